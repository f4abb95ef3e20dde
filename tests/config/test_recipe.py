"""Recipes: strict reading, all problems at once, and every YAML file under recipes/."""

import dataclasses
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from trl import TrlParser, get_peft_config, get_quantization_config

from fslora_hf.common.settings import SettingsError
from fslora_hf.config.federation import FederatedSketchConfig
from fslora_hf.config.recipe import ModelArguments, RecipeArguments, parse_recipe

pytest_plugins = ("tests.support.forked",)

ROOT = Path(__file__).resolve().parents[2]
TYPES = (RecipeArguments, FederatedSketchConfig, ModelArguments)
ACCELERATE = sorted((ROOT / "recipes" / "accelerate_configs").glob("*.yaml"))
TASK_FILES = set((ROOT / "recipes" / "lm_eval").glob("*.yaml"))  # lm-evaluation-harness's, not ours
COMPARISONS = set((ROOT / "recipes" / "comparisons").glob("*.yaml"))  # tests/comparison/test_compare.py reads them
RECIPES = sorted(set((ROOT / "recipes").rglob("*.yaml")) - set(ACCELERATE) - TASK_FILES - COMPARISONS)
WORKING = {"model_name_or_path": "some/model", "num_clients": 8, "use_cpu": True, "bf16": False}


@pytest.fixture
def parse(tmp_path):
    """Parse a recipe file with the given text or settings, then command-line arguments."""

    def run(content, *args):
        file = tmp_path / "recipe.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return parse_recipe(TYPES, ["--config", str(file), *args])

    return run


@pytest.fixture
def problems_of(parse):
    def run(content, *args):
        with pytest.raises(SettingsError) as caught:
            parse(content, *args)
        assert str(caught.value).split("\n- ")[1:] == caught.value.problems
        return caught.value.problems

    return run


def test_no_setting_belongs_to_two_dataclasses():
    names = [field.name for each in TYPES for field in dataclasses.fields(each)]
    assert len(names) == len(set(names)) and "config" not in names
    TrlParser(TYPES)


def test_a_file_is_read_and_the_command_line_overrides_it(parse):
    settings = WORKING | {"num_rounds": 5, "client_ranks": [1] * 8, "lora_target_modules": ["q_proj", "v_proj"]}
    recipe, config, model = parse(
        settings, "--num_rounds", "7", "--client-ranks", *"22222222", "--no_use_peft", "--use_peft"
    )
    assert (recipe.num_clients, config.num_rounds, model.model_name_or_path) == (8, 7, "some/model")
    assert config.client_ranks == [2] * 8 and model.lora_target_modules == ["q_proj", "v_proj"]
    _, config, _ = parse(settings)
    assert config.num_rounds == 5 and config.client_ranks == [1] * 8


def test_the_file_may_follow_an_equals_sign_or_be_left_out(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(WORKING | {"seed": 3}))
    assert parse_recipe(TYPES, [f"--config={file}"])[1].seed == 3
    flags = ["--model_name_or_path", "m", "--num_clients=2", "--use_cpu", "--bf16", "false", "--seed", "4"]
    assert parse_recipe(TYPES, flags)[1].seed == 4


def test_the_command_line_of_the_process_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--model_name_or_path", "m", "--num_clients", "2", "--use_cpu"])
    assert parse_recipe(TYPES)[2].model_name_or_path == "m"


def test_texts_take_the_type_of_their_field(parse):
    # YAML 1.1, which is what Python reads, takes 1e-4 for a text.
    recipe, config, _ = parse(
        "model_name_or_path: m\nnum_clients: '4'\nlearning_rate: 1e-4\nuse_cpu: 'true'\nbf16: no\n"
    )
    assert (recipe.num_clients, config.learning_rate, config.use_cpu, config.bf16) == (4, 1e-4, True, False)
    _, config, model = parse(WORKING, "--clients_per_round", "none", "--lora_target_modules", "all-linear")
    assert config.clients_per_round is None and model.lora_target_modules == "all-linear"


@pytest.mark.parametrize("text", ["all-linear", r".*layers\.1\..*q_proj"])
def test_a_text_for_target_modules_is_pefts_own(parse, text):
    _, _, model = parse(WORKING | {"lora_target_modules": text})
    assert get_peft_config(model).target_modules == text
    assert dataclasses.replace(model, lora_r=4).lora_target_modules == text


def test_env_sets_variables_first(parse, monkeypatch):
    monkeypatch.setenv("FSLORA_TEST_VARIABLE", "old")
    parse(WORKING | {"env": {"FSLORA_TEST_VARIABLE": 3}})
    assert os.environ["FSLORA_TEST_VARIABLE"] == "3"


def test_a_misspelt_key_is_named_with_the_nearest_one_and_every_other_problem(problems_of, tmp_path):
    found = problems_of(
        """
        clients_per_rounds: 5
        torch_dtype: bfloat16
        zzzzzzzzzz: 1
        seed: 1
        seed: 2
        env: [A]
        model_name_or_path: m
        use_cpu: true
        bf16: false
        num_rounds: many
        local_steps: 0
        save_strategy: steps
        method: fslor
        num_clients: 3
        clients_per_round: 4
        client_ranks: [4, 32]
        partition: dirichlets
        train_rows_per_task: 0
        lora_r: 16
        dtype: bfloat61
        use_peft: false
        debug: everything
        """,
        "--clientz",
        "5",
    )
    where = f"in {tmp_path / 'recipe.yaml'}"
    expected = [
        "Expected only settings that exist on the command line, found clientz: did you mean num_clients?",
        f"Expected seed once {where}, found it more often: keep one.",
        "Expected env to be a mapping of variables to values, found a list: indent NAME: value below env:.",
        f"Expected only settings that exist {where}, found clients_per_rounds: did you mean clients_per_round?",
        f"Expected only settings that exist {where}, found torch_dtype: did you mean dtype?",
        f"Expected only settings that exist {where}, found zzzzzzzzzz: remove it.",
        "Expected partition to be one of iid, dirichlet, task_dirichlet, sorted_shards, column, found 'dirichlets': "
        "did you mean dirichlet.",
        "Expected train_rows_per_task to be at least 1, found 0: raise it.",
        "Expected num_rounds to be an integer, found 'many': write an integer without quotes.",
        "Expected method to be one of fslora, fedit, hetlora, flexlora, flora, flora_residual, ffa_lora or "
        "module:Class, found 'fslor': "
        "did you mean fslora.",
        "Expected local_steps to be at least 1, found 0: raise it.",
        "Expected save_strategy to be left at 'no', found 'steps': checkpoints are written at round ends, "
        "so remove it and set save_rounds.",
        "Expected dtype to be one of auto, bfloat16, float16, float32, found 'bfloat61': did you mean bfloat16.",
        "Expected use_peft to be left at True, found False: clients train LoRA adapters, so remove it.",
        "Expected client_ranks to be at most lora_r (16), found 32: lower it or raise lora_r.",
        "Expected clients_per_round to be at most num_clients (3), found 4: lower it or raise num_clients.",
        "Expected client_ranks to be of length num_clients (3), found 2: give as many ranks as clients.",
    ]
    assert [text for text in expected if text not in found] == []
    [other] = [text for text in found if text not in expected]
    assert "everything is not a valid DebugOption" in other  # transformers' own sentence


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("max_seq_length", "max_length"),
        ("warmup_ratio", "warmup_steps"),
        ("rounds", "num_rounds"),
        ("num-rounds", "num_rounds"),
        ("config", None),
        ("help", None),
    ],
)
def test_keys_of_other_recipes_are_not_passed_over(problems_of, tmp_path, name, near):
    [text] = problems_of(WORKING | {name: 1})
    assert text.startswith(f"Expected only settings that exist in {tmp_path / 'recipe.yaml'}, found {name}: ")
    assert near is None or text.endswith(f"did you mean {near}?")


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "", "just text\n"])
def test_a_file_that_is_no_mapping_is_an_error(problems_of, content):
    [text] = problems_of(content)
    assert "to be a YAML mapping of settings to values" in text


def test_a_file_that_cannot_be_read_is_an_error(problems_of, tmp_path):
    [text] = problems_of("a: b: c\n")
    assert "mapping values are not allowed here" in text and text.endswith("name another or correct it.")
    with pytest.raises(SettingsError, match="No such file"):
        parse_recipe(TYPES, ["--config", str(tmp_path / "none.yaml")])


def test_a_flag_without_its_value_is_an_error_and_flags_are_not_completed(problems_of):
    [text] = problems_of(WORKING, "--num_rounds", "--seed", "1")
    assert text.startswith("Expected a value after its flag, found argument --num_rounds")
    [text] = problems_of(WORKING, "--num_round", "3")
    assert text.endswith("found num_round: did you mean num_rounds?")


def test_help_shows_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_recipe(TYPES, ["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for name in (
        "--config",
        "--num_rounds",
        "--partition {iid,",
        "--lora_r",
        "--method {fslora,fedit,hetlora,flexlora,flora,flora_residual,ffa_lora,MODULE:CLASS}",
    ):
        assert name in text


def test_problems_of_other_dataclasses_are_told_too(tmp_path):
    @dataclasses.dataclass
    class Other:
        count: int
        size: float = 1.0

    assert parse_recipe((Other,), ["--count", "3", "--size", "2"]) == (Other(3, 2.0),)
    with pytest.raises(
        SettingsError, match="Expected size to be a value that Other can read, found 'big': correct it."
    ):
        parse_recipe((Other,), ["--count", "3", "--size", "big"])
    with pytest.raises(SettingsError, match="missing 1 required positional argument: 'count'"):
        parse_recipe((Other,), [])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"num_clients": None},
            "num_clients to be set for partition task_dirichlet, found None: say how many clients",
        ),
        (
            {"dataset": "miniature", "data_dir": "rows"},
            "data_dir to be unset for dataset miniature, found 'rows': remove it, or set dataset to commonsense",
        ),
        (
            {"partition": "iid", "dirichlet_alpha": 1},
            "dirichlet_alpha to be unset for partition iid, found 1: remove it",
        ),
        (
            {"partition": "dirichlet", "shards_per_client": 2},
            "shards_per_client to be unset for partition dirichlet, found 2: remove it or choose another partition",
        ),
        (
            {"dirichlet_alpha": 0},
            "dirichlet_alpha to be from 1e-6 to 1e6, found 0: for an even split choose partition iid",
        ),
        (
            {"partition": "column"},
            "partition_column to be set for partition column, found None: name the column with the clients",
        ),
        ({"num_clients": 0}, "num_clients to be at least 1, found 0: raise it"),
        (
            {"model_name_or_path": None},
            "model_name_or_path to be set, found None: name a model of the Hub or a folder",
        ),
        ({"use_dora": True}, "use_dora to be left at False, found True: clients hold plain LoRA pairs, so remove it"),
        (
            {"lora_modules_to_save": ["x"]},
            "lora_modules_to_save to be unset, found ['x']: clients train LoRA pairs only",
        ),
        (
            {"lora_target_parameters": ["x"]},
            "lora_target_parameters to be unset, found ['x']: LoRA pairs sit in linear modules, so name those in "
            "lora_target_modules",
        ),
        (
            {"lora_task_type": "SEQ_CLS"},
            "lora_task_type to be left at 'CAUSAL_LM', found 'SEQ_CLS': the trainer fine-tunes causal language models",
        ),
        ({"lora_r": 0}, "lora_r to be at least 1, found 0: raise it"),
        ({"lora_r": 1.5}, "lora_r to be an integer, found 1.5: write an integer"),
        ({"lora_dropout": 1.0}, "lora_dropout to be at least 0 and below 1, found 1.0: choose a share such as 0.1"),
        (
            {"load_in_4bit": True, "load_in_8bit": True},
            "load_in_8bit to be off beside load_in_4bit, found True: keep one of the two",
        ),
        (
            {"load_in_4bit": True, "dtype": "auto"},
            "dtype to be a precision beside load_in_4bit, found 'auto': set dtype to bfloat16",
        ),
        ({"max_rank": 17}, "max_rank to be at most lora_r (16), found 17: lower it or raise lora_r"),
    ],
)
def test_data_and_model_settings_that_cannot_work_are_refused(problems_of, settings, text):
    [found] = problems_of({name: value for name, value in (WORKING | settings).items() if value is not None})
    assert found.startswith(f"Expected {text}")


def test_one_task_needs_no_brackets(parse):
    assert parse(WORKING | {"tasks": "boolq"})[0].tasks == ["boolq"]


def test_tasks_are_checked_where_they_are_known(parse, problems_of):
    [text] = problems_of(WORKING | {"tasks": ["boolq", "boolqq"]})
    assert text.startswith("Expected different tasks out of ARC-Challenge,") and "boolqq" in text
    assert parse(WORKING | {"tasks": ["mine"], "dataset": "some/rows"})[0].tasks == ["mine"]


def test_the_data_set_follows_from_data_dir():
    assert RecipeArguments(num_clients=2).dataset == "miniature"
    assert RecipeArguments(num_clients=2, data_dir="rows").dataset == "commonsense"


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"partition": "iid"}, (None, None, None)),
        ({"partition": "task_dirichlet"}, ("task", None, None)),
        ({"partition": "dirichlet", "partition_column": "answer", "dirichlet_alpha": 2.0}, ("answer", 2.0, None)),
        ({"partition": "sorted_shards", "shards_per_client": 3}, ("task", None, 3)),
        ({"partition": "column", "partition_column": "author"}, ("author", None, None)),
    ],
)
def test_partition_options_are_those_of_the_scheme(settings, options):
    clients = None if settings["partition"] == "column" else 4
    found = RecipeArguments(num_clients=clients, **settings).partition_options
    assert (found["column"], found["alpha"], found["shards_per_client"]) == options


def test_one_target_module_stays_a_list():
    # ModelConfig would make it a text, which PEFT matches against whole paths and so against nothing.
    assert ModelArguments("m", lora_target_modules=["q_proj"]).lora_target_modules == ["q_proj"]
    assert get_peft_config(ModelArguments("m", lora_target_modules=["q_proj"])).target_modules == {"q_proj"}
    assert ModelArguments("m", lora_target_modules=["all-linear"]).lora_target_modules == "all-linear"


# ---- the files under recipes/ ----


@pytest.mark.parametrize("given, read", [("auto", "auto"), ("4", 4)])
def test_clients_that_share_a_step_are_a_number_or_auto(tmp_path, given, read):
    file = tmp_path / "recipe.yaml"
    known = "model_name_or_path: m\nnum_clients: 2\nuse_cpu: true\nbf16: false\n"
    file.write_text(f"{known}per_device_train_clients: {given}\n")
    assert parse_recipe(TYPES, ["--config", str(file)])[1].per_device_train_clients == read
    flags = ["--config", str(file), "--per_device_train_clients", given]
    assert parse_recipe(TYPES, flags)[1].per_device_train_clients == read


def load(file: Path):
    """A recipe as it is, but for bf16 where no GPU has it."""
    on_cpu = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    return parse_recipe(TYPES, ["--config", str(file), *on_cpu])


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: str(file.relative_to(ROOT / "recipes")))
def test_every_recipe_is_read(file):
    recipe, config, model = load(file)
    assert config.output_dir.startswith("outputs/") and config.save_rounds and config.logging_steps
    assert get_peft_config(model).r == model.lora_r
    assert recipe.num_clients >= (config.clients_per_round or 1)
    if "smollm2" in str(file):
        assert config.use_cpu and not config.bf16 and not config.activation_checkpointing and model.dtype == "float32"
    # Every key is written once and with a plain value, so that what the file says is what was read.
    written = yaml.safe_load(file.read_text())
    read = {name: value for part in (recipe, config, model) for name, value in vars(part).items()}
    assert {name: read[name] for name in written.keys() - {"use_cpu"}} == {
        name: value for name, value in written.items() if name != "use_cpu"
    }


def test_the_recipes_are_those_that_the_readme_names():
    assert {str(file.relative_to(ROOT / "recipes")) for file in RECIPES} >= {
        "llama3.2_3b/commonsense/paper_table.yaml",
        "llama3.2_3b/commonsense/published_script_heavy_tail_low.yaml",
        "llama3.2_3b/commonsense/published_script_normal.yaml",
        "smollm2_135m/ci.yaml",
        "smollm2_135m/commonsense.yaml",
        "smollm2_135m/quickstart.yaml",
    }


# What arXiv 2501.19389 and its published script state; see the comments in the files.
LLAMA = {
    "lora_r": 64,
    "lora_alpha": 1,
    "use_rslora": True,
    "lora_dropout": 0.1,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "load_in_4bit": True,
    "use_bnb_nested_quant": True,
    "bnb_4bit_quant_type": "nf4",
    "learning_rate": 3e-4,
    "local_steps": 20,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "dirichlet_alpha": 0.1,
    "partition": "task_dirichlet",
    "min_rank": 1,
    "max_rank": 32,
}
SCRIPT = {"num_clients": 50, "clients_per_round": 10, "server_optim": "adamw", "server_learning_rate": 3e-4}
TABLE = {"num_clients": 20, "num_rounds": 750, "server_optim": "sgd", "server_learning_rate": 1.0}


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        ("published_script_normal", SCRIPT | {"rank_distribution": "normal", "num_rounds": 600}),
        ("published_script_heavy_tail_low", SCRIPT | {"rank_distribution": "heavy_tail_low", "num_rounds": 500}),
        ("paper_table", TABLE),
    ],
)
def test_llama_recipes_have_the_published_numbers(name, stated):
    parts = load(ROOT / "recipes" / "llama3.2_3b" / "commonsense" / f"{name}.yaml")
    read = {name: value for part in parts for name, value in vars(part).items()}
    assert {name: read[name] for name in LLAMA | stated} == LLAMA | stated
    quantization = get_quantization_config(parts[2])
    assert quantization.bnb_4bit_use_double_quant and quantization.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    "file", sorted((ROOT / "recipes" / "llama3.2_3b").rglob("*.yaml")), ids=lambda file: file.stem
)
def test_every_line_of_the_llama_recipes_says_where_it_comes_from(file):
    for line in file.read_text().splitlines():
        if re.match(r"\w+:", line) and not line.startswith("output_dir:"):
            assert re.search(r"# \[(script|paper|ours)\]", line), line


def test_the_quickstart_has_eight_clients_of_four_ranks_and_not_alike():
    recipe, config, _ = load(ROOT / "recipes" / "smollm2_135m" / "quickstart.yaml")
    assert (recipe.num_clients, config.clients_per_round, len(set(config.client_ranks))) == (8, 4, 4)
    assert recipe.partition == "task_dirichlet" and recipe.partition_options["alpha"] < 1


def test_the_ci_recipe_is_small():
    recipe, config, _ = load(ROOT / "recipes" / "smollm2_135m" / "ci.yaml")
    assert len(recipe.tasks) == 4 and config.num_rounds <= 4 and config.local_steps <= 4
    assert config.per_device_train_batch_size <= 4


@pytest.mark.parametrize("file", ACCELERATE, ids=lambda file: file.stem)
def test_accelerate_reads_its_configurations(file):
    config = load_config_from_file(str(file))
    stem = file.stem
    assert config.mixed_precision == "no"  # the recipe's bf16 decides
    assert config.use_cpu == (stem == "cpu") and config.num_machines == (2 if stem == "multi_node" else 1)
    assert config.num_processes == {"cpu": 1, "single_gpu": 1, "multi_gpu": 4, "multi_node": 8}[stem]
    assert not (config.fsdp_config or config.deepspeed_config or config.parallelism_config)


@pytest.mark.slow
def test_accelerates_configuration_trains_on_the_cpu(run_script, tmp_path):
    script = tmp_path / "hello.py"
    script.write_text(
        "import sys\nfrom fslora_hf.config.recipe import *\n"
        "from fslora_hf.config.federation import FederatedSketchConfig\n"
        "config = parse_recipe((RecipeArguments, FederatedSketchConfig, ModelArguments))[1]\n"
        "print('hello from', config.device, 'of', config.world_size, 'rounds', config.num_rounds)\n"
    )
    config = ["--config", str(ROOT / "recipes" / "smollm2_135m" / "quickstart.yaml"), "--num_rounds", "2"]
    assert "hello from cpu of 1 rounds 2" in run_script(str(script), *config, cwd=tmp_path)
