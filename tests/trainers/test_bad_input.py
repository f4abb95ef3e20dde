"""Law 9: bad input is an error before any training that says what was expected, what was found and how to mend it."""

import re

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from fslora_hf.config.federation import FederatedSketchConfig
from fslora_hf.trainers.sft import FederatedSketchTrainer
from tests.support import tiny
from tests.support.worker_train import QUIET, SMALL

RUN = {**QUIET, **SMALL, "num_rounds": 2, "local_steps": 1}


@pytest.fixture
def output_dir(tmp_path):
    """A folder with something of the user's in it, which must be all that is there when the test ends."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    yield folder
    assert [path.name for path in folder.rglob("*")] == ["notes.txt"]
    assert (folder / "notes.txt").read_text() == "mine"


def make(output_dir, *, args=None, rows=None, lora=None, **arguments) -> FederatedSketchTrainer:
    """A trainer of the tiny model; `args` are fields of the config, or the arguments themselves."""
    if args is None or isinstance(args, dict):
        args = FederatedSketchConfig(output_dir=str(output_dir), **{**RUN, **(args or {})})
    settings = {
        "model": tiny.base_model(),
        "args": args,
        "train_dataset": tiny.tokenised() if rows is None else rows,
        "processing_class": tiny.tokenizer(),
        "peft_config": tiny.lora_config() if lora is None else lora,
    }
    return FederatedSketchTrainer(**{**settings, **arguments})


def refused(message: str, output_dir, **changes):
    """The error's sentence matches `message`, in the form of them all, and what is wrong is told before training."""
    with pytest.raises(ValueError) as error:
        make(output_dir, **changes)
    text = str(error.value)
    assert re.search(message, text, re.DOTALL), text
    for sentence in text.splitlines()[1:]:
        assert re.fullmatch(r"- Expected .*found .*: .*\.", sentence), sentence
    return text


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 6, "target_modules": tiny.TARGETS, "task_type": "CAUSAL_LM", **changes})


# ---- Ranks and clients ----

RANKS = {
    "above the global rank": ({"client_ranks": [1, 2, 7, 1, 1]}, "from 1 to the global rank 6, found 1 to 7: lower"),
    "below 1": (
        {"client_ranks": [1, 0, 1, 1, 1]},
        r"Expected client_ranks\[1\] to be an integer of at least 1, found 0",
    ),
    "max_rank too high": (
        {"max_rank": 9},
        "from 1 to the global rank 6, found 9 to 9: lower client_ranks or max_rank",
    ),
    "list too short": ({"client_ranks": [1, 2]}, "client_ranks with 5 entries, .*found 2: make the list as long"),
    "list too long": ({"client_ranks": [1] * 6}, "client_ranks with 5 entries, .*found 6: make the list as long"),
    "more clients than exist": ({"clients_per_round": 6}, "clients_per_round of at most 5, .*found 6: lower it"),
    "ranks below r in fedit": (
        {"method": "fedit", "max_rank": 4},
        "Expected every client to have the global rank 6 with method=fedit, found ranks 4 to 4: .*method=fslora",
    ),
    "unequal ranks in ffa_lora": (
        {"method": "ffa_lora", "client_ranks": [6, 6, 4, 6, 2]},
        "Expected every client to have the global rank 6 with method=ffa_lora, found ranks 2 to 6: .*method=fslora",
    ),
}


@pytest.mark.parametrize("case", RANKS)
def test_ranks_and_cohorts(output_dir, case):
    args, message = RANKS[case]
    refused(message, output_dir, args=args)


# ---- The client column and the rows ----


def renamed(rows):
    return rows.rename_column("client_id", "owner")


def with_ids(change):
    """The rows with another client column, its type left to what `change` makes of each id."""
    return lambda rows: Dataset.from_list([{**row, "client_id": change(i, row)} for i, row in enumerate(rows)])


COLUMNS = {
    "missing": (
        renamed,
        r"column 'client_id' in train_dataset, found input_ids, labels, owner: add it with",
    ),
    "strings": (with_ids(lambda i, row: f"c{row['client_id']}"), "integers in column 'client_id', found string: turn"),
    "floats": (
        with_ids(lambda i, row: row["client_id"] + 0.5),
        "integers in column 'client_id', found (double|float64)",
    ),
    "truth values": (with_ids(lambda i, row: i % 2 == 0), "integers in column 'client_id', found bool"),
    "lists": (with_ids(lambda i, row: [row["client_id"]]), r"integers in column 'client_id', found .*[Ll]ist"),
    "nulls": (with_ids(lambda i, row: None if i == 3 else 1), "id in every row of column 'client_id', found .*null"),
    "no rows": (lambda rows: rows.select([]), "id in every row of column 'client_id', found no rows"),
    "streaming": (
        lambda rows: rows.to_iterable_dataset(),
        "a datasets.Dataset, .*found a IterableDataset: load it without streaming",
    ),
    "a dict of data sets": (
        lambda rows: DatasetDict(train=rows, test=rows),
        r"one datasets.Dataset, found a DatasetDict of the splits 'train', 'test': .*train_dataset=data\['train'\]",
    ),
    "an empty dict": (lambda rows: {}, "one datasets.Dataset, found a dict of the splits none: pass a data set"),
    "a list": (lambda rows: list(rows), "found a list: make one with Dataset.from_list"),
    "images": (
        lambda rows: rows.add_column("image", [0] * len(rows)),
        "text data in .*, found an image",
    ),
}


def test_rows_without_text_are_told_with_the_columns_that_there_are(output_dir):
    rows = Dataset.from_dict({"question": ["a", "b"], "completion": ["c", "d"], "client_id": [0, 1]})
    message = "columns prompt and completion, or messages, or text, found client_id, completion, question: rename them"
    refused(message, output_dir, rows=rows, args={"client_ranks": [1, 2]})
    make(output_dir, rows=rows.rename_column("question", "text"), args={"client_ranks": [1, 2]})
    make(output_dir, rows=rows, args={"client_ranks": [1, 2], "dataset_text_field": "question"})
    make(output_dir, rows=rows, args={"client_ranks": [1, 2]}, formatting_func=lambda row: row["question"])


@pytest.mark.parametrize("case", COLUMNS)
def test_data_sets_and_their_client_column(output_dir, case):
    change, message = COLUMNS[case]
    refused(message, output_dir, rows=change(tiny.tokenised()))


def test_no_data_set(output_dir):
    refused("Expected train_dataset to be a datasets.Dataset, found none: pass one.", output_dir, train_dataset=None)


def answer_of(length: int, client: int) -> dict:
    return {"input_ids": [3] * (length + 1), "labels": [-100] + [3] * length, "client_id": client}


def test_a_client_that_loses_all_its_rows(output_dir):
    """Its answers leave no room for a prompt."""
    rows = Dataset.from_list([answer_of(2, 1), answer_of(20, 5), answer_of(3, 7)])
    message = "every client to keep rows in preparation, found that client 5 lost all of theirs, too long or without"
    refused(message, output_dir, rows=rows, args={"max_length": 8})
    several = Dataset.from_list([answer_of(20, c) for c in range(10, 19)] + [answer_of(2, 1)])
    refused(
        r"found that 9 clients \(10, 11, 12, 13, 14, \.\.\.\) lost all",
        output_dir,
        rows=several,
        args={"max_length": 8},
    )


def test_a_client_that_falls_below_min_examples(output_dir):
    """It has enough rows before preparation, and too few after."""
    rows = Dataset.from_list([answer_of(2, 1)] * 3 + [answer_of(20, 5)] + [answer_of(2, 5)] * 2)
    message = "min_examples=3 prepared rows of every client, found fewer at client 5: lower min_examples, or give"
    refused(message, output_dir, rows=rows, args={"max_length": 8, "min_examples": 3})
    refused("min_examples=2 .*found fewer at client 3: ", output_dir, args={"min_examples": 2})
    assert len(make(output_dir, rows=rows, args={"max_length": 8, "min_examples": 2}).client_index) == 2


@pytest.mark.parametrize("labels", [[-100, -100], [3, -100]], ids=["nothing scored", "only the first token scored"])
def test_a_client_without_a_scored_token_after_the_shift(output_dir, labels):
    """A client may lose rows, which are counted (tests/trainers/test_trl_rows.py), and not all of them."""
    rows = [answer_of(2, 1), {"input_ids": [3, 3], "labels": labels, "client_id": 1}]
    assert len(make(output_dir, rows=Dataset.from_list(rows)).train_dataset) == 1
    message = "found that client 2 lost all of theirs, too long or without a scored token: raise max_length, "
    refused(message, output_dir, rows=Dataset.from_list([*rows, {**rows[1], "client_id": 2}]))


# ---- The adapter ----

LORAS = {
    "not LoRA": (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "peft.LoraConfig .*found a IA3Config"),
    "AdaLoRA": (
        AdaLoraConfig(target_modules=["k_proj"], total_step=10),
        "peft.LoraConfig .*found a AdaLoraConfig: clients train plain LoRA; use that",
    ),
    "prompts": (
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        "found a PromptTuningConfig: clients",
    ),
    "target_parameters": (
        lora(target_parameters=["experts.down_proj"]),
        r"target_modules of linear layers, found target_parameters=\['experts.down_proj'\], .*without expert",
    ),
    "rank 0": (lora(), "a global rank r of at least 1, found 0: raise it"),
    "alpha 0": (lora(lora_alpha=0), "a lora_alpha above 0, as the adapter is scaled by it, found 0: raise it"),
    "bias": (lora(bias="all"), "bias='none', found 'all': "),
    "rank_pattern": (lora(rank_pattern={"q_proj": 2}), "plain LoRA, found rank_pattern={'q_proj': 2} .*leave it out"),
    "modules_to_save": (lora(modules_to_save=["lm_head"]), r"plain LoRA, found modules_to_save=\['lm_head'\]"),
    "DoRA": (lora(use_dora=True), "plain LoRA, found use_dora=True in the peft_config: .*leave it out"),
    "lora_bias": (lora(lora_bias=True), "plain LoRA, found lora_bias=True"),
    "trained tokens": (lora(trainable_token_indices=[1]), r"plain LoRA, found trainable_token_indices=\[1\]"),
    "pissa": (lora(init_lora_weights="pissa"), "init_lora_weights to be True, .*found 'pissa': it changes the base"),
    "lm_head": (
        lora(target_modules=["q_proj", "lm_head"]),
        "target_modules without lm_head, found it: .*leave it out",
    ),
}
LORAS["rank 0"][0].r = 0


@pytest.mark.parametrize("case", LORAS)
def test_adapters(output_dir, case):
    config, message = LORAS[case]
    refused(message, output_dir, lora=config)


def test_no_adapter(output_dir):
    refused("Expected a peft.LoraConfig as peft_config .*found none: pass one", output_dir, peft_config=None)


def test_an_adapter_that_is_not_called_default(output_dir, tmp_path):
    """Both remedies work, in which SFTTrainer trains the adapter, too; and a description beside it changes nothing."""
    other = get_peft_model(tiny.base_model(), tiny.lora_config(), adapter_name="mine")
    message = "Expected the model's adapter to be called default, found mine: leave adapter_name out of get_peft_model"
    refused(message, output_dir, model=other, peft_config=None)
    refused(message, output_dir, model=other)
    other.save_pretrained(tmp_path / "saved")
    mended = [
        get_peft_model(tiny.base_model(), tiny.lora_config()),
        PeftModel.from_pretrained(tiny.base_model(), tmp_path / "saved" / "mine", is_trainable=True),
    ]
    args = SFTConfig(output_dir=str(output_dir), **QUIET)
    for model in mended:
        SFTTrainer(model, args, train_dataset=tiny.tokenised(), processing_class=tiny.tokenizer())
        make(output_dir, model=model, peft_config=None)


def test_target_modules_that_match_nothing(output_dir):
    """PEFT's own error, which names them, comes before training."""
    with pytest.raises(
        ValueError, match="Target modules {'qproj'} not found in the base model. Please check the target"
    ):
        make(output_dir, lora=lora(target_modules=["qproj"]))
    with pytest.raises(ValueError, match="lm_head"):
        make(output_dir, lora=lora(target_modules=".*(q_proj|lm_head)"))


def test_target_modules_that_are_no_linear_layers(output_dir):
    """PEFT adapts embeddings with tensors of another kind, which a stack of clients does not have."""
    message = "Expected .*found .*embed_tokens.*: .*leave it out"
    refused(message, output_dir, lora=lora(target_modules=["q_proj", "embed_tokens"]))


def unfreeze_norm(model):
    model.get_submodule("base_model.model.model.norm").weight.requires_grad_(True)


def activate_another(model):
    model.add_adapter("other", tiny.lora_config())
    model.set_adapter("other")


@pytest.mark.parametrize("change, found", [(unfreeze_norm, "norm.weight"), (activate_another, "other")])
def test_what_else_is_trainable_is_refused(output_dir, change, found):
    """All clients would train it together, and no checkpoint would hold it."""
    model = get_peft_model(tiny.base_model(), tiny.lora_config())
    change(model)
    refused(f"Expected .*default.*found .*{found}", output_dir, model=model, peft_config=None)


# ---- Other arguments ----


def test_arguments_of_the_wrong_class(output_dir):
    for kind in (SFTConfig, TrainingArguments):
        args = kind(output_dir=str(output_dir), use_cpu=True, bf16=False, report_to="none")
        message = f"Expected args to be a FederatedSketchConfig, found a {kind.__name__}: build one from its fields"
        refused(message, output_dir, args=args)


def make_optimizer():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


ARGUMENTS = {
    "optimizers": lambda: (make_optimizer(), None),
    "optimizer_cls_and_kwargs": lambda: (torch.optim.SGD, {"lr": 0.1}),
    "compute_loss_func": lambda: lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum(),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_would_mix_clients(output_dir, name):
    message = f"Expected no {name}, found one: the trainer makes its own, one for every client; leave it out"
    refused(message, output_dir, **{name: ARGUMENTS[name]()})


@pytest.mark.parametrize("args", [{"eval_rounds": 1}, {"eval_on_start": True}])
def test_evaluation_without_a_data_set(output_dir, args):
    refused("Expected an eval_dataset with .*found none: pass one", output_dir, args=args)


STEPS = {
    "save_strategy": ("steps", "save_rounds"),
    "save_steps": (10, "save_rounds"),
    "eval_strategy": ("steps", "eval_rounds"),
    "eval_steps": (10, "eval_rounds"),
    "max_steps": (10, "num_rounds"),
}


@pytest.mark.parametrize("name", STEPS)
def test_saves_and_evaluations_by_steps(output_dir, name):
    value, instead = STEPS[name]
    refused(f"Expected {name} to be .*, found {value!r}: .*{instead}", output_dir, args={name: value})


def test_several_problems_are_told_together(output_dir):
    """Of the adapter, the arguments and the data; then, once they are known, of clients, ranks and method."""
    text = refused(
        "The run cannot start:",
        output_dir,
        lora=lora(bias="all", use_dora=True, target_modules=["lm_head"]),
        rows=renamed(tiny.tokenised()).add_column("images", [0] * 41),
        args={"eval_rounds": 1},
        optimizers=(make_optimizer(), None),
    )
    assert len(text.splitlines()) == 8
    for part in ("eval_dataset", "optimizers", "bias", "use_dora", "lm_head", "'client_id'", "image column"):
        assert part in text
    args = {"client_ranks": [1, 7], "clients_per_round": 9, "method": "fedit"}
    assert len(refused("The run cannot start:", output_dir, args=args).splitlines()) == 5
    rows = Dataset.from_list([answer_of(20, 5), answer_of(2, 1), answer_of(0, 1)])
    text = refused("The run cannot start:", output_dir, rows=rows, args={"max_length": 8, "min_examples": 3})
    assert len(text.splitlines()) == 3


def test_nothing_is_loaded_for_a_run_that_cannot_start(output_dir):
    """A model that does not exist is not looked for while the arguments are wrong."""
    refused("clients_per_round of at most 5", output_dir, model="/no/such/model", args={"clients_per_round": 6})


class Stop(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        raise AssertionError("a step began")


def test_good_input_is_good(output_dir):
    """What the other tests change one thing in."""
    trainer = make(output_dir, callbacks=[Stop()])
    assert len(trainer.client_index) == 5 and trainer.layout.steps_per_round == 5
