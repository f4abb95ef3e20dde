"""The README's commands that talk to the Hub, as they stand there, with the test Hub in place of the real one."""

import os
import shlex

import pytest
import torch

from tests.evaluation.test_loglikelihood import fitted, tokenizer
from tests.support import tiny
from tests.support.forked import be
from tests.support.hub_calls import WRITES
from tests.test_readme import ROOT, blocks

pytest_plugins = ("tests.support.hub_client",)
pytestmark = pytest.mark.slow
SHORTER = "--local_steps 1 --train_rows_per_task 24 --eval_rows_per_task 4 --max_length 512".split()


@pytest.fixture
def run(hub, users, fork_client, tmp_path):
    """`run(command)` runs a line of the README, with stand-ins for what it names, logged in as `user`."""
    base = tmp_path / "base"
    fitted(tiny.base_model(torch.float32)).save_pretrained(base)
    tokenizer().save_pretrained(base)

    def call(command: str, code: int = 0, rounds: int = 4) -> str:
        for name, stand_in in {"MODEL": base, "YOU": "user", "NAME": "run", "outputs": tmp_path}.items():
            command = command.replace(name, str(stand_in))
        words = shlex.split(command.replace("--config_file recipes/accelerate_configs/cpu.yaml", ""))
        if words[:2] == ["accelerate", "launch"]:  # what it launches, without the second start of Python
            words = ["python", *words[2:], *SHORTER, "--num_rounds", str(rounds)]
        assert words[0] == "python"
        done = fork_client(log_in_and_be, WRITES, words[1:])
        printed = done.wait()
        assert done.returncode == code, printed[-3000:]
        assert WRITES not in printed
        return printed

    return call


def log_in_and_be(token: str, words: list[str]) -> None:
    """What `python words...` is for who is logged in by this token."""
    os.environ["HF_TOKEN"] = token
    be(words, str(ROOT))


def commands() -> list[str]:
    """The lines of the README that the Hub has a part in, in their order."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if "YOU" in line or "recipes/push.py" in line]


def test_commands_run_one_after_the_other(hub, run, tmp_path):
    train, push, resume, push_results, rank = commands()
    hub.fault("commit", status=403, after=1, times=None)  # round 2 arrives, round 4 does not
    printed = run(train, code=1)
    assert "Expected every chosen round on the Hub, found 1 missing (rounds 4)" in printed
    assert sorted(hub.find("user/run").refs()) == ["refs/heads/main", "refs/tags/round-0002"]
    hub.mend()
    table = [line.split() for line in run(push).splitlines() if "round-" in line]
    assert [(line[1], line[-1]) for line in table] == [("round-0002", "yes"), ("round-0004", "yes")]
    card = hub.find("user/run").files()["README.md"].decode()
    for part in ("### Log-likelihood of the options, after 4 rounds", "accuracy_by_round", "model-index:"):
        assert part in card, part
    assert "--push_to_hub true" in card and WRITES not in card
    printed = run(resume, rounds=6)
    assert "round-0006" in printed and sorted(hub.find("user/run").refs())[-1] == "refs/tags/round-0006"
    results = sorted(path.name for path in (tmp_path / "elsewhere" / "eval_rounds").glob("*.results.json"))
    assert results == [f"round-{number:04d}.loglikelihood.results.json" for number in (2, 4, 6)]
    assert run(push_results).count("added: ") == 2
    ranked = run(rank)
    assert "hf://datasets/user/results@" in ranked and "hf://user/run@" in ranked, ranked
