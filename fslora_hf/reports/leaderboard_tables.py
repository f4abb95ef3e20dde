"""A leaderboard as text, Markdown and CSV: shares in percent for people, of 1 in CSV."""

from collections.abc import Callable, Sequence

from .leaderboard import Estimate, HasError, Leaderboard, Row, excludes_zero, interval
from .markdown import escape_markdown, percent
from .tables import as_csv, as_markdown, as_text

MARK = "fslora_hf leaderboard"
CSV_START = ("rank", "name", "protocol", "average", "average_low", "average_high", "average_standard_error")
METRIC_NAMES = {
    "accuracy": "accuracy",
    "accuracy_norm": "length-normalised accuracy",
    "format_validity": "format validity",
}
_LEFT = (1, 2)  # columns of the table that are texts


def to_text(leaderboard: Leaderboard) -> str:
    """A table for a terminal, with its notes below."""
    cells = _grid(leaderboard, lambda note: f"[{note}]", lambda name: name)
    lines = [line.rstrip() for line in as_text(cells, _LEFT)]
    rule = "-" * max(map(len, lines))
    lines.insert(1, rule)
    if leaderboard.majority_rates:
        lines.insert(len(lines) - 1, rule)
    below = [*captions(leaderboard), *(f"[{number}] {note}" for number, note in enumerate(leaderboard.notes, 1))]
    return "\n".join([f"{MARK}: {METRIC_NAMES[leaderboard.metric]}", "", *lines, "", *below])


def to_markdown(leaderboard: Leaderboard) -> str:
    """A table as GitHub and the Hub render it."""
    cells = _grid(leaderboard, lambda note: f"<sup>{note}</sup>", escape_markdown)
    below = [f"- {escape_markdown(caption)}" for caption in captions(leaderboard)]
    below += [f"- <sup>{n}</sup> {escape_markdown(note)}" for n, note in enumerate(leaderboard.notes, 1)]
    heading = f"<!-- {MARK} -->\n**Leaderboard by {METRIC_NAMES[leaderboard.metric]}**"
    return "\n".join([heading, "", as_markdown(cells, _LEFT), "", *below])


def to_csv(leaderboard: Leaderboard) -> str:
    """Every number at full precision, as shares of 1; texts that a spreadsheet would run as formulas are quoted."""
    tasks = leaderboard.tasks
    header = [*CSV_START, *(column for task in tasks for column in (task, f"{task}_standard_error"))]
    header += ["difference", "difference_standard_error", "difference_excludes_zero", "reference", "questions"]
    header += ["prompt_hash", "rows_hash", "model", "revision", "adapter", "adapter_revision", "round", "time"]
    return as_csv([[*header, "source"], *(_csv_cells(row, leaderboard) for row in leaderboard.rows)])


def _csv_cells(row: Row, leaderboard: Leaderboard) -> list[str | float | None]:
    entry, adapter = row.entry, row.entry.adapter or {}
    cells = [row.rank, row.name, entry.protocol, row.average.value, *interval(row.average), row.average.standard_error]
    for task in leaderboard.tasks:
        score = row.scores.get(task)
        cells += [score.value, score.standard_error] if score else [None, None]
    difference = row.difference
    cells += [difference.value, difference.standard_error] if difference else [None, None]
    cells += [excludes_zero(difference) if difference else None, leaderboard.reference.name]
    cells += [row.questions(leaderboard.ranked_tasks), entry.prompt_hash, entry.rows_hash]
    cells += [entry.model.get("name"), entry.model.get("revision")]
    return [*cells, *(adapter.get(key) for key in ("name", "revision", "round")), entry.time, entry.source]


def captions(leaderboard: Leaderboard) -> list[str]:
    """What the columns mean, one sentence or two each."""
    ranked, left = leaderboard.ranked_tasks, [t for t in leaderboard.tasks if t not in leaderboard.ranked_tasks]
    lines = [
        f"Average in percent: the mean over {_join(ranked)}, each task alike. Its 95 % confidence interval is ± 1.96 "
        "standard errors, which is too narrow for few questions and for shares near 0 or 100."
    ]
    if left:
        lines.append(f"Not in the average, because not every entry has it: {_join(left)}.")
    lines.append("Tasks in percent, ± one standard error.")
    if len(leaderboard.rows) > 1:
        lines.append(
            f"Difference: to {leaderboard.reference.name}, in percentage points on the questions that both were "
            "asked, ± its paired standard error; * where 0 lies outside the 95 % interval (of 20 entries that are no "
            "better, one has a * by chance)."
        )
    if leaderboard.majority_rates:
        lines.append(
            "Majority rate: what always giving the most common answer would reach on the questions of "
            f"{leaderboard.reference.name}."
        )
    return lines


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _grid(board: Leaderboard, mark: Callable[[int], str], escape: Callable[[str], str]) -> list[list[str]]:
    """Header, rows and majority rates as texts; `mark` writes a note's number and `escape` a text of the user's."""
    grid = [["#", "name", "protocol", "average [95 %]", "difference", *map(escape, board.tasks), "questions"]]
    for row in board.rows:
        name = escape(row.name) + "".join(" " + mark(number) for number in row.notes)
        low, high = interval(row.average)
        average = f"{percent(row.average.value)} [{percent(low)}, {percent(high)}]"
        scores = [_with_error(row.scores.get(task)) for task in board.tasks]
        questions = f"{row.questions(board.ranked_tasks):,}"
        grid.append([str(row.rank), name, row.entry.protocol, average, escape(_difference(row)), *scores, questions])
    if board.majority_rates:
        rates = [percent(board.majority_rates[task]) for task in board.tasks]
        mean = percent(sum(board.majority_rates[task] for task in board.ranked_tasks) / len(board.ranked_tasks))
        grid.append(["", "majority rate", "", mean, "", *rates, ""])
    return grid


def _difference(row: Row) -> str:
    if row.is_reference:
        return "reference"
    difference: Estimate | None = row.difference
    if difference is None:
        return "-"
    star = "*" if excludes_zero(difference) else " "
    return f"{100 * difference.value:+.1f} ± {percent(difference.standard_error)}{star}"


def _with_error(score: HasError | None) -> str:
    return "-" if score is None else f"{percent(score.value)} ± {percent(score.standard_error)}"
