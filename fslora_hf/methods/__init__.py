"""Federated LoRA methods, one paper a file. `METHODS` names those a configuration may ask for."""

from .base import ClientAdapter, ClientUpdate, FlatTensors, Method, ServerPair
from .fedit import FedIT
from .fslora import FSLoRA

METHODS: dict[str, type[Method]] = {"fslora": FSLoRA, "fedit": FedIT}

__all__ = ["METHODS", "ClientAdapter", "ClientUpdate", "FedIT", "FlatTensors", "FSLoRA", "Method", "ServerPair"]
