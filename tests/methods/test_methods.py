"""Each method by itself, on tensors: what clients receive, how the fold averages, and what crosses the wire.

Law 7  flexlora's error equals the tail singular values; hetlora at full rank with equal norms equals fedit
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model

from fslora_hf.methods import METHODS, ClientUpdate
from fslora_hf.methods.hetlora import product_norm
from fslora_hf.models.adapter import global_pair
from fslora_hf.models.stack import ClientStack
from fslora_hf.rounds.server import ServerState
from tests.support import reference, tiny
from tests.support.worker_train import build, ledger

R = 6
SHAPES = {"square": (16, 16), "wide": (24, 7), "low": (5, 4)}  # [in, out]; the last has less than R dimensions
EXACT = 1e-12


def randn(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_server(zero_b: bool = False) -> ServerState:
    A = {name: randn(R, shape[0], seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    B = {name: randn(shape[1], R, seed=9 + i) * (not zero_b) for i, (name, shape) in enumerate(SHAPES.items())}
    return ServerState(A, B)


def cohort(ranks, weights=None) -> list[SimpleNamespace]:
    weights = weights or [1 / len(ranks)] * len(ranks)
    return [client_of(k, w) for k, w in zip(ranks, weights, strict=True)]


def client_of(rank, weight=1.0) -> SimpleNamespace:
    fresh = partial(np.full, fill_value=0.5)
    return SimpleNamespace(
        rank=rank, weight=weight, participation=1.0, fresh_rows=lambda module, features: fresh((rank, features))
    )


def sketch(module: str, k: int = R) -> np.ndarray:
    return np.arange(k)


def returns(method, server, clients, train) -> list[ClientUpdate]:
    """The update of each client that ends its turn with `train(position, what it received)`: {module: (A, B)}."""
    updates = []
    for position, client in enumerate(clients):
        received = method.receive(server, client, lambda module, k=client.rank: sketch(module, k))
        pairs = train(position, received)
        A, B = (
            {module: pairs[module][side] - start for module, start in held.items()} if name in method.trains else {}
            for side, (name, held) in enumerate((("A", received.A), ("B", received.B)))
        )
        updates.append(ClientUpdate(A, B, client.weight, lambda m, k=client.rank: sketch(m, k), received, position))
    return updates


def drawn(position, received):
    """A pair of the client's own."""
    return {
        module: (randn(*A.shape, seed=100 + position), randn(*received.B[module].shape, seed=200 + position))
        for module, A in received.A.items()
    }


def fold(method, server, clients, updates, order=None):
    """The change of the global pair: updates accumulated in any order, by two processes, and the sum finished."""
    halves = [method.accumulator(server, clients) for _ in range(2)]
    for i in order if order is not None else range(len(updates)):
        method.accumulate(halves[i % 2], updates[i])
    halves[0].flat += halves[1].flat
    return method.finish(server, halves[0])


def after(server, change) -> reference.Adapter:
    if all(tensor.shape[1] != R for tensor in change[1].values()):  # a product of another rank, to be folded
        return {m: (change[1][m] @ change[0][m], torch.zeros(1)) for m in server.A}
    return {m: (server.A[m] + change[0].get(m, 0.0), server.B[m] + change[1].get(m, 0.0)) for m in server.A}


@pytest.mark.parametrize("name", METHODS)
def test_a_client_gets_tensors_of_its_own(name):
    method, server = METHODS[name](), make_server()
    held = method.receive(server, client_of(R), sketch)
    for ours, theirs in ((held.A, server.A), (held.B, server.B)):
        for module in theirs:
            before = theirs[module].clone()
            ours[module].fill_(7.0)
            assert torch.equal(theirs[module], before)


@pytest.mark.parametrize("name", METHODS)
def test_the_order_and_the_place_of_clients_do_not_matter(name):
    method, server = METHODS[name](), make_server()
    clients = cohort([R] * 4 if method.full_rank_only else [1, 2, 5, 3], [0.1, 0.4, 0.3, 0.2])
    updates = returns(method, server, clients, drawn)
    one, other = (
        after(server, fold(method, server, clients, updates, order)) for order in ((0, 1, 2, 3), (3, 1, 0, 2))
    )
    assert reference.max_difference(one, other) < EXACT


@pytest.mark.parametrize("name", METHODS)
def test_a_missing_update_leaves_the_others_shares_in_proportion(name):
    method, server = METHODS[name](), make_server()
    ranks, weights = [R] * 3 if method.full_rank_only else [4, 2, 3], [0.2, 0.5, 0.3]
    everyone = cohort(ranks, weights)
    updates = returns(method, server, everyone, drawn)
    without = after(server, fold(method, server, everyone, updates, [0, 2]))
    pair, others = cohort([ranks[0], ranks[2]], [0.4, 0.6]), (updates[0], updates[2])
    alone = [replace(u, weight=c.weight, position=i) for i, (u, c) in enumerate(zip(others, pair, strict=True))]
    assert reference.max_difference(without, after(server, fold(method, server, pair, alone))) < EXACT
    assert fold(method, server, everyone, updates, []) is None


# ---- hetlora ----


def test_hetlora_norms_are_those_of_the_products():
    adapter = make_server()
    dense = torch.cat([(adapter.B[m] @ adapter.A[m]).flatten() for m in SHAPES])
    assert product_norm(adapter) == pytest.approx(dense.norm().item(), rel=1e-13)
    small = SimpleNamespace(A={"m": adapter.A["wide"].float() * 1e-20}, B={"m": adapter.B["wide"].float() * 1e-20})
    dense = small.B["m"].double() @ small.A["m"].double()  # in float32 the squares would be zero
    assert product_norm(small) == pytest.approx(dense.norm().item(), rel=1e-12) and product_norm(small) > 0


def test_law_7_hetlora_at_full_rank_with_equal_norms_is_fedit():
    server, clients = make_server(), cohort([R] * 3, [0.5, 0.2, 0.3])

    def of_norm_one(position, received):
        pairs = drawn(position, received)
        norm = torch.cat([(B @ A).flatten() for A, B in pairs.values()]).norm()
        return {module: (A, B / norm) for module, (A, B) in pairs.items()}

    ends = {}
    for name in ("hetlora", "fedit"):
        method = METHODS[name]()
        ends[name] = after(server, fold(method, server, clients, returns(method, server, clients, of_norm_one)))
    assert reference.max_difference(ends["hetlora"], ends["fedit"]) < EXACT


def test_hetlora_gives_larger_products_a_larger_part():
    server, method = make_server(), METHODS["hetlora"]()
    clients = cohort([2, 4])
    updates = returns(method, server, clients, drawn)
    norms = [product_norm(update.returned) for update in updates]
    parts = [norm / sum(norms) for norm in norms]
    assert [method.weigh(update) for update in updates] == pytest.approx([n / 2 for n in norms])
    end = after(server, fold(method, server, clients, updates))
    for module, (A, B) in end.items():
        pairs = [drawn(i, method.receive(server, c, sketch))[module] for i, c in enumerate(clients)]
        torch.testing.assert_close(A[:2], parts[0] * pairs[0][0] + parts[1] * pairs[1][0][:2])
        torch.testing.assert_close(B[:, 2:4], parts[1] * pairs[1][1][:, 2:])  # padded with zeros, not left out
        assert torch.equal(A[4:], server.A[module][4:]) and torch.equal(B[:, 4:], server.B[module][:, 4:])


def test_hetlora_without_any_product_changes_nothing():
    server, method = make_server(zero_b=True), METHODS["hetlora"]()
    clients = cohort([2, 4])
    updates = returns(method, server, clients, lambda i, held: {m: (held.A[m] * 2, held.B[m]) for m in held.A})
    assert fold(method, server, clients, updates) is None


# ---- flexlora ----


def average_product(updates, total=1.0) -> dict[str, torch.Tensor]:
    return {
        m: sum(u.weight / total * u.returned.B[m] @ u.returned.A[m] for u in updates) for m in updates[0].returned.A
    }


def flexlora(ranks, weights=None, train=drawn, server=None):
    """The method after a round, the new global pair, and the dense average of the products."""
    method, server, clients = METHODS["flexlora"](), server or make_server(), cohort(ranks, weights)
    updates = returns(method, server, clients, train)
    return method, after(server, fold(method, server, clients, updates)), average_product(updates)


@pytest.mark.parametrize("ranks", [[5, 5, 4], [1, 6, 6, 6, 6]])
def test_law_7_flexloras_error_is_the_tail_of_the_singular_values(ranks):
    weights = [n / sum(range(1, len(ranks) + 1)) for n in range(1, len(ranks) + 1)]
    method, end, products = flexlora(ranks, weights)
    tails = {m: torch.linalg.svdvals(product)[R:].square().sum() for m, product in products.items()}
    assert tails["square"] > 1.0 and tails["wide"] > 1e-3 and tails["low"] == 0.0
    for module, (A, B) in end.items():
        error = (products[module] - B @ A).square().sum()
        torch.testing.assert_close(error, tails[module], rtol=1e-11, atol=1e-20)
    assert method.notes()["truncation_error"] == pytest.approx(sum(tails.values()).item(), rel=1e-12)


@pytest.mark.parametrize("ranks", [[6], [1, 2, 3], [3, 3], [2]])
def test_law_7_flexlora_keeps_an_average_of_at_most_its_rank_exactly(ranks):
    method, end, products = flexlora(ranks)
    for module, (A, B) in end.items():
        torch.testing.assert_close(B @ A, products[module], rtol=0, atol=EXACT)
    assert method.notes()["truncation_error"] < 1e-24


def test_flexloras_first_rows_are_a_clients_best_part_and_balanced():
    _, end, products = flexlora([6, 6, 6], [0.2, 0.3, 0.5])
    for module, (A, B) in end.items():
        values = torch.linalg.svdvals(products[module])
        for k in range(1, R + 1):
            error = (products[module] - B[:, :k] @ A[:k]).square().sum()
            torch.testing.assert_close(error, values[k:].square().sum(), rtol=1e-10, atol=1e-20)
        live = min(R, len(values))
        torch.testing.assert_close(A[:live] @ A[:live].mT, torch.diag(values[:R]), rtol=0, atol=1e-11)
        torch.testing.assert_close(B[:, :live].mT @ B[:, :live], torch.diag(values[:R]), rtol=0, atol=1e-11)
        assert (A[:live].gather(1, A[:live].abs().argmax(1, keepdim=True)) > 0).all()  # one sign of the two


def test_flexlora_does_not_depend_on_how_a_product_is_factored():
    """Signs and bases of what clients return do not reach the global pair."""
    rotation, _ = torch.linalg.qr(randn(4, 4, seed=5))

    def rotated(position, received):
        return {m: (rotation @ A, B @ rotation.mT) for m, (A, B) in drawn(position, received).items()}

    ends = [flexlora([4, 4], train=train)[1] for train in (drawn, rotated)]
    assert reference.max_difference(*ends) < 1e-11


def test_flexloras_zero_directions_keep_a_row_to_learn_by():
    server = make_server()
    _, end, products = flexlora([1, 2], server=server)  # of rank 3: three rows are free
    for module, (A, B) in end.items():
        rank = int(torch.linalg.matrix_rank(products[module]))
        assert rank == 3 and (B[:, rank:] == 0).all()
        torch.testing.assert_close(A[rank:], server.A[module][rank:], rtol=0, atol=1e-15)
    _, end, _ = flexlora([2, 4], train=lambda i, held: {m: (held.A[m], held.B[m] * 0) for m in held.A}, server=server)
    for module, (A, B) in end.items():  # nothing learned: a new adapter
        assert torch.equal(A, server.A[module]) and (B == 0).all()


def test_flexlora_adds_no_rounding_to_float32_adapters_but_their_own():
    """The best part of what the clients returned, as float64 finds it: within two units of float32's last place."""
    pair = make_server()
    server = ServerState(*({m: t.float() for m, t in side.items()} for side in (pair.A, pair.B)))

    def train(position, received):
        return {m: (A.float(), B.float()) for m, (A, B) in drawn(position, received).items()}

    method, clients = METHODS["flexlora"](), cohort([3, 4, 2])
    updates = returns(method, server, clients, train)
    for module, (A, B) in after(server, fold(method, server, clients, updates)).items():
        assert A.dtype == B.dtype == torch.float32
        product = sum(u.weight * u.returned.B[module].double() @ u.returned.A[module].double() for u in updates)
        U, S, Vh = torch.linalg.svd(product, full_matrices=False)
        best = U[:, :R] * S[:R] @ Vh[:R]
        assert torch.linalg.norm(B.double() @ A.double() - best) < 2e-7 * torch.linalg.norm(best)


def test_flexlora_learns_on_after_a_round_of_a_small_rank(tmp_path):
    """A client of rank 1 leaves five of six directions at zero; one of full rank then uses all of them again."""
    args = {"method": "flexlora", "optim": "adamw_torch", "num_rounds": 4, "local_steps": 4, "clients_per_round": 1}
    trainer = build(tmp_path, {**args, "client_ranks": [1, 1, 6, 6, 1]})
    trainer.train()
    ranks = [record["ranks"][0] for record in ledger(tmp_path)]
    assert ranks[-2:] == [1, R], ranks
    for A, B in reference.read_adapter(trainer.model).values():
        assert torch.linalg.matrix_rank(B @ A) == R


# ---- ffa_lora ----


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_ffa_lora_never_moves_a(tmp_path, optim):
    args = {"method": "ffa_lora", "optim": optim, "weight_decay": 0.5, "server_optim": "adam", "num_rounds": 2}
    trainer = build(tmp_path, {**args, "local_steps": 2, "save_rounds": 2, "per_device_train_clients": 2})
    start = reference.read_adapter(trainer.model)
    trainer.train()
    for name, (A, B) in reference.read_adapter(trainer.model).items():
        assert torch.equal(A, start[name][0]) and not torch.equal(B, start[name][1])
    floats = sum(B.numel() for _, B in start.values())
    for record in ledger(tmp_path):
        assert record["bytes_down"] == record["bytes_up"] == 5 * 8 * floats
        assert record["bytes_full_rank"] == 2 * 5 * 8 * sum(A.numel() + B.numel() for A, B in start.values())


def test_ffa_lora_clips_by_the_gradients_of_b_alone():
    model = get_peft_model(tiny.base_model(), tiny.lora_config(zero_b=False))
    stack = ClientStack(model, 1, R, trains=METHODS["ffa_lora"].trains)
    stack.attach()
    stack.load([METHODS["ffa_lora"]().receive(ServerState(*global_pair(model)), SimpleNamespace(rank=R), sketch)])
    ids = torch.tensor([[3, 4, 5, 6]])
    with stack.at_work(ids.numel()):
        model.train()(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients and all(name.endswith("client_B") for name in gradients)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    torch.testing.assert_close(stack.clip_gradients(norm.item() / 2), norm[None], rtol=1e-12, atol=0)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(clipped, norm / 2, rtol=1e-4, atol=0)
    A, B = stack.change(0)
    assert A == {} and len(B) == 2 * len(tiny.TARGETS)


def test_ffa_loras_average_is_that_of_the_products():
    server, method, clients = make_server(), METHODS["ffa_lora"](), cohort([R] * 3, [0.5, 0.2, 0.3])
    updates = returns(method, server, clients, drawn)
    assert not any(update.A for update in updates)
    for module, (A, B) in after(server, fold(method, server, clients, updates)).items():
        assert torch.equal(A, server.A[module])
        torch.testing.assert_close(B @ A, average_product(updates)[module], rtol=0, atol=1e-11)


# ---- The wire ----


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("flora")])  # see test_flora.py
def test_bytes_are_those_of_what_a_client_receives_and_sends(name):
    method, server = METHODS[name](), make_server()
    for rank in [R] if method.full_rank_only else [1, 4]:
        (update,) = returns(method, server, cohort([rank]), drawn)
        sent = sum(t.numel() for side in (update.A, update.B) for t in side.values())
        assert method.bytes_moved(server, cohort([rank])[0]) == (8 * sent, 8 * sent)
