"""Federated LoRA methods, one paper a file. `METHODS` names those a configuration may ask for."""

from .base import ClientAdapter, ClientUpdate, FlatTensors, Method, PairChange, ServerPair
from .fedit import FedIT
from .ffa_lora import FFALoRA
from .flexlora import FlexLoRA
from .fslora import FSLoRA
from .hetlora import HetLoRA

METHODS: dict[str, type[Method]] = {
    "fslora": FSLoRA,
    "fedit": FedIT,
    "hetlora": HetLoRA,
    "flexlora": FlexLoRA,
    "ffa_lora": FFALoRA,
}

__all__ = [
    "METHODS",
    "ClientAdapter",
    "ClientUpdate",
    "FedIT",
    "FFALoRA",
    "FlatTensors",
    "FlexLoRA",
    "FSLoRA",
    "HetLoRA",
    "Method",
    "PairChange",
    "ServerPair",
]
