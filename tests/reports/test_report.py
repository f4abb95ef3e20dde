import json
import os
import subprocess
import sys

import pytest
from matplotlib.image import imread

from fslora_hf.reports.ledger import cohort_mean, draw_ledger, ledger_table, plot_ledger, read_ledger, totals


def row(t, clients=(3, 7), ranks=(2, 8), losses=(2.0, 1.0), weights=(0.5, 0.5), refused=(), kilobytes=10):
    """A round's record in which an index of the sketch costs `kilobytes` each way, under a global rank of 8."""
    return {
        "round": t,
        "learning_rate": 1e-3,
        "clients": list(clients),
        "ranks": list(ranks),
        "weights": list(weights),
        "losses": list(losses),
        "update_norms": [None if loss is None else 0.25 for loss in losses],
        "refused": [{"client_id": client, "reason": "its update is not finite"} for client in refused],
        "bytes_down": sum(ranks) * kilobytes * 1000,
        "bytes_up": sum(ranks) * kilobytes * 1000,
        "bytes_full_rank": 2 * 8 * len(ranks) * kilobytes * 1000,
        "seconds": 1.5,
    }


ROWS = [row(0), row(1, losses=(None, 0.5), weights=(0, 1), refused=(3,)), row(2, losses=(0.75, 0.25))]


def write(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_torn_last_line_is_left_out(tmp_path, cut):
    path = write(tmp_path / "rounds.jsonl", ROWS, tail=json.dumps(row(3))[:cut])
    assert read_ledger(path) == ROWS


def test_a_whole_last_line_without_its_newline_counts(tmp_path):
    path = write(tmp_path / "rounds.jsonl", ROWS, tail=json.dumps(row(3)))
    assert read_ledger(path) == [*ROWS, row(3)]


def test_an_empty_ledger_has_no_rounds(tmp_path):
    assert read_ledger(write(tmp_path / "rounds.jsonl", [])) == []


def _without(key):
    return {name: value for name, value in row(1).items() if name != key}


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (
            [json.dumps(ROWS[0]), '{"round": 1, "cl', json.dumps(ROWS[2])],
            r"JSON record on line 2 .* found '\{\"round\"",
        ),
        ([json.dumps(ROWS[0]), "17"], "JSON record on line 2 .* found '17'"),
        ([json.dumps(ROWS[0]), ""], "JSON record on line 2 .* found ''"),
        ([json.dumps(_without("losses"))], "on line 1 .* found none of losses"),
        ([json.dumps(row(0, losses=[1.0]))], "one entry a client in every list on line 1 .*'losses': 1"),
        ([json.dumps(row(0)), json.dumps(row(2))], "Expected round 1 after round 0 .* found round 2"),
        ([json.dumps(row(0)), json.dumps(row(0))], "Expected round 1 after round 0 .* found round 0"),
    ],
)
def test_a_damaged_ledger_is_an_error(tmp_path, lines, sentence):
    path = tmp_path / "rounds.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(ValueError, match=sentence):
        read_ledger(path)


def test_a_missing_ledger_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="Expected a ledger at .*nowhere.jsonl, found no file"):
        read_ledger(tmp_path / "nowhere.jsonl")


def test_totals():
    assert totals(ROWS) == {
        "bytes_up": 300_000,
        "bytes_down": 300_000,
        "bytes_total": 600_000,
        "bytes_full_rank": 960_000,
        "ratio": 0.625,
        "seconds": 4.5,
        "rounds": 3,
        "refused": 1,
    }
    assert totals([])["ratio"] is None


def test_cohort_mean_weighs_accepted_clients_only():
    assert cohort_mean(row(0, weights=(0.75, 0.25)), "losses") == 1.75
    # A client refused for its update may still have had a finite loss: it counts for nothing.
    assert cohort_mean(row(0, losses=(9.0, 1.0), weights=(0, 1), refused=(3,)), "losses") == 1.0
    for losses in ((None, None), (9.0, 9.0)):
        assert cohort_mean(row(0, losses=losses, weights=(0, 0), refused=(3, 7)), "losses") is None


def test_table():
    assert ledger_table(ROWS).splitlines() == [
        "round  clients  ranks    loss  update norm  MB up  MB down  seconds  refused",
        "----------------------------------------------------------------------------",
        "    0      3 7    2 8  1.5000         0.25   0.10     0.10      1.5        -",
        "    1      3 7    2 8  0.5000         0.25   0.10     0.10      1.5        3",
        "    2      3 7    2 8  0.5000         0.25   0.10     0.10      1.5        -",
        "----------------------------------------------------------------------------",
        "  all                                        0.30     0.30      4.5        1",
    ]


def test_table_of_every_nth_round_ends_with_the_last_and_sums_all():
    rows = [row(t) for t in range(12)]
    lines = ledger_table(rows, every=5).splitlines()
    assert [line.split()[0] for line in lines[2:-2]] == ["0", "5", "10", "11"]
    assert lines[-1].split() == ["all", "1.20", "1.20", "18.0", "0"]
    with pytest.raises(ValueError, match="Expected every >= 1, found 0"):
        ledger_table(rows, every=0)


def test_table_counts_the_clients_of_a_large_cohort():
    ids = range(100)
    large = row(0, clients=ids, ranks=[1 + i % 8 for i in ids], losses=[1.0] * 100, weights=[0.01] * 100)
    assert ledger_table([large]).splitlines()[2].split()[:5] == ["0", "100", "clients", "1..8", "1.0000"]


def test_figure_shows_what_the_ledger_says():
    rows = [ROWS[0], row(1, losses=(9.0, 0.5), weights=(0, 1), refused=(3,)), ROWS[2]]
    losses, ranks, sent = draw_ledger(rows, {3: 0.6, 0: 2.2}, "a title").axes
    assert losses.collections[0].get_offsets().tolist() == [[1, 2.0], [1, 1.0], [2, 0.5], [3, 0.75], [3, 0.25]]
    mean, held_out = (line.get_xydata().tolist() for line in losses.lines)
    assert mean == [[1, 1.5], [2, 0.5], [3, 0.5]]
    assert held_out == [[0, 2.2], [3, 0.6]]
    assert sorted(text.get_text() for text in losses.texts) == ["0.6", "2.2"]
    assert [bar.get_height() for bar in ranks.patches] == [2, 8]
    assert [label.get_text() for label in ranks.get_xticklabels()] == ["3", "7"]
    assert [text.get_text() for text in ranks.texts] == ["3", "3"]  # rounds each took part in
    full, ours = sent.lines
    assert full.get_ydata().tolist() == pytest.approx([0, 320, 640, 960])  # kB
    assert ours.get_ydata().tolist() == pytest.approx([0, 200, 400, 600])
    assert [text.get_text() for text in sent.get_legend().get_texts()] == [
        "every client at full rank: 960 kB",
        "this run: 600 kB (62%)",
    ]


def test_figure_counts_the_clients_of_a_large_run():
    ids = range(40)
    large = row(0, clients=ids, ranks=[1 + i % 4 for i in ids], losses=[1.0] * 40, weights=[1 / 40] * 40)
    ranks = draw_ledger([large], {}, "").axes[1]
    assert ranks.get_title("left") == "Ranks of the 40 clients seen"
    assert [bar.get_height() for bar in ranks.patches] == [10, 10, 10, 10]


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        [row(0, losses=(None, None), weights=(0, 0), refused=(3, 7))],
        [row(5, ranks=(1, 1), kilobytes=0)],
        [row(t) for t in range(120)],
    ],
    ids=["several", "all refused", "nothing sent", "many"],
)
def test_plot_writes_a_png(tmp_path, rows):
    plot_ledger(rows, tmp_path / "run.png", evaluation={rows[-1]["round"] + 1: 0.5}, title="A run")
    assert imread(tmp_path / "run.png").shape[:2] == (585, 1800)


def test_plot_of_no_rounds_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Expected at least one round to draw, found none"):
        plot_ledger([], tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


def test_plotting_needs_no_screen_and_leaves_matplotlibs_backend_alone(tmp_path):
    ledger = write(tmp_path / "rounds.jsonl", ROWS)
    code = (
        "import sys; from fslora_hf.reports.ledger import plot_ledger, read_ledger;"
        f"plot_ledger(read_ledger({str(ledger)!r}), {str(tmp_path / 'run.png')!r});"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    env = {**os.environ, "MPLBACKEND": "tkagg", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    assert (tmp_path / "run.png").exists()
