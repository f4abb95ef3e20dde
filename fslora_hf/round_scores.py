"""Scores of the global adapter at round ends: metrics for the log, and result files of the run."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset
from peft import get_peft_model_state_dict

from .config import FederatedSketchConfig
from .data.commonsense import COLUMNS
from .evaluation.outcomes import Scores
from .evaluation.results import AdapterSource, Subject, adapter_digest, describe_model, make_results, write_results
from .evaluation.runner import make_protocol, score_rows

if TYPE_CHECKING:
    from .trainer import FederatedSketchTrainer

FOLDER = "eval_rounds"


class RoundScorer:
    """Asks the evaluation rows that have options, by `eval_protocol`.

    `rows` holds them by the name of their evaluation set, "" for a single one; sets without options are not in it.
    """

    def __init__(self, args: FederatedSketchConfig, eval_dataset: Dataset | dict[str, Dataset] | None):
        sets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        asks = args.eval_protocol != "loss"
        self.rows = {
            name: rows
            for name, rows in sets.items()
            if asks and rows is not None and set(COLUMNS) <= set(rows.column_names) and len(rows)
        }
        self.protocol = (
            make_protocol(args.eval_protocol or "loglikelihood", args.eval_num_beams, args.eval_max_new_tokens)
            if asks
            else None
        )

    def score(self, trainer: "FederatedSketchTrainer", name: str, prefix: str) -> dict[str, float]:
        """Metrics of the set `name`, their keys beginning with `prefix`; while a run is on, its files are written."""
        rows, args, started = self.rows[name], trainer.args, time.monotonic()
        scores = score_rows(
            trainer.model,
            trainer.processing_class,
            rows,
            self.protocol,
            batch_size=args.per_device_eval_batch_size,
            description="Scoring" + (f" {name}" if name else ""),
        )
        if trainer.in_run and trainer.is_world_process_zero():
            results = make_results(
                _subject(trainer),
                self.protocol,
                rows,
                scores,
                seed=args.seed,
                seconds=time.monotonic() - started,
                processes=args.world_size,
                batch_size=args.per_device_eval_batch_size,
            )
            label = f"round-{trainer.rounds_done:04d}" + (f".{name}" if name else "")
            write_results(Path(args.output_dir) / FOLDER, f"{label}.{self.protocol.name}", results, scores)
        return _metrics(scores, prefix)


def _subject(trainer: "FederatedSketchTrainer") -> Subject:
    run, done = Path(trainer.args.output_dir).name, trainer.rounds_done
    digest = adapter_digest(get_peft_model_state_dict(trainer.model, adapter_name="default"))
    model = describe_model(trainer.model.get_base_model())
    return Subject(f"{run}, round {done}", model, AdapterSource(trainer.args.output_dir, digest, round=done))


def _metrics(scores: Scores, prefix: str) -> dict[str, float]:
    found = {}
    for line in scores.table():
        task = "" if line["task"] == "average" else f"_{line['task']}"
        found[f"{prefix}_{line['metric']}{task}"] = line["value"]
        if not task and line["metric"] != "format_validity":
            found[f"{prefix}_{line['metric']}_standard_error"] = line["standard_error"]
    return found
