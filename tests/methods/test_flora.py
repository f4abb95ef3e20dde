"""FLoRA in both its forms: new adapters trained beside what is learned, folded into the base or kept beside it.

Law 1  the base after every round equals the slow twin's, which merges dense products
Law 7  the fold is the explicit sum of the clients' products; the residual's error is the tail of the singular values
Law 8  a checkpoint's base and adapter give plain PEFT's logits
"""

import json
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from fslora_hf.methods import METHODS, ClientAdapter, ClientUpdate, beside
from fslora_hf.models.adapter import global_pair, save_client_adapter
from fslora_hf.models.adapter_checks import check_layers
from fslora_hf.models.folding import FOLDED_NAME, FoldedBase, folded_base, load_folded_base
from fslora_hf.models.stack import ClientStack
from fslora_hf.rounds.server import ServerState
from fslora_hf.storage.checkpoint import CheckpointError
from tests.laws.test_laws_training import RANKS, logits, trained
from tests.support import reference, tiny
from tests.support.worker_train import build, ledger

pytest_plugins = ("tests.support.forked",)

EXACT = 1e-9
SGD = {"optim": "sgd", "learning_rate": 0.2, "max_grad_norm": 0.0, "gradient_accumulation_steps": 2}
ADAMW = {"optim": "adamw_torch", "weight_decay": 0.1, "max_grad_norm": 0.05, "per_device_train_clients": 3}
FOLDED = {
    "sgd, accumulated, not clipped": (SGD, {}),
    "adamw, clipped, decayed, by examples, blocks of 3": (
        {**ADAMW, "client_weighting": "num_examples"},
        {"rslora": True},
    ),
    "beside an adapter trained before, part of the clients, blocks of 2": (
        {**ADAMW, "per_device_train_clients": 2, "clients_per_round": 2, "num_rounds": 4},
        {"zero_b": False},
    ),
}


def weights(model) -> dict[str, torch.Tensor]:
    return {n: m.weight.detach().clone() for n, m in model.named_modules() if n.split(".")[-1] in tiny.TARGETS}


def base_weights(trainer) -> dict[str, torch.Tensor]:
    layers = reference.lora_layers(trainer.model)
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers}


def largest_gap(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("name", FOLDED)
def test_law_1_the_base_equals_the_slow_twins_after_every_round(tmp_path, name):
    args, lora = FOLDED[name]
    args = {**args, "method": "flora", "client_ranks": RANKS, "save_rounds": 1}
    trainer, start, seen = trained(tmp_path, args, lora)
    plans, bases = [trainer.round_plan(t) for t in range(trainer.args.num_rounds)], []
    expected = reference.replay(
        tiny.base_model(), tiny.lora_config(**lora), start, trainer.train_dataset, plans, trainer.args, bases=bases
    )
    assert largest_gap(weights(tiny.base_model()), weights(bases[0])) > 1e-3
    assert reference.max_difference(start, expected[-1]) == 0 and len(seen) == 1  # the adapter stays what it was
    for t, base in enumerate(bases, start=1):
        saved = load_file(tmp_path / "run" / f"checkpoint-{t * trainer.layout.steps_per_round}" / FOLDED_NAME)
        assert largest_gap({n.removesuffix(".weight"): w for n, w in saved.items()}, weights(base)) < EXACT
    assert largest_gap(base_weights(trainer), weights(bases[-1])) < EXACT
    untouched = {n: p for n, p in tiny.base_model().named_parameters() if n.split(".")[-2] not in tiny.TARGETS}
    ours = {n.replace(".base_layer", ""): p for n, p in trainer.model.get_base_model().named_parameters()}
    assert len(untouched) > 5 and all(torch.equal(ours[n], p) for n, p in untouched.items())


LAYOUT = {"optim": "adamw_torch", "num_rounds": 2, "local_steps": 2, "client_ranks": RANKS, "save_rounds": 2}


@pytest.fixture(scope="module")
def one_client_a_step(tmp_path_factory):
    trainer = build(tmp_path_factory.mktemp("sequential"), {**LAYOUT, "method": "flora"})
    trainer.train()
    return base_weights(trainer)


@pytest.mark.parametrize("block", [2, 5])
def test_law_2_blocks_fold_the_same(one_client_a_step, tmp_path, block):
    trainer = build(tmp_path, {**LAYOUT, "method": "flora", "per_device_train_clients": block})
    trainer.train()
    assert largest_gap(base_weights(trainer), one_client_a_step) < EXACT


@pytest.mark.slow
def test_law_2_two_processes_fold_the_same(one_client_a_step, fork_ranks, tmp_path):
    args = {**LAYOUT, "method": "flora", "per_device_train_clients": 2}
    job = {"output_dir": str(tmp_path / "run"), "args": args, "dtype": "float64", "result": str(tmp_path / "end")}
    assert fork_ranks(job) == [0, 0]
    (path,) = (tmp_path / "run").glob(f"checkpoint-*/{FOLDED_NAME}")
    saved = {name.removesuffix(".weight"): weight for name, weight in load_file(path).items()}
    assert largest_gap(saved, one_client_a_step) < EXACT


def test_law_8_a_checkpoint_is_a_changed_base_and_a_plain_adapter(tmp_path):
    trainer, _, _ = trained(tmp_path, {"method": "flora", "save_rounds": 2, "client_ranks": RANKS}, {"zero_b": False})
    trainer.save_model(str(tmp_path / "final"))
    expected = logits(trainer.model)
    (last,) = (tmp_path / "run").glob(f"checkpoint-{3 * trainer.layout.steps_per_round}")
    for folder in (last, tmp_path / "final"):
        base = tiny.base_model()
        assert load_folded_base(base, folder)
        assert (logits(base) - logits(tiny.base_model())).abs().max() > 1e-3
        model = peft.PeftModel.from_pretrained(base, folder)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=EXACT)
    own = weights(base := tiny.base_model())
    with folded_base(base, last):
        assert largest_gap(weights(base), own) > 1e-3
    assert largest_gap(weights(base), own) == 0


def test_a_folder_without_a_changed_base_leaves_the_base_alone(tmp_path):
    base = tiny.base_model()
    assert load_folded_base(base, tmp_path) is False
    with folded_base(base, tmp_path):
        assert largest_gap(weights(base), weights(tiny.base_model())) == 0


@pytest.mark.parametrize("damage", ["shape", "name", "torn"])
def test_a_changed_base_that_does_not_fit_is_told(tmp_path, damage):
    tensors = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(16, 16 if damage == "name" else 8)}
    if damage == "name":
        tensors = {"model.layers.9.self_attn.q_proj.weight": torch.zeros(16, 16)}
    save_file(tensors, tmp_path / FOLDED_NAME)
    if damage == "torn":
        (tmp_path / FOLDED_NAME).write_bytes((tmp_path / FOLDED_NAME).read_bytes()[:20])
    expected = "found damage" if damage == "torn" else "load the base that the run was trained on, unquantized"
    with pytest.raises(ValueError, match=expected):
        load_folded_base(base := tiny.base_model(), tmp_path)
    base = tiny.base_model()
    with pytest.raises(ValueError, match=expected), folded_base(base, tmp_path):
        pass
    assert largest_gap(weights(base), weights(tiny.base_model())) == 0


# ---- The fold and the residual, on tensors ----

R, IN, OUT = 6, 9, 7


def randn(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cohort(ranks, shares) -> list[SimpleNamespace]:
    rng = np.random.default_rng(0)
    return [
        SimpleNamespace(
            rank=k,
            weight=w,
            participation=0.25,
            cohort_rank=sum(ranks),
            fresh_rows=lambda m, n, k=k: rng.normal(size=(k, n)),
        )
        for k, w in zip(ranks, shares, strict=True)
    ]


def fold(method, server, clients):
    """What `finish` makes of clients that all return a pair of their own, and the explicit sum of their products."""
    accumulator, explicit = method.accumulator(server, clients), 0.0
    for position, client in enumerate(clients):
        held = method.receive(server, client, None)
        assert (held.B["m"] == 0).all() and held.A["m"].shape == (client.rank, IN)
        end = randn(client.rank, IN, seed=position), randn(OUT, client.rank, seed=9 + position)
        change = {"m": end[0] - held.A["m"]}, {"m": end[1] - held.B["m"]}
        method.accumulate(accumulator, ClientUpdate(*change, client.weight, None, held, position))
        explicit = explicit + client.weight * R / client.rank * end[1] @ end[0]
    return method.finish(server, accumulator), explicit


def pair(zero: bool = False) -> ServerState:
    return ServerState({"m": randn(R, IN, seed=50)}, {"m": randn(OUT, R, seed=51) * (not zero)})


def test_law_7_floras_stack_is_the_sum_of_the_products():
    clients = cohort([1, 4, 2], [0.5, 0.2, 0.3])
    (A, B), explicit = fold(METHODS["flora"](), pair(), clients)
    assert A["m"].shape == (7, IN) and B["m"].shape == (OUT, 7)
    torch.testing.assert_close(B["m"] @ A["m"], explicit, rtol=0, atol=1e-12)


@pytest.mark.parametrize("zero", [False, True], ids=["beside a residual", "first round"])
def test_law_7_the_residuals_error_is_the_tail_of_the_singular_values(zero):
    clients, server = cohort([1, 4, 3], [0.5, 0.2, 0.3]), pair(zero)
    method = METHODS["flora_residual"]()
    (A, B), explicit = fold(method, server, clients)
    whole = server.B["m"] @ server.A["m"] + explicit
    values = torch.linalg.svdvals(whole)
    error = (whole - (server.B["m"] + B["m"]) @ (server.A["m"] + A["m"])).square().sum()
    assert values[R:].square().sum() > 1e-3
    torch.testing.assert_close(error, values[R:].square().sum(), rtol=1e-10, atol=0)
    assert method.notes()["truncation_error"] == pytest.approx(error.item(), rel=1e-10)


def test_bytes_are_those_of_stacks_and_residuals():
    server, unit = pair(), 8 * (IN + OUT)
    clients = cohort([1, 2], [0.5, 0.5])
    method = METHODS["flora"]()
    clients[0].participation = 1.0  # a stack of rank 3 each round
    assert method.bytes_moved(server, clients[0]) == (3 * unit, unit)
    assert method.bytes_moved(server, clients[1]) == (8 * IN * OUT, 2 * unit)  # the weights are less than four stacks
    assert METHODS["flora_residual"]().bytes_moved(server, clients[1]) == (R * unit, 2 * unit)


def test_a_changed_base_is_resumed_in_its_own_precision_only(tmp_path):
    args = {"method": "flora", "num_rounds": 2, "local_steps": 1, "save_rounds": 1}
    build(tmp_path, args).train()
    with pytest.raises(CheckpointError, match="base dtype was 'torch.float64' and is 'torch.float32'"):
        build(tmp_path, args, dtype=torch.float32).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("dtype, exact", [(torch.float64, True), (torch.float32, True), (torch.bfloat16, False)])
def test_a_fold_tells_what_the_bases_precision_gave_up(dtype, exact, monkeypatch):
    monkeypatch.setattr("fslora_hf.models.folding.ROWS", 5)  # several pieces of a weight, the last one smaller
    model = peft.get_peft_model(tiny.base_model(dtype), tiny.lora_config())
    adapter = torch.promote_types(dtype, torch.float32)
    before = weights(tiny.base_model(dtype))
    A = {name: randn(3, w.shape[1], seed=1).to(adapter) for name, w in before.items()}
    B = {name: randn(w.shape[0], 3, seed=2).to(adapter) * 1e-3 for name, w in before.items()}
    error, gap = FoldedBase.of(model).fold(A, B), 0.0
    for name, layer in reference.lora_layers(model):
        wanted = before[name].to(adapter) + 2.0 * B[name] @ A[name]  # alpha 12, rank 6
        gap += (layer.get_base_layer().weight.to(adapter) - wanted).square().sum(dtype=torch.float64).item()
    assert gap < 1e-9 if exact else gap > 1e-6
    assert error == (0.0 if exact else pytest.approx(gap, rel=1e-5))


def test_a_fold_finds_weights_that_lie_the_other_way():
    """GPT-2's layers hold `[in, out]`; merging the same pair by PEFT says what a fold must give."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8)).double()
    shape = {"r": 3, "lora_alpha": 6, "fan_in_fan_out": True, "init_lora_weights": False}
    config = LoraConfig(target_modules=["c_attn", "c_fc"], **shape)
    model = peft.get_peft_model(base, config)
    pairs = reference.read_adapter(model)
    folded = FoldedBase.of(model)
    before = {n: layer.get_base_layer().weight.clone() for n, layer in reference.lora_layers(model)}
    folded.fold({n: a for n, (a, _) in pairs.items()}, {n: b for n, (_, b) in pairs.items()})
    for name, layer in reference.lora_layers(model):
        a, b = pairs[name]
        assert layer.get_base_layer().weight.shape == (8, len(b))  # c_attn: 24, c_fc: 32
        torch.testing.assert_close(layer.get_base_layer().weight, before[name] + 2.0 * (b @ a).mT, rtol=0, atol=1e-13)


# ---- A client by itself ----

ALL = ["fslora", "fedit", "hetlora", "flexlora", "ffa_lora", "flora", "flora_residual"]


def test_all_methods_are_listed():
    assert set(ALL) == set(METHODS)


@pytest.mark.parametrize("method", ALL)
def test_law_8_a_trained_clients_adapter_gives_its_own_logits(tmp_path, method):
    """What a client of the stack computes after it was trained, against plain PEFT on its export."""
    model = peft.get_peft_model(tiny.base_model(), tiny.lora_config(rslora=True, zero_b=False))
    method, server = METHODS[method](), ServerState(*global_pair(model))
    k = 6 if method.full_rank_only else 2
    client = SimpleNamespace(
        rank=k, weight=1.0, fresh_rows=lambda module, n: np.random.default_rng(n).normal(size=(k, n)) / n
    )
    received = method.receive(server, client, lambda module: np.arange(6 - k, 6))
    trained = ClientAdapter(
        {m: t + 0.1 * randn(*t.shape, seed=3) for m, t in received.A.items()},
        {m: t + 0.1 * randn(*t.shape, seed=4) for m, t in received.B.items()},
        received.scale,
    )
    stack = ClientStack(model, 2, 6, trains=method.trains, beside_global=method.beside_global)
    stack.attach()
    stack.load([received, trained])
    ids = torch.tensor([tiny.tokenised()[i]["input_ids"][:3] for i in range(8)])
    with torch.no_grad(), stack.at_work(2 * ids.numel()):
        ours = model.train()(input_ids=ids.repeat(2, 1)).logits[8:]
        held = stack.current(1)
    stack.detach()
    if method.beside_global:
        held = beside(server, held)
    save_client_adapter(tmp_path, held, model.peft_config["default"])
    plain = peft.PeftModel.from_pretrained(tiny.base_model(), tmp_path)
    torch.testing.assert_close(logits(plain), ours, rtol=0, atol=1e-12)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == (6 + k if method.beside_global else k)


def test_a_client_of_flora_is_exported_at_its_own_rank(tmp_path):
    trainer = build(tmp_path / "run", {"method": "flora", "num_rounds": 1, "local_steps": 1, "client_ranks": RANKS})
    trainer.train()
    client = trainer.round_plan(1).clients[1]
    trainer.save_client_adapter(tmp_path / "client", client)
    exported = load_file(tmp_path / "client" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    fresh = client.fresh_rows("model.layers.0.self_attn.q_proj", 16)
    assert fresh.shape == (client.rank, 16) and np.abs(fresh).max() <= 0.25
    assert torch.equal(exported[f"{name}.lora_A.weight"], torch.from_numpy(fresh))
    assert (exported[f"{name}.lora_B.weight"] == 0).all()


def test_new_rows_differ_by_round_client_and_module_and_fill_their_interval(tmp_path):
    trainer = build(tmp_path, {"method": "flora", "client_ranks": RANKS})
    drawn = {}
    for t in range(40):
        for client in trainer.round_plan(t).clients:
            for module in ("a", "b"):
                drawn[t, client.client_id, module] = client.fresh_rows(module, 16)
    first = {key: tuple(rows[0]) for key, rows in drawn.items()}
    assert len(set(first.values())) == len(first)
    every = np.concatenate([rows.ravel() for rows in drawn.values()])
    assert abs(every.mean()) < 5 * 0.25 / np.sqrt(3 * every.size) and every.min() < -0.249 and every.max() > 0.249
    assert abs(every.var() - 0.0625 / 3) < 5 * 0.0625 * np.sqrt(4 / 45 / every.size)


# ---- What cannot be ----


def test_the_ledger_tells_what_was_given_up(tmp_path):
    for method, note in (("flora", "fold_error"), ("flora_residual", "truncation_error")):
        build(tmp_path / method, {"method": method, "num_rounds": 2, "local_steps": 1, "client_ranks": RANKS}).train()
        values = [record[note] for record in ledger(tmp_path / method)]
        assert all(value > 0 for value in values) if method == "flora_residual" else values == [0.0, 0.0]


def test_a_weight_that_is_used_elsewhere_is_not_folded_into(tmp_path):
    base = tiny.base_model()
    base.model.layers[1].self_attn.q_proj.weight = base.model.layers[0].self_attn.q_proj.weight
    model = peft.get_peft_model(base, tiny.lora_config())
    problems = list(check_layers(model, False, "flora"))
    assert len(problems) == 2 and "found it shared by" in problems[0] and "flora_residual" in problems[0]
    assert not list(check_layers(model, False, "flora_residual"))
