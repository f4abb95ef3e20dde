"""A method in a user's own file: how its name finds the class, what is told if it does not, and what it may return."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fslora_hf.config import FederatedSketchConfig
from fslora_hf.engine import RoundEngine
from fslora_hf.methods import METHODS, ClientAdapter, FedIT, FSLoRA, HetLoRA, Method, MethodError, method_class
from fslora_hf.recipe import ModelArguments, RecipeArguments, parse_recipe
from fslora_hf.settings import SettingsError
from tests import reference
from tests.test_engine import make_engine
from tests.worker_train import QUIET, build, ledger

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n((?:(?!```).)*\(Method\).*?)```", README, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to start from; what is imported from it is forgotten when the test ends."""
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


def write(folder: Path, code: str, name: str = "mine.py") -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(code)


def refused(method) -> str:
    """The one sentence that the configuration has for this method, which is in the form of them all."""
    with pytest.raises(SettingsError) as caught:
        FederatedSketchConfig(output_dir="out", use_cpu=True, bf16=False, method=method)
    (problem,) = caught.value.problems
    assert re.fullmatch(r"Expected .*, found .*: .*\.", problem), problem
    return problem


# ---- From the name to the class ----

OWN = """
from fslora_hf.methods import FSLoRA


class Mine(FSLoRA):
    pass
"""


def test_built_in_names_are_theirs():
    assert {name: method_class(name) for name in METHODS} == METHODS


def test_a_class_is_found_in_the_folder_of_the_run(folder):
    write(folder, OWN)
    write(folder, OWN, "package/inner.py")
    assert method_class("mine:Mine") is sys.modules["mine"].Mine and issubclass(method_class("mine:Mine"), FSLoRA)
    assert method_class("package.inner:Mine") is sys.modules["package.inner"].Mine
    assert method_class("mine:FSLoRA") is FSLoRA  # a class may be imported there
    assert sys.path.count(str(folder)) == 1
    config = FederatedSketchConfig(output_dir="out", use_cpu=True, bf16=False, method="mine:Mine")
    assert config.method == "mine:Mine"


def test_a_script_may_hold_the_class_itself(folder, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "Mine", FSLoRA, raising=False)
    assert method_class("__main__:Mine") is FSLoRA


def test_the_command_line_and_yaml_name_it_alike(folder):
    write(folder, OWN)
    types = (RecipeArguments, FederatedSketchConfig, ModelArguments)
    flags = ["--model_name_or_path", "m", "--num_clients", "2", "--use_cpu", "true", "--bf16", "false"]
    assert parse_recipe(types, [*flags, "--method", "mine:Mine"])[1].method == "mine:Mine"
    write(folder, "method: mine:Mine\n", "recipe.yaml")
    assert parse_recipe(types, ["--config", "recipe.yaml", *flags])[1].method == "mine:Mine"


def test_a_problem_of_the_method_is_told_with_the_others(folder):
    write(folder, OWN)
    with pytest.raises(SettingsError) as caught:
        FederatedSketchConfig(output_dir="out", use_cpu=True, bf16=False, method="mine:Yours", num_rounds=0)
    told = " ".join(caught.value.problems)
    assert len(caught.value.problems) == 2 and "num_rounds" in told and "class Yours" in told


def test_what_a_class_says_of_itself_counts(folder, tmp_path):
    write(folder, OWN.replace("pass", "new_basis = True"))
    with pytest.raises(SettingsError, match="server_optim to be sgd with method=mine:Mine, found 'adam'"):
        FederatedSketchConfig(output_dir="out", use_cpu=True, bf16=False, method="mine:Mine", server_optim="adam")
    write(folder, OWN.replace("pass", "full_rank_only = True"), "full.py")
    with pytest.raises(ValueError, match="the global rank 6 with method=full:Mine, found ranks 4 to 4"):
        build(tmp_path / "run", {"method": "full:Mine", "max_rank": 4})


# ---- Names that stand for no method ----

BUILT_IN = "Expected method to be one of fslora, fedit, hetlora, flexlora, ffa_lora or module:Class, found "


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fed_it", BUILT_IN + "'fed_it': did you mean fedit."),
        ("xyz", BUILT_IN + "'xyz': choose one of these."),
        ("mine.Mine", BUILT_IN + "'mine.Mine': write mine:Mine if it is a class of yours."),
        *(
            (
                name,
                f"Expected method to be of the form module:Class, found {name!r}: name a module as an import does and "
                "a class in it, as in my_methods:MyMethod.",
            )
            for name in ("mine:", ":Mine", "mine:Mine:Mine", "./mine.py:Mine", "mine:Outer.Mine", "..mine:Mine")
        ),
    ],
)
def test_names_without_a_class(folder, name, message):
    write(folder, OWN)
    assert refused(name) == message


def test_other_values_are_no_names():
    assert refused(FSLoRA).startswith("Expected method to be a text, found <class")
    assert refused(None) == "Expected method to be a text, found None: write a text."


@pytest.mark.parametrize(
    ("name", "missing", "remedy"),
    [
        ("yours:Mine", "yours", "start the run in the folder that holds it, or correct the name"),
        ("mine.deeper:Mine", "mine.deeper", "start the run in the folder that holds it, or correct the name"),
        ("no.such:Mine", "no", "start the run in the folder that holds it, or correct the name"),
        ("mine.py:Mine", "mine.py", "write mine:Mine"),
    ],
)
def test_no_such_module(folder, name, missing, remedy):
    write(folder, OWN)
    assert refused(name) == (
        f"Expected method={name} to name a module that can be imported, found no module {missing} in {folder} or on "
        f"Python's path: {remedy}."
    )


@pytest.mark.parametrize(
    ("code", "found"),
    [
        (
            "import torch\nimport no_such_thing\n",
            "ModuleNotFoundError: No module named 'no_such_thing' (mine.py, line 2)",
        ),
        ("\n\n1 / 0\n", "ZeroDivisionError: division by zero (mine.py, line 3)"),
        ("class Mine(:\n", "SyntaxError: invalid syntax (mine.py, line 1)"),
        ("from fslora_hf.methods import Nothing\n", "ImportError: cannot import name 'Nothing' from "),
    ],
)
def test_an_error_of_the_file_itself_is_told_in_its_own_words(folder, code, found):
    write(folder, code)
    problem = refused("mine:Mine")
    assert problem.startswith(f"Expected method=mine:Mine to name a module that can be imported, found {found}")
    assert problem.endswith("): mend that file.") and "(mine.py, line" in problem


def test_no_such_class(folder):
    write(folder, OWN)
    where = f"in mine ({folder / 'mine.py'})"
    assert refused("mine:Mien") == f"Expected a class Mien {where}, found Mine: did you mean Mine."
    assert refused("mine:Other") == f"Expected a class Other {where}, found Mine: choose one of these."
    write(folder, "X = 1\n", "empty.py")
    where = f"in empty ({folder / 'empty.py'})"
    assert refused("empty:Mine") == f"Expected a class Mine {where}, found no method: write class Mine(Method) there."
    assert "in sys (a module without a file), found no method" in refused("sys:Mine")


CLASSES = """
from fslora_hf.methods import FSLoRA, Method

number = 3

def function(): pass

class Plain: pass

class Derived(dict): pass

class Nothing(Method): pass

class OnlyReceives(Method):
    def receive(self, state, client, sketch): pass

class Sideless(FSLoRA):
    trains = ()

class Misspelt(FSLoRA):
    trains = ("a", "B")

class Text(FSLoRA):
    trains = "AB"

class Demanding(FSLoRA):
    def __init__(self, strength): pass

class Modest(FSLoRA):
    def __init__(self, strength=1.0): pass
"""
SUBCLASS = "to be a subclass of fslora_hf.methods.Method, found"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", f"Expected classes:number {SUBCLASS} a int: derive it from Method."),
        ("function", f"Expected classes:function {SUBCLASS} a function: derive it from Method."),
        ("Plain", f"Expected classes:Plain {SUBCLASS} a class of object: derive it from Method."),
        ("Derived", f"Expected classes:Derived {SUBCLASS} a class of dict: derive it from Method."),
        (
            "Nothing",
            "Expected classes:Nothing to write receive and accumulate, found no receive and no accumulate: define it.",
        ),
        ("OnlyReceives", "to write receive and accumulate, found no accumulate: define it."),
        ("Sideless", "Expected classes:Sideless.trains to hold 'A', 'B' or both, found (): write it as in trains = "),
        ("Misspelt", "trains to hold 'A', 'B' or both, found ('a', 'B'): write it as in trains = ('B',)."),
        ("Text", "trains to hold 'A', 'B' or both, found 'AB': write it as in trains = ('B',)."),
        (
            "Demanding",
            "Expected classes:Demanding to be made without arguments, found missing a required argument: 'strength': "
            "give its arguments defaults.",
        ),
    ],
)
def test_classes_that_are_no_methods(folder, name, message):
    write(folder, CLASSES, "classes.py")
    assert message in refused(f"classes:{name}")
    assert method_class("classes:Modest")


# ---- What a method may return ----


def changed(method: type[Method], **functions) -> type[Method]:
    """A method of the user's whose functions are given what the original ones return."""

    def wrap(name, function):
        def wrapped(self, *arguments):
            return function(getattr(super(own, self), name)(*arguments), *arguments)

        return wrapped

    own = type("Own", (method,), {name: wrap(name, function) for name, function in functions.items()})
    own.__module__ = "mine"
    return own


def one_round(engine: RoundEngine) -> dict:
    engine.begin_round(0)
    for wave in range(engine.layout.waves):
        engine.hand_over(wave)
        engine.collect()
    return engine.close_round()


def error_of(method: type[Method]) -> str:
    engine = make_engine(method=method)
    before = {m: (engine.server.A[m].clone(), engine.server.B[m].clone()) for m in engine.server.A}
    with pytest.raises(MethodError) as caught:
        one_round(engine)
    after = {m: (engine.server.A[m], engine.server.B[m]) for m in engine.server.A}
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
    assert len(one_round(make_engine(method=large))["clients"]) == 5


def test_numpys_numbers_are_numbers():
    scaled = changed(
        FSLoRA,
        receive=lambda a, *_: ClientAdapter(a.A, a.B, np.float32(a.scale)),
        weigh=lambda weight, update: np.float32(weight),
    )
    engine = make_engine(method=scaled)
    json.dumps(one_round(engine))
    engine.begin_round(1)
    engine.hand_over(0)
    assert {type(engine.stack.received(slot).scale) for slot in range(5)} == {float}


def test_a_global_adapter_that_is_not_finite_is_not_the_methods_doing():
    engine = make_engine()
    engine.server.A[DOWN].data[0, 0] = math.inf
    assert one_round(engine)["round"] == 0


def test_an_assignment_reaches_the_sum_of_processes():
    """As `+=` does: a tensor put beside the flat buffer would be left out of it."""
    engine = make_engine()
    accumulator = engine.method.accumulator(engine.server, engine.plan(0).clients)
    accumulator["weight"] = accumulator["weight"] + 2.0
    accumulator["weight"] += 1.0
    assert accumulator["weight"].item() == 3.0 and accumulator.flat.sum().item() == 3.0
    with pytest.raises(KeyError):
        accumulator["no such name"] = torch.ones(1)


def test_the_error_of_a_run_names_the_method_the_client_and_the_module(folder):
    write(folder, OWN.replace("pass", "def receive(self, state, client, sketch):") + "        return state\n")
    trainer = build(folder / "run", {"method": "mine:Mine", "num_rounds": 1, "local_steps": 1})
    with pytest.raises(
        MethodError, match=r"mine:Mine.receive to give client 3 a ClientAdapter, found a ServerState: "
    ):
        trainer.train()
    with pytest.raises(MethodError, match=r"mine:Mine.receive to give client 41 a ClientAdapter, found a ServerState"):
        client = next(client for client in trainer.round_plan(0).clients if client.client_id == 41)
        trainer.save_client_adapter(folder / "client", client)


# ---- The README's example ----


def test_the_readmes_method_averages_over_holders(folder):
    """At full rank it is fedit; with mixed ranks the rows that one client held change as that client's did."""
    write(folder, EXAMPLE, "my_methods.py")
    ends = []
    for method in ("my_methods:MeanOfHolders", "fedit"):
        trainer = build(folder / method.replace(":", "_"), {"method": method, "num_rounds": 2, "local_steps": 2})
        trainer.train()
        ends.append(reference.read_adapter(trainer.model))
    assert reference.max_difference(*ends) < 1e-12
    args = {"method": "my_methods:MeanOfHolders", "num_rounds": 2, "local_steps": 2, "server_optim": "adam"}
    trainer = build(folder / "mixed", {**args, "client_ranks": [1, 2, 2, 3, 5], "per_device_train_clients": 3})
    start = reference.read_adapter(trainer.model)
    trainer.train()
    for name, (A, B) in reference.read_adapter(trainer.model).items():
        assert torch.equal(A[5:], start[name][0][5:]) and torch.equal(B[:, 5:], start[name][1][:, 5:])
        assert not torch.equal(A[4], start[name][0][4]) or not torch.equal(B[:, 4], start[name][1][:, 4])
    assert [record["round"] for record in ledger(folder / "mixed")] == [0, 1]


def test_another_method_does_not_resume_its_run(folder):
    write(folder, OWN)
    args = {**QUIET, "num_rounds": 1, "local_steps": 1, "save_rounds": 1}
    build(folder / "run", {**args, "method": "mine:Mine"}).train()
    with pytest.raises(ValueError, match="method.*mine:Mine"):
        build(folder / "run", {**args, "method": "fslora"}).train(resume_from_checkpoint=True)
    build(folder / "run", {**args, "num_rounds": 2, "method": "mine:Mine"}).train(resume_from_checkpoint=True)
    assert [record["round"] for record in ledger(folder / "run")] == [0, 1]


def test_fedit_is_a_method_of_ones_own_too():
    """The checks know no difference between the built-in methods and a user's."""
    short = changed(FedIT, receive=with_A(lambda t, state: t[:2]))
    short.full_rank_only = False
    with pytest.raises(MethodError, match="client 0 A of model.layers.0.self_attn.q_proj of shape"):
        one_round(make_engine(method=short))  # it gives the whole pair to a client of rank 1
