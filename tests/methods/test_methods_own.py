"""A method in a user's own file: how its name finds the class, what is told if it does not, and runs of one."""

import re
import sys
from pathlib import Path

import pytest
import torch

from fslora_hf.common.settings import SettingsError
from fslora_hf.config.federation import FederatedSketchConfig
from fslora_hf.config.recipe import ModelArguments, RecipeArguments, parse_recipe
from fslora_hf.methods import METHODS, FSLoRA, MethodError, method_class
from tests.rounds.test_round import make_run, train
from tests.support import reference
from tests.support.worker_train import QUIET, build, ledger

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
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

NAMES = "fslora, fedit, hetlora, flexlora, flora, flora_residual, ffa_lora"
BUILT_IN = f"Expected method to be one of {NAMES} or module:Class, found "


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


# ---- Runs ----


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


def test_the_readmes_method_averages_over_holders(folder):
    """At full rank it is fedit; with mixed ranks the rows that one client held change as that client's did."""
    write(folder, EXAMPLE, "my_methods.py")
    ends = []
    for method in ("my_methods:MeanOfHolders", "fedit"):
        trainer = build(folder / method.replace(":", "_"), {"method": method, "num_rounds": 2, "local_steps": 2})
        trainer.train()
        ends.append(reference.read_adapter(trainer.model))
    assert reference.max_difference(*ends) < 1e-12
    run = make_run(method=method_class("my_methods:MeanOfHolders"))
    before = {name: A.clone() for name, A in run.round.state.A.items()}
    run.begin_round(0)
    clients = run.hand_over(0)
    train(run)  # client c adds c + 1
    run.collect()
    run.aggregate()
    for name, A in run.round.state.A.items():
        for row in range(6):
            held = [(client.weight, client.client_id + 1) for client in clients if client.rank > row]
            mean = sum(weight * change for weight, change in held) / sum(weight for weight, _ in held)
            torch.testing.assert_close(A[row] - before[name][row], torch.full_like(A[row], mean))
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
