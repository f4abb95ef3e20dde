"""The report of a comparison: its numbers against those worked out by hand, its figures, its page."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from math import sqrt

import pytest

from fslora_hf.comparison.arguments import parse_comparison
from fslora_hf.comparison.figures import LINES, panels_of
from fslora_hf.comparison.folder import Folder
from fslora_hf.comparison.page import write_report
from fslora_hf.comparison.results import check_alike, read_run
from fslora_hf.comparison.runs import runs_of
from fslora_hf.comparison.splits import Split
from fslora_hf.comparison.summary import over_seeds, summarise
from fslora_hf.comparison.tables import grid, to_markdown, to_text
from tests.support import compared

# Loss and accuracy after the last round, by method and seed.
LAST = {
    ("fslora", 1): (1.0, 0.50),
    ("fslora", 2): (1.4, 0.60),
    ("hetlora", 1): (1.1, 0.45),
    ("hetlora", 2): (1.3, 0.63),
}
FIGURES = {
    "accuracy_by_round",
    "loss_by_round",
    "accuracy_by_bytes",
    "loss_by_bytes",
    "accuracy_by_rank",
    "loss_by_rank",
    "data_split",
    "ranks",
}


@pytest.fixture
def results(tmp_path):
    """Four made-up runs of four rounds, and the variants that they are of."""
    variants, runs = runs_of(parse_comparison(compared.write_comparison(tmp_path)))
    folder, found = Folder(tmp_path / "out"), []
    for run in runs:
        path = folder.run(run.name)
        scores = {2: (2.0, 0.4), 4: LAST[run.args.method, run.seed]}
        compared.write_run(path, 4, scores, data=f"d{run.seed}", rows_hash=f"r{run.seed}")
        found.append(read_run(run, path))
    return variants, found


def split(results, **ranks) -> Split:
    given = {result.run.name: ranks.get(result.run.args.method, (1, 3)) for result in results}
    return Split("iid, 2 clients", 1, ("boolq", "piqa"), ((3, 1), (0, 4)), "digest", "digest", given)


@pytest.fixture
def summary(results):
    variants, found = results
    splits = [split(found, hetlora=(1, 1))]
    return summarise("Mine & <yours>", {"rounds": 4}, (1, 2), variants, found, splits)


def approx(mean, spread, n):
    return {"mean": pytest.approx(mean), "spread": spread if spread is None else pytest.approx(spread), "n": n}


def test_means_spreads_and_paired_differences(summary):
    """By hand: the sample's standard deviation of two numbers is their distance by the root of two."""
    first, second = summary["variants"]
    assert first["accuracy"] == approx(0.55, 0.1 / sqrt(2), 2)
    assert first["loss"] == approx(1.2, 0.4 / sqrt(2), 2)
    assert first["reference"] is None and first["difference"] == {"accuracy": None, "loss": None}
    # Within the seeds: -0.05 and +0.03, and +0.1 and -0.1; not the distance of the means with its larger spread.
    assert second["reference"] == "fslora"
    assert second["difference"]["accuracy"] == approx(-0.01, 0.08 / sqrt(2), 2)
    assert second["difference"]["loss"] == approx(0.0, 0.2 / sqrt(2), 2)
    assert first["megabytes_up"] == approx(4.0, 0.0, 2) and first["megabytes_down"] == approx(8.0, 0.0, 2)
    assert first["seconds"] == approx(12.0, 0.0, 2)
    assert (first["mean_rank"]["mean"], second["mean_rank"]["mean"]) == (2.0, 1.0)
    assert first["rank_losses"] == {"1": approx(2.0, 0.0, 2), "3": approx(1.0, 0.0, 2)}
    assert [(point["round"], point["megabytes_up"]) for point in first["curve"]] == [(2, 2.0), (4, 4.0)]
    assert first["curve"][0]["loss"] == approx(2.0, 0.0, 2) and first["curve"][1]["loss"] == first["loss"]
    assert summary["majority_rate"] == pytest.approx(0.4)


def test_spread_is_the_samples():
    assert over_seeds([1.0, 2.0, 6.0]) == approx(3.0, sqrt((4 + 1 + 9) / 2), 3)
    assert over_seeds([2.5]) == approx(2.5, None, 1)
    assert over_seeds([None]) is None


def test_the_table_shows_them(summary):
    header, first, second = grid(summary)
    cells = dict(zip(header, second, strict=True))
    assert dict(zip(header, first, strict=True))["difference, points [95 %]"] == "reference"
    assert cells["accuracy, %"] == "54.00 ± 12.73" and cells["MB down"] == "8.00 ± 0.00"
    # 95 % of two values: 12.7062 of their spread by the root of two, so 0.508 and 1.271.
    assert cells["difference, points [95 %]"] == "-1.00 ± 5.66 [-51.82, +49.82]"
    assert cells["difference of loss [95 %]"] == "+0.0000 ± 0.1414 [-1.2706, +1.2706]"
    assert cells["MB up"] == "4.00 ± 0.00"
    assert cells["seeds"] == "2"
    text = to_text(summary)
    assert "Always giving a task's most common answer would reach 40.00 %." in text
    assert "Seeds were scored on rows of their own" in text
    assert "by Student's t (spread / root of the number of seeds, times 12.7 for 2 seeds)" in text
    assert (
        to_markdown(summary)
        .splitlines()[3]
        .startswith("| hetlora | 54.00 ± 12.73 | -1.00 ± 5.66 \\[-51.82, +49.82\\] |")
    )


def test_one_seed_is_said_to_be_one(results):
    variants, found = results
    one = [result for result in found if result.run.seed == 1]
    summary = summarise("t", {"rounds": 4}, (1,), variants, one, [split(one)])
    assert grid(summary)[2][1:3] == ["45.00 (n=1)", "-5.00 (n=1)"]
    assert "Student" not in to_text(summary)
    assert "One seed (1): there is no spread, and no difference here can be told from chance." in to_text(summary)


def test_a_run_that_did_not_finish_is_said_to_be_missing(results):
    variants, found = results
    summary = summarise("t", {"rounds": 4}, (1, 2), variants, found[:3], [split(found)])
    assert "hetlora: no finished run of seed 2." in summary["notes"]
    # The pair of the other seed is all there is.
    assert summary["variants"][1]["difference"]["accuracy"] == approx(-0.05, None, 1)


def test_a_run_that_ran_out_of_rounds_before_its_bytes_is_named(results):
    variants, found = results
    short = [dataclasses.replace(found[0], short_of_budget=True), *found[1:]]
    summary = summarise("t", {"upload_megabytes": 9.0}, (1, 2), variants, short, [split(found)])
    (note,) = [note for note in summary["notes"] if "less than the budget" in note]
    assert note.startswith("fslora-seed1: 4 rounds, all that num_rounds allows, sent 4.00 MB")
    assert "Equal bytes: every run ended after the round in which" in to_text(summary)


def test_a_curve_ends_with_each_runs_own_last_round(results):
    """At equal bytes, seeds end after different rounds; only evaluations that all have are averaged before."""
    variants, found = results
    longer = found[2].points + (dataclasses.replace(found[2].points[-1], round=6, bytes_up=6_000_000),)
    uneven = [found[0], dataclasses.replace(found[2], points=longer)]
    assert {result.run.variant for result in uneven} == {0}
    curve = summarise("t", {"rounds": 4}, (1, 2), variants, uneven, [])["variants"][0]["curve"]
    assert [(point["round"], point["megabytes_up"]) for point in curve] == [(2, 2.0), (5, 5.0)]


# ---- refusals ----


def altered(result, **changes):
    return dataclasses.replace(result, scoring=result.scoring | changes)


def test_runs_that_differ_in_data_or_scoring_are_refused(results):
    _, found = results
    check_alike(found)
    assert found[0].scoring["rows_hash"] != found[2].scoring["rows_hash"]  # of another seed
    other_data = dataclasses.replace(found[1], identity=found[1].identity | {"data": "other"})
    other_model = dataclasses.replace(found[3], identity=found[3].identity | {"model": "Other"})
    for changed, what in (
        (other_data, "the training rows of each client to be 'd1' in fslora-seed1 and 'other' in hetlora-seed1"),
        (other_model, "the model to be 'Tiny' in fslora-seed1 and 'Other' in hetlora-seed2"),
        (altered(found[1], rows_hash="x"), "the scored rows to be 'r1' in fslora-seed1 and 'x' in hetlora-seed1"),
        (altered(found[2], prompt_hash="x"), "prompt_hash to be 'p' in fslora-seed1 and 'x' in fslora-seed2"),
        (altered(found[2], protocol="generate"), "protocol to be 'loglikelihood' in fslora-seed1 and 'generate'"),
        (altered(found[1], settings={"beams": 2}), "settings to be {} in fslora-seed1 and {'beams': 2}"),
        (dataclasses.replace(found[1], scoring=None), "the kind of scoring"),
    ):
        changed_runs = [changed if changed.run.name == result.run.name else result for result in found]
        with pytest.raises(ValueError) as caught:
            check_alike(changed_runs)
        assert f"found {what}" in str(caught.value)


def test_another_way_to_split_may_have_other_owners(results):
    _, found = results
    run = dataclasses.replace(found[1].run, recipe=dataclasses.replace(found[1].run.recipe, num_clients=5))
    check_alike([found[0], dataclasses.replace(found[1], run=run, identity={"model": "Tiny", "data": "other"})])


# ---- files ----


@pytest.fixture
def folder(summary, tmp_path):
    (tmp_path / "report").mkdir()
    write_report(summary, tmp_path / "report")
    return tmp_path / "report"


def test_every_file_of_a_report_is_there_and_whole(folder):
    assert {path.stem for path in folder.glob("*.svg")} == {path.stem for path in folder.glob("*.png")} == FIGURES
    for path in folder.glob("*.svg"):
        root = ElementTree.parse(path).getroot()
        assert root.tag.endswith("svg") and len(list(root.iter())) > 50
    assert all(
        path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in folder.glob("*.png")
    )
    assert json.loads((folder / "comparison.json").read_text())["variants"][1]["label"] == "hetlora"
    report = (folder / "report.md").read_text()
    assert (folder / "table.md").read_text().strip() in report and "- `fslora-seed1`" in report
    assert all((folder / name).is_file() for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", report))

    page = (folder / "index.html").read_text()
    assert "<h1>Mine &amp; &lt;yours&gt;</h1>" in page and "<td>54.00 ± 12.73</td>" in page and "{{" not in page
    # Nothing is fetched: every address is of bytes in the page, and the policy forbids others.
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert len(addresses) == len(FIGURES) and all(each.startswith("data:image/svg+xml;base64,") for each in addresses)
    assert "http://" not in page and "https://" not in page and "<script" not in page
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and policy.endswith("; img-src data:")


def test_a_report_without_scores_has_no_figure_of_them(results, tmp_path):
    variants, found = results
    bare = [dataclasses.replace(result.points[-1], accuracy=None) for result in found]
    losses = [
        dataclasses.replace(result, points=(point,), scoring=None, majority_rate=None)
        for result, point in zip(found, bare, strict=True)
    ]
    summary = summarise("t", {"rounds": 4}, (1, 2), variants, losses, [])
    written = {path.name for path in write_report(summary, tmp_path) if path.suffix == ".svg"}
    assert written == {"loss_by_round.svg", "loss_by_bytes.svg", "loss_by_rank.svg"}
    assert grid(summary)[1][1] == "-"


def test_a_panel_holds_few_lines():
    def made(cases, laws, methods):
        every = [(c, law, m) for c in range(cases) for law in range(laws) for m in range(methods)]
        return [{"case": str(c), "rank_law": str(law), "method": str(m)} for c, law, m in every]

    assert [len(panel) for panel in panels_of(made(1, 1, 8))] == [8]
    assert [len(panel) for panel in panels_of(made(1, 2, 7))] == [7, 7]
    assert [len(panel) for panel in panels_of(made(1, 1, 9))] == [8, 1]
    assert [len(panel) for panel in panels_of(made(10, 1, 1))] == [8, 2]
    assert all(len(panel) <= LINES for panel in panels_of(made(3, 2, 11)))
