"""What is targeted is trained: layers that would not be are refused, with the names that work in their place."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from trl import SFTConfig, SFTTrainer

from fslora_hf.config.federation import FederatedSketchConfig
from fslora_hf.models.adapter_checks import check_layers
from fslora_hf.models.targets import layers_seeing_all, working_names
from fslora_hf.trainers.sft import FederatedSketchTrainer
from tests.support import routed, tiny
from tests.support.worker_train import QUIET, SMALL

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
TOWER = r".*vision_tower.*"
RUN = {**QUIET, **SMALL, "num_rounds": 1, "local_steps": 2, "max_length": 32}


def lora(targets, **changes) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **changes)


def federated(folder, model, config, **args) -> FederatedSketchTrainer:
    """A trainer of one client."""
    return FederatedSketchTrainer(
        model=model,
        args=FederatedSketchConfig(output_dir=str(folder / "run"), **{**RUN, **args}),
        train_dataset=tiny.tokenised({0: 6}),
        processing_class=tiny.tokenizer(),
        peft_config=config,
    )


def plain(folder, model, config) -> SFTTrainer:
    """SFTTrainer with as many steps on the same rows."""
    args = SFTConfig(output_dir=str(folder / "sft"), max_steps=2, **QUIET, save_strategy="no", learning_rate=1e-2)
    rows = tiny.tokenised({0: 6}).remove_columns("client_id")
    return SFTTrainer(model, args, train_dataset=rows, processing_class=tiny.tokenizer(), peft_config=config)


def moved(trainer) -> set[str]:
    """Modules whose B, zero to begin with, is not zero after training."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".lora_B." in name}
    assert not any(tensor.any() for tensor in before.values())
    trainer.train()
    now = dict(trainer.model.named_parameters())
    return {name.split(".lora_B.")[0].removeprefix("base_model.model.") for name in before if now[name].any()}


def refusal(folder, model, config, **args) -> str:
    with pytest.raises(ValueError) as error:
        federated(folder, model, config, **args)
    assert not list((folder / "run").rglob("*"))
    assert re.search(r"Expected .*found .*: .*\.", str(error.value), re.DOTALL), error.value
    return str(error.value)


# ---- Mixtures of experts: names of experts and routers become bare parameters in PEFT ----

EXPERTS = ["q_proj", "gate_proj", "up_proj", "down_proj"]
ROUTED = {
    "all-linear": "all-linear",
    "router": ["q_proj", "gate"],
    "experts": EXPERTS,
    "a pattern": r".*(q_proj|gate)",
}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("case", ROUTED)
def test_experts_and_routers_are_refused_and_what_works_is_named(tmp_path, name, case):
    targets = ["q_proj", "w1", "w2", "w3"] if (name, case) == ("mixtral", "experts") else ROUTED[case]
    text = refusal(tmp_path, routed.model(name), lora(targets))
    assert "Expected target_modules of linear layers, found model.layers." in text
    assert "name some of k_proj, o_proj, q_proj, v_proj in target_modules" in text


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "glm4_moe"])
def test_the_names_told_train_every_layer_as_in_sft_trainer(tmp_path, name):
    config = lora(ATTENTION)
    trained = moved(federated(tmp_path, routed.model(name), config, router_aux_loss_coef=0.0))
    assert trained == moved(plain(tmp_path, routed.model(name), config)) and len(trained) == 8


def test_a_configuration_is_not_changed_by_a_refusal(tmp_path):
    """PEFT writes `target_parameters` and a `rank_pattern` into the configuration that it is given."""
    config = lora("all-linear")
    refusal(tmp_path, routed.model("mixtral"), config)
    assert config.target_modules == "all-linear" and not config.target_parameters and not config.rank_pattern


def test_peft_refusing_first_is_told_with_the_names_too(tmp_path):
    """With dropout, which recipes set, PEFT itself refuses parameters; also when the model is but named."""
    text = refusal(tmp_path, routed.model("mixtral"), lora("all-linear", lora_dropout=0.1))
    assert "does not work with lora_dropout" in text and "k_proj, o_proj, q_proj, v_proj" in text
    routed.model("mixtral").save_pretrained(tmp_path / "model")
    text = refusal(tmp_path, str(tmp_path / "model"), lora("all-linear", lora_dropout=0.1))
    assert "does not work with lora_dropout" in text and "name some of k_proj, o_proj, q_proj, v_proj in" in text


def test_a_model_that_has_such_an_adapter_already(tmp_path):
    model = get_peft_model(routed.model("mixtral"), lora(["q_proj", "gate"]))
    assert "found target_parameters=['gate.weight'], which" in refusal(tmp_path, model, None)


# ---- Layers that see other tokens than the batch's ----


class Experts(nn.Module):
    """Two linear experts behind a linear router, as models with code of their own have them."""

    def __init__(self, width: int):
        super().__init__()
        self.router = nn.Linear(width, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x):
        flat, out = x.reshape(-1, x.shape[-1]), torch.zeros_like(x).reshape(-1, x.shape[-1])
        best = self.router(flat).argmax(-1)
        for number, expert in enumerate(self.experts):
            out[best == number] = expert(flat[best == number])
        return out.view(x.shape)


def model_with_experts():
    model = tiny.base_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in model.model.layers:
            layer.mlp = Experts(16).to(torch.float64)
    return model


def test_linear_experts_are_refused_by_what_they_see(tmp_path):
    text = refusal(tmp_path, model_with_experts(), lora("all-linear"))
    assert "Expected targeted layers that every token of a text passes through, in order, found model.layers.0" in text
    assert "set exclude_modules='.*(experts).*' in the peft_config" in text
    federated(tmp_path, model_with_experts(), lora("all-linear", exclude_modules=".*(experts).*"))
    assert working_names(model_with_experts()) == [*ATTENTION[:3], "router", "v_proj"]


def test_the_probe_leaves_the_model_as_it_was():
    model = tiny.base_model().train()
    names = layers_seeing_all(model)
    assert len(names) == 14 and "model.layers.1.mlp.down_proj" in names and model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- Excluded modules ----


def test_all_linear_without_a_vision_tower_trains_as_in_sft_trainer(tmp_path):
    config = lora("all-linear", exclude_modules=TOWER)
    trained = moved(federated(tmp_path, routed.model("gemma3"), config))
    assert trained == moved(plain(tmp_path, routed.model("gemma3"), config)) and len(trained) == 14
    assert all(name.startswith("model.language_model.") for name in trained)


def test_a_vision_tower_that_sees_no_text_is_refused(tmp_path):
    text = refusal(tmp_path, routed.model("gemma3"), lora("all-linear"))
    assert "found model.vision_tower." in text and "set exclude_modules='.*(vision_tower).*'" in text


@pytest.mark.parametrize(
    "targets, excluded, layers",
    [
        ("all-linear", ["k_proj"], 12),
        ("all-linear", r".*layers\.0\..*", 7),
        (["q_proj", "k_proj"], ["k_proj"], 2),
        (["q_proj", "layers.0.mlp.up_proj"], ["model.layers.0.mlp.up_proj"], 2),
    ],
)
def test_names_that_are_excluded_need_match_no_layer(tmp_path, targets, excluded, layers):
    trainer = federated(tmp_path, tiny.base_model(), lora(targets, exclude_modules=excluded))
    assert len(moved(trainer)) == layers


def test_a_name_of_no_module_is_refused_also_beside_an_exclusion(tmp_path):
    text = refusal(tmp_path, tiny.base_model(), lora(["q_proj", "kproj"], exclude_modules=["v_proj"]))
    assert "found none for 'kproj': correct it" in text


def test_all_modules_excluded(tmp_path):
    text = refusal(tmp_path, tiny.base_model(), lora(["q_proj"], exclude_modules=["q_proj"]))
    assert "Expected target_modules to match linear layers of the model, found none" in text
    assert "name some of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in text


def test_a_folding_method_names_the_same(tmp_path):
    """It looks at the layers' weights, which a bare parameter does not have."""
    model = get_peft_model(routed.model("mixtral"), lora("all-linear"))
    problems = list(check_layers(model, False, "flora"))
    assert any("which PEFT adapts as bare parameters" in problem for problem in problems)
