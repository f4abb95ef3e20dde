"""Federated LoRA methods, one paper a file. `METHODS` names the built-in ones; `method_class` also finds a user's."""

import re

from ..common.settings import did_you_mean, sentence
from .base import (
    ClientAdapter,
    ClientUpdate,
    FlatTensors,
    Method,
    PairChange,
    ServerPair,
    SketchedClient,
    beside,
    first_rows,
    zeros_like_pair,
)
from .contract import MethodError
from .fedit import FedIT
from .ffa_lora import FFALoRA
from .flexlora import FlexLoRA
from .flora import FLoRA, FLoRAResidual
from .fslora import FSLoRA
from .hetlora import HetLoRA
from .own import load_class

METHODS: dict[str, type[Method]] = {
    "fslora": FSLoRA,
    "fedit": FedIT,
    "hetlora": HetLoRA,
    "flexlora": FlexLoRA,
    "flora": FLoRA,
    "flora_residual": FLoRAResidual,
    "ffa_lora": FFALoRA,
}


def method_class(name: str) -> type[Method]:
    """The class that `name` stands for: a built-in by its name, or one in a user's own file as `module:Class`.

    Raises:
        MethodError: a ValueError that says what was expected, what was found and how to mend it.
    """
    if name in METHODS:
        return METHODS[name]
    if ":" in name:
        return load_class(name)
    remedy = did_you_mean(name, METHODS)
    if re.fullmatch(r"\w+(\.\w+)+", name):
        remedy = f"write {':'.join(name.rsplit('.', 1))} if it is a class of yours"
    raise MethodError(sentence("method", f"one of {', '.join(METHODS)} or module:Class", name, remedy))


__all__ = [
    "METHODS",
    "ClientAdapter",
    "ClientUpdate",
    "FedIT",
    "FFALoRA",
    "FlatTensors",
    "FlexLoRA",
    "FLoRA",
    "FLoRAResidual",
    "FSLoRA",
    "HetLoRA",
    "Method",
    "MethodError",
    "PairChange",
    "ServerPair",
    "SketchedClient",
    "beside",
    "first_rows",
    "method_class",
    "zeros_like_pair",
]
