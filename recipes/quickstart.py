"""The quickstart: a small federated run, and what it did to held-out rows.

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/quickstart.py

Settings come from recipes/smollm2_135m/quickstart.yaml; any of them can be given on the command line instead.
"""

import json
import sys
import time
from pathlib import Path

from datasets import disable_progress_bars

from fslora_hf import FederatedSketchConfig
from fslora_hf.common.processes import agree
from fslora_hf.common.settings import SettingsError
from fslora_hf.config.recipe import ModelArguments, RecipeArguments, parse_recipe
from fslora_hf.evaluation import Losses, Scores, held_out_loss, score_rows
from fslora_hf.launch import build_trainer, claimed, finish, held_out_rows
from fslora_hf.reports.ledger import read_ledger, totals
from fslora_hf.storage.files import write_text
from fslora_hf.storage.folders import unused_folder

RECIPE = Path(__file__).parent / "smollm2_135m" / "quickstart.yaml"


def evaluate(trainer, rows, when: str) -> tuple[Losses, Scores]:
    """Loss and accuracy of the global adapter on held-out rows."""
    print(f"Scoring {len(rows)} held-out rows {when} training ...", flush=True)
    subject = trainer.model, trainer.processing_class, rows
    batch_size = trainer.args.per_device_eval_batch_size
    return held_out_loss(*subject, batch_size=batch_size), score_rows(*subject, batch_size=batch_size)


def results_table(before: tuple[Losses, Scores], after: tuple[Losses, Scores]) -> str:
    """One row a task. An improvement is marked only where accuracy rose beyond both its start and the majority rate,
    each by more than its standard error: always giving the most common answer is no skill."""
    lines = [f"{'task':14}{'rows':>5}  {'loss':>15}  {'accuracy':>15}  {'majority':>8}  improved"]
    for task, new in after[1].tasks.items():
        old = before[1].tasks[task]
        improved = new.accuracy - new.standard_error > max(old.accuracy, new.majority_rate)
        loss = f"{before[0].tasks[task]:.3f} -> {after[0].tasks[task]:.3f}"
        accuracy = f"{old.accuracy:6.1%} -> {new.accuracy:.1%}"
        verdict = "yes" if improved else "no"
        lines.append(f"{task:14}{new.rows:5}  {loss:>15}  {accuracy:>15}  {new.majority_rate:8.1%}  {verdict}")
    lines.append(f"{'all':14}{len(after[1].outcomes):5}  {before[0].overall:.3f} -> {after[0].overall:.3f}")
    return "\n".join(lines)


def to_json(losses: Losses, scores: Scores) -> dict:
    tasks = {
        task: {"loss": losses.tasks[task], **{k: getattr(score, k) for k in score.__dataclass_fields__}}
        for task, score in scores.tasks.items()
    }
    return {"loss": losses.overall, "tasks": tasks}


def main() -> None:
    start = time.monotonic()
    disable_progress_bars()
    try:
        parsed = parse_recipe(
            (RecipeArguments, FederatedSketchConfig, ModelArguments), ["--config", str(RECIPE), *sys.argv[1:]]
        )
    except SettingsError as error:
        sys.exit(str(error))
    recipe, args, model_args = parsed
    args.output_dir = agree(lambda: unused_folder(args.output_dir))
    with claimed(args.output_dir):
        trainer = build_trainer(recipe, args, model_args)
        held_out = held_out_rows(recipe, args.seed)
        before = evaluate(trainer, held_out, "before")
        trainer.train()
        after = evaluate(trainer, held_out, "after")
        table = finish(trainer, {0: before[0].overall, args.num_rounds: after[0].overall})
        moved = totals(read_ledger(trainer.ledger_path))
        results = {"before": to_json(*before), "after": to_json(*after), "moved": moved}
        write_text(Path(args.output_dir) / "results.json", json.dumps(results, indent=1) + "\n")
    print(f"\nRounds\n{table}\n\nHeld-out rows, before and after\n{results_table(before, after)}\n")
    print(
        f"Sent: {moved['bytes_total'] / 1e6:.1f} MB, {moved['ratio']:.0%} of what full-rank LoRA would have sent.\n"
        f"Figure, table and adapter: {args.output_dir}   ({(time.monotonic() - start) / 60:.1f} minutes)"
    )


if __name__ == "__main__":
    main()
