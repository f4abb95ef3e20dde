"""Laws 1, 4, 6 and 8: the trainer computes what the slow twin computes, and what it writes is plain PEFT's.

Law 1  the trainer equals one client, one plain adapter of rank k, one torch optimizer at a time, replaying the plan
Law 4  one client of full rank, one round, equals SFTTrainer fed the same batches
Law 6  in a round of one client exactly the planned rows of A and columns of B change
Law 8  a checkpoint, a client's adapter and a merge give plain PEFT's logits
"""

import math
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, get_scheduler
from trl import SFTConfig, SFTTrainer

from tests.support import reference, tiny
from tests.support.worker_train import QUIET, SMALL, build

EXACT = 1e-9
RANKS = [1, 2, 4, 6, 3]

# name: (fields of the config, arguments of the LoRA config). Together they cover what law 1 lists. A clipped gradient
# has forgotten the scale of its loss, so what divides a loss shows only in the configurations with max_grad_norm = 0.
COVERING = {
    "sgd from zero B, accumulated, not clipped": (
        {
            "optim": "sgd",
            "learning_rate": 0.2,
            "max_grad_norm": 0.0,
            "gradient_accumulation_steps": 2,
            "client_ranks": RANKS,
        },
        {},
    ),
    "adamw from zero B, blocks of 2": (
        {"optim": "adamw_torch", "client_ranks": RANKS, "per_device_train_clients": 2, "lr_scheduler_type": "cosine"},
        {"rslora": True},
    ),
    "sgd, clipped, decayed, accumulated, rsLoRA, warm-up, by examples, one sketch a model": (
        {
            "optim": "sgd",
            "learning_rate": 0.2,
            "weight_decay": 0.1,
            "max_grad_norm": 0.05,
            "gradient_accumulation_steps": 2,
            "lr_scheduler_type": "linear",
            "warmup_steps": 2,
            "num_rounds": 4,
            "client_weighting": "num_examples",
            "sketch_scope": "model",
            "client_ranks": RANKS,
        },
        {"rslora": True, "zero_b": False},
    ),
    "the same in blocks of 3": (
        {
            "optim": "sgd",
            "learning_rate": 0.2,
            "weight_decay": 0.1,
            "max_grad_norm": 0.05,
            "gradient_accumulation_steps": 3,
            "lr_scheduler_type": "cosine",
            "client_weighting": "num_examples",
            "client_ranks": RANKS,
            "per_device_train_clients": 3,
        },
        {"zero_b": False},
    ),
    "adamw, clipped, decayed, accumulated, server adamw": (
        {
            "optim": "adamw_torch",
            "weight_decay": 0.1,
            "max_grad_norm": 0.05,
            "adam_beta1": 0.8,
            "adam_beta2": 0.95,
            "adam_epsilon": 1e-4,
            "gradient_accumulation_steps": 2,
            "server_optim": "adamw",
            "rank_distribution": "uniform",
            "min_rank": 1,
            "max_rank": 5,
            "per_device_train_clients": 5,
        },
        {"rslora": True, "zero_b": False},
    ),
    "part of the clients, server momentum": (
        {
            "optim": "adamw_torch_fused",
            "clients_per_round": 3,
            "server_optim": "sgd_momentum",
            "server_learning_rate": 0.7,
            "client_weighting": "num_examples",
            "client_ranks": RANKS,
            "per_device_train_clients": 2,
            "num_rounds": 5,
        },
        {},
    ),
    "server adam, recomputed activations, accumulated, not clipped, blocks of 2": (
        {
            "optim": "sgd",
            "learning_rate": 0.2,
            "server_optim": "adam",
            "server_learning_rate": 0.01,
            "activation_checkpointing": True,
            "gradient_accumulation_steps": 3,
            "max_grad_norm": 0.0,
            "sketch_scope": "model",
            "client_ranks": RANKS,
            "per_device_train_clients": 2,
        },
        {},
    ),
    "server sgd below one, not clipped, batches of one": (
        {
            "optim": "sgd",
            "learning_rate": 0.2,
            "server_learning_rate": 0.5,
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": 1,
            "lr_scheduler_type": "cosine",
            "client_ranks": RANKS,
        },
        {"zero_b": False},
    ),
    "hetlora, sgd from zero B, accumulated, not clipped": (
        {
            "method": "hetlora",
            "optim": "sgd",
            "learning_rate": 0.2,
            "max_grad_norm": 0.0,
            "gradient_accumulation_steps": 2,
            "client_ranks": RANKS,
        },
        {},
    ),
    "hetlora, adamw, clipped, decayed, part of the clients, by examples, server adamw, blocks of 2": (
        {
            "method": "hetlora",
            "optim": "adamw_torch",
            "weight_decay": 0.1,
            "max_grad_norm": 0.05,
            "clients_per_round": 2,
            "client_weighting": "num_examples",
            "server_optim": "adamw",
            "client_ranks": [1, 2, 4, 5, 3],
            "per_device_train_clients": 2,
            "num_rounds": 5,
        },
        {"rslora": True, "zero_b": False},
    ),
    "flexlora, sgd from zero B, accumulated, not clipped": (
        {
            "method": "flexlora",
            "optim": "sgd",
            "learning_rate": 0.2,
            "max_grad_norm": 0.0,
            "gradient_accumulation_steps": 2,
            "client_ranks": RANKS,
        },
        {},
    ),
    "flexlora, adamw, clipped, decayed, by examples, blocks of 3": (
        {
            "method": "flexlora",
            "optim": "adamw_torch",
            "weight_decay": 0.1,
            "max_grad_norm": 0.05,
            "client_weighting": "num_examples",
            "client_ranks": RANKS,
            "per_device_train_clients": 3,
            "num_rounds": 4,
        },
        {"rslora": True, "zero_b": False},
    ),
    "flexlora, a first round at rate zero, cohorts of a smaller rank than the adapter, blocks of 2": (
        {
            "method": "flexlora",
            "optim": "adamw_torch",
            "lr_scheduler_type": "linear",
            "warmup_steps": 1,
            "clients_per_round": 2,
            "client_ranks": [1, 2, 2, 1, 3],
            "per_device_train_clients": 2,
            "num_rounds": 5,
        },
        {},
    ),
    "flora_residual, sgd, accumulated, not clipped": (
        {
            "method": "flora_residual",
            "optim": "sgd",
            "learning_rate": 0.2,
            "max_grad_norm": 0.0,
            "gradient_accumulation_steps": 2,
            "client_ranks": RANKS,
        },
        {},
    ),
    "flora_residual, adamw, clipped, decayed, part of the clients, by examples, blocks of 2": (
        {
            "method": "flora_residual",
            "optim": "adamw_torch",
            "weight_decay": 0.1,
            "max_grad_norm": 0.05,
            "clients_per_round": 3,
            "client_weighting": "num_examples",
            "client_ranks": RANKS,
            "per_device_train_clients": 2,
            "num_rounds": 4,
        },
        {"rslora": True, "zero_b": False},
    ),
    "ffa_lora, adamw, clipped, decayed, accumulated, server adam, blocks of 2": (
        {
            "method": "ffa_lora",
            "optim": "adamw_torch",
            "weight_decay": 0.1,
            "max_grad_norm": 0.05,
            "gradient_accumulation_steps": 2,
            "server_optim": "adam",
            "per_device_train_clients": 2,
        },
        {"rslora": True, "zero_b": False},
    ),
    "ffa_lora, sgd from zero B, not clipped, by examples, recomputed activations": (
        {
            "activation_checkpointing": True,
            "method": "ffa_lora",
            "optim": "sgd",
            "learning_rate": 0.2,
            "max_grad_norm": 0.0,
            "client_weighting": "num_examples",
        },
        {},
    ),
}


class GlobalAdapters(TrainerCallback):
    """What `default` holds at the start of each round, and at the end."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._note(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._note(model)

    def _note(self, model):
        now = reference.read_adapter(model)
        if not self.seen or reference.max_difference(now, self.seen[-1]) > 0:
            self.seen.append(now)


def trained(tmp_path, args, lora=None, **kwargs):
    """The trainer after its run, and the global adapter at the start, after every round and at the end."""
    rounds = GlobalAdapters()
    trainer = build(tmp_path / "run", {"num_rounds": 3, "local_steps": 3, **args}, lora, callbacks=[rounds], **kwargs)
    start = reference.read_adapter(trainer.model)
    trainer.train()
    return trainer, start, rounds.seen


@pytest.mark.parametrize("name", COVERING)
def test_law_1_the_trainer_equals_the_slow_twin(tmp_path, name):
    args, lora = COVERING[name]
    trainer, start, seen = trained(tmp_path, args, lora)
    plans = [trainer.round_plan(t) for t in range(trainer.args.num_rounds)]
    norms = []
    expected = reference.replay(
        tiny.base_model(), tiny.lora_config(**lora), start, trainer.train_dataset, plans, trainer.args, norms
    )
    assert reference.max_difference(start, expected[-1]) > 1e-3  # something was learnt
    if args.get("max_grad_norm"):
        assert np.mean(np.array(norms) > args["max_grad_norm"]) > 0.9  # clipping bites
    # A round at rate zero (the first of a warm-up) changes nothing and leaves no new adapter to see.
    moments = [start, *(after for plan, after in zip(plans, expected, strict=True) if plan.learning_rate > 0)]
    assert len(seen) == len(moments)
    gaps = [reference.max_difference(now, then) for now, then in zip(seen, moments, strict=True)]
    assert max(gaps) < EXACT, gaps
    assert trainer.model.active_adapters == ["default"]


@pytest.mark.parametrize("name", COVERING)
def test_law_1_the_plan_keeps_its_contract(tmp_path, name):
    """The twin trusts the plan, so what the plan promises is checked by itself."""
    args, lora = COVERING[name]
    trainer = build(tmp_path / "run", {"num_rounds": 3, "local_steps": 3, **args}, lora)
    config = trainer.args
    owners = np.array(trainer.train_dataset["client_id"])
    shards = {client: np.flatnonzero(owners == client) for client in np.unique(owners).tolist()}
    ranks = dict(zip(shards, config.client_ranks or [None] * len(shards), strict=True))
    probe = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    warmup = config.get_warmup_steps(config.num_rounds)
    schedule = get_scheduler(config.lr_scheduler_type, probe, warmup, config.num_rounds)
    for t in range(config.num_rounds):
        plan = trainer.round_plan(t)
        assert plan.round == t and math.isclose(plan.learning_rate, schedule.get_last_lr()[0], rel_tol=1e-12)
        ids = [client.client_id for client in plan.clients]
        assert len(set(ids)) == len(ids) == (config.clients_per_round or len(shards)) and set(ids) <= shards.keys()
        sizes = np.array([len(shards[i]) if config.client_weighting == "num_examples" else 1 for i in ids])
        np.testing.assert_allclose([client.weight for client in plan.clients], sizes / sizes.sum(), rtol=1e-12)
        for client in plan.clients:
            assert client.rank == (ranks[client.client_id] or client.rank)
            assert client.cohort_rank == sum(each.rank for each in plan.clients)
            assert client.participation == len(ids) / len(shards)
            check_reading(client.example_ids, shards[client.client_id], config)
        probe.step()
        schedule.step()


def check_reading(example_ids, shard, config):
    """A permutation of the shard, then another, in steps of one optimizer step's examples."""
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert example_ids.shape == (config.local_steps, batch)
    for i in range(0, example_ids.size, len(shard)):
        read = example_ids.ravel()[i : i + len(shard)]
        assert len(np.unique(read)) == len(read) and np.isin(read, shard).all()


def test_the_twin_at_full_rank_is_plain_peft_training():
    """The twin itself, against a loop that knows of no plan: one client, one round, rank r, scale alpha / r."""
    config, dataset = tiny.lora_config(zero_b=False), tiny.tokenised({5: 12})
    model = peft.get_peft_model(tiny.base_model(), config)
    start = reference.read_adapter(model)
    steps = np.arange(12).reshape(3, 4)
    args = SimpleNamespace(
        optim="sgd", weight_decay=0.0, max_grad_norm=1.0, per_device_train_batch_size=2, server_optim="sgd",
        server_learning_rate=None, method="fslora", upload_top_k=None,
    )  # fmt: skip
    client = SimpleNamespace(weight=1.0, example_ids=steps, sketch=lambda module: np.arange(6))
    plan = SimpleNamespace(clients=[client], learning_rate=0.2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    for step in steps:
        optimizer.zero_grad()
        rows = [dataset[int(row)] for row in step]  # one batch, Hugging Face's own loss
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
        labels = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows])
        log_probs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        scored = labels[:, 1:] != -100
        nll = -log_probs.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        nll[scored].mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    (replayed,) = reference.replay(tiny.base_model(), config, start, dataset, [plan], args)
    assert reference.max_difference(start, replayed) > 1e-3
    assert reference.max_difference(reference.read_adapter(model), replayed) < 1e-13


@pytest.mark.parametrize("text", [False, True], ids=["tokenised", "prompt-completion"])
@pytest.mark.parametrize("optim, rate, clip", [("sgd", 0.05, 0.0), ("sgd", 0.2, 0.1), ("adamw_torch", 3e-3, 1.0)])
def test_law_4_one_full_rank_client_equals_sft_trainer(tmp_path, optim, rate, clip, text):
    shared = {
        "optim": optim,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": clip,
        "gradient_accumulation_steps": 2,
        "weight_decay": 0.01,
    }
    dataset = tiny.texts({5: 17}) if text else tiny.tokenised({5: 17})
    ours, start, seen = trained(
        tmp_path, {**shared, "num_rounds": 1, "local_steps": 5}, {"rslora": True}, dataset=dataset
    )
    steps = ours.round_plan(0).clients[0].example_ids
    batches = [ours.train_dataset.select(rows) for rows in steps.reshape(-1, SMALL["per_device_train_batch_size"])]

    class FedTheSameBatches(SFTTrainer):
        def get_train_dataloader(self):
            return DataLoader(batches, batch_size=None, collate_fn=lambda rows: self.data_collator(list(rows)))

    plain = FedTheSameBatches(
        model=tiny.base_model(),
        args=SFTConfig(output_dir=str(tmp_path / "plain"), save_strategy="no", max_steps=5, **QUIET, **shared),
        train_dataset=dataset,
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora_config(rslora=True),
    )
    reference.write_adapter(plain.model, start)
    plain.train()
    theirs = reference.read_adapter(plain.model)
    assert plain.state.global_step == 5
    assert reference.max_difference(start, theirs) > 1e-3
    # SFTTrainer's head works in float32; the rates keep five steps from amplifying that.
    assert reference.max_difference(seen[-1], theirs) < 1e-6


@pytest.mark.parametrize("scope", ["module", "model"])
def test_law_6_exactly_the_planned_rows_and_columns_change(tmp_path, scope):
    rounds = 4
    trainer, start, seen = trained(
        tmp_path,
        {
            "optim": "adamw_torch",
            "num_rounds": rounds,
            "client_ranks": [2],
            "sketch_scope": scope,
        },
        dataset=tiny.tokenised({41: 25}),  # one client, so that its rounds are compared with each other
    )
    assert len(seen) == rounds + 1
    changed = []  # of each round: {module: rows of A that changed}, read from the tensors alone
    for before, after in zip(seen, seen[1:], strict=False):
        sets = {}
        for name in before:
            rows = (before[name][0] != after[name][0]).any(dim=1).nonzero().flatten().tolist()
            columns = (before[name][1] != after[name][1]).any(dim=0).nonzero().flatten().tolist()
            assert rows == columns and len(rows) == 2, name
            sets[name] = tuple(rows)
        changed.append(sets)
    for t, sets in enumerate(changed):
        (client,) = trainer.round_plan(t).clients
        assert sets == {name: tuple(client.sketch(name).tolist()) for name in sets}
    assert len(changed[0]) == 2 * len(tiny.TARGETS)
    assert len({tuple(sets.items()) for sets in changed}) > 1  # rounds differ
    for sets in changed:
        assert (len(set(sets.values())) == 1) == (scope == "model")  # modules differ, or share the set


def logits(model) -> torch.Tensor:
    ids = torch.tensor([tiny.tokenised()[i]["input_ids"][:3] for i in range(8)])
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


METHODS = {
    "fslora": {"client_ranks": RANKS},
    "hetlora": {"client_ranks": RANKS},
    "flexlora": {"client_ranks": RANKS},
    "flora_residual": {"client_ranks": RANKS},
    "ffa_lora": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_law_8_a_checkpoint_is_a_plain_adapter(tmp_path, method):
    trainer, start, seen = trained(tmp_path, {"save_rounds": 2, "method": method, **METHODS[method]}, {"rslora": True})
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    assert len(checkpoints) == 2  # after the second round and after the last
    for folder, after in zip(checkpoints, (seen[2], seen[3]), strict=True):
        model = peft.PeftModel.from_pretrained(tiny.base_model(), folder)
        assert reference.max_difference(reference.read_adapter(model), after) == 0
    expected = logits(trainer.model)
    assert (expected - logits(tiny.base_model())).abs().max() > 1e-3  # the adapter does something
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=EXACT)
    torch.testing.assert_close(logits(trainer.model.merge_and_unload()), expected, rtol=0, atol=EXACT)


# A client of flora_residual trains beside the global adapter: test_flora.py.
ALONE = [method for method in METHODS if method != "flora_residual"]


@pytest.mark.parametrize("method, rslora", [("fslora", False), *((method, True) for method in ALONE)])
def test_law_8_a_clients_adapter_is_a_plain_adapter_of_its_rank(tmp_path, method, rslora):
    """The client's part of the global adapter, by hand into the base's weights: what plain PEFT makes of the export.

    In fslora, W0 + scale * r/k * B[:, I] A[I, :]; else W0 + scale * B[:, :k] A[:k, :].
    """
    trainer, _, seen = trained(tmp_path, {"method": method, **METHODS[method]}, {"rslora": rslora})
    scale, r = 12 / math.sqrt(6) if rslora else 12 / 6, 6
    full = logits(trainer.model)
    clients = trainer.round_plan(1).clients
    assert sorted(client.rank for client in clients) == sorted(METHODS[method].get("client_ranks", [r] * 5))
    for client in clients:
        trainer.save_client_adapter(tmp_path / str(client.client_id), client)
        by_hand = tiny.base_model()
        for name, (a, b) in seen[-1].items():
            k = client.rank
            chosen, factor = (client.sketch(name), r / k) if method == "fslora" else (np.arange(k), 1.0)
            by_hand.get_submodule(name).weight.data += scale * factor * b[:, chosen] @ a[chosen]
        model = peft.PeftModel.from_pretrained(tiny.base_model(), tmp_path / str(client.client_id))
        assert all(a.shape[0] == client.rank == b.shape[1] for a, b in reference.read_adapter(model).values())
        torch.testing.assert_close(logits(model), logits(by_hand), rtol=0, atol=EXACT)
        torch.testing.assert_close(logits(model.merge_and_unload()), logits(by_hand), rtol=0, atol=EXACT)
        assert ((logits(by_hand) - full).abs().max() < EXACT) == (client.rank == r)
    assert torch.equal(logits(trainer.model), full)  # exporting changes nothing
