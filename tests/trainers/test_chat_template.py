"""`chat_template_path`: the template of another model, as far as a frozen base has its tokens."""

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from fslora_hf import FederatedSketchConfig, FederatedSketchTrainer
from tests.support import tiny
from tests.support.worker_train import QUIET

TEMPLATE = "{% for message in messages %}w1 {{ message['content'] }} {END} {% endfor %}"  # {END} as given below
ROWS = [
    {
        "messages": [{"role": "user", "content": f"w{n}"}, {"role": "assistant", "content": f"w{n + 1} w2"}],
        "client_id": n % 2,
    }
    for n in range(8)
]
RUN = {**QUIET, "num_rounds": 1, "local_steps": 1, "save_rounds": 0}


def write_source(folder, end: str, *added: str, template: str | None = TEMPLATE) -> str:
    """The tokenizer of another model: its template ends turns with `end`, and it has tokens of its own."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(list(added), special_tokens=True)
    tokenizer.eos_token = end
    tokenizer.chat_template = template and template.replace("{END}", end)
    tokenizer.save_pretrained(folder)
    return str(folder)


def prepared(trainer) -> list:
    return trainer.train_dataset.select_columns(["input_ids", "labels"]).to_list()


def make(folder, path, model=None, processing_class=None) -> FederatedSketchTrainer:
    return FederatedSketchTrainer(
        model=tiny.base_model() if model is None else model,
        args=FederatedSketchConfig(output_dir=str(folder), chat_template_path=str(path), **RUN),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=processing_class or tiny.tokenizer(),
        peft_config=tiny.lora_config(),
    )


def sft(folder, path) -> SFTTrainer:
    return SFTTrainer(
        model=tiny.base_model(),
        args=SFTConfig(output_dir=str(folder), chat_template_path=str(path), **QUIET),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora_config(),
    )


@pytest.mark.parametrize("added", [(), ("<tool>",)], ids=["the same tokens", "tokens that its template does without"])
def test_a_template_of_known_tokens_is_taken_as_by_sfttrainer(tmp_path, added):
    """The same rows and end of a turn; the base keeps its embeddings, which TRL makes larger and trains."""
    source = write_source(tmp_path / "source", "w28", *added)
    trainer, other = make(tmp_path / "run", source), sft(tmp_path / "sft", source)
    assert prepared(trainer) == prepared(other)
    for one in (trainer, other):
        config = one.model.get_base_model().config
        assert config.eos_token_id == one.processing_class.eos_token_id == tiny.VOCABULARY.index("w28")
        assert one.model.generation_config.eos_token_id == tiny.VOCABULARY.index("w28")
    assert trainer.model.get_base_model().vocab_size == len(tiny.VOCABULARY)
    assert trainer.args.chat_template_path == source
    trainer.train()


def test_the_tokenizer_of_a_model_in_a_folder_is_given_the_template(tmp_path):
    tiny.base_model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    source = write_source(tmp_path / "source", "w28")
    trainer = FederatedSketchTrainer(
        model=str(tmp_path / "model"),
        args=FederatedSketchConfig(output_dir=str(tmp_path / "run"), chat_template_path=source, **RUN),
        train_dataset=Dataset.from_list(ROWS),
        peft_config=tiny.lora_config(),
    )
    assert prepared(trainer) == prepared(make(tmp_path / "other", source))


def test_a_template_that_needs_other_tokens_is_refused_before_a_model_is_loaded(tmp_path):
    """In one sentence that names them and what to do, and that does work."""
    source = write_source(tmp_path / "source", "<|im_end|>", "<|im_start|>", "<|im_end|>")
    with pytest.raises(ValueError, match=r"would add <\|im_end\|>: .* name a .jinja file with the template alone"):
        make(tmp_path / "run", source, model="/no/such/model")
    assert not (tmp_path / "run").exists()
    alone = tmp_path / "source" / "chat_template.jinja"
    assert prepared(make(tmp_path / "run", alone)) == prepared(sft(tmp_path / "sft", alone))


def test_paths_without_a_template(tmp_path):
    bare = write_source(tmp_path / "bare", "w28", template=None)
    for path in (bare, tmp_path / "none", tmp_path / "none.jinja"):
        with pytest.raises(ValueError, match=f"Expected chat_template_path to name a .jinja file .*found '{path}' "):
            make(tmp_path / "run", path, model="/no/such/model")
