"""Score a model on held-out rows: a base, an adapter, a checkpoint, every checkpoint of a run, a Hub repository.

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/evaluate.py \
        --config recipes/smollm2_135m/commonsense.yaml --data_dir FOLDER --adapter outputs/smollm2_135m-commonsense

Takes the recipe that a run was trained with: its model, its data, its seed. `--eval_protocol generate` asks for text
instead of scoring options; `--help` lists all settings. Started again after a kill, it goes on where it was.
"""

import sys

from fslora_hf import FederatedSketchConfig
from fslora_hf.evaluation.report import plot_accuracy, results_table
from fslora_hf.launch import held_out_rows
from fslora_hf.processes import rank
from fslora_hf.recipe import ModelArguments, RecipeArguments, parse_recipe
from fslora_hf.scoring import evaluate
from fslora_hf.settings import SettingsError
from fslora_hf.subjects import EvaluationArguments


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
        sys.exit(str(error))
    if rank() > 0:
        return
    print(f"\n{results_table(results)}\n\nResult files: {folder}")
    if len(results) > 2:
        print(f"Accuracy by round: {plot_accuracy(results, folder)}")


if __name__ == "__main__":
    main()
