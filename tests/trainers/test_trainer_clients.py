"""A client's turn in the trainer: a fresh optimizer, precision, loss, and an update that may be lost."""

import math
from pathlib import Path

import pytest
import torch

from fslora_hf.rounds.watch import RunLost
from tests.support import reference, tiny
from tests.support.worker_train import ledger
from tests.trainers.test_trainer import RUN, STEPS, Watching, make, train_and_read

# ---- Local optimizers ----

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adamw_torch": (torch.optim.AdamW, {"weight_decay": 0.0}),
}


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_client_starts_with_a_fresh_optimizer(tmp_path, monkeypatch, optim):
    """As the slow twin's, who makes one for each client; blocks of two, so that parameters are reused."""
    kind, options = OPTIMIZERS[optim]
    monkeypatch.setattr(reference, "client_optimizer", lambda p, lr, args: kind(p, lr=lr, **options))
    watching = Watching()
    trainer = make(tmp_path, optim=optim, callbacks=[watching], per_device_train_clients=2, max_grad_norm=0.5)
    start = reference.read_adapter(trainer.model)
    end = train_and_read(trainer)
    plans = [trainer.round_plan(t) for t in (0, 1)]
    lora = tiny.lora_config(zero_b=False)
    expected = reference.replay(tiny.base_model(), lora, start, trainer.train_dataset, plans, trainer.args)
    assert reference.max_difference(end, expected[-1]) < 1e-9 < reference.max_difference(start, end)
    assert all(not state or all((v == 0).all() for v in state.values()) for state in watching.states)
    assert bool(watching.states[-1]) == (optim == "adagrad")  # the one that is born with a state


# ---- Precision, memory, loss ----


def test_recomputed_activations_change_nothing(tmp_path):
    ends = [
        train_and_read(make(tmp_path / str(on), activation_checkpointing=on, lora={"dropout": 0.1}, num_rounds=1))
        for on in (True, False)
    ]
    assert reference.max_difference(*ends) < 1e-12


def test_bf16_autocast_runs(tmp_path):
    """Matrix products in bfloat16 give nearly the same run; the adapter stays float32."""
    ends, dtypes = [], set()
    for bf16 in (False, True):
        trainer = make(
            tmp_path / str(bf16), model=tiny.base_model(torch.float32), bf16=bf16, optim="sgd", num_rounds=1
        )
        layer = trainer.model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj")
        handle = layer.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
        start = reference.read_adapter(trainer.model)
        ends.append(train_and_read(trainer))
        handle.remove()
    assert dtypes == {torch.float32, torch.bfloat16}
    assert all(half.dtype == torch.float32 for pair in ends[1].values() for half in pair)
    moved, apart = reference.max_difference(start, ends[0]), reference.max_difference(*ends)
    assert 0 < apart < 0.1 * moved, (apart, moved)


def test_dft_loss(tmp_path):
    """arXiv 2508.05629: every token's loss times its own probability, which carries no gradient."""
    args = {"loss_type": "dft", "optim": "sgd", "num_rounds": 1, "local_steps": 1, "max_grad_norm": 0.0}
    trainer = make(tmp_path, **args, client_ranks=[6] * 5, clients_per_round=1)
    start = reference.read_adapter(trainer.model)
    end = train_and_read(trainer)
    ((client,),) = [trainer.round_plan(0).clients]
    model = reference.rank_k_model(tiny.base_model(), tiny.lora_config(), start, 6)
    losses = []
    for row in client.example_ids.reshape(-1).tolist():
        ids, labels = (torch.tensor(trainer.train_dataset[row][name]) for name in ("input_ids", "labels"))
        keep = labels[1:] != -100
        log_probs = model(input_ids=ids[None]).logits[0, :-1][keep].log_softmax(-1)
        chosen = log_probs.gather(-1, labels[1:][keep, None])
        losses.append(-chosen * chosen.exp().detach())
    loss = torch.cat(losses).mean()
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    assert reference.max_difference(end, reference.read_adapter(model)) < 1e-12 < reference.max_difference(start, end)
    assert ledger(tmp_path)[0]["losses"] == [pytest.approx(loss.item())]


# ---- Clients that fail ----

POISON = 31


def poisoned(owners: set[int]):
    """A model that gives NaN for a word, and rows in which only these clients use it."""
    model = tiny.base_model()
    model.model.embed_tokens.weight.data[POISON] = math.nan
    rows = tiny.tokenised().map(
        lambda row: {
            "input_ids": [POISON if row["client_id"] in owners else min(t, POISON - 1) for t in row["input_ids"][:-1]]
            + [3],
            "labels": row["labels"][:-1] + [3],
        }
    )
    return {"model": model, "rows": rows}


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("block", [1, 5])
def test_a_client_that_is_not_finite_is_left_out_and_the_run_goes_on(tmp_path, caplog, block, optim):
    trainer = make(tmp_path, **poisoned({41}), per_device_train_clients=block, optim=optim, logging_steps=1)
    start = reference.read_adapter(trainer.model)
    end = train_and_read(trainer)
    assert reference.max_difference(start, end) > 1e-5  # which is infinite where something is not finite
    assert all(half.isfinite().all() for pair in end.values() for half in pair)
    for record in ledger(tmp_path):
        lost = record["clients"].index(41)
        assert record["refused"] == [{"client_id": 41, "reason": "the update is not finite"}]
        assert record["weights"] == [pytest.approx(0.25) if c != 41 else 0.0 for c in record["clients"]]
        for key in ("losses", "update_norms"):
            assert [value is None for value in record[key]] == [i == lost for i in range(5)], key
    for t in (0, 1):
        text = f"Round {t}: the update of client 41 was left out because the update is not finite."
        assert text in caplog.messages
    assert [e["clients_accepted"] for e in trainer.state.log_history if "clients_accepted" in e] == [4, 4]
    assert reference.max_difference(end, without(tmp_path, 41, block, optim)) < 1e-9


def without(tmp_path, client, block, optim) -> reference.Adapter:
    """The slow twin's run over the same plan in which this client never was."""
    trainer = make(tmp_path / "plan", **poisoned({client}), optim=optim, client_ranks=RUN["client_ranks"])
    plans = []
    for t in (0, 1):
        plan = trainer.round_plan(t)
        others = [c for c in plan.clients if c.client_id != client]
        for other in others:
            object.__setattr__(other, "weight", 1 / len(others))
        plans.append(type(plan)(t, plan.learning_rate, tuple(others)))
    start = reference.read_adapter(trainer.model)
    base = poisoned({client})["model"]
    lora = tiny.lora_config(zero_b=False)
    return reference.replay(base, lora, start, trainer.train_dataset, plans, trainer.args)[-1]


@pytest.mark.parametrize("server_optim", ["sgd", "sgd_momentum", "adam"])
def test_a_round_without_a_usable_update_changes_nothing(tmp_path, server_optim):
    trainer = make(tmp_path, **poisoned(set(tiny.SHARDS)), server_optim=server_optim, save_rounds=1)
    start = reference.read_adapter(trainer.model)
    with pytest.raises(RunLost, match="found none of 10 updates folded in 2 rounds"):
        trainer.train()
    assert reference.max_difference(start, reference.read_adapter(trainer.model)) == 0
    for record in ledger(tmp_path):
        assert len(record["refused"]) == 5 and record["weights"] == [0.0] * 5 and record["losses"] == [None] * 5
    logged = [entry for entry in trainer.state.log_history if "clients_accepted" in entry]
    assert [entry["clients_accepted"] for entry in logged] == [0, 0] and "client_loss" not in logged[0]
    states = [Path(tmp_path, f"checkpoint-{n * STEPS}", "federated_state.safetensors").read_bytes() for n in (1, 2)]
    assert states[0] == states[1]
