"""The pipeline of updates: what runs where and in which order, and a user's own parts in whole runs."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fslora_hf.common.draws import seed_from
from fslora_hf.methods import METHODS, ClientAdapter, ClientUpdate
from fslora_hf.updates.bounds import CheckFinite, MaxNorm
from fslora_hf.updates.feedback import ErrorFeedback
from fslora_hf.updates.movement import Movement
from fslora_hf.updates.part import RefusedUpdate, UpdatePart
from fslora_hf.updates.pipeline import Pipeline, parts_of
from fslora_hf.updates.top_k import TopK
from tests.rounds.test_round import Halve, make_run, plan, run_round
from tests.support import reference
from tests.support.worker_train import build, ledger

ARGS = {"num_rounds": 2, "local_steps": 2, "clients_per_round": 3, "client_ranks": [1, 2, 3, 4, 6]}


class Clip(UpdatePart):
    """An update longer than `norm` is shortened to it."""

    def __init__(self, norm: float):
        self.norm = norm

    def take(self, round, client, update):
        factor = self.norm / max(self.norm, update.norm().item())
        A, B = ({module: factor * tensor for module, tensor in side.items()} for side in (update.A, update.B))
        return replace(update, A=A, B=B)


class Noise(UpdatePart):
    """Adds draws of the round's own to the sums of A and B."""

    def settle(self, round, total, refused):
        for name, tensor in total.items():
            if name != "weight":
                tensor += noise(round, name, tensor.shape)


def noise(round: int, name: str, shape) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(seed_from(7, "noise", round, name))
    return torch.randn(shape, generator=drawn, dtype=torch.float64)


class Recorded(UpdatePart):
    """Notes each of its calls."""

    def __init__(self, name: str, calls: list):
        self.name, self.calls = name, calls

    def send(self, round, client, update):
        self.calls.append((self.name, "send", round, client.client_id))
        return update

    def take(self, round, client, update):
        self.calls.append((self.name, "take", round, client.client_id))
        if client.client_id == 10:
            raise RefusedUpdate("of the test")
        return update

    def settle(self, round, total, refused):
        self.calls.append((self.name, "settle", round, sorted(refused)))

    def bytes_up(self, size, element_size):
        return size // 2 + 1

    def notes(self):
        return {self.name: len(self.calls)}


def test_places_run_in_order_and_settling_knows_who_was_refused():
    calls = []
    record = run_round(make_run(1, parts=[Recorded("one", calls), Recorded("two", calls)]), round=3)
    expected = []
    for client in sorted(plan(3).clients, key=lambda client: client.rank):
        number = client.client_id
        places = [("one", "send"), ("two", "send"), ("one", "take"), ("two", "take")]
        expected += [(*place, 3, number) for place in (places[:3] if number == 10 else places)]
    expected += [("one", "settle", 3, [10]), ("two", "settle", 3, [10])]
    assert calls == expected and record["refused"] == [{"client_id": 10, "reason": "of the test"}]
    whole = [client.rank * 8 * reference_numbers() for client in plan(3).clients]
    assert record["bytes_up"] == sum((size // 2 + 1) // 2 + 1 for size in whole)  # the second halves what is left
    assert record["one"] == record["two"] == len(calls)


def test_notes_do_not_take_the_place_of_what_the_ledger_has():
    with pytest.raises(ValueError, match="by names that the ledger does not have, found bytes_up: rename it"):
        run_round(make_run(1, parts=[Recorded("bytes_up", [])]))


def reference_numbers() -> int:
    """Numbers of one row of A and one column of B of every module."""
    return sum(A.shape[1] + B.shape[0] for A, B in reference.read_adapter(make_run().model).values())


def test_parts_come_in_the_documented_order():
    own, bound = Halve(), MaxNorm(3.0)

    def names(share):
        parts = parts_of(
            SimpleNamespace(upload_top_k=share),
            METHODS["fslora"](),
            Movement(["m"], "AB", 1, 1.0),
            None,
            [bound],
            [own],
        )
        assert parts[-2:] == (bound, own)
        return [type(part) for part in parts[:-2]]

    assert [name.__name__ for name in names(0.5)] == ["_AtClients", "TopK", "CheckFinite"]
    assert [name.__name__ for name in names(None)] == ["CheckFinite", "_AtServer"]


# ---- The slow twin: send, take and settle replayed number by number ----


class Trained(UpdatePart):
    """In place of local steps: draws for the change; in round 1 client 30's holds NaN."""

    def send(self, round, client, update):
        A, B = (
            {name: drawn(round, client.client_id, name, side, tensor.shape) for name, tensor in tensors.items()}
            for side, tensors in (("A", update.A), ("B", update.B))
        )
        if (client.client_id, round) == (30, 1):
            next(iter(A.values()))[0, 0] = math.nan
        return replace(update, A=A, B=B)


def drawn(*path_and_shape) -> torch.Tensor:
    *path, shape = path_and_shape
    generator = torch.Generator().manual_seed(seed_from(*path))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_a_round_with_all_parts_equals_its_replay(tmp_path):
    """Top-k with error feedback over three rounds, a clip that bites, noise on the sum, an update refused."""
    feedback = ErrorFeedback(tmp_path / "waiting")
    parts = [Trained(), TopK(0.25, METHODS["fslora"](), feedback), CheckFinite(), Clip(CLIP), Noise()]
    run = make_run(2, parts=parts)
    expected = {name: (A.clone(), B.clone()) for name, (A, B) in reference.read_adapter(run.model).items()}
    waiting = {client.client_id: {} for client in plan(0).clients}
    for round in range(3):
        record = run_round(run, round)
        expected = replay(expected, waiting, round, refused={30} if round == 1 else set())
        assert reference.max_difference(reference.read_adapter(run.model), expected) < 1e-12
        assert [one["client_id"] for one in record["refused"]] == ([30] if round == 1 else [])
        norms = [norm for norm in record["update_norms"] if norm is not None]
        assert max(norms) == pytest.approx(CLIP) and min(norms) < CLIP - 1
        assert record["update_norms"].count(None) == (round == 1)


CLIP = 18.0


def replay(start, waiting, round, refused):
    """One round; what waits is kept as large as the global pair."""
    total = {name: [torch.zeros_like(half) for half in pair] for name, pair in start.items()}
    weights = 0.0
    for client in plan(round).clients:
        if client.client_id in refused:
            continue  # and what it had left out before stays
        weights += client.weight
        entries = []  # (size, module, side, place in the global pair) of every number the client has a part of
        for name, pair in start.items():
            rows = client.sketch(name).tolist()
            for side, half in enumerate(pair):
                held = waiting[client.client_id].setdefault((name, side), torch.zeros_like(half))
                shape = (len(rows), half.shape[1]) if side == 0 else (half.shape[0], len(rows))
                change = drawn(round, client.client_id, name, "AB"[side], shape)
                for place in np.ndindex(*shape):
                    own = list(place)
                    own[side] = rows[place[side]]
                    held[tuple(own)] += change[place]
                    entries.append((abs(held[tuple(own)].item()), name, side, tuple(own)))
        sent = sorted(entries)[-math.ceil(len(entries) / 4) :]
        factor = min(1.0, CLIP / math.sqrt(sum(size**2 for size, *_ in sent)))
        for _, name, side, place in sent:
            held = waiting[client.client_id][name, side]
            total[name][side][place] += client.weight * factor * held[place]
            held[place] = 0.0
    return {
        name: tuple(
            old + (change + noise(round, f"{name}.{side}", old.shape)) / weights
            for side, old, change in zip("AB", pair, total[name], strict=True)
        )
        for name, pair in start.items()
    }


def test_what_a_refused_update_left_out_is_void(tmp_path):
    """By whomever it is refused, also by a part after top-k; in the round after it the older rest is sent."""
    feedback, refusing = ErrorFeedback(tmp_path), Refuse()
    pipeline = Pipeline([TopK(0.5, METHODS["fslora"](), feedback), refusing])
    (client,) = plan(0).clients[2:3]
    start = ClientAdapter({"m": torch.zeros(3, 4)}, {"m": torch.zeros(2, 3)}, 1.0)
    sums = []
    for round in range(4):
        A, B = torch.arange(1.0, 13.0).view(3, 4), torch.zeros(2, 3)
        update = ClientUpdate({"m": A}, {"m": B}, 1.0, lambda module: np.arange(3), start, 0)
        refusing.now = round in (1, 2)
        refused = set()
        try:
            sums.append(pipeline.take(round, client, pipeline.send(round, client, update)).A["m"].sum().item())
        except RefusedUpdate:
            refused = {client.client_id}
        pipeline.settle(round, None, refused)
        waiting = feedback.take(client.client_id, round + 1).tensors["m.A"]
        if round < 3:
            # Nine of 18 numbers were sent in round 0, 4 to 12; then nothing moves for two rounds.
            assert waiting.flatten().tolist() == [1.0, 2.0, 3.0] + [0.0] * 9
    assert sums == [72.0, 74.0] and waiting.flatten().tolist() == [2.0, 4.0, 0.0, 4.0] + [0.0] * 8


class Refuse(UpdatePart):
    now = False

    def take(self, round, client, update):
        if self.now:
            raise RefusedUpdate("of the test")
        return update


def test_a_layer_whose_update_is_not_finite_has_not_moved():
    """Else NaN would hide a layer that is never trained, where updates are thinned and looked at before the check."""
    movement = Movement(["m"], "A", 2, 1.0)
    start = ClientAdapter({"m": torch.ones(1, 2)}, {"m": torch.ones(2, 1)}, 1.0)
    update = ClientUpdate({"m": torch.full((1, 2), math.nan)}, {}, 1.0, None, start, 0)
    movement.at_clients().send(0, None, update)
    movement.judge(0, 1.0, lambda value: [value])
    assert movement.is_watching
    movement.at_clients().send(1, None, replace(update, A={"m": torch.ones(1, 2)}))
    movement.judge(1, 1.0, lambda value: [value])
    assert not movement.is_watching


# ---- A user's own, in whole runs ----


def test_a_run_with_a_users_parts_is_that_of_its_replay(tmp_path):
    """Clipping by the part equals refusing nothing and rescaling by the ledger's norms, whatever the blocks."""
    ends = []
    for block in (1, 3):
        args = ARGS | {"per_device_train_clients": block}
        trainer = build(tmp_path / str(block), args, update_transforms=[Clip(1e-3), Noise()])
        trainer.train()
        ends.append(reference.read_adapter(trainer.model))
        norms = [norm for line in ledger(tmp_path / str(block)) for norm in line["update_norms"]]
        assert max(norms) == pytest.approx(1e-3)
    assert reference.max_difference(*ends) < 1e-9
    plain = build(tmp_path / "plain", ARGS)
    plain.train()
    assert reference.max_difference(ends[0], reference.read_adapter(plain.model)) > 1e-3


def test_without_parts_that_do_anything_a_run_is_the_plain_one(tmp_path):
    ends = []
    for name, parts in (("plain", ()), ("own", [UpdatePart(), Clip(1e9)])):
        trainer = build(tmp_path / name, ARGS | {"upload_top_k": 0.3, "error_feedback": True}, update_transforms=parts)
        trainer.train()
        ends.append(reference.read_adapter(trainer.model))
    assert reference.max_difference(*ends) == 0


def test_a_run_is_resumed_with_the_parts_it_had(tmp_path):
    args = ARGS | {"save_rounds": 1}
    build(tmp_path, args | {"num_rounds": 1}, update_transforms=[Clip(1e-3)]).train()
    with pytest.raises(ValueError, match=r"update_transforms was \['.*test_pipeline:Clip'\] and is None"):
        build(tmp_path, args).train(resume_from_checkpoint=True)
    trainer = build(tmp_path, args, update_transforms=[Clip(1e-3)])
    trainer.train(resume_from_checkpoint=True)
    assert [line["round"] for line in ledger(tmp_path)] == [0, 1]


@pytest.mark.parametrize(
    "parts, told",
    [
        ([lambda update: update], r"update_transforms\[0\] to be an UpdatePart, found a function: derive"),
        ([UpdatePart(), Clip], r"update_transforms\[1\] to be an UpdatePart, found the class Clip: pass an instance"),
        (Clip(1.0), "update_transforms to be a list of UpdatePart, found a Clip: pass"),
    ],
)
def test_what_is_no_part_is_refused_before_anything_is_loaded(tmp_path, parts, told):
    with pytest.raises(ValueError, match=told):
        build(tmp_path, ARGS, update_transforms=parts)
