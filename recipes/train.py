"""Train a federated recipe.

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/train.py \
        --config recipes/llama3.2_3b/commonsense/paper_table.yaml --data_dir FOLDER

Every setting of the YAML file can be given on the command line, too, where it takes precedence; `--help` lists them.
`--resume_from_checkpoint true` goes on from the latest checkpoint in output_dir.
"""

import sys

from fslora_hf import FederatedSketchConfig
from fslora_hf.common.processes import leave
from fslora_hf.common.settings import SettingsError
from fslora_hf.config.recipe import ModelArguments, RecipeArguments, parse_recipe
from fslora_hf.launch import build_trainer, claimed, finish, missing_rounds


def main() -> None:
    try:
        recipe, args, model_args = parse_recipe((RecipeArguments, FederatedSketchConfig, ModelArguments))
    except SettingsError as error:
        sys.exit(str(error))
    with claimed(args.output_dir, anew=not args.resume_from_checkpoint):
        trainer = build_trainer(recipe, args, model_args)
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        table = finish(trainer)
    leave()
    if trainer.is_world_process_zero():
        print(f"\n{table}\n\nAdapter, ledger and figure: {args.output_dir}")
        sys.exit(missing_rounds(trainer))


if __name__ == "__main__":
    main()
