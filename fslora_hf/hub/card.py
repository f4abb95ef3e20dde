"""The model card of a run: our section and metadata written anew at each push, everything else left as it stands."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results

from ..reports.markdown import one_line
from .card_context import COMMONSENSE, Benchmark, CardContext, hub_id
from .card_scores import latest_results, round_of, score, tasks_of
from .card_text import card_body

__all__ = ["COMMONSENSE", "Benchmark", "CardContext", "eval_results_yaml", "merge_card", "render_card"]

BEGIN, END = "<!-- fslora_hf:begin -->", "<!-- fslora_hf:end -->"
_SOURCE = "fslora_hf"  # by which our entries of the model-index are known again
_LISTS = ("datasets", "metrics", "tags")  # of which a person may have added some
_TAGS = ["fslora_hf", "federated-learning", "lora"]
_TASKS = {  # protocol -> the Hub's name of what is asked, and ours
    "loglikelihood": ("question-answering", "Multiple choice by log-likelihood"),
    "generate": ("text-generation", "Multiple choice by generated answers"),
}
_METRICS = {"accuracy": ("accuracy", "Accuracy"), "accuracy_norm": ("acc_norm", "Length-normalised accuracy")}
_MARKER = rf"^[ \t]*(?:{re.escape(BEGIN)}|{re.escape(END)})[ \t]*$\n?"
_SECTION = re.compile(
    rf"^[ \t]*{re.escape(BEGIN)}[ \t]*$(?:(?!{re.escape(BEGIN)}).)*?^[ \t]*{re.escape(END)}[ \t]*$",
    re.MULTILINE | re.DOTALL,
)


class _Loader(yaml.SafeLoader):
    """Reads front matter as the Hub does: YAML 1.2, in which `no` is a text and `010` no octal number."""


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML version would take for a number."""


_PLAIN = {
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    "float": (r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _PLAIN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), list(_first))
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$|0o[0-7]+$|[-+]?0[0-9]+$")
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def render_card(context: CardContext, existing: str | None = None) -> str:
    """The card of a repository.

    Args:
        existing: the README.md that stands there now. Text outside our markers stays, and metadata that is not ours;
            so does a license or a pipeline tag that someone gave. Front matter and markers that were damaged by hand
            are written anew, with a warning.
    """
    section = f"{BEGIN}\n{card_body(context)}\n{END}"
    return merge_card(f"---\n{_dumped(_metadata(context))}---\n{section}", existing or "")


def merge_card(ours: str, existing: str) -> str:
    """A card that `render_card` made without knowing what stands in the repository, joined with that."""
    existing = existing.removeprefix("\ufeff")
    line_break = "\r\n" if "\r\n" in existing else "\n"
    made, section = _split(ours)
    found, text = _split(existing.replace("\r\n", "\n"))
    joined = {**found, **made}
    for key in _LISTS:
        joined[key] = _joined(made.get(key), found.get(key))
    for key in ("license", "pipeline_tag"):
        joined[key] = found.get(key) or made.get(key)
    joined["model-index"] = _joined_index(made.get("model-index"), found.get("model-index"))
    metadata = {key: value for key, value in joined.items() if value not in (None, [])}
    return f"---\n{_dumped(metadata)}---\n\n{_placed(section.strip(), text)}".replace("\n", line_break)


def eval_results_yaml(context: CardContext) -> str | None:
    """The content of a file in `.eval_results/`: accuracies of the latest evaluated round on data sets of the Hub.

    None if no task has a benchmark; the Hub shows those of data sets that are registered as benchmarks.
    """
    entries = []
    for result in latest_results(context):
        for task in tasks_of(result):
            found, benchmark = score(result, task, "accuracy"), context.benchmarks.get(task)
            if benchmark is None:
                continue
            notes = (
                f"{_TASKS[result['protocol']][1]}, {found['rows']} questions, standard error "
                f"{found['standard_error']:.4f}, after round {round_of(result, context.rounds_done)}"
            )
            entries.append(
                EvalResultEntry(
                    dataset_id=benchmark.repository,
                    task_id=benchmark.config or "default",
                    value=round(found["value"], 6),
                    date=result["time"],
                    source_url=f"{context.endpoint}/{context.repo_id}",
                    source_name=_SOURCE,
                    notes=notes,
                )
            )
    if not entries:
        return None
    return _dumped(eval_result_entries_to_yaml(entries))


# ---- metadata ----


def _split(existing: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card; no metadata and a warning if they are damaged."""
    block = REGEX_YAML_BLOCK.search(existing)
    if block is None:
        if existing.lstrip().startswith("---\n"):
            _warn("metadata between two lines of ---", "no second one", "it is kept as text below new metadata")
        return {}, existing
    text = existing[block.end() :]
    try:
        found = yaml.load(block.group(2), Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        _warn("metadata in YAML", one_line(error)[:200], "it is written anew, and the commit before has what it was")
        return {}, text
    if found is not None and not isinstance(found, dict):
        _warn("metadata of keys and values", f"a {type(found).__name__}", "it is written anew")
        return {}, text
    return {str(key): value for key, value in (found or {}).items()}, text


def _warn(expected: str, found: str, remedy: str) -> None:
    warnings.warn(f"Expected {expected} at the head of the model card, found {found}: {remedy}.", stacklevel=4)


def _metadata(context: CardContext) -> dict[str, Any]:
    base = hub_id(context.base_model)
    return ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name="peft",
        license=context.license,
        pipeline_tag="text-generation",
        datasets=list(filter(hub_id, context.datasets)) or None,
        metrics=["accuracy"] if context.results else None,
        tags=_TAGS,
        eval_results=_evaluations(context) or None,
        model_name=one_line(context.name) or context.repo_id,
    ).to_dict()


def _dumped(metadata: Any) -> str:
    return yaml.dump(metadata, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _joined(ours: Any, theirs: Any) -> list[str]:
    """Ours, and what someone added to a list, or wrote in place of one."""
    theirs = theirs if isinstance(theirs, list) else [theirs]
    return list(dict.fromkeys([*(ours or []), *(each for each in theirs if isinstance(each, str))]))


def _joined_index(ours: Any, theirs: Any) -> list[dict[str, Any]]:
    """Our results, and those that someone added to the index, by the name of their model."""
    index = {model["name"]: list(model["results"]) for model in ours or []}
    for model in theirs if isinstance(theirs, list) else []:
        results = model.get("results") if isinstance(model, dict) and isinstance(model.get("name"), str) else None
        for result in results if isinstance(results, list) else []:
            if not _is_ours(result) and _is_readable(model, result):
                index.setdefault(model["name"], []).append(result)
    return [{"name": name, "results": results} for name, results in index.items()]


def _is_ours(result: Any) -> bool:
    source = result.get("source") if isinstance(result, dict) else None
    return isinstance(source, dict) and source.get("name") == _SOURCE


def _is_readable(model: Mapping[str, Any], result: Any) -> bool:
    """Whether the Hub's client can read a result; one that it cannot would spoil the whole card for it."""
    try:
        model_index_to_eval_results([{"name": model["name"], "results": [result]}])
    except (KeyError, TypeError, AttributeError):
        _warn("results with task, dataset and metrics", "one without in the model-index", "it is left out")
        return False
    return True


def _evaluations(context: CardContext) -> list[EvalResult]:
    """Accuracies of the latest evaluated rounds; standard errors and majority rates stand in the card's tables."""
    evaluations = []
    for result in latest_results(context):
        kind, kind_name = _TASKS[result["protocol"]]
        number = round_of(result, context.rounds_done)
        for task in tasks_of(result):
            benchmark = context.benchmarks.get(task) or Benchmark(task)
            for metric, (metric_type, metric_name) in _METRICS.items():
                found = score(result, task, metric)
                if found is None:
                    continue
                evaluations.append(
                    EvalResult(
                        task_type=kind,
                        task_name=kind_name,
                        dataset_type=benchmark.repository,
                        dataset_name=f"{task}, {found['rows']:,} questions",
                        dataset_config=benchmark.config,
                        dataset_split=benchmark.split,
                        metric_type=metric_type,
                        metric_name=f"{metric_name} after round {number}",
                        metric_value=round(found["value"], 6),
                        source_name=_SOURCE,
                        source_url=f"{context.endpoint}/{context.repo_id}",
                    )
                )
    return evaluations


# ---- text ----


def _placed(section: str, text: str) -> str:
    """The text with our section in place of the one before, or in front if there is none."""
    first = _SECTION.search(text)
    if first is None:
        before, after = "", text
    else:
        before, after = text[: first.start()], _SECTION.sub("", text[first.end() :])
    rest = [re.sub(_MARKER, "", part, flags=re.MULTILINE) for part in (before, after)]
    if rest != [before, after]:
        warnings.warn(
            f"Expected {BEGIN} and {END} around our section of the model card, found one without the other: the "
            "section is written anew, and what stood beside the lone marker is kept as text.",
            stacklevel=3,
        )
    before, after = rest[0].strip("\n"), rest[1].strip("\n")
    return "\n\n".join(part for part in (before, section, after) if part) + "\n"
