"""The scores of a model card: the latest round in full, and the average of every evaluated round."""

import json
from collections.abc import Mapping
from typing import Any

from ..common.foreign_text import foreign_fields
from ..reports.entries import AVERAGE
from ..reports.leaderboard import Z
from ..reports.markdown import count, percent, plain
from ..reports.tables import as_markdown
from .card_context import CardContext, round_tag

_PROTOCOLS = {"loglikelihood": "Log-likelihood of the options", "generate": "Generated answers"}
_REMARKS = {
    "not_finite": "the model computed something that is not a number; they count as wrong",
    "tied": "the best options are equally likely; the first was chosen",
}
SHOWN_ROUNDS = 12  # a longer table of rounds is folded up


def score_section(context: CardContext) -> str:
    """Tables of all results; nothing without any."""
    groups = _groups(context)
    if not groups:
        return ""
    parts = [
        "## Scores",
        "Accuracies in percent, ± one standard error. The majority rate is what always giving the most common answer "
        "would reach.",
    ]
    for group in groups:
        parts += [_latest(group), _by_round(group, context)]
    return "\n\n".join(part for part in parts if part)


def _groups(context: CardContext) -> list[dict[int, Mapping[str, Any]]]:
    """Results by round, one group for each protocol, its settings and its questions, in order of appearance.

    Of several results of one round the one that finished last counts.
    """
    groups: dict[str, dict[int, Mapping[str, Any]]] = {}
    for result in sorted(context.results, key=lambda result: result["time"]):
        same = [result[name] for name in ("protocol", "settings", "prompt_hash", "rows_hash")]
        groups.setdefault(json.dumps(same, sort_keys=True), {})[round_of(result, context.rounds_done)] = result
    return [dict(sorted(group.items())) for group in groups.values()]


def _latest(group: Mapping[int, Mapping[str, Any]]) -> str:
    """Every task of the group's latest round, beside the base's accuracy where that is known."""
    number = max(group)
    result, base = group[number], group.get(0) if number else None
    has_norm = any(line["metric"] == "accuracy_norm" for line in result["scores"])
    header = ["task", "accuracy", *(["length-normalised"] if has_norm else [])]
    lines = [[*header, *(["base model"] if base else []), "majority rate", "questions"]]
    for task in [*tasks_of(result), AVERAGE]:
        found = score(result, task, "accuracy")
        if found is None:
            continue
        cells = [_with_error(found), *([_with_error(score(result, task, "accuracy_norm"))] if has_norm else [])]
        cells += [_with_error(score(base, task, "accuracy"))] if base else []
        cells += [percent(found["majority_rate"]), f"{found['rows']:,}"]
        strong = task == AVERAGE
        lines.append([f"**{cell}**" if strong else cell for cell in [plain(task), *cells]])
    protocol = _PROTOCOLS.get(result["protocol"], result["protocol"])
    when = f"after {count(number, 'round')}" if number else "of the base model"
    return f"### {plain(protocol)}, {when}\n\n{as_markdown(lines)}\n\n{_reading(result)}"


def _reading(result: Mapping[str, Any]) -> str:
    """What the table shows beside its numbers, and what a reader must know of them."""
    scores = {task: score(result, task, "accuracy") for task in tasks_of(result)}
    above = [plain(task) for task, s in scores.items() if s["value"] - Z * s["standard_error"] > s["majority_rate"]]
    lines = [f"Above the majority rate by more than {Z} standard errors: {', '.join(above) or 'no task'}."]
    usable = score(result, AVERAGE, "format_validity")
    lines += [f"Usable answers: {percent(usable['value'])} %."] if usable else []
    settings = ", ".join(f"{plain(key)} {plain(value)}" for key, value in foreign_fields(result["settings"]).items())
    lines += [f"Settings: {settings}."] if settings else []
    for key, what in _REMARKS.items():
        lines += [f"In {count(result[key], 'question')} {what}."] if result.get(key) else []
    return " ".join(lines)


def _by_round(group: Mapping[int, Mapping[str, Any]], context: CardContext) -> str:
    """The average of every evaluated round; nothing for one round alone."""
    if len(group) < 2:
        return ""
    lines = [["rounds", "revision", "average accuracy", "usable answers"]]
    for number, result in group.items():
        is_pushed = number in context.pushed_rounds or number == context.rounds_done
        revision = f"`{round_tag(number)}`" if number and is_pushed else "-" if number else "the base model"
        usable = score(result, AVERAGE, "format_validity")
        cells = [_with_error(score(result, AVERAGE, "accuracy")), f"{percent(usable['value'])} %" if usable else "-"]
        lines.append([f"{number:,}", revision, *cells])
    averages = as_markdown(lines, left=(0, 1))
    if len(group) <= SHOWN_ROUNDS:
        return averages
    return f"<details>\n<summary>Average by round ({len(group)} evaluations)</summary>\n\n{averages}\n\n</details>"


def _with_error(line: Mapping[str, Any] | None) -> str:
    return "-" if line is None else f"{percent(line['value'])} ± {percent(line['standard_error'])}"


def round_of(result: Mapping[str, Any], latest: int) -> int:
    """The rounds that a result's adapter was trained for: 0 for the base, `latest` if the result does not say."""
    if result["adapter"] is None:
        return 0
    number = result["adapter"].get("round")
    return latest if number is None else number


def latest_results(context: CardContext) -> list[Mapping[str, Any]]:
    """The result of the latest round that was evaluated, one for each protocol and set of questions."""
    groups = _groups(context)
    return [group[max(group)] for group in groups if max(group) > 0]


def score(result: Mapping[str, Any], task: str, metric: str) -> Mapping[str, Any] | None:
    """One line of a result's scores, None without one."""
    return next((line for line in result["scores"] if (line["task"], line["metric"]) == (task, metric)), None)


def tasks_of(result: Mapping[str, Any]) -> list[str]:
    """The tasks that a result has accuracies of."""
    return [line["task"] for line in result["scores"] if line["metric"] == "accuracy" and line["task"] != AVERAGE]
