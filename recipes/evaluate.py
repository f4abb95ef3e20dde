"""Score a model on held-out rows: a base, an adapter, a checkpoint, every checkpoint of a run, a Hub repository.

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/evaluate.py \
        --config recipes/smollm2_135m/commonsense.yaml --data_dir FOLDER --adapter outputs/smollm2_135m-commonsense

Takes the recipe that a run was trained with: its model, its data, its seed. `--eval_protocol generate` asks for text
instead of scoring options; `--help` lists all settings. Started again after a kill, it goes on where it was.
"""

import sys

from fslora_hf import FederatedSketchConfig
from fslora_hf.common.processes import leave, rank
from fslora_hf.common.settings import SettingsError
from fslora_hf.config.recipe import ModelArguments, RecipeArguments, parse_recipe
from fslora_hf.evaluation.scoring import evaluate
from fslora_hf.evaluation.subjects import EvaluationArguments
from fslora_hf.launch import held_out_rows
from fslora_hf.reports.accuracy import plot_accuracy, results_table, round_number
from fslora_hf.storage.disk_errors import WriteError
from fslora_hf.storage.files import write_text


def main() -> None:
    try:
        recipe, args, model_args, arguments = parse_recipe(
            (RecipeArguments, FederatedSketchConfig, ModelArguments, EvaluationArguments)
        )
    except SettingsError as error:
        sys.exit(str(error))
    try:
        rows = held_out_rows(recipe, args.seed)
        if rows is None:
            sys.exit(f"Expected held-out rows in {recipe.dataset}, found none: name a data set with a split test.")
        results, folder = evaluate(arguments, args, model_args, rows)
    except (ValueError, OSError) as error:
        sys.exit(str(error) if rank() == 0 else 1)
    first = rank() == 0
    leave()
    if not first:
        return
    table = results_table(results)
    print(f"\n{table}\n\nResult files: {folder}")
    try:
        if any(round_number(result) for result in results) and len(results) > 1:
            figure = plot_accuracy(results, folder)
            write_text(figure.with_suffix(".md"), f"{table}\n")
            print(f"Accuracy by round, as a table and a figure: {figure.with_suffix('.md')}, {figure.name}")
    except WriteError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
