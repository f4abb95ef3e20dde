"""Which settings of a recipe a node obeys. What nothing is said of it refuses, also what a later version will add.

A recipe comes from whoever starts a run. Of its settings a node obeys those that decide what is computed and can do no
harm, takes no notice of those that are the server's business or the node's own, and refuses the rest, which its owner
can allow with `--trust_code`. docs/federation.md shows the same as a table.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

from transformers import PretrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from ..common.foreign_text import foreign_names, foreign_text, foreign_value
from ..common.masking import find_secrets, is_secret_name, mask
from ..common.settings import default_of
from ..config.arguments import ModelArguments, RecipeArguments
from ..config.decides import where
from ..config.federation import FederatedSketchConfig
from ..trainers.checks import raise_together

logger = logging.getLogger(__name__)

RECIPE_TYPES = (RecipeArguments, FederatedSketchConfig, ModelArguments)

# As the fields themselves say, or the table of those that are not ours (config/decides.py).
OBEYED = where(RECIPE_TYPES, lambda each: each.at_node == "obeys")
IGNORED = where(RECIPE_TYPES, lambda each: each.at_node == "ignores")

# Why, of those that are refused; the rest has the general reason.
_WHY = {
    "trust_remote_code": "it runs code that comes with the model",
    "chat_template_path": "it reads a file of this machine or loads another model",
    "accelerator_config": "it can name a file of this machine",
    "fsdp_config": "it can name a file of this machine",
    "deepspeed": "it can name a file of this machine",
}
_UNKNOWN = "it is not among the settings that a node obeys"

_DTYPES = {"auto", "float64", "float32", "bfloat16", "float16"}
# Ways of attention that are part of torch, and those for which a package must be there: else transformers fetches
# code from the Hub in its place.
_ATTENTION = {"eager": None, "sdpa": None, "flex_attention": None, "flash_attention_2": "flash_attn",
              "flash_attention_3": "flash_attn_interface"}  # fmt: skip


def told_to_nodes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a recipe's settings what nodes are told: none that they would not read, and no secret."""
    told = {name: _opened(value) for name, value in values.items() if name not in IGNORED}
    secrets = sorted({*find_secrets(told)})
    if secrets:
        logger.warning("Nodes are not told %s: it looks like a secret, of which each node has its own.",
                       foreign_names(secrets))  # fmt: skip
    return _without_secrets(told)


def obeyed(values: Mapping[str, Any], trusts_code: bool = False) -> dict[str, Any]:
    """Of the settings that came over the wire those that a node goes by.

    Raises:
        ValueError: one sentence for each that it refuses; with `trusts_code` it refuses none.
    """
    kept = {name: value for name, value in values.items() if name not in IGNORED}
    if trusts_code:
        return kept
    raise_together(refusals(kept))
    return kept | {"model_init_kwargs": {**_mapping(kept.get("model_init_kwargs")), "use_safetensors": True}}


def refusals(values: Mapping[str, Any]) -> Iterator[str]:
    """What a node does not do for a recipe, a sentence each; nothing about settings left at their default."""
    defaults = {each.name: default_of(each) for kind in RECIPE_TYPES for each in fields(kind) if each.init}
    for name, value in values.items():
        if name in IGNORED or (name in defaults and _same(value, defaults[name])):
            continue
        if name not in OBEYED:
            yield _refusal(name, value, _WHY.get(name, _UNKNOWN))
        elif name in _CHECKS:
            yield from _CHECKS[name](name, value)


def model_refusals(model: str, revision: str) -> Iterator[str]:
    """What a node does not do for what comes with a model beside its weights, a sentence each.

    Raises:
        OSError: there is none.
    """
    configuration, _ = PretrainedConfig.get_config_dict(model, revision=revision)
    if find_adapter_config_file(model, revision=revision) is not None:
        yield _refusal("an adapter beside the model's config.json", "adapter_config.json",
                       "the model that it names would be loaded in place of this one")  # fmt: skip
    for name, value in _implementations(configuration):
        if not isinstance(value, str) or "/" in value or value.startswith("flash"):
            yield from _attention(f"{name} in the model's config.json", value)


def _implementations(configuration: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every key of a nested configuration that says by which code something is done."""
    if depth > 20 or not isinstance(configuration, Mapping):
        return
    for name, value in configuration.items():
        if "_implementation" in str(name) and value is not None:
            yield str(name), value
        else:
            yield from _implementations(value, depth + 1)


def _refusal(name: str, value: Any, why: str) -> str:
    found = foreign_value(mask(value, name.rpartition(".")[2]))
    return (f"Expected a recipe without {foreign_text(name)}, found {found}: {why}; start the node with --trust_code "
            "if you trust whoever starts runs, or remove it.")  # fmt: skip


def _same(value: Any, default: Any) -> bool:
    """Whether a setting is left at its default, or turned off where that is the default."""
    return (type(value) is type(default) and value == default) or (not value and not default)


def _mapping(value: Any) -> Mapping[str, Any]:
    """A setting that is a mapping, or a text of one, as on a command line; of nothing, an empty one.

    Raises:
        ValueError: it is neither.
    """
    found = json.loads(value) if isinstance(value, str) and value else value or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"Expected a mapping, found {foreign_value(value)}.")
    return found


def _method(name: str, value: Any) -> Iterator[str]:
    if ":" in str(value):
        yield _refusal(name, value, "it names code in a file")


def _attention(name: str, value: Any) -> Iterator[str]:
    if value is None or (isinstance(value, str) and value in _ATTENTION):
        package = _ATTENTION.get(value)
        if package is None or find_spec(package) is not None:
            return
        why = f"without the package {package}, code of the Hub would be fetched in its place"
    else:
        why = f"it is none of {', '.join(_ATTENTION)}, and may be code of the Hub"
    yield _refusal(name, value, why)


def _dtype(name: str, value: Any) -> Iterator[str]:
    if value is not None and not (isinstance(value, str) and value in _DTYPES):
        yield _refusal(name, value, f"it is none of {', '.join(sorted(_DTYPES))}")


def _device_map(name: str, value: Any) -> Iterator[str]:
    places = [*value.keys(), *value.values()] if isinstance(value, Mapping) else [value]
    if not all(isinstance(place, int) or (isinstance(place, str) and "disk" not in place) for place in places):
        yield _refusal(name, value, "it may have weights written to this machine's disk")


def _on(name: str, value: Any) -> Iterator[str]:
    if value is not True:
        yield _refusal(name, value, "weights of other formats than safetensors may hold code")


def _plain(name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, (bool, int, float, str, type(None))):
        yield _refusal(name, value, "it is not a plain value")


def _with_keys(allowed: Mapping[str, Callable[[str, Any], Iterator[str]]]) -> Callable[[str, Any], Iterator[str]]:
    """A check of a mapping that may hold these keys and no others."""

    def check(name: str, value: Any) -> Iterator[str]:
        try:
            found = _mapping(value)
        except ValueError:
            yield _refusal(name, value, "it is not a mapping")
            return
        for key, each in found.items():
            path = f"{name}.{key}"
            if key in allowed:
                yield from allowed[key](path, each)
            else:
                yield _refusal(path, each, f"of {name} a node obeys only {', '.join(allowed)}")

    return check


# The harmless keys of `from_pretrained`: no other files, folders, tokens, kernels or formats.
MODEL_KEYS = {"attn_implementation": _attention, "dtype": _dtype, "torch_dtype": _dtype, "device_map": _device_map,
              "low_cpu_mem_usage": _plain, "use_cache": _plain, "use_safetensors": _on}  # fmt: skip
_CHECKPOINTING = _with_keys({"use_reentrant": _plain, "preserve_rng_state": _plain})
_CHECKS = {
    "method": _method,
    "attn_implementation": _attention,
    "dtype": _dtype,
    "model_init_kwargs": _with_keys(MODEL_KEYS),
    "dataset_kwargs": _with_keys({"add_special_tokens": _plain, "skip_prepare_dataset": _plain}),
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
}


def _opened(value: Any) -> Any:
    """A mapping in place of a text of one, as on a command line, whose keys tell of secrets; all else as it is."""
    try:
        found = _mapping(value) if isinstance(value, str) else {}
    except (ValueError, RecursionError):
        return value
    return found if any(find_secrets(found)) else value


def _without_secrets(value: Any) -> Any:
    """A value without what stands under a secret's name or begins as a well-known token does."""
    if isinstance(value, Mapping):
        return {key: _without_secrets(each) for key, each in value.items() if not _is_secret(key, each)}
    if isinstance(value, (list, tuple)):
        return [_without_secrets(each) for each in value if not _is_secret("", each)]
    return value


def _is_secret(name: Any, value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return False
    return is_secret_name(name) or (isinstance(value, str) and next(find_secrets(value), None) is not None)
