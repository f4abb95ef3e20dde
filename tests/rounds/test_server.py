"""The server's step is torch's optimizer on the negative average update, and its state survives its file."""

import copy

import pytest
import torch
from safetensors import safe_open

from fslora_hf.rounds.server import ServerState

KINDS = {
    "sgd": (1.0, torch.optim.SGD, {}),
    "sgd_momentum": (0.7, torch.optim.SGD, {"momentum": 0.9}),
    "adam": (1e-2, torch.optim.Adam, {}),
    "adamw": (1e-2, torch.optim.AdamW, {"weight_decay": 0.0}),
}


def make_pair(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    A = {f"layers.{i}.q": torch.randn(3, 5, generator=generator, dtype=dtype) for i in range(2)}
    B = {f"layers.{i}.q": torch.randn(4, 3, generator=generator, dtype=dtype) for i in range(2)}
    return A, B


def make_server(optimizer="sgd", rate=None, dtype=torch.float64) -> ServerState:
    return ServerState(*make_pair(dtype), optimizer, KINDS[optimizer][0] if rate is None else rate)


def make_update(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        {name: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for name, tensor in side.items()}
        for side in make_pair()
    )


def tensors(server: ServerState) -> list[torch.Tensor]:
    return [*server.A.values(), *server.B.values()]


def test_sgd_at_rate_one_is_plain_averaging():
    server, before, update = make_server(), make_pair(), make_update(1)
    server.step(update)
    for side, old, change in zip((server.A, server.B), before, update, strict=True):
        for name in side:
            torch.testing.assert_close(side[name], old[name] + change[name], rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_torchs_on_the_negative_update(kind):
    rate, optimizer_class, options = KINDS[kind]
    server = make_server(kind)
    parameters = [torch.nn.Parameter(t.clone()) for t in tensors(server)]
    optimizer = optimizer_class(parameters, lr=rate, **options)
    for seed in range(4):
        update = make_update(seed)
        for parameter, change in zip(parameters, [*update[0].values(), *update[1].values()], strict=True):
            parameter.grad = -change
        optimizer.step()
        server.step(update)
        for ours, theirs in zip(tensors(server), parameters, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_coordinates_that_no_client_trained_stay(kind):
    """Weight decay would shrink them."""
    server, before = make_server(kind), make_pair()
    update = make_update(0)
    for side in update:
        for tensor in side.values():
            tensor[0] = 0
    server.step(update)
    for side, old in zip((server.A, server.B), before, strict=True):
        for name in side:
            assert torch.equal(side[name][0], old[name][0]) and not torch.equal(side[name][1], old[name][1])


@pytest.mark.parametrize("kind", KINDS)
def test_no_usable_update_changes_nothing(kind, tmp_path):
    """Neither the pair nor the optimizer: momentum must not go on, and Adam must not count the round."""
    server = make_server(kind)
    server.step(make_update(0))
    held = [t.clone() for t in tensors(server)]
    server.save(tmp_path / "before")
    server.step(None)
    server.save(tmp_path / "after")
    assert all(torch.equal(old, new) for old, new in zip(held, tensors(server), strict=True))
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_saved_and_loaded_server_goes_on_bit_for_bit(kind, steps, tmp_path):
    server = make_server(kind)
    for seed in range(steps):
        server.step(make_update(seed))
    server.save(tmp_path / "state.safetensors")
    other = ServerState(*copy.deepcopy((server.A, server.B)), kind, KINDS[kind][0])
    other.step(make_update(77))  # what it had is gone after loading
    for old, new in zip(tensors(server), tensors(other), strict=True):
        new.copy_(old)
    other.load(tmp_path / "state.safetensors", 2)
    for seed in range(10, 13):
        server.step(make_update(seed))
        other.step(make_update(seed))
    assert all(torch.equal(old, new) for old, new in zip(tensors(server), tensors(other), strict=True))


def test_the_file_is_safetensors_with_a_name_for_every_number(tmp_path):
    server = make_server("adam")
    server.step(make_update(0))
    server.save(tmp_path / "state.safetensors")
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.get_tensor("layers.1.q.A.exp_avg").dtype == torch.float64
    modules = [f"layers.{i}.q.{side}" for i in range(2) for side in "AB"]
    assert names == {f"{module}.{key}" for module in modules for key in ("exp_avg", "exp_avg_sq", "step")}


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.float64, 8)])
def test_the_pair_is_the_callers_own_and_keeps_its_precision(dtype, size):
    A, B = make_pair(dtype)
    server = ServerState(A, B)
    assert server.rank == 3 and server.bytes_per_rank == (5 + 5 + 4 + 4) * size
    server.step(tuple({n: torch.ones_like(t) for n, t in side.items()} for side in (A, B)))
    assert all(server.A[name] is A[name] for name in A) and all(t.dtype == dtype for t in tensors(server))
    torch.testing.assert_close(A["layers.0.q"], make_pair(dtype)[0]["layers.0.q"] + 1)
    assert all(t.grad is None for t in tensors(server))
