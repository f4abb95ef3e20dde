"""Scores of the global adapter at round ends: metrics for the log, and result files of the run."""

import logging
import time
from pathlib import Path

from datasets import Dataset
from peft import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..common.processes import agree
from ..config.federation import FederatedSketchConfig
from ..data.commonsense import COLUMNS
from ..data.prompts import options
from ..models.description import adapter_digest, describe_model
from ..storage.result_files import IN_LOOP, slug
from .outcomes import Scores
from .results import AdapterSource, Subject, make_results, write_results
from .runner import longest_row, make_protocol, score_rows

logger = logging.getLogger(__name__)


class RoundScorer:
    """Asks the evaluation rows that have options, by `eval_protocol`.

    `rows` holds them by the name of their evaluation set, "" for a single one; sets without options are not in it.

    Raises:
        ValueError: rows that shall be asked cannot be; told here, before training.
    """

    def __init__(
        self,
        args: FederatedSketchConfig,
        eval_dataset: Dataset | dict[str, Dataset] | None,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
    ):
        sets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        self._args = args
        asked = args.eval_protocol or "loglikelihood"
        self.rows = {
            name: rows
            for name, rows in sets.items()
            if asked != "loss" and rows is not None and (args.eval_protocol or _have_options(rows))
        }
        labels = [slug([name]) for name in self.rows]
        if len(set(labels)) < len(labels):
            raise ValueError(
                f"Expected evaluation sets whose names differ in letters and digits, found {', '.join(self.rows)}: "
                "their result files would have the same names; rename one."
            )
        self.questions: dict[str, list] = {}
        if self.rows:
            self.protocol = make_protocol(asked, args.eval_num_beams, args.eval_max_new_tokens)
        for name in self.rows if args.eval_rounds or args.eval_on_start else ():
            try:
                self._prepare(name, model, tokenizer)
            except ValueError as error:
                raise ValueError(f"{error} Or set eval_protocol to loss, which asks nothing.") from error

    def _prepare(self, name: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.questions[name] = self.protocol.prepare(tokenizer, self.rows[name], longest_row(model))

    def score(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str, *, prefix: str, round: int | None
    ) -> dict[str, float]:
        """Metrics of the set `name`, their keys beginning with `prefix`; with `round`, after so many of a run's that
        is on, its files are written."""
        rows, started = self.rows[name], time.monotonic()
        if name not in self.questions:
            self._prepare(name, model, tokenizer)
        scores = score_rows(
            model,
            tokenizer,
            rows,
            self.protocol,
            batch_size=self._args.per_device_eval_batch_size,
            questions=self.questions[name],
            description="Scoring" + (f" {name}" if name else ""),
        )
        seconds = time.monotonic() - started
        if round is not None:
            agree(lambda: self._write(_subject(model, self._args.output_dir, round), name, scores, seconds))
        return _metrics(scores, prefix)

    def _write(self, subject: Subject, name: str, scores: Scores, seconds: float) -> None:
        args = self._args
        results = make_results(
            subject,
            self.protocol,
            self.rows[name],
            scores,
            seed=args.seed,
            seconds=seconds,
            processes=args.world_size,
            batch_size=args.per_device_eval_batch_size,
        )
        label = f"round-{subject.adapter.round:04d}" + (f".{slug([name])}" if name else "")
        write_results(Path(args.output_dir) / IN_LOOP, f"{label}.{self.protocol.name}", results, scores)


def _have_options(rows: Dataset) -> bool:
    """Whether every row names its options, so that it can be asked and not only measured by its loss."""
    texts = [getattr(rows.features.get(column), "dtype", None) == "string" for column in COLUMNS]
    if not all(texts) or not len(rows):
        return False
    try:
        return all(prompt is not None and options({"prompt": prompt}) for prompt in rows["prompt"])
    except ValueError as error:
        logger.info("Evaluation rows are measured by their loss alone, since they do not all name options. %s", error)
        return False


def _subject(model: nn.Module, folder: str, round: int) -> Subject:
    tensors = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    adapter = AdapterSource(folder, adapter_digest(tensors), round=round)
    return Subject(f"{Path(folder).name}, round {round}", describe_model(model.get_base_model()), adapter)


def _metrics(scores: Scores, prefix: str) -> dict[str, float]:
    found = {}
    for line in scores.table():
        task = "" if line["task"] == "average" else f"_{line['task']}"
        found[f"{prefix}_{line['metric']}{task}"] = line["value"]
        if not task and line["metric"] != "format_validity":
            found[f"{prefix}_{line['metric']}_standard_error"] = line["standard_error"]
    return found
