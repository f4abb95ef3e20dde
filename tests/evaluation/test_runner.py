"""All questions are asked once, whatever the batches, the processes and the kills."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from fslora_hf.common.processes import leave
from fslora_hf.data import load_miniature
from fslora_hf.evaluation import Loglikelihood, score_rows
from fslora_hf.evaluation import runner as runner_module
from fslora_hf.evaluation.journal import Journal
from fslora_hf.evaluation.outcomes import Outcome
from tests.evaluation.test_loglikelihood import fitted, tokenizer
from tests.support import tiny

pytest_plugins = ("tests.support.forked",)

ROOT = Path(__file__).parents[2]
IDENTITY = {"protocol": "loglikelihood", "rows_hash": "0"}


@pytest.fixture(scope="module")
def model():
    return fitted(tiny.base_model(torch.float32))


@pytest.fixture(scope="module")
def rows() -> Dataset:
    whole = load_miniature("test", rows_per_task=12)
    return whole.select([(i * 35) % len(whole) for i in range(40)])


class Counting(Loglikelihood):
    """Counts how often each question is asked, and stops like a killed process after some batches."""

    def __init__(self, batches: int | None = None):
        self.asked, self.batches = [], batches

    def score(self, model, questions):
        if self.batches is not None and len(self.asked) >= self.batches:
            raise KeyboardInterrupt
        self.asked.append([question.row["prompt"] for question in questions])
        return super().score(model, questions)


def agree(scores, others) -> None:
    """The same choice wherever the best two differ by more than 1e-4 nats, and log-likelihoods within that."""
    for outcome, other in zip(scores.outcomes, others.outcomes, strict=True):
        assert outcome.question == other.question
        torch.testing.assert_close(outcome.log_likelihoods, other.log_likelihoods, rtol=0, atol=1e-4)
        best, second = sorted(outcome.log_likelihoods, reverse=True)[:2]
        assert outcome.choice == other.choice or best - second <= 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_sizes_and_tokenizers_padding_change_nothing(model, rows, side):
    one = score_rows(model, tokenizer(), rows, batch_size=1)
    padding = tokenizer(padding_side=side)
    padding.pad_token = "!"  # one that also stands in texts, as where a model's pad token is its end of sequence
    for batch_size in (7, 32):
        agree(one, score_rows(model, padding, rows, batch_size=batch_size))


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["loglikelihood", "generate"])
def test_two_processes_share_the_questions(model, rows, protocol, run_python, tmp_path):
    model.save_pretrained(tmp_path / "model")
    rows.save_to_disk(tmp_path / "rows")
    done = run_python(__file__, str(tmp_path), protocol, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["records"] == second["records"]
    assert sorted(first["asked"] + second["asked"]) == sorted(rows["prompt"]) and first["asked"] and second["asked"]
    here = score_rows(model, tokenizer(), rows, protocol)
    there = [Outcome.from_record(record) for record in first["records"]]
    if protocol == "generate":
        assert there == here.outcomes
    else:
        agree(here, type(here)(protocol, there, {}))
    assert first["accuracy"] == second["accuracy"] == here.metrics["accuracy"]["accuracy"]


def work(folder: Path, protocol: str) -> None:
    """One process of the test above."""
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM

    torch.distributed.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    asking, asked = runner_module.make_protocol(protocol), []
    score = asking.score
    asking.score = lambda model, batch: asked.extend(q.row["prompt"] for q in batch) or score(model, batch)
    rows = load_from_disk(str(folder / "rows"))
    scores = score_rows(model, tokenizer(), rows, asking, journal=Journal(folder / "results", "x", IDENTITY))
    found = {"records": [outcome.to_record() for outcome in scores.outcomes], "asked": asked}
    found["accuracy"] = scores.metrics["accuracy"]["accuracy"]
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    leave()
    assert not torch.distributed.is_initialized()


def test_a_killed_evaluation_goes_on_with_the_questions_left(model, rows, tmp_path):
    whole = score_rows(model, tokenizer(), rows, Counting(), batch_size=4)
    asked_before = 0
    for attempt in range(2):
        killed = Counting(batches=3)
        with pytest.raises(KeyboardInterrupt):
            score_rows(model, tokenizer(), rows, killed, 4, journal=Journal(tmp_path, "x", IDENTITY))
        assert len(killed.asked) == 3, attempt
        asked_before += sum(map(len, killed.asked))
    last = sorted(tmp_path.glob(".x.*"))[-1]
    torn = last.read_text()
    last.write_text(torn[: torn.rindex('"answer"')])  # the kill came in the middle of a line
    rest = Counting()
    scores = score_rows(model, tokenizer(), rows, rest, 7, journal=Journal(tmp_path, "x", IDENTITY))
    assert sum(map(len, rest.asked)) == 40 - asked_before + 1 and 12 < asked_before < 30
    agree(whole, scores)
    assert scores.metrics == whole.metrics
    journal = Journal(tmp_path, "x", IDENTITY)
    assert len(journal.read()[0]) == 40
    again = Counting()
    assert score_rows(model, tokenizer(), rows, again, journal=journal).outcomes == scores.outcomes
    assert again.asked == []
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_journal_of_another_evaluation_is_refused(tmp_path):
    journal = Journal(tmp_path, "x", IDENTITY)
    journal.open(1, 0)
    journal.close()
    other = Journal(tmp_path, "x", IDENTITY | {"rows_hash": "1"})
    with pytest.raises(ValueError, match=r"^Expected the unfinished .* found that it differs in rows_hash:"):
        other.read()
    assert Journal(tmp_path, "y", IDENTITY).read() == ({}, 1)


def test_outcomes_survive_the_journal(tmp_path):
    nan = Outcome("1", "boolq", "true", ("true", "false"), None, (float("nan"), -1.5), None, finite=False)
    text = Outcome("2", "boolq", "true", ("true", "false"), "true", text="é \n true")
    sound = Outcome("3", "boolq", "true", ("true", "false"), "false", (-2.0, -1.0), "true")
    journal = Journal(tmp_path, "x", IDENTITY)
    journal.open(1, 0)
    journal.append([5, 0, 2], [nan, text, sound])
    journal.close()
    read, attempt = journal.read()
    assert attempt == 2 and read[0] == text and read[2] == sound
    assert read[5].log_likelihoods[1] == -1.5 and repr(read[5]) == repr(nan)


def test_batches_hold_like_lengths_and_come_mixed():
    costs = [(i * 37) % 101 for i in range(100)]
    sizes = [("ab"[i % 3 == 0], cost) for i, cost in enumerate(costs)]
    batches = runner_module._batches(sizes, {3, 50}, 8)
    assert all(len({sizes[i][0] for i in batch}) == 1 for batch in batches)
    assert sorted(i for batch in batches for i in batch) == [i for i in range(100) if i not in (3, 50)]
    assert max(costs) in [costs[i] for i in batches[0]]  # the longest first, so that memory is known to suffice
    spans = [max(costs[i] for i in batch) - min(costs[i] for i in batch) for batch in batches]
    assert max(spans) <= 30
    means = [sum(costs[i] for i in batch) / len(batch) for batch in batches]
    assert means != sorted(means) and means[1:] != sorted(means[1:], reverse=True)


def test_progress_counts_questions_from_where_a_kill_left_it(model, rows, tmp_path, capsys):
    killed = Counting(batches=2)
    with pytest.raises(KeyboardInterrupt):
        score_rows(model, tokenizer(), rows, killed, 4, journal=Journal(tmp_path, "x", IDENTITY))
    done = sum(map(len, killed.asked))
    capsys.readouterr()
    score_rows(
        model, tokenizer(), rows, batch_size=4, journal=Journal(tmp_path, "x", IDENTITY), description="Scoring it"
    )
    shown = capsys.readouterr().err
    assert "Scoring it" in shown and f" {done}/40" in shown and "40/40" in shown and "questions/s" in shown


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    work(Path(sys.argv[1]), sys.argv[2])
