"""Record runs with whatever version comes first on the path, for tests/laws/test_recorded.py to resume with this one.

    cd SOME_EMPTY_FOLDER && PYTHONPATH=OTHER_VERSION:THIS_VERSION python THIS_VERSION/tests/recorded/record.py

writes beside this file, for each of `RUNS` (tests/support/recorded.py) a folder that holds

    run/        the run's folder as a kill in its last round left it: the last checkpoint, the ledger with a round
                more, and what else a run keeps
    expected/   the tensors of the last checkpoint and the ledger of the same run, never interrupted
    hub.bundle  for the run that pushes: the repository, with two of its rounds; the third waits in the outbox

and a comparison, an evaluation and a federation of their own kind, told at their functions. All that is there was
written by the last version before the package's modules were sorted into rooms (November 2026), on an x86
processor, by the versions of constraints.txt. Paths are relative and the model is random: nothing here is of a person
or a machine.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
KEPT = ("*.safetensors", "federated_state.json", "error_feedback.json")  # of the last checkpoint of a whole run


def write_model() -> None:
    """The base model of all but the comparison, whose tokens are words."""
    from tests.support import recorded, tiny

    tiny.base_model().save_pretrained(recorded.MODEL)
    tiny.tokenizer().save_pretrained(recorded.MODEL)


def write_bytes() -> None:
    """The base model of the comparison, whose tokens are bytes."""
    import torch

    from tests.support import tiny

    try:
        from tests.evaluation.test_loglikelihood import fitted, tokenizer
    except ImportError:  # that version's own
        from tests.test_loglikelihood import fitted, tokenizer
    fitted(tiny.base_model(torch.float32)).save_pretrained(HERE / "bytes")
    tokenizer().save_pretrained(HERE / "bytes")


def whole(name: str) -> None:
    """A run from beginning to end."""
    from tests.support import recorded

    recorded.build(name, "whole", push_to_hub=False).train()


def stopped(name: str) -> None:
    """A run killed in the second step of its last round."""
    from transformers import TrainerCallback

    from tests.support import recorded

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == (recorded.ROUNDS - 1) * recorded.STEPS + 1:
                os._exit(9)

    recorded.build(name, "run", [Kill()]).train()


def pushed(name: str) -> None:
    """The same with a Hub beside it, which takes two rounds and then answers no more."""
    from tests.support.hub_server import HubServer

    hub = HubServer(page_size=3)
    hub.__enter__()
    os.environ |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    from transformers import TrainerCallback

    from fslora_hf.hub.outbox import Outbox
    from tests.support import recorded

    hub.users[recorded.WRITES] = {"name": "user", "role": "write", "orgs": []}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            while state.global_step == 2 * recorded.STEPS and Outbox("run/hub_outbox", tidy=False).pending():
                pass
            if state.global_step == 2 * recorded.STEPS:
                hub.fault("commit", status=503, times=None)

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == (recorded.ROUNDS - 1) * recorded.STEPS + 1:
                while not Outbox("run/hub_outbox", tidy=False).get(3).sent:
                    pass
                repository = hub.find(recorded.REPOSITORY)
                repository.git("bundle", "create", os.path.abspath("hub.bundle"), "--all")
                os._exit(9)

    recorded.build(name, "run", [Watch()]).train()


def federation(folder: str, answers: str) -> None:
    """A federation whose server and nodes, all in one process, are killed once that many answers are in.

    `federation/` holds the folders of the server (run/) and of the nodes, and expected/ as above.
    """
    from tests.support import recorded

    try:
        from tests.support import federated
    except ImportError:  # that version's own
        from tests import federated

    Path("source").mkdir()
    federated.write_model_and_rows(Path("source"))
    shutil.copytree(recorded.MODEL, "source/model", dirs_exist_ok=True)
    Path(folder).mkdir()
    recipe = federated.write_recipe(Path("source"), Path(folder), **recorded.FEDERATION)
    nodes = federated.make_nodes(Path(folder))
    exchange = federated.LocalExchange(nodes)

    def counted(node):
        def answer(packet):
            trained = sum(sent.kind == "train" for _, sent in exchange.sent)
            return os._exit(9) if trained > int(answers) else node(packet)

        return answer

    exchange.nodes_by_number = {number: counted(node) for number, node in nodes.items()}
    federated.federate(recipe, exchange)


def comparison() -> None:
    """Two runs on rows of bytes, compared, and the first of them evaluated once more."""
    from recipes import compare, evaluate
    from tests.support import recorded

    values = recorded.COMPARISON
    recorded.write_files(Path(), recipe=values["recipe"], comparison=values["comparison"])
    sys.argv = ["compare.py", "--config", "comparison.yaml"]
    compare.main()
    sys.argv = ["evaluate.py", "--config", "recipe.yaml", *recorded.EVALUATED]
    evaluate.main()


def keep(name: str, run: str, whole: str) -> None:
    """Put what a killed run and a whole one left beside this file."""
    target = HERE / name
    shutil.rmtree(target, ignore_errors=True)
    last = max(Path(whole).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in (path for kind in KEPT for path in last.rglob(kind)):
        place = target / "expected" / path.relative_to(last)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    shutil.copy(Path(whole, "rounds.jsonl"), target / "expected")
    copy(Path(run), target / "run")


def copy(source: Path, target: Path) -> None:
    """A folder without what tells of this machine, what is drawn, and what a federation's recipe is given again."""
    ignored = shutil.ignore_patterns(".run.lock", "*.png", "*.html", "*.svg", "*.log", "*.yaml")
    shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)


def record_runs() -> None:
    for name in ("sketches", "folded", "pushed"):
        for left in ("whole", "run"):
            shutil.rmtree(left, ignore_errors=True)
        assert child("whole", name) == 0
        assert child("pushed" if name == "pushed" else "stopped", name) == 9
        keep(name, "run", "whole")
    shutil.copy("hub.bundle", HERE / "pushed")


def record_federation() -> None:
    for folder, answers, code in (("federated", "7", 9), ("undisturbed", "9", 0)):
        shutil.rmtree("source", ignore_errors=True)
        assert child("federation", folder, answers) == code
    keep("federation", "federated/run", "undisturbed/run")
    for folder in Path("federated").glob("node-*"):
        copy(folder, HERE / "federation" / folder.name)


def record_comparison() -> None:
    shutil.rmtree(HERE / "bytes", ignore_errors=True)
    assert child("write_bytes") == 0
    shutil.copytree(HERE / "bytes", "bytes", dirs_exist_ok=True)
    assert child("comparison") == 0
    for name in ("compared", "evaluated"):
        shutil.rmtree(HERE / name, ignore_errors=True)
        copy(Path(name), HERE / name)


def child(*command: str) -> int:
    """This script in a process of its own; its exit code."""
    return subprocess.run([sys.executable, __file__, *command]).returncode


def main() -> None:
    if len(sys.argv) > 1:
        globals()[sys.argv[1]](*sys.argv[2:])
        return
    assert child("write_model") == 0
    record_runs()
    record_federation()
    record_comparison()


if __name__ == "__main__":
    main()
