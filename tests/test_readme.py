"""What the README shows works as it stands there."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from fslora_hf import FederatedSketchConfig
from fslora_hf.config.recipe import RecipeArguments
from fslora_hf.data.miniature import miniature_rows
from fslora_hf.reports.ledger import read_ledger
from tests.evaluation.test_loglikelihood import fitted, tokenizer
from tests.support import tiny

pytest_plugins = ("tests.support.forked",)

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=len(tiny.VOCABULARY),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_python_blocks_run_in_order(model, tmp_path, monkeypatch, capsys):
    """One after the other in one namespace, with a stand-in for MODEL and rows by three authors."""
    monkeypatch.chdir(tmp_path)
    authors = ["ann", "bob", "cyd"]
    rows = [{"prompt": f"w{i % 7} w2 ", "completion": f"w{i % 5} ", "author": authors[i % 3]} for i in range(24)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    namespace = {"__name__": "readme"}
    code = [block.replace("MODEL", model) for block in blocks("python")]
    assert len(code) == 6
    for block in code:
        exec(compile(block, "README.md", "exec"), namespace)  # noqa: S102
    assert "[" in capsys.readouterr().out  # the sketch that was printed
    narrator = namespace["Narrator"]()
    trainer = namespace["trainer"]
    args = type(trainer.args)(
        output_dir="outputs/narrated",
        num_rounds=2,
        warmup_steps=1,  # nothing moves in the first round
        clients_per_round=2,
        local_steps=1,
        use_cpu=True,
        bf16=False,
    )
    peft_config, base = trainer.model.peft_config["default"], AutoModelForCausalLM.from_pretrained(model)
    narrated = type(trainer)(
        model=base,
        args=args,
        train_dataset=namespace["rows"],
        peft_config=peft_config,
        callbacks=[narrator],
        update_transforms=[namespace["Clip"](1e-5)],
    )
    narrated.train()
    resting, moving = (record["update_norms"] for record in read_ledger(narrated.ledger_path))
    assert resting == [0.0] * 2 and moving == pytest.approx([1e-5] * 2)
    printed = capsys.readouterr().out
    assert "now training" in printed and "bytes came back" in printed


@pytest.mark.slow
def test_train_command_runs(model, run_script, tmp_path):
    (command,) = [block for block in blocks("sh") if "recipes/train.py" in block and "outputs/mine" in block]
    words = shlex.split(
        command.replace("\\\n", " ").replace("MODEL", model).replace("outputs/mine", str(tmp_path / "r"))
    )
    assert words[:3] == ["accelerate", "launch", "--config_file"]
    shorter = ["--num_rounds", "1", "--local_steps", "1", "--train_rows_per_task", "24"]
    assert "Adapter, ledger and figure" in run_script(*words[4:], *shorter)


@pytest.mark.slow
def test_own_method_runs_from_the_folder_it_is_in(model, run_script, tmp_path):
    """Its file in an empty folder, and the command run there."""
    (example,) = [block for block in blocks("python") if "(Method)" in block]
    assert len(example.splitlines()) < 30 and "a file `my_methods.py`" in TEXT
    (tmp_path / "my_methods.py").write_text(example)
    (command,) = [block for block in blocks("sh") if "--method" in block]
    words = shlex.split(command.replace("\\\n", " ").replace("MODEL", model))
    words = [str(ROOT / word) if word.startswith("recipes/") else word for word in words]
    shorter = ["--num_rounds", "2", "--local_steps", "1", "--train_rows_per_task", "24"]
    assert "Adapter, ledger and figure" in run_script(*words[4:], *shorter, cwd=tmp_path)
    output = tmp_path / "outputs" / "holders"
    assert json.loads((output / "federated_run.json").read_text())["method"] == "my_methods:MeanOfHolders"
    records = [json.loads(line) for line in (output / "rounds.jsonl").read_text().splitlines()]
    assert len(records) == 2 and all(min(record["update_norms"]) > 0 for record in records)
    assert len({rank for record in records for rank in record["ranks"]}) > 1


def stand_ins(folder: Path, count: int, *tasks: str) -> tuple[Path, Path]:
    """Folders of a model of bytes, and of so many generated rows of each task and split."""
    base, rows = folder / "base", folder / "rows"
    fitted(tiny.base_model(torch.float32)).save_pretrained(base)
    tokenizer().save_pretrained(base)
    for task in tasks:
        for split in ("train", "test"):
            (rows / task).mkdir(parents=True, exist_ok=True)
            (rows / task / f"{split}.json").write_text(json.dumps(miniature_rows(task, split, count, seed=0)))
    return base, rows


@pytest.mark.slow
def test_score_commands_run(run_script, tmp_path):
    """With generated rows, a model of bytes, and a run of one round in place of what they name."""
    base, rows, scores = *stand_ins(tmp_path, 24, "boolq", "piqa"), tmp_path / "scores"
    adapter = tmp_path / "checkpoint-120"
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), tiny.lora_config(2)).save_pretrained(adapter)
    (block,) = [block for block in blocks("sh") if "recipes/evaluate.py" in block]
    named = {"MODEL": base, "FOLDER": rows, "outputs/smollm2_135m-commonsense-short/checkpoint-120": adapter}
    for name, stand_in in {**named, "outputs/scores": scores, "outputs/leaderboard": tmp_path / "board"}.items():
        block = block.replace(name, str(stand_in))
    score, rank = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    table = run_script(*score[4:])
    assert "| base " in table and "checkpoint-120" in table and "most common answer" in table
    assert rank[:2] == ["python", "recipes/leaderboard.py"]
    assert "checkpoint-120" in run_script(*rank[1:])
    assert {path.suffix for path in (tmp_path / "board").iterdir()} >= {".md", ".csv", ".html"}


@pytest.mark.slow
def test_compare_command_runs(run_script, tmp_path):
    """Two methods of it for one round and one seed, on a model of bytes and generated rows."""
    base, rows, out = *stand_ins(tmp_path, 400, "boolq"), tmp_path / "out"
    (command,) = [block for block in blocks("sh") if "recipes/compare.py" in block]
    words = shlex.split(command.replace("FOLDER", str(rows)))
    shorter = f"--model_name_or_path {base} --output_dir {out} --methods fslora ffa_lora --seeds 1 --rounds 1"
    shorter += " --local_steps 1 --tasks boolq --eval_rows_per_task 4 --max_length 512 --dirichlet_alpha 1000"
    run_script(*words[1:], *shorter.split(), forks=True)
    table = (out / "table.md").read_text()
    assert "| fslora |" in table and "| ffa\\_lora |" in table and "hetlora" not in table
    assert {path.suffix for path in out.iterdir()} >= {".md", ".html", ".json", ".png", ".svg"}


def test_keys_of_the_table_exist():
    table = TEXT[TEXT.index("| key |") : TEXT.index("`--help` lists")]
    rows = [row for row in table.splitlines()[2:] if row.startswith("|")]
    keys = {key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])}
    known = set(FederatedSketchConfig.__dataclass_fields__) | set(RecipeArguments.__dataclass_fields__)
    keys -= {"miniature", "commonsense"}  # values
    assert len(keys) > 10 and keys <= known


def test_linked_files_exist():
    for target in re.findall(r"\]\(((?!https?:)[^)]+)\)", TEXT):
        path, _, heading = target.partition("#")
        assert (ROOT / path).exists(), target
        if heading:
            lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
            headings = [re.sub(r"[^\w -]", "", line.lstrip("# ")) for line in lines if line.startswith("#")]
            assert heading in [text.lower().replace(" ", "-") for text in headings], target
