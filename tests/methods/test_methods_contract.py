"""What a method may return: each error names the method, the client and the module, before the server takes a step."""

import json
import math
import re

import numpy as np
import pytest
import torch

from fslora_hf.methods import ClientAdapter, FedIT, FLoRA, FSLoRA, HetLoRA, Method, MethodError
from fslora_hf.rounds.run import FederatedRun
from tests.rounds.test_round import make_run
from tests.support import reference


def changed(method: type[Method], **functions) -> type[Method]:
    """A method of the user's whose functions are given what the original ones return."""

    def wrap(name, function):
        def wrapped(self, *arguments):
            return function(getattr(super(own, self), name)(*arguments), *arguments)

        return wrapped

    own = type("Own", (method,), {name: wrap(name, function) for name, function in functions.items()})
    own.__module__ = "mine"
    return own


def one_round(run: FederatedRun) -> dict:
    run.begin_round(0)
    for wave in range(run.layout.waves):
        run.hand_over(wave)
        run.collect()
    return run.aggregate()


def error_of(method: type[Method]) -> str:
    run = make_run(method=method)
    before = {m: (run.round.state.A[m].clone(), run.round.state.B[m].clone()) for m in run.round.state.A}
    with pytest.raises(MethodError) as caught:
        one_round(run)
    after = {m: (run.round.state.A[m], run.round.state.B[m]) for m in run.round.state.A}
    assert reference.max_difference(before, after) == 0  # refused before the server's step
    assert re.fullmatch(r"Expected mine:Own\..*, found .*: .*\.", str(caught.value)), str(caught.value)
    return str(caught.value)


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"  # [in, out] = [16, 16], [24, 16]


def with_A(change, module=DOWN, side="A"):
    """A `receive` whose tensor of one side and module is changed, for the client of rank 3 alone."""

    def function(adapter, state, client, sketch):
        if client.rank == 3:
            tensors = getattr(adapter, side)
            new = change(tensors[module], state)
            tensors |= {module: new} if new is not None else {}
            if new is None:
                del tensors[module]
        return adapter

    return function


def whole(change):
    """A `receive` that returns something else to the client of rank 3."""
    return lambda adapter, state, client, sketch: change(adapter) if client.rank == 3 else adapter


GIVES = "Expected mine:Own.receive to give client 20"
RECEIVED = {
    "no adapter": (whole(lambda a: None), "a ClientAdapter, found None: return ClientAdapter(A, B, scale)."),
    "a pair": (whole(lambda a: (a.A, a.B)), "a ClientAdapter, found a tuple: return ClientAdapter(A, B, scale)."),
    "scale of NaN": (
        whole(lambda a: ClientAdapter(a.A, a.B, math.nan)),
        "a finite number as scale, found nan: 1.0 is the global adapter's own scale.",
    ),
    "scale of a tensor": (
        whole(lambda a: ClientAdapter(a.A, a.B, torch.ones(()))),
        "a finite number as scale, found a Tensor: 1.0 is the global adapter's own scale.",
    ),
    "a list of tensors": (
        whole(lambda a: ClientAdapter(list(a.A.values()), a.B, 1.0)),
        "A as a dict by module, found a list: fill it as state.A is.",
    ),
    "a missing module": (
        with_A(lambda t, state: None),
        f"A of {DOWN}, found none: return A for every module of state.A.",
    ),
    "an unknown module": (
        whole(lambda a: ClientAdapter(a.A, a.B | {"lm_head": a.B[Q]}, 1.0)),
        "B of the adapter's modules, found 'lm_head': take the names of state.B.",
    ),
    "an array": (
        with_A(lambda t, state: t.numpy()),
        f"A of {DOWN} as a tensor, found a ndarray: return a torch tensor.",
    ),
    "rows of the global rank": (
        with_A(lambda t, state: state.A[DOWN].clone()),
        f"A of {DOWN} of shape [rank, in] = [3, 24], found [6, 24]: the rank here is the client's rank, 3.",
    ),
    "one row, which would broadcast": (
        with_A(lambda t, state: t[:1]),
        f"A of {DOWN} of shape [rank, in] = [3, 24], found [1, 24]: the rank here is the client's rank, 3.",
    ),
    "the other side's axes": (
        with_A(lambda t, state: t.mT, module=Q, side="B"),
        f"B of {Q} of shape [out, rank] = [16, 3], found [3, 16]: the rank here is the client's rank, 3.",
    ),
    "another type": (
        with_A(lambda t, state: t.float()),
        f"A of {DOWN} in torch.float64, found torch.float32: keep the type of state.A.",
    ),
    "another device": (
        with_A(lambda t, state: t.to("meta")),
        f"A of {DOWN} on cpu, found meta: keep the device of state.A.",
    ),
    "a view": (
        with_A(lambda t, state: state.A[DOWN][:3]),
        f"A of {DOWN} as a tensor of its own, found a view of the server's: return a copy, such as tensor.clone().",
    ),
    "a view of another module": (
        with_A(lambda t, state: state.A["model.layers.0.mlp.down_proj"][3:]),
        f"A of {DOWN} as a tensor of its own, found a view of the server's: return a copy, such as tensor.clone().",
    ),
    "NaN": (
        with_A(lambda t, state: t / 0 * 0, side="B"),
        f"finite values in B of {DOWN}, found NaN or infinity: look for a division by zero or an overflow, or lower "
        "the learning rate.",
    ),
    "infinity": (with_A(lambda t, state: t.fill_(math.inf)), f"finite values in A of {DOWN}, found NaN or infinity: "),
}


@pytest.mark.parametrize("case", RECEIVED)
def test_received_adapters(case):
    function, message = RECEIVED[case]
    assert f"{GIVES} {message}" in error_of(changed(FSLoRA, receive=function))


def in_change(change, side=0, module=DOWN):
    """A `finish` whose change of one side and module is replaced."""

    def function(pair, state, accumulator):
        new = change(pair[side][module])
        return tuple(
            tensors if n != side else {m: t for m, t in (tensors | {module: new}).items() if t is not None}
            for n, tensors in enumerate(pair)
        )

    return function


FINISHED = {
    "one dict": (
        lambda pair, *_: pair[0],
        "the changes of A and of B, or None, found a dict: return two dicts, A and B.",
    ),
    "three dicts": (
        lambda pair, *_: (*pair, {}),
        "the changes of A and of B, or None, found a tuple: return two dicts, A and B.",
    ),
    "lists": (
        lambda pair, *_: tuple(list(side.values()) for side in pair),
        "the changes of A and of B, or None, found a tuple: return two dicts, A and B.",
    ),
    "a missing module": (in_change(lambda t: None), f"A of {DOWN}, found none: return A for every module of state.A."),
    "a dropped side": (lambda pair, *_: (pair[0], {}), "B of model.layers.0.self_attn.q_proj, found none: return B"),
    "a client's rank": (
        in_change(lambda t: t[:3]),
        f"A of {DOWN} of shape [rank, in] = [6, 24], found [3, 24]: the rank here is the global rank, 6.",
    ),
    "another type": (
        in_change(lambda t: t.float(), side=1),
        f"B of {DOWN} in torch.float64, found torch.float32: keep the type of state.B.",
    ),
    "NaN": (in_change(lambda t: t * math.nan, side=1), f"finite values in B of {DOWN}, found NaN or infinity: look"),
}


@pytest.mark.parametrize("case", FINISHED)
def test_changes(case):
    function, message = FINISHED[case]
    assert f"Expected mine:Own.finish to give {message}" in error_of(changed(FSLoRA, finish=function))


def test_a_product_to_fold_has_one_rank_in_all_modules():
    own = changed(FLoRA, finish=in_change(lambda t: t[:5]))
    assert f"A of {DOWN} of shape [rank, in] = [16, 24], found [5, 24]: the rank here is that of A of {Q}, 16." in (
        error_of(own)
    )
    own = changed(FLoRA, finish=in_change(lambda t: t[:, :5], side=1))
    assert f"B of {DOWN} of shape [out, rank] = [16, 16], found [16, 5]" in error_of(own)
    assert f"A of {Q} of shape [rank, in] = [0, 16], found [16]" in (
        error_of(changed(FLoRA, finish=in_change(lambda t: t[:, 0], module=Q)))
    )


def test_a_side_that_is_not_trained_does_not_change():
    frozen = changed(FSLoRA)
    frozen.trains = ("B",)
    frozen.accumulate = lambda self, accumulator, update: None
    frozen.finish = lambda self, state, accumulator: (state.A, state.B)
    message = error_of(frozen)
    assert (
        "no change of A, since trains=('B',), found one of model.layers.0.self_attn.q_proj: return {} for A."
        in message
    )


def test_accumulators_and_weights():
    plain = changed(FSLoRA, accumulator=lambda zeros, state, cohort: dict(zeros))
    assert error_of(plain) == (
        "Expected mine:Own.accumulator to return FlatTensors, found a dict: return zeros_like_pair(state, shapes)."
    )
    found = {"nan": math.nan, "-1.0": -1.0, "a Tensor": torch.ones(()), "None": None}
    for told, weight in found.items():
        weighed = changed(HetLoRA, weigh=lambda norm, update, weight=weight: weight)
        weighed.accumulate = lambda self, accumulator, update: None
        assert error_of(weighed) == (
            "Expected mine:Own.weigh to give client 0 a finite number of at least 0, found "
            f"{told}: return a float, such as update.weight."
        )


def test_finite_values_may_overflow_in_a_sum():
    large = changed(FSLoRA, receive=with_A(lambda t, state: t.fill_(1e308)))
    assert len(one_round(make_run(method=large))["clients"]) == 5


def test_numpys_numbers_are_numbers():
    scaled = changed(
        FSLoRA,
        receive=lambda a, *_: ClientAdapter(a.A, a.B, np.float32(a.scale)),
        weigh=lambda weight, update: np.float32(weight),
    )
    run = make_run(method=scaled)
    json.dumps(one_round(run))
    run.begin_round(1)
    run.hand_over(0)
    assert {type(run.clients.stack.received(slot).scale) for slot in range(5)} == {float}


def test_a_global_adapter_that_is_not_finite_is_not_the_methods_doing():
    run = make_run()
    run.round.state.A[DOWN].data[0, 0] = math.inf
    assert one_round(run)["round"] == 0


def test_an_assignment_reaches_the_sum_of_processes():
    """As `+=` does: a tensor put beside the flat buffer would be left out of it."""
    run = make_run()
    accumulator = run.round.method.accumulator(run.round.state, run.plan(0).clients)
    accumulator["weight"] = accumulator["weight"] + 2.0
    accumulator["weight"] += 1.0
    assert accumulator["weight"].item() == 3.0 and accumulator.flat.sum().item() == 3.0
    with pytest.raises(KeyError):
        accumulator["no such name"] = torch.ones(1)


def test_fedit_is_a_method_of_ones_own_too():
    """The checks know no difference between the built-in methods and a user's."""
    short = changed(FedIT, receive=with_A(lambda t, state: t[:2]))
    short.full_rank_only = False
    with pytest.raises(MethodError, match="client 0 A of model.layers.0.self_attn.q_proj of shape"):
        one_round(make_run(method=short))  # it gives the whole pair to a client of rank 1
