"""What is checked of the adapter: its configuration before a model is loaded, its layers once there is one."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from torch import nn

from ..methods import method_class
from .adapter import global_pair, lora_layers
from .description import quantization_of
from .targets import check_targets


def check_fold(method: str, quantized: bool) -> Iterator[str]:
    """Problems of a base model that the method is to change."""
    if quantized and method_class(method).folds:
        yield (
            f"Expected an unquantized base with method={method}, which folds what is learned into its weights, found "
            "a quantized one: load it without quantization, or use method=flora_residual."
        )


def _check_folded_layers(model: PeftModel, layers: dict[str, LoraLayer]) -> Iterator[str]:
    """Weights that are also used elsewhere, where nothing is to change."""
    base = model.get_base_model()
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        used = names[id(layer.get_base_layer().weight)]
        if len(used) > 1:
            yield (
                f"Expected a weight of its own in {name}, which shall be changed, found it shared by "
                f"{' and '.join(used)}: leave it out of target_modules, or use method=flora_residual."
            )


def check_layers(model: PeftModel, aux_loss: bool, method: str) -> Iterator[str]:
    """Problems of the layers that the adapter's target modules matched."""
    yield from check_fold(method, quantization_of(model.get_base_model()) is not None)
    if aux_loss:
        yield (
            "Expected a loss that keeps clients apart, found a router loss over the whole batch: set "
            "router_aux_loss_coef to 0.0."
        )
    problems, layers = list(check_targets(model)), lora_layers(model)
    yield from problems
    if not problems and method_class(method).folds:
        yield from _check_folded_layers(model, layers)
    devices = sorted({str(tensor.device) for tensors in global_pair(model) for tensor in tensors.values()})
    if len(devices) > 1:
        yield (
            f"Expected the whole model on one device, found it on {', '.join(devices)}: start with accelerate launch, "
            "or set model_init_kwargs to {'device_map': {'': 0}}."
        )
    output = model.get_output_embeddings()
    ours = {id(part["default"].weight) for layer in layers.values() for part in (layer.lora_A, layer.lora_B)}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    if others:
        yield (
            f"Expected the linear layers' adapter default to be all that is trainable, found {', '.join(others[:3])} "
            f"({len(others)} tensors): freeze the rest, activate default, and leave it out of target_modules."
        )
    for name, layer in layers.items():
        pair = layer.lora_A["default"], layer.lora_B["default"]
        if not all(type(part) is nn.Linear for part in pair):
            kind = type(layer.get_base_layer()).__name__
            yield f"Expected linear target modules, found {name}, a {kind}: leave it out."
        if layer is output:
            yield "Expected target_modules without the LM head, found it among them: leave it out."
        if layer.lora_variant:
            kind = type(layer.lora_variant["default"]).__name__
            yield f"Expected plain LoRA in {name}, found the variant {kind}: leave it out."


def check_adapter(model: Any, lora: PeftConfig | None) -> Iterator[str]:
    """Problems of the adapter, that `model` has as `default` or that `lora` describes, before anything is loaded."""
    if isinstance(model, PeftModel) and lora is None:
        yield (
            f"Expected the model's adapter to be called default, found {', '.join(model.peft_config)}: leave "
            "adapter_name out of get_peft_model(base, config), or of PeftModel.from_pretrained(base, folder, "
            "is_trainable=True)."
        )
    elif not isinstance(lora, LoraConfig) or lora.peft_type != PeftType.LORA:  # AdaLoraConfig is a LoraConfig, too
        found = "none: pass one" if lora is None else f"a {type(lora).__name__}: clients train plain LoRA; use that"
        yield f"Expected a peft.LoraConfig as peft_config (or a model with a LoRA adapter), found {found}."
    else:
        yield from _check_lora(lora)


def _check_lora(lora: LoraConfig) -> Iterator[str]:
    if lora.r < 1:
        yield f"Expected a global rank r of at least 1, found {lora.r}: raise it."
    if not lora.lora_alpha > 0:
        yield f"Expected a lora_alpha above 0, as the adapter is scaled by it, found {lora.lora_alpha}: raise it."
    if lora.bias != "none":
        yield f"Expected bias='none', found {lora.bias!r}: biases of different clients cannot share a base model."
    if lora.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        yield (
            f"Expected init_lora_weights to be True, False, 'gaussian' or 'orthogonal', found "
            f"{lora.init_lora_weights!r}: it changes the base model, which no checkpoint holds; use one of these."
        )
    targets = [lora.target_modules] if isinstance(lora.target_modules, str) else list(lora.target_modules or [])
    if any(target == "lm_head" or target.endswith(".lm_head") for target in targets):
        yield "Expected target_modules without lm_head, found it: the loss reads the head's own weights; leave it out."
    if lora.target_parameters:  # PEFT makes these of the names of experts and routers
        yield (
            f"Expected target_modules of linear layers, found target_parameters={sorted(lora.target_parameters)}, "
            "which a stack of clients cannot train: name linear layers in target_modules, without experts and routers."
        )
    for field in fields(lora):
        value = getattr(lora, field.name)
        refused = field.metadata.get("is_lora_variant") or field.name in _REFUSED_LORA_FIELDS
        if refused and value:
            yield (
                f"Expected plain LoRA, found {field.name}={value!r} in the peft_config: stacked client adapters do "
                "not have it; leave it out."
            )


_REFUSED_LORA_FIELDS = (
    "rank_pattern",
    "modules_to_save",
    "lora_bias",
    "trainable_token_indices",
    "layer_replication",
    "use_dora",
    "megatron_config",
)
