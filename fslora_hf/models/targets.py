"""Which layers of a model can be adapted: those through which every token of a text passes, in order.

An expert sees the tokens that are routed to it, a vision tower none of a text; and what PEFT adapts as a bare
parameter (`target_parameters`, into which it turns the names of experts and routers) is no layer at all. A stack of
clients cannot compute with any of these, and what no token passes through is never trained.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .adapter import lora_layers
from .quantized import check_as_stored, keep_as_stored

_PEFT_ERRORS = (
    "Target module",
    "Cannot convert PEFT target",
    "lora.ParamWrapper",
    "No modules were targeted",
    "All modules were excluded",
    "No `target_modules`",
)


@contextmanager
def unmatched_targets_told(model: str | PreTrainedModel) -> Iterator[None]:
    """PEFT's errors about target modules, in the form of the others and with the names that `model` has."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(_PEFT_ERRORS):
            raise
        raise ValueError(
            f"Expected target_modules to match linear layers of the model, found none or others ({error}): "
            f"{_name_some(_outline(model))}."
        ) from error


def check_targets(model: PeftModel, adapter_name: str = "default") -> Iterator[str]:
    """Problems of the layers that the adapter's target modules matched: none, bare parameters, or layers that do not
    see every token."""
    base, layers = model.get_base_model(), lora_layers(model, adapter_name)
    parameters = [f"{name} ({layer.parameter_name})" for name, layer in layers.items() if _is_parameter(layer)]
    if parameters:
        yield (
            f"Expected target_modules of linear layers, found {_some(parameters)}, which PEFT adapts as bare "
            f"parameters and a stack of clients cannot train: {_name_some(base)}."
        )
    elif not layers:
        yield f"Expected target_modules to match linear layers, found none: {_name_some(base)}."
    else:
        yield from _check_names(model.peft_config[adapter_name], base, layers)
        yield from _check_seen(base, layers)


def _check_names(lora: LoraConfig, base: nn.Module, layers: dict[str, LoraLayer]) -> Iterator[str]:
    """Names of which no layer is adapted, unless it is because they are excluded."""
    modules = [name for name, _ in base.named_modules()]
    for target in [] if isinstance(lora.target_modules, str) else sorted(lora.target_modules):
        meant = [name for name in modules if _ends_with(name, target)]
        if not any(name in layers or _is_excluded(lora, name) for name in meant):
            yield f"Expected every name in target_modules to match a layer, found none for {target!r}: correct it."


def _check_seen(base: PreTrainedModel, layers: dict[str, LoraLayer]) -> Iterator[str]:
    seen = layers_seeing_all(base)
    unseen = [] if seen is None else [name for name in layers if name not in seen]
    if unseen:
        parts = {part for name in layers if name in seen for part in name.split(".")}
        foreign = [next((part for part in name.split(".") if part not in parts), None) for name in unseen]
        pattern = "|".join(sorted({part for part in foreign if part is not None}))
        remedy = _name_some(base) if None in foreign else f"set exclude_modules='.*({pattern}).*' in the peft_config"
        yield (
            f"Expected targeted layers that every token of a text passes through, in order, found {_some(unseen)}, "
            f"which see others or none and would not be trained for all clients: {remedy}."
        )


@torch.no_grad()
def layers_seeing_all(base: PreTrainedModel) -> set[str] | None:
    """Names of the model's linear and adapted layers that see every token of a batch whenever they are called, found
    by trying with a few tokens; None if the model does not run on tokens alone, or not any more."""
    if any(check_as_stored(base)):  # which cannot be computed with
        return None
    keep_as_stored(base)  # which trying in evaluation mode could change for good
    rows = torch.arange(12, device=base.get_input_embeddings().weight.device).view(2, 6)
    rows = rows % base.get_input_embeddings().weight.shape[0]
    seen: dict[str, bool] = {}

    def note(name: str, x: torch.Tensor) -> None:
        seen[name] = seen.get(name, True) and x.shape[:-1].numel() == rows.numel()

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]) if inputs else None)
        for name, layer in _plain_layers(base).items()
    ]
    was_training = base.training
    base.eval()
    try:
        base.base_model(input_ids=rows, use_cache=False)
    except (TypeError, ValueError):
        return None
    finally:
        base.train(was_training)
        for hook in hooks:
            hook.remove()
    return {name for name, all_tokens in seen.items() if all_tokens}


def working_names(base: PreTrainedModel) -> list[str]:
    """Names for `target_modules` all of whose layers can be adapted in this model."""
    on_meta = any(parameter.is_meta for parameter in base.parameters())  # where routing cannot be tried
    seen, head = None if on_meta else layers_seeing_all(base), base.get_output_embeddings()
    layers = {name: layer for name, layer in _plain_layers(base).items() if layer is not head}
    good = {name: name.rpartition(".")[2] for name in layers if seen is None or name in seen}
    names = set(good.values()) - {name.rpartition(".")[2] for name in layers if name not in good}
    return sorted(name for name in names if _stays_a_module(name, base))


def _plain_layers(base: nn.Module) -> dict[str, nn.Module]:
    """Linear layers, and whatever else is adapted, by the name each had before PEFT wrapped it."""
    layers = {}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and not _is_parameter(module):
            layers[name] = module.get_base_layer()
        elif isinstance(module, nn.Linear) and ".lora_" not in name and not name.endswith(".base_layer"):
            layers[name] = module
    return layers


def _stays_a_module(name: str, base: PreTrainedModel) -> bool:
    """Whether PEFT takes a name for what it is, and not for experts or routers that are parameters now."""
    lora = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(lora, base, conversions=None)
    except ValueError:  # one of several that only go together
        return False
    return not lora.target_parameters


def _outline(model: str | PreTrainedModel) -> PreTrainedModel | None:
    """A model without its weights, None if it cannot be had by its configuration alone."""
    if not isinstance(model, str):
        return model
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)  # else it may ask at the terminal
        with torch.device("meta"):
            return getattr(transformers, config.architectures[0])(config)
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _name_some(base: PreTrainedModel | None) -> str:
    names = [] if base is None else working_names(base)
    return f"name some of {', '.join(names)} in target_modules" if names else "name linear layers of this model"


def _is_parameter(layer: LoraLayer) -> bool:
    return isinstance(layer, ParamWrapper)


def _is_excluded(lora: LoraConfig, name: str) -> bool:
    excluded = lora.exclude_modules or ()
    if isinstance(excluded, str):
        return re.fullmatch(excluded, name) is not None
    return any(_ends_with(name, each) for each in excluded)


def _ends_with(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
