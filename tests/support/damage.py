"""Damaged variants of files, for fuzz tests: pure functions of (content, seed, number), thousands a second.

`damaged(name, content, seed, number)` picks the kinds by the file's ending; consecutive numbers go through all kinds.
"""

import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

DEEP = 10_000  # more levels than any parser follows
_MARK = "\x01mark\x01"
# As they stand in a file, some of them no JSON that a strict reader takes.
ODD_VALUES = (
    "null",
    "true",
    "false",
    "0",
    "-1",
    "-5",
    "1.5",
    "-0.0",
    str(10**9),
    str(2**63),
    str(-(10**30)),
    "1" + "0" * 400,
    "1" * 5000,  # more digits than Python turns into a number
    "1e400",
    "NaN",
    "Infinity",
    "-Infinity",
    '""',
    '"4"',
    '"text"',
    '"two\\nlines \\u001b[31mred\\u0000"',
    '"\\ud800"',
    '"../../outside"',
    '"/absolute"',
    json.dumps("long" * 5000),
    "[]",
    "[null]",
    "[1, [2], {}]",
    "{}",
    '{"a": 1}',
    "[" * DEEP + "]" * DEEP,
    '{"a":' * DEEP + "1" + "}" * DEEP,
)


class Damage(NamedTuple):
    """A damaged file and how it was damaged."""

    how: str
    content: bytes


def damaged(name: str, content: bytes, seed: int, number: int) -> Damage:
    """The variant `number` of a file: `.safetensors`, `.jsonl`, or else JSON."""
    ending = name.rsplit(".", 1)[-1]
    return {"safetensors": damaged_tensors, "jsonl": damaged_lines}.get(ending, damaged_json)(content, seed, number)


def variants(name: str, content: bytes, seed: int, count: int) -> Iterator[Damage]:
    """The first `count` variants of a file."""
    return (damaged(name, content, seed, number) for number in range(count))


def damaged_json(content: bytes, seed: int, number: int) -> Damage:
    """A variant of a JSON file: of its bytes, of its keys, or of its values."""
    return _pick(_BYTES | _JSON, content, seed, number)


def damaged_lines(content: bytes, seed: int, number: int) -> Damage:
    """A variant of a file with one JSON object a line: of its bytes, of its lines, or of what is in one line."""
    return _pick(_BYTES | _LINES, content, seed, number)


def damaged_tensors(content: bytes, seed: int, number: int) -> Damage:
    """A variant of a safetensors file: of its bytes, of what its header claims, or a whole file of other tensors."""
    return _pick(_BYTES | _CLAIMS | _TENSORS, content, seed, number)


def _pick(kinds: dict[str, Callable], content: bytes, seed: int, number: int) -> Damage:
    draw = random.Random(f"{seed}/{number}")
    how = [*kinds][number % len(kinds)]
    changed = kinds[how](content, draw)
    return Damage(f"{how}, seed {seed}, number {number}", changed)


# ---- Bytes of any file ----


def _flip(content: bytes, draw: random.Random, bits: int = 1, first: int = 0, end: int | None = None) -> bytes:
    changed = bytearray(content)
    end = len(changed) if end is None else end
    for _ in range(bits if end > first else 0):
        changed[draw.randrange(first, end)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _put(content: bytes, draw: random.Random, inserted: bytes) -> bytes:
    place = draw.randrange(len(content) + 1)
    return content[:place] + inserted + content[place:]


_BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a flipped bit": _flip,
    "flipped bits": lambda content, draw: _flip(content, draw, draw.randint(2, 64)),
    "truncated": lambda content, draw: content[: draw.randrange(len(content) or 1)],
    "the last byte missing": lambda content, draw: content[:-1],
    "empty": lambda content, draw: b"",
    "all NUL": lambda content, draw: bytes(len(content)),
    "NUL bytes in it": lambda content, draw: _put(content, draw, bytes(draw.randint(1, 9))),
    "the end all NUL": lambda content, draw: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    "not UTF-8": lambda content, draw: _put(content, draw, b"\xff\xfe\x80"),
    "twice": lambda content, draw: content + content,
    "something behind it": lambda content, draw: content + draw.randbytes(draw.randint(1, 20)),
    "something before it": lambda content, draw: draw.choice([b"\xef\xbb\xbf", b" ", b"#", b"\x00"]) + content,
}


# ---- JSON ----


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, each in inner for place in [(*path, key), *_places(each, (*path, key))]]


def _holder(document: Any, path: tuple) -> Any:
    for key in path[:-1]:
        document = document[key]
    return document


def _dump(document: Any, raw: str = "") -> bytes:
    """JSON text, the marked place replaced by `raw`."""
    return json.dumps(document).replace(json.dumps(_MARK), raw).encode("utf-8", "surrogatepass")


def _in_document(change: Callable[[Any, tuple, random.Random], bytes]) -> Callable[[bytes, random.Random], bytes]:
    """A change of a parsed file at one of its places."""

    def apply(content: bytes, draw: random.Random) -> bytes:
        document = json.loads(content)
        places = _places(document)
        return change(document, draw.choice(places), draw) if places else draw.choice(ODD_VALUES).encode()

    return apply


def _in_key(change: Callable[[dict, str, random.Random], str]) -> Callable[[bytes, random.Random], bytes]:
    """A change of one key of one object: `change` edits the object and says what to write at the mark."""

    def apply(content: bytes, draw: random.Random) -> bytes:
        document = json.loads(content)
        places = [place for place in _places(document) if isinstance(place[-1], str)]
        if not places:
            return b"{}"
        place = draw.choice(places)
        return _dump(document, change(_holder(document, place), place[-1], draw))

    return apply


def _odd_value(document: Any, path: tuple, draw: random.Random) -> bytes:
    _holder(document, path)[path[-1]] = _MARK
    return _dump(document, draw.choice(ODD_VALUES))


def _near_value(document: Any, path: tuple, draw: random.Random) -> bytes:
    """Another value of the same type: what no reader can tell from sound without comparing."""
    holder, value = _holder(document, path), _holder(document, path)[path[-1]]
    if isinstance(value, bool):
        holder[path[-1]] = not value
    elif isinstance(value, (int, float)):
        holder[path[-1]] = value + draw.choice([-1, 1, 10])
    elif isinstance(value, str):
        holder[path[-1]] = value[:-1] if value and draw.random() < 0.5 else value + "0"
    elif isinstance(value, list):
        holder[path[-1]] = value[:-1] if value and draw.random() < 0.5 else [*value, *value[:1]]
    else:
        holder[path[-1]] = None
    return _dump(document)


def _swapped_values(document: Any, path: tuple, draw: random.Random) -> bytes:
    other = draw.choice(_places(document))
    if path[: len(other)] == other or other[: len(path)] == path:  # one inside the other
        return _odd_value(document, path, draw)
    one, two = _holder(document, path), _holder(document, other)
    one[path[-1]], two[other[-1]] = two[other[-1]], one[path[-1]]
    return _dump(document)


def _delete_key(holder: dict, key: str, draw: random.Random) -> str:
    del holder[key]
    return ""


def _rename_key(holder: dict, key: str, draw: random.Random) -> str:
    holder[draw.choice([key + "_", key.upper(), "", "../" + key, "\x1b[31m" + key])] = holder.pop(key)
    return ""


def _double_key(holder: dict, key: str, draw: random.Random) -> str:
    holder[_MARK] = draw.choice([1, "other", [], None])  # last wins in Python's reader
    return json.dumps(key)


def _add_key(holder: dict, key: str, draw: random.Random) -> str:
    holder[draw.choice(["unknown", "__class__", "__dict__", "self"])] = _MARK
    return draw.choice(ODD_VALUES)


_JSON = {
    "a value of another kind": _in_document(_odd_value),
    "another value": _in_document(_near_value),
    "values swapped": _in_document(_swapped_values),
    "a key missing": _in_key(_delete_key),
    "a key renamed": _in_key(_rename_key),
    "a key twice": _in_key(_double_key),
    "a key too many": _in_key(_add_key),
    "all of it another value": lambda content, draw: draw.choice(ODD_VALUES).encode(),
    "of another encoding": lambda content, draw: content.decode().encode(draw.choice(["utf-16", "utf-32", "cp037"])),
    "no double quotes": lambda content, draw: content.replace(b'"', b"'"),
}


# ---- Lines ----


def _in_lines(change: Callable[[list[bytes], int, random.Random], None]) -> Callable[[bytes, random.Random], bytes]:
    def apply(content: bytes, draw: random.Random) -> bytes:
        lines = content.splitlines(keepends=True)
        if lines:
            change(lines, draw.randrange(len(lines)), draw)
        return b"".join(lines)

    return apply


def _remove(lines: list[bytes], place: int, draw: random.Random) -> None:
    del lines[place]


def _double(lines: list[bytes], place: int, draw: random.Random) -> None:
    lines.insert(draw.randrange(len(lines) + 1), lines[place])


def _swap(lines: list[bytes], place: int, draw: random.Random) -> None:
    other = draw.randrange(len(lines))
    lines[place], lines[other] = lines[other], lines[place]


def _spoil(lines: list[bytes], place: int, draw: random.Random) -> None:
    kinds = _BYTES | _JSON
    body = lines[place].rstrip(b"\n")
    lines[place] = kinds[draw.choice([*kinds])](body, draw) + b"\n"


def _insert(lines: list[bytes], place: int, draw: random.Random) -> None:
    lines.insert(place, draw.choice([b"\n", b"{}\n", b"null\n", b"[]\n", b"garbage\n", b'{"round": -1}\n', b"\x00\n"]))


def _join(lines: list[bytes], place: int, draw: random.Random) -> None:
    lines[place] = lines[place].rstrip(b"\n")


def _other_ends(lines: list[bytes], place: int, draw: random.Random) -> None:
    lines[:] = [line.rstrip(b"\n") + draw.choice([b"\r\n", b"\r"]) for line in lines]


def _shuffle(lines: list[bytes], place: int, draw: random.Random) -> None:
    draw.shuffle(lines)


_LINES = {
    "a line missing": _in_lines(_remove),
    "a line twice": _in_lines(_double),
    "lines swapped": _in_lines(_swap),
    "a line damaged": _in_lines(_spoil),
    "a line too many": _in_lines(_insert),
    "lines joined": _in_lines(_join),
    "other line ends": _in_lines(_other_ends),
    "lines shuffled": _in_lines(_shuffle),
}


# ---- Safetensors ----

_BYTES_OF = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_NOT_FINITE = {  # NaN and infinity, little endian
    "F64": (b"\0\0\0\0\0\0\xf8\x7f", b"\0\0\0\0\0\0\xf0\x7f"),
    "F32": (b"\0\0\xc0\x7f", b"\0\0\x80\x7f"),
    "F16": (b"\0\x7e", b"\0\x7c"),
    "BF16": (b"\xc0\x7f", b"\x80\x7f"),
}
_Tensors = dict[str, tuple[str, list[int], bytes]]  # name -> type, shape, bytes


def unpack(content: bytes) -> tuple[dict, _Tensors]:
    """Metadata and tensors of a whole safetensors file."""
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    metadata = header.pop("__metadata__", {})
    return metadata, {
        name: (each["dtype"], each["shape"], data[slice(*each["data_offsets"])]) for name, each in header.items()
    }


def pack(metadata: dict, tensors: _Tensors) -> bytes:
    """A whole safetensors file, which every reader takes."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header, separators=(",", ":")).encode()  # as safetensors writes it
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _in_tensor(change: Callable[[_Tensors, str, random.Random], None]) -> Callable[[bytes, random.Random], bytes]:
    """A whole file in which one tensor is another."""

    def apply(content: bytes, draw: random.Random) -> bytes:
        metadata, tensors = unpack(content)
        change(tensors, draw.choice([*tensors]) if tensors else "", draw)
        return pack(metadata, tensors)

    return apply


def _of_all_tensors(change: Callable[[_Tensors, str, random.Random], None]) -> Callable:
    def apply(tensors: _Tensors, _: str, draw: random.Random) -> None:
        for name in [*tensors]:
            change(tensors, name, draw)

    return _in_tensor(apply)


def _other_shape(tensors: _Tensors, name: str, draw: random.Random) -> None:
    """Transposed, flat, with an axis more, one row, one value, twice as long, or empty."""
    if not name:
        return
    dtype, shape, data = tensors[name]
    size = _BYTES_OF[dtype]
    row = math.prod(shape[1:]) * size
    tensors[name] = draw.choice(
        [
            (dtype, shape[::-1], data),
            (dtype, [math.prod(shape)], data),
            (dtype, [1, *shape], data),
            (dtype, [*shape, 1], data),
            (dtype, [1, *shape[1:]], data[:row]),
            (dtype, [1] * len(shape), data[:size]),
            (dtype, [], data[:size]),
            (dtype, [2 * (shape or [1])[0], *shape[1:]], data + data),
            (dtype, [0, *shape[1:]], b""),
        ]
    )


def _other_type(tensors: _Tensors, name: str, draw: random.Random) -> None:
    if not name:
        return
    dtype, shape, data = tensors[name]
    other = draw.choice([kind for kind in _BYTES_OF if kind != dtype])
    wanted = math.prod(shape) * _BYTES_OF[other]
    content = (data * (wanted // max(len(data), 1) + 1))[:wanted] if draw.random() < 0.5 else bytes(wanted)
    tensors[name] = other, shape, bytes(byte & 1 for byte in content) if other == "BOOL" else content


def _not_finite(tensors: _Tensors, name: str, draw: random.Random) -> None:
    dtype, shape, data = tensors.get(name, ("", [], b""))
    if dtype in _NOT_FINITE and data:
        value, place = draw.choice(_NOT_FINITE[dtype]), draw.randrange(len(data) // _BYTES_OF[dtype])
        start = place * len(value)
        tensors[name] = dtype, shape, data[:start] + value + data[start + len(value) :]


def _missing(tensors: _Tensors, name: str, draw: random.Random) -> None:
    tensors.pop(name, None)


def _extra(tensors: _Tensors, name: str, draw: random.Random) -> None:
    added = draw.choice(["unknown", name + ".copy", "", "no_dot", "a.b.c", "\x1b[31mred\n", name.upper() + "."])
    tensors[added] = tensors.get(name, ("F32", [1], bytes(4)))


def _renamed(tensors: _Tensors, name: str, draw: random.Random) -> None:
    if name in tensors:
        tensors[draw.choice([name + "_", name[1:], "x" + name, name.replace(".", "")])] = tensors.pop(name)


def _exchanged(tensors: _Tensors, name: str, draw: random.Random) -> None:
    """Two tensors under each other's name: of the same shape, what no reader can tell."""
    if name:
        other = draw.choice([*tensors])
        tensors[name], tensors[other] = tensors[other], tensors[name]


_TENSORS = {
    "a tensor of another shape": _in_tensor(_other_shape),
    "all tensors of other shapes": _of_all_tensors(_other_shape),
    "a tensor of another type": _in_tensor(_other_type),
    "all tensors of other types": _of_all_tensors(_other_type),
    "a value not finite": _in_tensor(_not_finite),
    "a tensor missing": _in_tensor(_missing),
    "all tensors missing": _of_all_tensors(_missing),
    "a tensor too many": _in_tensor(_extra),
    "a tensor renamed": _in_tensor(_renamed),
    "tensors exchanged": _in_tensor(_exchanged),
}


def _header_size(content: bytes) -> int:
    return min(8 + struct.unpack("<Q", content[:8])[0], len(content))


def _in_header(change: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, random.Random], bytes]:
    """The header's text changed, the data left."""

    def apply(content: bytes, draw: random.Random) -> bytes:
        end = _header_size(content)
        text = change(content[8:end].rstrip(), draw)
        return struct.pack("<Q", len(text)) + text + content[end:]

    return apply


def _lying_length(content: bytes, draw: random.Random) -> bytes:
    size = struct.unpack("<Q", content[:8])[0]
    lie = draw.choice([0, 1, size - 1, size + 1, size + 8, len(content), 2**31, 2**63, 2**64 - 1])
    return struct.pack("<Q", lie) + content[8:]


def _flip_header(content: bytes, draw: random.Random) -> bytes:
    return _flip(content, draw, draw.randint(1, 3), 8, _header_size(content))


def _flip_data(content: bytes, draw: random.Random) -> bytes:
    return _flip(content, draw, draw.randint(1, 3), _header_size(content))


_CLAIMS = {
    "bits flipped in the header": _flip_header,
    "bits flipped in the data": _flip_data,
    "a header of another length": _lying_length,
    "a claim of another kind": _in_header(_in_document(_odd_value)),
    "another claim": _in_header(_in_document(_near_value)),
    "a claim missing": _in_header(_in_key(_delete_key)),
    "a claim twice": _in_header(_in_key(_double_key)),
    "no header": _in_header(lambda content, draw: draw.choice(ODD_VALUES).encode()),
}
