"""What is in a folder, but for what clocks and drawn names say, to compare it with another."""

import re
from pathlib import Path

# What a run may differ in from one that was not killed.
CLOCKS = re.compile(
    r'"(seconds|time|resumed|minutes_left|\w*runtime|\w*_per_second|total_flos|resume_from_checkpoint)": [^,}\n]+'
)
# The Trainer's means and sums since a run's last log, its start or its resumption.
WINDOWS = re.compile(r'"(loss|train_loss|entropy|mean_token_accuracy|(?:eval_)?num_tokens)": [^,}\n]+')


def photograph(folder: Path) -> dict[str, str]:
    """Every file below a folder and what is in it, but for what clocks and drawn names say.

    A round that was evaluated and then killed before its checkpoint leaves its scores under a name of their own when
    it is done again: they must be the same ones.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): _content(path) for path in files}
    for name in [name for name in found if ".superseded" in name]:
        assert found.pop(name) == found[name.split(".superseded")[0]], name
    return found


def _content(path: Path) -> str:
    if path.suffix == ".log":
        text = path.read_text(errors="replace")
        assert "Traceback" not in text, text[-3000:]
        return ""
    if path.suffix in (".svg", ".html") or path.name == "federated_state.json":
        return ""  # names in drawings are random; a state holds the checksums of files with clocks in them
    content = path.read_bytes()
    if path.suffix in (".png", ".safetensors"):
        return content.hex()
    text = CLOCKS.sub(r'"\1": 0', content.decode())
    return WINDOWS.sub(r'"\1": 0', text) if path.name == "trainer_state.json" else text


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Names of files that one of two folders lacks, or that differ."""
    return [f"{name}: {_told(found.get(name), expected.get(name))}" for name in sorted({*found, *expected})
            if found.get(name) != expected.get(name)]  # fmt: skip


def _told(found: str | None, expected: str | None) -> str:
    if found is None or expected is None:
        return "missing" if found is None else "too much"
    at = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), -40)
    return f"{found[max(0, at - 60) : at + 40]!r} in place of {expected[max(0, at - 60) : at + 40]!r}"
