"""Top-k compression of updates, with and without error feedback, and runs that end when a budget of uploads is spent.

Laws 1 to 3 for compressed runs: the slow twin, blocks and processes, SIGKILL and resume.
"""

import json
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from fslora_hf.methods import METHODS, ClientAdapter, ClientUpdate
from fslora_hf.storage.checkpoint import FEEDBACK_NAME, CheckpointError
from fslora_hf.updates.feedback import ErrorFeedback, Waiting
from fslora_hf.updates.top_k import TopK
from tests.laws.test_laws_training import RANKS, trained
from tests.support import reference, tiny
from tests.support.worker_train import build, check_same_ledger, ledger, load_result

pytest_plugins = ("tests.support.forked",)

EXACT = 1e-9
SGD = {"optim": "sgd", "learning_rate": 0.2, "max_grad_norm": 0.0}
ADAMW = {"optim": "adamw_torch", "weight_decay": 0.1, "max_grad_norm": 0.05, "clients_per_round": 3, "num_rounds": 5}
COVERING = {
    "fslora, sgd": {**SGD, "client_ranks": RANKS},
    "fslora, sgd, error feedback, by examples": {
        **SGD,
        "client_ranks": RANKS,
        "error_feedback": True,
        "client_weighting": "num_examples",
    },
    "fslora, adamw, error feedback, one sketch a model, server adam, blocks of 2": {
        **ADAMW,
        "client_ranks": RANKS,
        "error_feedback": True,
        "sketch_scope": "model",
        "server_optim": "adam",
        "per_device_train_clients": 2,
    },
    "fedit, adamw, error feedback": {**ADAMW, "method": "fedit", "error_feedback": True},
    "ffa_lora, adamw, error feedback": {**ADAMW, "method": "ffa_lora", "error_feedback": True},
    "hetlora, adamw, error feedback": {**ADAMW, "method": "hetlora", "error_feedback": True, "client_ranks": RANKS},
    "flexlora, adamw": {**ADAMW, "method": "flexlora", "client_ranks": RANKS},
    "flora_residual, adamw": {**ADAMW, "method": "flora_residual", "client_ranks": RANKS},
}


@pytest.mark.parametrize("name", COVERING)
def test_law_1_the_trainer_equals_the_slow_twin(tmp_path, name):
    args = {"upload_top_k": 0.2, **COVERING[name]}
    trainer, start, seen = trained(tmp_path, args)
    plans = [trainer.round_plan(t) for t in range(trainer.args.num_rounds)]
    expected = reference.replay(
        tiny.base_model(), tiny.lora_config(), start, trainer.train_dataset, plans, trainer.args
    )
    assert reference.max_difference(start, expected[-1]) > 1e-3
    gaps = [reference.max_difference(now, then) for now, then in zip(seen, [start, *expected], strict=True)]
    assert max(gaps) < EXACT, gaps


def test_law_1_of_flora_folded(tmp_path):
    args = {**SGD, "upload_top_k": 0.2, "method": "flora", "client_ranks": RANKS}
    trainer, start, _ = trained(tmp_path, args)
    plans, bases = [trainer.round_plan(t) for t in range(3)], []
    reference.replay(
        tiny.base_model(), tiny.lora_config(), start, trainer.train_dataset, plans, trainer.args, bases=bases
    )
    for name, layer in reference.lora_layers(trainer.model):
        weight = layer.get_base_layer().weight
        assert (weight - tiny.base_model().get_submodule(name).weight).abs().max() > 1e-3
        torch.testing.assert_close(weight, bases[-1].get_submodule(name).weight, rtol=0, atol=EXACT)


def test_a_share_of_one_is_no_compression_and_error_feedback_matters(tmp_path):
    args = {**ADAMW, "client_ranks": RANKS}
    ends = {}
    for name, more in {
        "none": {},
        "all": {"upload_top_k": 1.0, "error_feedback": True},
        "some": {"upload_top_k": 0.2},
        "fed back": {"upload_top_k": 0.2, "error_feedback": True},
    }.items():
        ends[name] = trained(tmp_path / name, {**args, **more})[2][-1]
    assert reference.max_difference(ends["none"], ends["all"]) == 0
    assert reference.max_difference(ends["none"], ends["some"]) > 1e-3
    assert reference.max_difference(ends["some"], ends["fed back"]) > 1e-3


LAYOUT = {
    **ADAMW,
    "clients_per_round": None,
    "client_ranks": RANKS,
    "upload_top_k": 0.2,
    "error_feedback": True,
    "num_rounds": 3,
    "local_steps": 2,
}


@pytest.fixture(scope="module")
def one_client_a_step(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequential")
    trainer = build(folder, LAYOUT)
    trainer.train()
    return folder, reference.read_adapter(trainer.model)


def test_law_2_blocks(one_client_a_step, tmp_path):
    folder, end = one_client_a_step
    trainer = build(tmp_path, {**LAYOUT, "per_device_train_clients": 2})
    trainer.train()
    assert reference.max_difference(reference.read_adapter(trainer.model), end) < EXACT
    check_same_ledger(tmp_path, folder)


@pytest.mark.slow
def test_law_2_two_processes(one_client_a_step, fork_ranks, tmp_path):
    folder, end = one_client_a_step
    args = {**LAYOUT, "per_device_train_clients": 2}
    job = {"output_dir": str(tmp_path / "run"), "args": args, "dtype": "float64", "result": str(tmp_path / "end")}
    assert fork_ranks(job) == [0, 0]
    assert reference.max_difference(load_result(tmp_path / "end"), end) < EXACT
    check_same_ledger(tmp_path / "run", folder)
    assert waiting_files(tmp_path / "run" / FEEDBACK_NAME) == waiting_files(folder / FEEDBACK_NAME)


def waiting_files(folder) -> dict[str, int]:
    """Client: the round of its one file."""
    paths = sorted(folder.glob("*/*.safetensors"))
    found = {path.parent.name: int(path.name.split("-")[0]) for path in paths}
    assert len(found) == len(paths)
    return found


# ---- Law 3 ----

STEPS = 4  # of a round: two clients of two steps
RESUMED = {
    "optim": "adamw_torch",
    "num_rounds": 4,
    "local_steps": 2,
    "clients_per_round": 2,
    "client_ranks": [1, 2, 4, 6, 3],
    "server_optim": "adam",
    "upload_top_k": 0.2,
    "error_feedback": True,
    "save_rounds": 1,
    "save_total_limit": 2,
}


def job(folder, **changes) -> dict:
    run = {"output_dir": str(folder / "run"), "args": RESUMED, "lora": {"dropout": 0.1}, "dtype": "float32"}
    return {**run, "result": str(folder / "end"), **changes}


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def last_checkpoint(folder):
    return max((folder / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "event, step",
    [
        ("on_optimizer_step", 3 * STEPS - 1),  # the last step, before the round closes
        ("on_step_begin", 2 * STEPS + 2),  # the round's first client has written what it left out
        ("on_step_begin", 3 * STEPS),  # right after a checkpoint
        ("on_step_begin", 2),  # before the first checkpoint
    ],
)
def test_law_3_killed_and_resumed_bit_for_bit(fork, tmp_path, event, step):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    kill = {"event": event, "step": step}
    assert fork(job(whole), job(stopped, kill=kill)) == [0, -signal.SIGKILL]
    assert fork(job(stopped, resume=True)) == [0]
    for folder in (whole, stopped):
        current = waiting_files(folder / "run" / FEEDBACK_NAME)
        assert len(current) >= 3 and current == waiting_files(last_checkpoint(folder) / FEEDBACK_NAME)
    assert contents(last_checkpoint(stopped)) == contents(last_checkpoint(whole))
    assert contents(stopped / "run" / FEEDBACK_NAME) == contents(whole / "run" / FEEDBACK_NAME)
    assert reference.max_difference(load_result(stopped / "end"), load_result(whole / "end")) == 0
    for lines in (ended := [ledger(stopped / "run"), ledger(whole / "run")]):
        for line in lines:
            del line["seconds"]
    assert ended[0] == ended[1] and len(ended[0]) == 4


def test_an_earlier_checkpoint_goes_on_elsewhere_as_it_did_here(tmp_path):
    args = {**LAYOUT, "clients_per_round": 2, "num_rounds": 4, "save_rounds": 1}
    first = build(tmp_path / "first", args)
    first.train()
    early = tmp_path / "first" / f"checkpoint-{2 * first.layout.steps_per_round}"
    kept = contents(early)
    second = build(tmp_path / "second", args)
    second.train(resume_from_checkpoint=str(early))
    assert reference.max_difference(*(reference.read_adapter(t.model) for t in (first, second))) == 0
    assert contents(tmp_path / "first" / FEEDBACK_NAME) == contents(tmp_path / "second" / FEEDBACK_NAME)
    assert contents(early) == kept and len(kept) > 2


class StopIn(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


def test_a_run_stopped_within_a_round_saves_what_waited_before_it(tmp_path):
    args = {**LAYOUT, "num_rounds": 4, "save_rounds": 4}  # everybody takes part, so that all have something waiting
    whole = build(tmp_path / "whole", args)
    whole.train()
    stopped = build(tmp_path / "stopped", args, callbacks=[StopIn(2 * 10 + 3)])
    stopped.train()
    assert len(list((tmp_path / "stopped").glob("checkpoint-*"))) == 1
    resumed = build(tmp_path / "stopped", args)
    resumed.train(resume_from_checkpoint=True)
    assert [line["round"] for line in ledger(tmp_path / "stopped")] == [0, 1, 2, 3]
    assert reference.max_difference(*(reference.read_adapter(t.model) for t in (whole, resumed))) == 0


def test_every_process_must_see_what_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fslora_hf.trainers.federated.gather", lambda seen: [seen, False]
    )  # a machine with a disk of its own
    with pytest.raises(ValueError, match="Expected every process to see .*error_feedback, found one that does not"):
        build(tmp_path, {**LAYOUT, "num_rounds": 1}).train()


@pytest.mark.parametrize("other", [{"upload_top_k": 0.3}, {"error_feedback": False}], ids=str)
def test_a_run_is_not_resumed_with_another_compression(tmp_path, other):
    args = {**LAYOUT, "num_rounds": 2, "save_rounds": 1}
    build(tmp_path, args).train()
    with pytest.raises(CheckpointError, match=f"{next(iter(other))} was "):
        build(tmp_path, {**args, **other}).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_what_waits_is_not_taken_from_a_damaged_checkpoint(tmp_path, damage):
    args = {**LAYOUT, "num_rounds": 2, "save_rounds": 1}
    build(tmp_path / "run", args).train()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-10")  # of the first round
    path = sorted((checkpoint / FEEDBACK_NAME).glob("*/*.safetensors"))[0]
    content = path.read_bytes()
    path.unlink()
    if damage == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    expected = "the file was damaged or changed" if damage == "changed" else "found no file"
    before = {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()}
    with pytest.raises(CheckpointError, match=expected):
        build(tmp_path / "run", args).train(resume_from_checkpoint=str(checkpoint))
    assert {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()} == before


# ---- On tensors ----


def randn(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def client_of(client_id: int, rows) -> SimpleNamespace:
    return SimpleNamespace(client_id=client_id, rank=len(rows), sketch=lambda module: np.array(rows))


def update_of(client, seed: int) -> ClientUpdate:
    A, B = {"m": randn(client.rank, 5, seed=seed)}, {"m": randn(4, client.rank, seed=seed + 50)}
    return ClientUpdate(A, B, 1.0, client.sketch, ClientAdapter(A, B, 1.0), 0)


def test_the_largest_numbers_of_both_sides_are_sent_and_no_others(tmp_path):
    update = update_of(client := client_of(0, [0, 2, 3]), seed=0)
    kept = TopK(0.3, METHODS["fslora"]()).send(0, client, update)
    whole = torch.cat([update.A["m"].flatten(), update.B["m"].flatten()])
    sent = torch.cat([kept.A["m"].flatten(), kept.B["m"].flatten()])
    assert (sent != 0).sum() == math.ceil(0.3 * 27) == 9
    assert (
        torch.equal(sent[sent != 0], whole[sent != 0]) and whole[sent == 0].abs().max() < sent[sent != 0].abs().min()
    )
    assert not torch.equal(update.A["m"], kept.A["m"])  # and the update given is left as it was
    assert torch.equal(update.A["m"], update_of(client, seed=0).A["m"])


def test_nothing_is_lost_with_error_feedback(tmp_path):
    """Over rounds of other sketches: what was sent and what waits add up to what was changed, row by row."""
    feedback = ErrorFeedback(tmp_path)
    compressor = TopK(0.25, METHODS["fslora"](), feedback)
    changed, sent = [(torch.zeros(6, 5).double(), torch.zeros(4, 6).double()) for _ in range(2)]
    for round, rows in enumerate([[0, 3], [3, 5], [1, 3], [0, 1]]):
        client = client_of(7, rows)
        update = update_of(client, seed=round)
        kept = compressor.send(round, client, update)
        for total, change in ((changed, update), (sent, kept)):
            total[0][rows] += change.A["m"]
            total[1][:, rows] += change.B["m"]
        compressor.settle(round, None, ())
        waits = feedback.take(7, round + 1)
        for side, total, gone in zip("AB", changed, sent, strict=True):
            waiting = waits.part(side, "m", waits.tensors["m.rows"].numpy())
            known = waits.tensors["m.rows"]
            gap = (total - gone)[known] if side == "A" else (total - gone)[:, known]
            torch.testing.assert_close(waiting, gap, rtol=0, atol=1e-14)
    assert waits.tensors["m.rows"].tolist() == [0, 1, 3, 5] and len(waiting_files(tmp_path)) == 1
    assert sent[0].abs().sum() > 0 and (changed[0] - sent[0]).abs().sum() > 0


def test_clients_wait_apart_and_only_those_of_the_cohort_are_touched(tmp_path):
    feedback = ErrorFeedback(tmp_path)
    compressor = TopK(0.25, METHODS["fslora"](), feedback)
    for round, ids in enumerate([[1, 2], [2, 3], [10**12]]):
        for client_id in ids:
            client = client_of(client_id, [client_id % 6])
            compressor.send(round, client, update_of(client, seed=client_id % 97))
        compressor.settle(round, None, ())
    assert waiting_files(tmp_path) == {"1": 0, "2": 1, "3": 1, str(10**12): 2}
    assert feedback.take(3, 2).tensors["m.rows"].tolist() == [3] and feedback.take(9, 2).tensors == {}
    assert feedback.take(3, 1).tensors == {}  # not what it left out in this very round


def test_a_checkpoint_links_what_was_current_when_it_was_taken(tmp_path):
    feedback, compressor = (f := ErrorFeedback(tmp_path / "run")), TopK(0.25, METHODS["fslora"](), f)
    for round in range(2):
        compressor.send(round, client_of(1, [0]), update_of(client_of(1, [0]), seed=round))
        compressor.settle(round, None, ())
    compressor.send(2, client_of(1, [0]), update_of(client_of(1, [0]), seed=2))  # a round that is not over
    (tmp_path / "checkpoint").mkdir()
    feedback.link_into(tmp_path / "checkpoint", 2)
    assert waiting_files(tmp_path / "checkpoint" / FEEDBACK_NAME) == {"1": 1}
    (path,) = (tmp_path / "checkpoint" / FEEDBACK_NAME).glob("*/*")
    assert path.stat().st_nlink == 2  # no copy
    fresh = ErrorFeedback(tmp_path / "elsewhere")
    fresh.restore(tmp_path / "checkpoint")
    assert contents(fresh.folder) == contents(tmp_path / "checkpoint" / FEEDBACK_NAME)
    fresh.restore()
    assert not any(fresh.folder.iterdir())


def test_waiting_numbers_keep_their_type(tmp_path):
    waiting = Waiting({})
    waiting.add("m", np.array([2, 4]), torch.ones(2, 3), torch.ones(5, 2))
    waiting.add("m", np.array([1, 4]), torch.ones(2, 3), torch.ones(5, 2))
    assert waiting.tensors["m.A"].dtype == torch.float32 and waiting.tensors["m.rows"].tolist() == [1, 2, 4]
    assert waiting.part("A", "m", np.array([4, 2])).tolist() == [[2.0] * 3, [1.0] * 3]
    assert waiting.tensors["m.B"].tolist() == [[1.0, 1.0, 2.0]] * 5


@pytest.mark.parametrize(
    "numbers, share, size, expected",
    [
        (100, 0.07, 4, 7 * 4 + 13),  # 100 * 0.07 is a little more than 7
        (1000, 0.01, 4, 10 * 4 + 10 * 4),  # few: places as integers
        (1000, 0.1, 4, 100 * 4 + 125),  # more: a bit for each place
        (1001, 0.1, 8, 101 * 8 + 126),
        (1000, 1.0, 4, 4000),  # all: no places
        (1000, 0.999, 4, 4000),  # nearly all: dense is less
        (3, 0.01, 4, 4 + 1),
    ],
)
def test_bytes_are_values_and_places(numbers, share, size, expected):
    assert TopK(share, METHODS["fslora"]()).bytes_up(numbers * size, size) == expected


@pytest.mark.parametrize("method", ["fslora", "ffa_lora"])
def test_the_ledger_counts_what_is_sent(tmp_path, method):
    ranks = {"client_ranks": RANKS} if method == "fslora" else {}
    args = {"method": method, "num_rounds": 1, "local_steps": 1, "upload_top_k": 0.05, **ranks}
    trainer = build(tmp_path, args)
    trainer.train()
    (record,) = ledger(tmp_path)
    shapes = [(a.shape[1], b.shape[0]) for a, b in reference.read_adapter(trainer.model).values()]
    numbers = [k * sum((i if method == "fslora" else 0) + o for i, o in shapes) for k in record["ranks"]]
    kept = [math.ceil(n / 20) for n in numbers]
    assert record["bytes_up"] == sum(8 * k + min(4 * k, math.ceil(n / 8)) for k, n in zip(kept, numbers, strict=True))
    assert record["bytes_down"] == 8 * sum(numbers)


# ---- A budget of uploads ----


def one_round(tmp_path) -> int:
    build(tmp_path, {"num_rounds": 1, "local_steps": 1, "clients_per_round": 2}).train()
    return ledger(tmp_path)[0]["bytes_up"]


@pytest.mark.parametrize("rounds_worth, expected", [(2.0, 2), (2.01, 3), (0.5, 1), (99.0, 6)])
def test_a_run_ends_when_its_uploads_reach_the_budget(tmp_path, rounds_worth, expected):
    megabytes = one_round(tmp_path / "one") * rounds_worth / 1e6
    args = {"num_rounds": 6, "local_steps": 2, "clients_per_round": 2, "upload_budget": megabytes, "save_rounds": 5}
    trainer = build(tmp_path / "run", args)
    told = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            if "minutes_left" in logs:
                told.append(trainer.run.rounds_left)

    trainer.add_callback(Watch())
    trainer.train()
    assert [line["round"] for line in ledger(tmp_path / "run")] == list(range(expected))
    assert told == list(reversed(range(expected)))
    steps = expected * trainer.layout.steps_per_round
    assert trainer.state.global_step == steps and (tmp_path / "run" / f"checkpoint-{steps}").is_dir()


def test_a_budget_needs_the_ledger_that_tells_what_is_spent(tmp_path):
    args = {"num_rounds": 3, "local_steps": 1, "upload_budget": 1.0, "save_rounds": 1}
    build(tmp_path / "first", args).train()
    (tmp_path / "alone").mkdir()
    checkpoint = (tmp_path / "first" / "checkpoint-5").rename(tmp_path / "alone" / "checkpoint-5")
    with pytest.raises(CheckpointError, match="how much of upload_budget is spent, found 0: copy rounds.jsonl"):
        build(tmp_path / "second", args).train(resume_from_checkpoint=str(checkpoint))


def test_a_run_whose_budget_is_spent_takes_no_further_step(tmp_path):
    megabytes = one_round(tmp_path / "one") * 2 / 1e6
    args = {"num_rounds": 6, "local_steps": 2, "clients_per_round": 2, "upload_budget": megabytes, "save_rounds": 1}
    first = build(tmp_path / "run", args)
    first.train()
    again = build(tmp_path / "run", args)
    again.train(resume_from_checkpoint=True)
    assert again.rounds_done == 2 and len(ledger(tmp_path / "run")) == 2
    assert reference.max_difference(*(reference.read_adapter(t.model) for t in (first, again))) == 0
    more = build(tmp_path / "run", {**args, "upload_budget": 2 * megabytes})  # a larger budget goes on
    more.train(resume_from_checkpoint=True)
    assert [line["round"] for line in ledger(tmp_path / "run")] == [0, 1, 2, 3]
    more.args.upload_budget = 3 * megabytes  # also if it is set of the very trainer
    more.train(resume_from_checkpoint=True)
    assert [line["round"] for line in ledger(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]


def test_a_checkpoints_index_names_all_that_waits(tmp_path):
    build(tmp_path, {**LAYOUT, "num_rounds": 1, "save_rounds": 1}).train()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    index = json.loads((checkpoint / "error_feedback.json").read_text())
    assert sorted(index) == sorted(map(str, tiny.SHARDS))
    for client_id, name in index.items():
        tensors = load_file(checkpoint / FEEDBACK_NAME / client_id / name)
        assert {key.rsplit(".", 1)[1] for key in tensors} == {"rows", "A", "B"}
    state = json.loads((checkpoint / "federated_state.json").read_text())
    assert "error_feedback.json" in state["files"]
    assert not any(name.startswith(f"{FEEDBACK_NAME}/") for name in state["files"])  # they carry their own
