"""A run ends with a sentence if a targeted layer that could move has not, and with none while it could not."""

from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from fslora_hf.config.federation import FederatedSketchConfig
from fslora_hf.federation.packet import Packet
from fslora_hf.federation.roster import FederationError
from fslora_hf.methods import METHODS, ClientAdapter, ClientUpdate
from fslora_hf.trainers.sft import FederatedSketchTrainer
from fslora_hf.updates.movement import Movement, NeverTrained
from recipes import train
from tests.models.test_targets import lora, model_with_experts
from tests.support import federated, tiny
from tests.support.worker_train import QUIET, SMALL, build, ledger

pytest_plugins = ("tests.support.forked",)

# With no keys in the first layer its attention is the same whatever is asked: no gradient ever reaches its queries.
KEYS = "model.layers.0.self_attn.k_proj"
QUERIES = "model.layers.0.self_attn.q_proj"
ARGS = {"num_rounds": 3, "local_steps": 2, "save_rounds": 1, "client_ranks": [1, 2, 4, 6, 6]}


def trainer_of(folder, args, lora=None, callbacks=None, zeroed=KEYS, **parts):
    trainer = build(folder, {**ARGS, **args}, lora, callbacks=callbacks, **parts)
    if zeroed:
        trainer.model.get_base_model().get_submodule(zeroed).weight.data.zero_()
    return trainer


def ended(trainer, round: int, sides: str) -> None:
    """The run ends after this round, whose line and every earlier checkpoint are there, naming the queries alone."""
    with pytest.raises(NeverTrained) as error:
        trainer.train()
    text = f"found that after round {round} no client has moved {QUERIES} ({sides}): leave these layers out"
    assert f"Expected every targeted layer to be trained, {text}" in str(error.value)
    folder = trainer.ledger_path.parent
    assert [line["round"] for line in ledger(folder)] == list(range(round + 1))
    assert len(list(folder.glob("checkpoint-*"))) == round


@pytest.mark.parametrize("method, local_steps", [*((method, 1) for method in METHODS), ("fslora", 2), ("flora", 2)])
def test_what_cannot_be_trained_ends_a_run_after_its_first_round(tmp_path, method, local_steps):
    """Whatever the method, and with weight decay, which moves what no gradient does. What can be trained goes on."""
    args = {"method": method, "local_steps": local_steps, "weight_decay": 0.1, "num_rounds": 2}
    args |= {"client_ranks": None} if METHODS[method].full_rank_only else {}
    ended(trainer_of(tmp_path / "dead", args), 0, "B")
    alive = trainer_of(tmp_path / "alive", args, zeroed=None)
    alive.train()
    assert len(ledger(tmp_path / "alive")) == 2


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_rate_of_zero_moves_nothing_and_a_small_one_may_not_be_seen_to(tmp_path, optim):
    """Under warm-up: judged in the first round that has a rate; and A, which float32 does not see move, is not."""
    warm = {"warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup", "optim": optim, "num_rounds": 5}
    ended(trainer_of(tmp_path / "dead", warm), 1, "B")
    rate = {**warm, "learning_rate": 1e-12, "warmup_steps": 4}
    alive = trainer_of(tmp_path / "alive", rate, zeroed=None, dtype=torch.float32)
    alive.train()
    assert len(ledger(tmp_path / "alive")) == 5


def test_an_adapter_that_is_trained_on_is_judged_at_the_full_rate(tmp_path):
    """Both its sides rest, which at a low rate could be rounding."""
    warm = {"warmup_steps": 4, "lr_scheduler_type": "constant_with_warmup", "num_rounds": 5}
    ended(trainer_of(tmp_path, warm, {"zero_b": False}), 2, "A and B")


def test_a_refused_update_says_nothing(tmp_path):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            for name, parameter in model.named_parameters():
                if "client_B" in name and state.global_step <= 2:
                    parameter.data.fill_(float("nan"))

    one = {"clients_per_round": 1, "client_ranks": None}
    ended(trainer_of(tmp_path, one, callbacks=[Poison()]), 1, "B")


def test_some_client_is_enough(tmp_path):
    """Only the widest client's queries move in the first round."""

    class Hold(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            layer = model.get_base_model().get_submodule(QUERIES)
            if layer.client_B.shape[2] < 6:
                layer.client_B.data.zero_()

    alive = trainer_of(tmp_path, {"client_ranks": [1, 2, 3, 4, 6]}, callbacks=[Hold()], zeroed=None)
    alive.train()
    assert len(ledger(tmp_path)) == 3


@pytest.mark.parametrize("side", ["A", "B"])
def test_either_side_alone_is_seen_to_rest(tmp_path, side):
    class Freeze(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            getattr(model.get_base_model().get_submodule(QUERIES), f"client_{side}").requires_grad_(False)

    ended(trainer_of(tmp_path, {}, callbacks=[Freeze()], zeroed=None), 0, side)


def test_a_router_that_only_chooses_is_told_where_sft_trainer_leaves_it_untrained(tmp_path):
    config = lora(["q_proj", "router"])
    args = SFTConfig(output_dir=str(tmp_path / "plain"), max_steps=2, **QUIET, save_strategy="no")
    rows, parts = tiny.tokenised({0: 6}), {"processing_class": tiny.tokenizer(), "peft_config": config}
    plain = SFTTrainer(model_with_experts(), args, train_dataset=rows.remove_columns("client_id"), **parts)
    plain.train()
    untrained = [n for n, p in plain.model.named_parameters() if ".lora_B." in n and not p.any()]
    assert len(untrained) == 2 and all("mlp.router" in name for name in untrained)
    args = FederatedSketchConfig(output_dir=str(tmp_path / "ours"), **{**QUIET, **SMALL}, num_rounds=2, local_steps=2)
    ours = FederatedSketchTrainer(model_with_experts(), args, train_dataset=rows, **parts)
    with pytest.raises(NeverTrained, match=r"moved model.layers.0.mlp.router \(B\), model.layers.1.mlp.router"):
        ours.train()


def test_two_processes_end_together_also_an_idle_one(fork_ranks, tmp_path):
    args = {**ARGS, "per_device_train_clients": 3, "clients_per_round": 3}
    job = {"output_dir": str(tmp_path / "run"), "args": args, "dtype": "float64", "result": str(tmp_path / "end")}
    codes = fork_ranks(job | {"zeroed": f"base_model.model.{KEYS}"})
    assert 1 in codes and 0 not in codes
    assert f"no client has moved {QUERIES} (B): " in (tmp_path / "end.error").read_text()
    assert len(ledger(tmp_path / "run")) == 1


def test_a_script_ends_with_the_sentence_and_the_exit_code_1(tmp_path, monkeypatch):
    def stop(resume_from_checkpoint):
        raise NeverTrained("Expected this, found that: do something.")

    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    monkeypatch.setattr(train, "parse_recipe", lambda types: (None, args, None))
    monkeypatch.setattr(train, "build_trainer", lambda *settings: SimpleNamespace(train=stop))
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == "Expected this, found that: do something."  # which Python prints, with the exit code 1


# ---- In a federation ----


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model whose first layer's queries cannot be trained, and rows."""
    folder = federated.write_model_and_rows(tmp_path_factory.mktemp("source"))
    weights = load_file(folder / "model" / "model.safetensors")
    weights[f"{KEYS}.weight"].zero_()
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_federations_server_sees_it_in_the_updates(tmp_path, source):
    recipe = federated.write_recipe(source, tmp_path)
    exchange = federated.LocalExchange(federated.make_nodes(tmp_path))
    with pytest.raises(NeverTrained, match=rf"after round 0 no client has moved {QUERIES} \(B\)"):
        federated.federate(recipe, exchange)
    assert len(ledger(tmp_path / "run")) == 1


@pytest.mark.parametrize(("rounds", "seen"), [(3, 2), (1, 1)])
def test_rounds_of_one_client_are_looked_at_together(tmp_path, source, rounds, seen):
    recipe = federated.write_recipe(source, tmp_path, clients_per_round=1, num_rounds=rounds, seed=2)
    with pytest.raises(NeverTrained, match=rf"no client has moved {QUERIES} \(B\)"):
        federated.federate(recipe, federated.LocalExchange(federated.make_nodes(tmp_path)))
    assert len(ledger(tmp_path / "run")) == seen


def test_one_node_that_sends_zeros_does_not_end_a_run_of_several(tmp_path):
    def sends_zeros(packet):
        answer = nodes[100](packet)
        return Packet(answer.header, {name: np.zeros_like(tensor) for name, tensor in answer.tensors.items()})

    recipe = federated.write_recipe(federated.write_model_and_rows(tmp_path), tmp_path, clients_per_round=1, seed=1)
    nodes = federated.make_nodes(tmp_path)
    federated.federate(recipe, federated.LocalExchange(nodes | {100: sends_zeros}))
    records = ledger(tmp_path / "run")
    assert len(records) == 3 and records[0]["clients"] == [0] and records[0]["update_norms"] == [0.0]


def test_of_updates_that_are_sent_in_part_the_nodes_tell(tmp_path, source):
    recipe = federated.write_recipe(source, tmp_path, upload_top_k=0.1, clients_per_round=None)
    exchange = federated.LocalExchange(federated.make_nodes(tmp_path))
    with pytest.raises(FederationError, match=rf"found 0 .*no client has moved {QUERIES} \(B\)"):
        federated.federate(recipe, exchange)


def test_a_federation_that_trains_all_goes_on_also_where_little_is_sent(tmp_path):
    source = federated.write_model_and_rows(tmp_path)
    recipe = federated.write_recipe(source, tmp_path, upload_top_k=0.02, lr_scheduler_type="constant")
    federated.federate(recipe, federated.LocalExchange(federated.make_nodes(tmp_path)))
    assert len(ledger(tmp_path / "run")) == 3


# ---- The rules, on updates ----


def update(A, dA, B, dB) -> ClientUpdate:
    """Of one module `m`: what the client received, and how it changed; None for a side that is not trained."""
    received = ClientAdapter({"m": torch.tensor([A])}, {"m": torch.tensor([B])}, 1.0)
    changes = ({} if change is None else {"m": torch.tensor([change])} for change in (dA, dB))
    return ClientUpdate(*changes, 1.0, None, received, 0)


ONE, NONE = [1.0, 2.0], [0.0, 0.0]
REST = {
    "B rests while A is there": (update(ONE, NONE, NONE, NONE), "AB", 1, 0.1, "m (B)"),
    "A rests while B moves": (update(ONE, NONE, NONE, ONE), "AB", 2, 0.1, "m (A)"),
    "A rests while B moves, in one step": (update(ONE, NONE, NONE, ONE), "AB", 1, 0.1, None),
    "A rests while B hardly moves": (update(ONE, NONE, NONE, [1e-9, 0.0]), "AB", 2, 0.1, None),
    "A rests while B, which was there, moves": (update(ONE, NONE, ONE, ONE), "AB", 1, 0.1, "m (A)"),
    "both rest": (update(ONE, NONE, ONE, NONE), "AB", 1, 1.0, "m (A and B)"),
    "both rest at a low rate": (update(ONE, NONE, ONE, NONE), "AB", 1, 0.1, None),
    "nothing to learn from": (update(NONE, NONE, NONE, NONE), "AB", 2, 1.0, None),
    "no rate": (update(ONE, NONE, NONE, NONE), "AB", 2, 0.0, None),
    "A is not trained": (update(ONE, None, NONE, NONE), "B", 1, 0.1, "m (B)"),
    "A is not trained, B was there": (update(ONE, None, ONE, NONE), "B", 1, 1.0, "m (B)"),
    "both move": (update(ONE, ONE, NONE, ONE), "AB", 1, 1.0, None),
}


@pytest.mark.parametrize("case", REST)
def test_who_could_have_moved(case):
    given, trains, local_steps, rate, found = REST[case]
    movement = Movement(["m"], trains, local_steps, 1.0)
    assert movement.note(given) is given
    if found is None:
        movement.judge(0, rate, lambda value: [value])
        return
    with pytest.raises(NeverTrained) as error:
        movement.judge(0, rate, lambda value: [value])
    assert f"no client has moved {found}: leave" in str(error.value)


def test_a_side_may_rest_with_the_other_one_once_that_has_moved():
    """Rounding at a low rate, which leaves now one side and now both as they are."""
    movement = Movement(["m"], "AB", 1, 1.0)
    for round, given in enumerate([update(ONE, NONE, ONE, [1e-9, 0.0]), update(ONE, NONE, ONE, NONE)]):
        movement.note(given)
        movement.judge(round, 1.0, lambda value: [value])


def test_processes_settle_on_what_any_of_them_saw():
    """One process's client moved what another's did not, and a third has none; later rounds look no more."""
    parts = [Movement(["m"], "AB", 2, 1.0) for _ in range(3)]
    parts[0].note(update(ONE, ONE, NONE, ONE))
    parts[1].note(update(ONE, NONE, NONE, NONE))
    gathered: list = []

    def gather(value):
        gathered.append(value)
        return [value]

    for part in parts[1:]:
        with pytest.raises(NeverTrained) if part is parts[1] else nullcontext():
            deepcopy(part).judge(0, 1.0, gather)
    deepcopy(parts[0]).judge(0, 1.0, gather)
    for part in parts:
        part.judge(0, 1.0, lambda value: gathered)
    for part in parts:
        part.note(update(ONE, NONE, NONE, NONE))
        part.judge(1, 1.0, lambda value: pytest.fail("nothing is left to look at"))
