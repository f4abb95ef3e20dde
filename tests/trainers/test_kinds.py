"""A kind of trainer of a few lines, over transformers' own Trainer: what rounds need of a Trainer is no SFT."""

import pytest
import torch
from peft import get_peft_model
from transformers import DataCollatorForTokenClassification, Trainer

from fslora_hf.config.federation import FederatedSketchConfig
from fslora_hf.trainers.federated import FederatedTrainer
from fslora_hf.trainers.sft import FederatedSketchTrainer
from tests.support import reference, tiny
from tests.support.worker_train import QUIET, SMALL

ARGS = {
    "num_rounds": 3,
    "local_steps": 2,
    "clients_per_round": 3,
    "client_ranks": [1, 2, 4, 6, 3],
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.0,
    "save_rounds": 1,
}


class FederatedTokens(FederatedTrainer, Trainer):
    """The logits of every position through the model's own head, and torch's loss of them."""

    loss_is_scaled_for_ga = True
    _forward_options = {"use_cache": False}
    scored = FederatedSketchTrainer.scored

    def __init__(self, **given):
        given = {"eval_dataset": None, "callbacks": None, **given}
        self._before_loading(given, given["model"].peft_config["default"], {}, [])
        super().__init__(**given)
        self._after_loading()

    def client_losses(self, model, inputs, clients, scored):
        asked = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        logits = model(**asked, **self._forward_options).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.mT, inputs["labels"][:, 1:], reduction="none")
        return losses.view(clients, -1).sum(1) / scored


def build_tokens(folder, args: dict) -> FederatedTokens:
    tokenizer = tiny.tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(tiny.base_model(), tiny.lora_config(), autocast_adapter_dtype=False)
    return FederatedTokens(
        model=model,
        args=FederatedSketchConfig(output_dir=str(folder), **{**QUIET, **SMALL, **args}),
        train_dataset=tiny.tokenised(),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("block", [1, 2, 3])
def test_a_kind_over_the_plain_trainer_trains_what_the_slow_twin_trains(tmp_path, block):
    trainer = build_tokens(tmp_path, {**ARGS, "per_device_train_clients": block})
    start = reference.read_adapter(trainer.model)
    plans = [trainer.round_plan(round) for round in range(3)]
    expected = reference.replay(
        tiny.base_model(), trainer.model.peft_config["default"], start, trainer.train_dataset, plans, trainer.args
    )
    trainer.train()
    trained = reference.read_adapter(trainer.model)
    assert reference.max_difference(start, trained) > 1e-3
    assert reference.max_difference(expected[-1], trained) < 1e-9


def test_a_kind_over_the_plain_trainer_resumes(tmp_path):
    whole, stopped = (build_tokens(tmp_path / name, ARGS) for name in ("whole", "run"))
    whole.train()
    stopped.args.num_rounds = 2
    stopped.train()
    resumed = build_tokens(tmp_path / "run", ARGS)
    resumed.train(resume_from_checkpoint=True)
    adapters = [reference.read_adapter(each.model) for each in (whole, resumed)]
    assert reference.max_difference(*adapters) == 0 and resumed.rounds_done == 3
