"""What result files, repositories and records on disk bring into tables, pages, cards and logs; and seeded damage."""

import html
import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from fslora_hf.data.sources import load_rows
from fslora_hf.evaluation.journal import Journal
from fslora_hf.evaluation.outcomes import Outcome
from fslora_hf.evaluation.subjects import check_base_name, check_base_shapes, find_adapters
from fslora_hf.hub.card_scores import score_section
from fslora_hf.hub.errors import translate
from fslora_hf.hub.outbox import Outbox
from fslora_hf.hub.results import said
from fslora_hf.reports.accuracy import plot_accuracy, results_table
from fslora_hf.reports.entries import read_results
from fslora_hf.reports.leaderboard import rank
from fslora_hf.reports.leaderboard_page import to_html
from fslora_hf.reports.leaderboard_tables import to_csv, to_markdown, to_text
from tests.support.damage import variants
from tests.support.result_files import OTHER, REFERENCE, adapter, evaluation

FORGED = "boom\nWARNING all is lost\r\x1b[2J\u202e\u2028| a | b |\n<script>alert(1)</script>[x](http://x)" + "x" * 3000
HOSTILE = {
    "name": FORGED,
    "time": FORGED,
    "prompt_hash": FORGED,
    "model": {"name": FORGED, "revision": FORGED, FORGED: [FORGED] * 99},
    "adapter": {**adapter(3), "name": FORGED},
    "settings": {f"{number} {FORGED[:99]}": FORGED for number in range(2000)},
    "versions": {"torch": {"deep": [FORGED] * 99}},
}
LONGEST = 1500  # characters of a message


def check_line(text) -> None:
    assert str(text).isprintable() and 0 < len(str(text)) <= LONGEST, str(text)[:LONGEST]


def check_lines(text: str, longest: int = 4000) -> None:
    """Printable lines, none of which begins as a forged one would."""
    for line in text.split("\n"):
        assert line.isprintable() and len(line) <= longest and not line.startswith("WARNING"), line[:longest]


def rendered(entries) -> dict[str, str]:
    board = rank(entries, allow_other_prompts=True)
    return {tell.__name__: tell(board) for tell in (to_text, to_markdown, to_csv, to_html)}


def test_a_hostile_result_file_stays_within_its_cells(tmp_path):
    evaluation(tmp_path, "sound", REFERENCE)
    evaluation(tmp_path, "hostile", OTHER, **HOSTILE)
    plain = [len(text.split("\n")) for text in rendered(read_results([tmp_path / "sound.results.json"] * 1)).values()]
    found = rendered(read_results([tmp_path]))
    for name in ("to_text", "to_markdown", "to_csv"):
        check_lines(found[name])
    assert len(found["to_csv"].split("\n")) == 3 and sum(map(len, found.values())) < 200_000 and min(plain) > 1
    assert "<script>alert" not in found["to_markdown"] and "\\[x\\]" in found["to_markdown"]
    assert "<script>alert" not in found["to_html"]
    (data,) = re.findall(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', found["to_html"], re.DOTALL)
    for row in json.loads(data)["rows"]:
        for text in [row["name"], *(text for pair in row["details"] for text in pair)]:
            assert text.isprintable() and len(text) < 20_000
    assert html.escape(FORGED[:4]) in found["to_html"]


def test_a_hostile_result_stays_within_a_cards_and_a_reports_tables(tmp_path):
    path = evaluation(tmp_path, "hostile", OTHER, **HOSTILE)
    result = json.loads(path.read_text())
    averages = [{**line, "task": "average"} for line in result["scores"] if line["task"] == "a"]
    result["scores"] = [line for line in result["scores"] if line["task"] != "average"] + averages
    context = SimpleNamespace(results=[result], rounds_done=3, pushed_rounds=[])
    card = score_section(context)
    check_lines(card, 30_000)
    assert "<script>" not in card and "\\|" in results_table([result])
    check_lines(results_table([result]))


def test_names_with_signs_of_formulas_are_drawn(tmp_path):
    path = evaluation(tmp_path, "x", {"$\\frac$": "10", "b": "11"})
    assert plot_accuracy([json.loads(path.read_text())], tmp_path).stat().st_size > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outcomes": "x" * 300}, "Expected outcomes in .* to be the name of a file beside it"),
        ({"outcomes": "a\nb"}, "Expected outcomes in .* to be the name of a file beside it"),
        ({"tied": 10**400}, "Expected tied in .* to be a number below"),
        ({"adapter": {"round": "3"}}, "Expected adapter.round in .* to be a number of rounds or null, found '3'"),
        ({"adapter": {"name": [FORGED]}}, "Expected adapter.name in .* to be a text or null"),
        ({"scores": [{"task": "a"}] * 1001}, "Expected scores in .* to be at most 1,000, found 1001"),
        ({"protocol": FORGED}, "Expected protocol in .* to be one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_shown_is_refused_in_a_line(tmp_path, changes, message):
    evaluation(tmp_path, "x", REFERENCE, **changes)
    with pytest.raises(ValueError, match=message) as refused:
        read_results([tmp_path])
    check_line(refused.value)


@pytest.mark.parametrize("task", [FORGED, "a\nb", ""])
def test_tasks_have_short_printable_names(tmp_path, task):
    evaluation(tmp_path, "x", {task: "10"})
    with pytest.raises(ValueError, match="to be a printable name of at most 100 characters") as refused:
        read_results([tmp_path])
    check_line(refused.value)


def test_files_with_names_that_are_not_printable_are_refused(tmp_path):
    evaluation(tmp_path, "x", REFERENCE).rename(tmp_path / "a\nb.results.json")
    with pytest.raises(ValueError, match="Expected printable names of files in") as refused:
        read_results([tmp_path])
    check_line(refused.value)


def test_what_the_hub_says_is_one_line_without_the_token():
    error = ValueError(f"hf_secretsecret {FORGED}")
    for text in (
        said(error, None),
        str(translate(error, "owner/name")),
        said(ValueError("x " * 150 + "mytoken"), "mytoken"),
    ):
        check_line(text)
        assert "secretsecret" not in text and "mytoken" not in text


# ---- Seeded damage ----


@pytest.mark.parametrize("which", ["x.results.json", "x.outcomes.jsonl"])
def test_damaged_results_are_ranked_or_refused_in_a_line(tmp_path, which):
    evaluation(tmp_path / "sound", "sound", OTHER)
    sound = read_results([tmp_path / "sound"])
    evaluation(tmp_path / "x", "x", REFERENCE, adapter=adapter(2))
    whole, ranked = (tmp_path / "x" / which).read_bytes(), 0
    for each in variants(which, whole, 21, 400):
        (tmp_path / "x" / which).write_bytes(each.content)
        try:
            texts = rendered([*sound, *read_results([tmp_path / "x"])])
        except ValueError as error:
            check_line(error)
            continue
        ranked += 1
        assert "sound" in texts["to_text"]
        check_lines(texts["to_text"])
        check_lines(texts["to_markdown"])
    assert 10 < ranked < 300


def test_damaged_records_of_an_outbox_are_told_as_such(tmp_path):
    outbox = Outbox(tmp_path)
    kept = outbox.add(4, lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"w"))
    path, whole = kept.folder / "push.json", 0
    for each in variants("push.json", path.read_bytes(), 22, 300):
        path.write_bytes(each.content)
        (found,) = outbox.all()
        assert (found.round, found.tag, found.folder) == (4, "round-0004", kept.folder)
        assert found.status in ("pending", "pushed", "damaged")
        assert len(outbox.pending()) == (found.status == "pending")
        whole += found.status == "pending"
    assert 10 < whole < 200


def test_damaged_notes_of_where_rounds_go_are_told_in_a_line(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.write_target("owner/name", "main", None)
    path, whole = tmp_path / "target.json", 0
    for each in variants("target.json", path.read_bytes(), 23, 300):
        path.write_bytes(each.content)
        try:
            noted = outbox.read_target()
        except ValueError as error:
            check_line(error)
            continue
        whole += 1
        assert all(noted[name].isprintable() for name in ("repo_id", "revision"))
    assert 10 < whole < 200


def test_of_a_damaged_journal_whole_questions_are_kept(tmp_path):
    outcomes = [Outcome(f"q{number}", "a", "yes", ("yes", "no"), "yes", (-1.0, -2.0), "yes") for number in range(6)]
    journal = Journal(tmp_path, "x", {"protocol": "loglikelihood", "rows_hash": "b" * 16})
    journal.open(1, 0)
    journal.append(range(6), outcomes)
    journal.close()
    (path,) = tmp_path.glob(".x.*")
    whole = 0
    for each in variants("x.jsonl", path.read_bytes(), 24, 400):
        path.write_bytes(each.content)
        try:
            done, attempt = journal.read()
        except ValueError as error:
            check_line(error)
            continue
        whole += done == dict(enumerate(outcomes))
        assert attempt == 2 and all(
            isinstance(row, int) and outcome.correct in (True, False) for row, outcome in done.items()
        )
    assert 5 < whole < 200


# ---- Adapters and data sets of others ----


def adapter_folder(tmp_path, config=None, tensors=None):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config or {"base_model_name_or_path": "tiny"}))
    save_file(tensors or {}, tmp_path / "adapter_model.safetensors")
    (found,), _ = find_adapters(str(tmp_path))
    return found


def test_what_an_adapter_says_of_its_base_is_one_short_line(tmp_path):
    found = adapter_folder(tmp_path, {"base_model_name_or_path": FORGED})
    with pytest.raises(ValueError, match="Expected the base of the adapter") as refused:
        check_base_name(found, "tiny", allow_other_base=False)
    check_line(refused.value)
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="found damage") as refused:
        check_base_name(found, "tiny", allow_other_base=False)
    check_line(refused.value)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (2, 9)])
def test_modules_of_an_adapter_that_fit_no_base_are_named_in_one_short_line(tmp_path, shape):
    found = adapter_folder(tmp_path, tensors={f"{FORGED}.lora_A.weight": torch.zeros(shape)})
    with pytest.raises(ValueError, match="Expected matrices in|Expected a base with") as refused:
        check_base_shapes(found, torch.nn.Linear(3, 3))
    check_line(refused.value)


@pytest.mark.parametrize("task", ["a\nb", "x" * 101, "\x1b[31mred"])
def test_tasks_of_a_data_set_are_names(tmp_path, task):
    row = {"instruction": "Answer: true/false", "answer": "true", "output": "the correct answer is true", "task": task}
    (tmp_path / "train.json").write_text(json.dumps([{"input": "", **row}]))
    with pytest.raises(ValueError, match="in the column task of .*, printable and of at most 100") as refused:
        load_rows(str(tmp_path / "train.json"), "train")
    check_line(refused.value)
