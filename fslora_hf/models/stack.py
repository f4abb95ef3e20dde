"""Client adapters, stacked in the PEFT layers of one resident base model.

A block of clients trains in the same step: their examples pass through the base together, client by client, and each
LoRA layer adds two batched products with the clients' stacked pairs, as wide as the block's largest rank. Rows beyond
a client's own rank are zero on both sides, so their gradients are zero and every elementwise optimizer leaves them.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..methods import ClientAdapter
from .adapter import lora_layers


class StackedLora(LoraVariant):
    """The forward pass of a block of clients; PEFT calls it in place of a layer's plain LoRA (peft 0.21.2)."""

    def __init__(self):
        self.scale = torch.empty(0)  # [clients, 1, 1], each client's factor on the layer's LoRA scale
        self.beside_global = False  # whether clients add to the global adapter, and not stand in its place
        self.positions: int | None = None  # tokens of the batch at work, padding included; None beside a step

    def forward(self, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs):
        # Whoever evaluates or generates within a round, but beside a step, means the global adapter.
        with_clients = module.training and self.positions is not None
        if self.beside_global or not with_clients:
            A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
            seen = x if with_clients else module.lora_dropout[active_adapter](x)
            result = result + B(A(seen)) * module.scaling[active_adapter]
        if not with_clients:
            return result
        clients = self.scale.shape[0]
        if clients > 1 and x.shape[:-1].numel() != self.positions:
            raise RuntimeError(
                f"Expected every token of the batch in order ({self.positions} tokens) in a targeted layer while "
                f"{clients} clients share a step, found {x.shape[:-1].numel()}: set per_device_train_clients to 1."
            )
        x = module.lora_dropout[active_adapter](x).reshape(clients, -1, x.shape[-1])
        down = torch.bmm(x, module.client_A.mT)
        down = down * (self.scale * module.scaling[active_adapter]).to(down.dtype)
        flat, B = result.reshape(clients, -1, result.shape[-1]), module.client_B.mT
        if flat.dtype == down.dtype == B.dtype:
            return torch.baddbmm(flat, down, B).view(result.shape)
        return result + torch.bmm(down, B).view(result.shape)

    @staticmethod
    def _refuse_merge(*args, **kwargs):
        raise RuntimeError(
            "Expected the global adapter, found client adapters in the model: merge after training or between rounds."
        )

    merge_safe = merge_unsafe = unmerge = _refuse_merge


class ClientStack:
    """The stacked adapters of the clients that a process trains together.

    Args:
        model: a PEFT model whose `adapter_name` is the global adapter.
        max_clients: most clients in a block.
        max_rank: largest rank of any client.
        trains: the sides of the pair that clients train; the other is frozen.
        beside_global: clients compute with the global adapter, frozen, and their own added to it.
    """

    def __init__(
        self,
        model: PeftModel,
        max_clients: int,
        max_rank: int,
        adapter_name: str = "default",
        trains: Sequence[str] = ("A", "B"),
        beside_global: bool = False,
    ):
        self._layers = lora_layers(model, adapter_name)
        self._trains = tuple(trains)
        self._adapter_name = adapter_name
        self._most = max_clients, max_rank
        self._rooms: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._variant, self._beside_global = StackedLora(), beside_global
        self._received: tuple[ClientAdapter, ...] = ()
        self._hooks: list[RemovableHandle] = []

    def attach(self) -> None:
        """Give every layer its stacked parameters (zeros, of the largest shape) and freeze the global adapter, so that
        whatever walks the model's trainable parameters finds the clients'."""
        clients, rank = self._most
        for name, layer in self._layers.items():
            A, B = layer.lora_A[self._adapter_name].weight, layer.lora_B[self._adapter_name].weight
            self._hooks.append(layer.register_state_dict_post_hook(_leave_clients_out))
            layer.client_A = nn.Parameter(A.new_zeros(clients, rank, A.shape[1]), "A" in self._trains)
            layer.client_B = nn.Parameter(B.new_zeros(clients, B.shape[0], rank), "B" in self._trains)
            self._rooms[name] = layer.client_A.data.view(-1), layer.client_B.data.view(-1)
            A.requires_grad_(False)
            B.requires_grad_(False)

    def detach(self) -> None:
        """Take the stacked parameters out again and make the global adapter trainable, as PEFT had it."""
        self.unload()
        while self._hooks:
            self._hooks.pop().remove()
        for layer in self._layers.values():
            if hasattr(layer, "client_A"):
                del layer.client_A, layer.client_B
            layer.lora_A[self._adapter_name].weight.requires_grad_(True)
            layer.lora_B[self._adapter_name].weight.requires_grad_(True)
        self._rooms.clear()

    @torch.no_grad()
    def load(self, adapters: Sequence[ClientAdapter]) -> None:
        """Refill the stack with the clients of a block, for the model to compute with at work.

        The parameters stay the same objects, in the same memory, and take the block's shape. Whoever keeps a loss of
        the block before, with its graph, may: it is of no use for a backward pass any more, and does not stand in the
        way of one.
        """
        self._received = tuple(adapters)
        for name, layer in self._layers.items():
            for stacked, room, tensors in (
                (layer.client_A, self._rooms[name][0], [adapter.A[name] for adapter in adapters]),
                (layer.client_B, self._rooms[name][1], [adapter.B[name] for adapter in adapters]),
            ):
                _forget_graphs(stacked)
                sizes = zip(*(tensor.shape for tensor in tensors), strict=True)
                shape = len(tensors), *map(max, sizes)
                stacked.data = room[: math.prod(shape)].view(shape)
                stacked.zero_()
                for slot, tensor in zip(stacked, tensors, strict=True):
                    slot[: tensor.shape[0], : tensor.shape[1]] = tensor
        some = next(iter(self._layers.values())).client_A
        scales = [adapter.scale for adapter in adapters]
        self._variant.scale = torch.tensor(scales, dtype=some.dtype, device=some.device).view(-1, 1, 1)
        self._variant.beside_global = self._beside_global and self._has_product()
        self._activate(True)

    def unload(self) -> None:
        """Make the model compute with the global adapter again."""
        self._received = ()
        self._activate(False)

    @contextmanager
    def at_work(self, positions: int) -> Iterator[None]:
        """Within, and only there, the model computes with the clients loaded if it is in training mode: of a batch of
        so many tokens, padding included, each client has an equal part, in order. What the backward pass recomputes
        belongs to it."""
        before, self._variant.positions = self._variant.positions, positions
        try:
            yield
        finally:
            self._variant.positions = before

    @property
    def is_at_work(self) -> bool:
        return self._variant.positions is not None

    @property
    def clients(self) -> int:
        """Clients in the stack."""
        return len(self._received)

    def current(self, slot: int) -> ClientAdapter:
        """A copy of what the client in `slot` holds now."""
        received, A, B = self._received[slot], {}, {}
        for name, layer in self._layers.items():
            rank = received.A[name].shape[0]
            A[name] = layer.client_A.detach()[slot, :rank].clone()
            B[name] = layer.client_B.detach()[slot, :, :rank].clone()
        return ClientAdapter(A, B, received.scale)

    def received(self, slot: int) -> ClientAdapter:
        """What the client in `slot` was loaded with."""
        return self._received[slot]

    def change(self, slot: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What local training changed in the client of `slot`: module name -> A `[k, in]`, and -> B `[out, k]`.

        A frozen side is empty.
        """
        received, current = self._received[slot], self.current(slot)
        A, B = (
            {name: tensor.sub_(old[name]) for name, tensor in new.items()} if side in self._trains else {}
            for side, new, old in (("A", current.A, received.A), ("B", current.B, received.B))
        )
        return A, B

    def parameters(self) -> list[nn.Parameter]:
        """The block's stacked parameters, `[clients, k_max, in]` and `[clients, out, k_max]` by turns."""
        return [tensor for layer in self._layers.values() for tensor in (layer.client_A, layer.client_B)]

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """Clip each client's gradient by its own norm over all modules, as `clip_grad_norm_` would clip it alone.

        Returns each client's norm before clipping, `[clients]`.
        """
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        per_tensor = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
        norms = torch.linalg.vector_norm(per_tensor, dim=0)
        if max_norm > 0:
            factors = (max_norm / (norms + 1e-6)).clamp(max=1.0).view(-1, 1, 1)
            for gradient in gradients:
                gradient.mul_(factors)
        return norms

    def _has_product(self) -> bool:
        """Whether the global adapter adds anything: with B at zero it need not be computed with."""
        B = [layer.lora_B[self._adapter_name].weight.any() for layer in self._layers.values()]
        return bool(torch.stack(B).any())

    def _activate(self, active: bool) -> None:
        for layer in self._layers.values():
            if active:
                layer.lora_variant[self._adapter_name] = self._variant
            else:
                layer.lora_variant.pop(self._adapter_name, None)


def _forget_graphs(stacked: nn.Parameter) -> None:
    """Part a parameter from its gradient and from the graphs of the last block, which may have had another shape.

    While somebody keeps such a graph, torch hands the node in it that takes this parameter's gradient to the next
    graph, too. It still expects the old shape: it refuses the new gradient, or sums it where it can be summed to the
    old (of rank 1). Data of another type make torch leave that node, and nothing else of the parameter (its hooks,
    say); the next forward pass makes a new one (torch 2.13.0).
    """
    stacked.grad = None
    another = torch.float32 if stacked.dtype == torch.float16 else torch.float16
    stacked.data = stacked.data.new_empty(0, dtype=another)


def _leave_clients_out(layer: LoraLayer, state_dict: dict, prefix: str, metadata: dict) -> None:
    """What a client holds never gets into a file: PEFT would save it beside the global adapter."""
    state_dict.pop(f"{prefix}client_A", None)
    state_dict.pop(f"{prefix}client_B", None)
