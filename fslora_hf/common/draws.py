"""Random draws as pure functions of a path such as ``(seed, "sketch", round, client, module)``.

Nothing in a federated run is read from a running stream: the same path gives the same numbers on any machine, in any
process, in any order, for ever. SHAKE-256 of the path is the source, so the numbers do not depend on the version of a
numerical library, and a longer draw from a path begins with the shorter one.
"""

import hashlib
import struct

import numpy as np


def uniforms(n: int, *path: int | str) -> np.ndarray:
    """`n` floats in [0, 1) with 53 random bits each, a pure function of `path` (float64 array `[n]`)."""
    return (_bits(n, path) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def seed_from(*path: int | str) -> int:
    """A seed below 2**63 for a library's own generator, a pure function of `path`."""
    return int(_bits(1, path)[0] >> np.uint64(1))


def permutation_prefix(n: int, m: int, *path: int | str) -> np.ndarray:
    """The first `m` entries of a uniformly random permutation of `range(n)` (int64 array `[m]`).

    A Fisher-Yates shuffle that remembers only what it moved: it costs `m` in time and memory, whatever `n` is, so that
    a hundred clients of a million, k rows of r, and twenty examples of a shard all come from here.
    """
    if not 0 <= m <= n:
        raise ValueError(f"Expected a prefix of length 0 to {n}, found {m}.")
    moved: dict[int, int] = {}
    prefix = []
    # Plain numbers, and not arrays, whose set-up would cost more than the few entries of a small shard.
    for i, word in enumerate(struct.unpack(f"<{m}Q", _digest(m, path))):
        j = i + int((word >> 11) * 2.0**-53 * (n - i))
        prefix.append(moved.get(j, j))
        moved[j] = moved.pop(i, i)
    return np.array(prefix, dtype=np.int64)


def _bits(n: int, path: tuple[int | str, ...]) -> np.ndarray:
    """`n` random 64-bit words (uint64 array)."""
    return np.frombuffer(_digest(n, path), dtype="<u8")


def _digest(n: int, path: tuple[int | str, ...]) -> bytes:
    """`n` random 64-bit words. Integers of any width (also numpy's) name the same path."""
    key = "/".join(part if isinstance(part, str) else str(int(part)) for part in path)
    return hashlib.shake_256(key.encode()).digest(8 * n)


def normals(n: int, *path: int | str) -> np.ndarray:
    """`n` standard normal draws by Box and Muller, a pure function of `path` (float64 array `[n]`).

    Draw i uses the uniforms 2i and 2i + 1 of the path, so that a longer array begins with the shorter one.
    """
    radius, angle = uniforms(2 * n, *path).reshape(n, 2).T
    return np.sqrt(-2.0 * np.log1p(-radius)) * np.cos(2.0 * np.pi * angle)
