"""What the server and its nodes must have in common, and how it is told when they have not."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..common.foreign_text import LONGEST_NAME, foreign_names, foreign_text, foreign_value
from ..config.arguments import ModelArguments
from ..config.decides import held_values, is_held, where
from ..config.federation import FederatedSketchConfig

# Of a model's configuration, what says nothing about which model it is.
_PASSING = {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache"}
_OWN = set(where([FederatedSketchConfig], lambda each: is_held(each) and each.at_node == "obeys"))
_LORA = where([ModelArguments], lambda each: str(each.entry).startswith(("lora", "adapted layers")))


@dataclass(frozen=True)
class Standing:
    """What a process would train with.

    Attributes:
        version: of fslora_hf.
        base: a hash of the base model's files; in which precision they are loaded is not part of it.
        tokenizer: a hash of the tokenizer and its chat template.
        configuration: the settings that decide what is computed.
    """

    version: str
    base: str
    tokenizer: str
    configuration: Mapping[str, Any]

    @classmethod
    def of(cls, args: FederatedSketchConfig, model_args: ModelArguments) -> "Standing":
        values = {name: value for name, value in held_values(args).items() if name in _OWN}
        values |= {name: getattr(model_args, name) for name in _LORA}
        values["examples a local step"] = args.per_device_train_batch_size * args.gradient_accumulation_steps
        values = json.loads(json.dumps(values, default=str))
        name, revision = model_args.model_name_or_path, model_args.model_revision
        base = digest_base(name, revision)
        # As it was published: a trainer may give one a token to pad with.
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
        return cls(version("fslora_hf"), base, digest_tokenizer(tokenizer), values)

    def to_header(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, node: Mapping[str, Any]) -> Iterator[str]:
        """A sentence for each thing in which a node's standing, as in its header, is another than this server's."""
        for name, what, remedy in (
            ("version", "fslora_hf", "install the server's on the node"),
            ("base", "the base model", "give the node the server's model"),
            ("tokenizer", "the tokenizer", "give the node the server's model folder"),
        ):
            if node.get(name) != getattr(self, name):
                yield (f"Expected {what} {_short(getattr(self, name))} as on the server, found "
                       f"{_short(node.get(name))}: {remedy}.")  # fmt: skip
        found = node.get("configuration")
        found = found if isinstance(found, Mapping) else {}
        for key in sorted(self.configuration):
            if self.configuration[key] != found.get(key):
                yield (f"Expected {key} {foreign_value(self.configuration[key])} as on the server, found "
                       f"{foreign_value(found.get(key))}: remove what sets it on the node.")  # fmt: skip
        surplus = found.keys() - self.configuration.keys()
        if surplus:
            yield (f"Expected the server's settings and no others, found {foreign_names(surplus)}: remove what sets "
                   "them on the node.")  # fmt: skip


def _short(value: Any) -> str:
    return foreign_text(value[:16]) if isinstance(value, str) else foreign_value(value, LONGEST_NAME)


def digest_base(model: str, revision: str = "main") -> str:
    """SHA-256 over a model's configuration and weight files, in hex.

    Args:
        model: a folder, or the name of a model on the Hub.

    Raises:
        OSError: there are no such files.
    """
    wanted = ["config.json", "*.safetensors"]
    here = model if Path(model).is_dir() else snapshot_download(model, revision=revision, allow_patterns=wanted)
    folder = Path(here)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(
        json.dumps({key: config[key] for key in sorted(config.keys() - _PASSING)}, sort_keys=True).encode()
    )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise OSError(f"Expected weights (*.safetensors) in {folder}, found none: name a folder that holds a model.")
    for path in files:
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def digest_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what a tokenizer does to text, in hex."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    # Truncation and padding are the caller's, and set while it works.
    rules = json.loads(rules)
    for passing in ("truncation", "padding"):
        rules.pop(passing, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps([rules, special, tokenizer.chat_template], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
