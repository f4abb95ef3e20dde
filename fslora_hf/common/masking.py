"""Secrets: what may be one by its name or by its looks, and how it is kept out of all that is said and written.

A token ends up where nobody meant it to be: under another key, in a list, in a line of a file that an error quotes.
Whatever of a user's stands in a sentence, a log, a card or a file of ours passes through here first.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "***"
_DEEPEST = 20  # levels of a value; no setting has more

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")  # of hub_token, hubToken and HF_TOKEN
_SECRET = re.compile(r"tok(?!eni[sz]).*|.*(token|secret|passw(or)?d|passphrase|pwd|credential|authori[sz]ation|key)s?")
_SPECIAL = {"pad", "eos", "bos", "unk", "sep", "cls", "mask", "image", "audio", "video", "special", "type"}
_COUNTING = set("num max min new average mean total count seen input output scored prompt completion per".split())
_OPAQUE = set("revision commit sha sha256 hash digest checksum".split())  # names of what is drawn and no secret

# What well-known services begin theirs with; but for words of the Hub's own library.
_PREFIXED = re.compile(
    r"\bhf_(?!(?:hub|xet|transfer|home|token|endpoint|datasets?|model)(?:_[a-z_]*)?\b)\w{6,}"
    r"|\b(?:gh[pousr]_|github_pat_|sk[-_](?:live_|test_|proj-|ant-)?|glpat-|xox[abprs]-|AIza)[\w-]{16,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{12,}|\beyJ[\w-]{8,}\.[\w-]{4,}(?:\.[\w-]*)?"
)
_USER_OF_URL = re.compile(r"(?<=://)[^\s/@'\"]+@")
_BEARER = re.compile(r"(?i)\b(bearer)\s+[\w.~+/=-]{12,}")
_LONG = re.compile(r"(?<![\w/@+=.-])[A-Za-z0-9_+/=-]{32,}(?![\w/.-])")
_VALUE = r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\[[^\]]*\]?|[^\s,;'"{}\[\]()]+)"""
_ASSIGNED = re.compile(r"""((?<![\w-])['"]?([A-Za-z_][\w.-]*)['"]?\s*[:=]\s*)""" + _VALUE)
_OPTION = re.compile(r"(--([A-Za-z][\w-]*)(?:=|\s+))" + _VALUE)


def is_secret_name(name: Any) -> bool:
    """Whether what stands under this name may be a secret: hub_token, api_key, password; not pad_token, num_tokens."""
    words = [word.lower() for word in _WORDS.findall(str(name)[:200])]
    if _SPECIAL & {*words} or (_COUNTING & {*words} and "tokens" in words):
        words = [word for word in words if not word.startswith("token")]
    return any(_SECRET.fullmatch(word) for word in words)


def scrub(text: str, mask: str = MASK) -> str:
    """A text without all that looks like a token, wherever it stands, and without the user of an address."""
    text = _PREFIXED.sub(mask, text)
    text = _BEARER.sub(rf"\1 {mask}", _USER_OF_URL.sub(f"{mask}@", text))
    return _LONG.sub(lambda match: mask if _is_opaque(match[0]) else match[0], text)


def scrub_quoted(text: str, mask: str = MASK) -> str:
    """A text that quotes a file, a command line or a value: without what stands beside a secret's name, too."""
    text = scrub(text, mask)
    for pattern in (_OPTION, _ASSIGNED):
        text = pattern.sub(lambda match: f"{match[1]}{mask}" if is_secret_name(match[2]) else match[0], text)
    return text


def mask(value: Any, name: Any = "") -> Any:
    """A value as it may be shown or written down: lists stay lists, mappings mappings, at any depth.

    What stands under a secret's name becomes that name in capitals, as transformers has it (`<HUB_TOKEN>`); a text
    that holds what looks like a token loses it.
    """
    return _masked(value, name, 0)


def find_secrets(value: Any, name: str = "") -> Iterator[str]:
    """The places, such as `model_init_kwargs.token`, where a value holds a secret by its name or its prefix."""
    if value is None or isinstance(value, bool) or value == "":
        return
    if is_secret_name(name.rpartition(".")[2]) or (isinstance(value, str) and _PREFIXED.search(value)):
        yield scrub(name)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from find_secrets(each, f"{name}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)) and any(isinstance(each, (str, list, tuple, Mapping)) for each in value):
        for each in value:
            yield from find_secrets(each, name)


def _masked(value: Any, name: Any, level: int) -> Any:
    if value is None or isinstance(value, bool) or value == "":
        return value
    if name != "" and is_secret_name(name):
        is_placeholder = isinstance(value, str) and re.fullmatch(r"<[A-Z_]+>", value)
        return value if is_placeholder else f"<{scrub(str(name)).upper()}>"
    if isinstance(value, str):
        is_drawn = _OPAQUE & {word.lower() for word in _WORDS.findall(str(name)[:200])}
        return _PREFIXED.sub(MASK, value) if is_drawn else scrub_quoted(value)
    if not isinstance(value, (Mapping, list, tuple)):
        return value
    if level == _DEEPEST:
        return "..."
    if isinstance(value, Mapping):
        named = {scrub(key) if isinstance(key, str) else key: key for key in value}
        return {shown: _masked(value[key], key, level + 1) for shown, key in named.items()}
    return [_masked(each, "", level + 1) for each in value]


def _is_opaque(word: str) -> bool:
    """Whether a long word holds what was drawn at random: no name, no path, no number."""
    if re.fullmatch("[0-9a-fA-F]+", word):
        return bool(re.search("[0-9]", word) and re.search("[a-fA-F]", word))
    return not word.startswith("/") and any(_is_drawn(run) for run in re.findall("[A-Za-z0-9]{12,}", word))


def _is_drawn(run: str) -> bool:
    """Whether capitals, small letters and digits alternate as in no word of words."""
    kinds = ["0" if character.isdigit() else "A" if character.isupper() else "a" for character in run]
    changes = sum(one != two for one, two in zip(kinds, kinds[1:], strict=False)) / (len(run) - 1)
    return kinds.count("0") >= 2 and changes >= (0.35 if len({*kinds}) == 3 else 0.25)
