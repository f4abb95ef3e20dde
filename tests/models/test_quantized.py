"""4-bit and 8-bit bases on a CPU: the stack computes as plain PEFT does, and a run leaves a plain adapter."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fslora_hf.config.federation import FederatedSketchConfig
from fslora_hf.config.recipe import ModelArguments
from fslora_hf.data import load_miniature
from fslora_hf.evaluation import score_rows
from fslora_hf.evaluation.scoring import load_base
from fslora_hf.methods import ClientAdapter
from fslora_hf.models.adapter import global_pair, lora_layers
from fslora_hf.models.description import describe_model
from fslora_hf.models.quantized import keep_as_stored
from fslora_hf.models.stack import ClientStack
from fslora_hf.trainers.sft import FederatedSketchTrainer
from tests.evaluation.test_loglikelihood import fitted, tokenizer
from tests.support import reference, tiny
from tests.support.worker_train import QUIET, SMALL, ledger

bitsandbytes = pytest.importorskip("bitsandbytes", reason="Expected bitsandbytes, found no such package.")
KINDS = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "8-bit": {"load_in_8bit": True},
}


@pytest.fixture(scope="module", autouse=True)
def bitsandbytes_runs_here():
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    try:
        layer.to("cpu")(torch.ones(1, 64))
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"Expected bitsandbytes to run on this CPU, found: {error}")


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.base_model(torch.float32).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def quantized(saved_base, kind):
    base = AutoModelForCausalLM.from_pretrained(saved_base, quantization_config=BitsAndBytesConfig(**KINDS[kind]))
    keep_as_stored(base)
    return base


def test_flora_needs_weights_that_it_can_change(saved_base, tmp_path):
    """Told before the model is loaded where it is to be quantized, and at once where it is quantized already."""
    args = {"output_dir": str(tmp_path), "method": "flora", "use_cpu": True, "bf16": False, "report_to": "none"}
    rest = {
        "args": FederatedSketchConfig(**args),
        "train_dataset": tiny.tokenised(),
        "peft_config": tiny.lora_config(),
    }
    told = "Expected an unquantized base with method=flora, .* or use method=flora_residual"
    with pytest.raises(ValueError, match=told):
        FederatedSketchTrainer(model="no/such-model", quantization_config=BitsAndBytesConfig(**KINDS["nf4"]), **rest)
    with pytest.raises(ValueError, match=told):
        model = quantized(saved_base, "nf4")
        FederatedSketchTrainer(model=model, processing_class=tiny.tokenizer(), **rest)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_equal_a_plain_adapter(saved_base, kind):
    """Two clients of unequal rank; the base is quantized on both sides of the comparison."""
    base = quantized(saved_base, kind)
    model = get_peft_model(base, tiny.lora_config(6, zero_b=False))
    layer_kinds = {type(layer.get_base_layer()).__name__ for layer in lora_layers(model).values()}
    assert layer_kinds == {{"nf4": "Linear4bit", "8-bit": "Linear8bitLt"}[kind]}
    A, B = global_pair(model)
    held = [{n: (A[n].detach()[:k].clone(), B[n].detach()[:, :k].clone()) for n in A} for k in (2, 4)]
    stack = ClientStack(model, 2, 4)
    stack.attach()
    stack.load(
        [
            ClientAdapter({n: a for n, (a, _) in h.items()}, {n: b for n, (_, b) in h.items()}, 6 / k)
            for h, k in zip(held, (2, 4), strict=True)
        ]
    )
    ids = torch.randint(3, 32, (4, 5), generator=torch.Generator().manual_seed(0))
    with stack.at_work(ids.numel()):
        logits = model(input_ids=ids).logits
    sum(part.square().mean() for part in logits.float().chunk(2)).backward()
    for slot, (pairs, rank) in enumerate(zip(held, (2, 4), strict=True)):
        config = copy.deepcopy(model.peft_config["default"])
        config.r, config.lora_alpha = rank, 12  # 12 / k is the scale 12 / 6 times r / k
        plain = get_peft_model(quantized(saved_base, kind), config)
        reference.write_adapter(plain, pairs)
        expected = plain(input_ids=ids.chunk(2)[slot]).logits
        # 8-bit rounds every row of activations, so that the two paths' rounding may fall apart by one step of 1/127.
        close = {"rtol": 1e-4, "atol": 1e-4} if kind == "nf4" else {"rtol": 0.02, "atol": 0.05}
        torch.testing.assert_close(logits.chunk(2)[slot], expected, **close)
        expected.float().square().mean().backward()
        for name, layer in reference.lora_layers(plain):
            ours = lora_layers(model)[name]
            for found, wanted in (
                (ours.client_A.grad[slot, :rank], layer.lora_A["default"].weight.grad),
                (ours.client_B.grad[slot, :, :rank], layer.lora_B["default"].weight.grad),
            ):
                assert torch.linalg.vector_norm(found - wanted) <= 0.05 * torch.linalg.vector_norm(wanted) + 1e-6
                assert found.abs().max() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_an_adapter_for_the_unquantized_base(saved_base, tmp_path, kind):
    trainer = FederatedSketchTrainer(
        model=str(saved_base),
        args=FederatedSketchConfig(
            output_dir=str(tmp_path),
            **{**QUIET, **SMALL, "num_rounds": 2, "local_steps": 2, "client_ranks": [1, 2, 3, 4, 6], "save_rounds": 1},
            per_device_train_clients=2,
        ),
        train_dataset=tiny.tokenised(),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora_config(),
        quantization_config=BitsAndBytesConfig(**KINDS[kind]),
    )
    start = reference.read_adapter(trainer.model)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora" not in n}
    trainer.train()
    end = reference.read_adapter(trainer.model)
    assert all(a.dtype == b.dtype == torch.float32 for a, b in end.values())
    assert reference.max_difference(start, end) > 1e-4
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if "lora" not in n)
    assert [line["refused"] for line in ledger(tmp_path)] == [[], []]
    (checkpoint,) = tmp_path.glob("checkpoint-12")
    loaded = PeftModel.from_pretrained(tiny.base_model(torch.float32), checkpoint)
    assert reference.max_difference(reference.read_adapter(loaded), end) == 0
    ids = torch.tensor([[3, 9, 5, 4]])
    with torch.no_grad():
        assert not torch.equal(loaded(input_ids=ids).logits, loaded.unload()(input_ids=ids).logits)


@pytest.fixture
def repacking_cpu(monkeypatch):
    """bitsandbytes as it is on a CPU with AVX512-BF16, where it repacks 4-bit weights to evaluate with them."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


def test_an_evaluation_leaves_a_4_bit_base_as_it_is_on_any_cpu(saved_base, tmp_path, repacking_cpu):
    """Else no gradient would pass through it afterwards, and its weights would be rounded."""
    federation = {"num_rounds": 2, "local_steps": 1, "client_ranks": [1, 2, 3, 4, 6], "eval_on_start": True}
    trainer = FederatedSketchTrainer(
        model=str(saved_base),
        args=FederatedSketchConfig(output_dir=str(tmp_path), **{**QUIET, **SMALL, **federation, "eval_rounds": 1}),
        train_dataset=tiny.tokenised(),
        eval_dataset=tiny.tokenised().remove_columns("client_id"),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora_config(),
        quantization_config=BitsAndBytesConfig(**KINDS["nf4"]),
    )
    stored = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora" not in name}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert "lora" in name or torch.equal(parameter, stored[name])
    layer = trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    assert layer.training or not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert layer.weight.quant_state.dtype == torch.float32


def test_a_4_bit_base_that_was_repacked_is_refused(saved_base, tmp_path):
    base = quantized(saved_base, "nf4")
    base.model.layers[1].mlp.down_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(
        ValueError, match="found .*layers.1.mlp.down_proj.* repacked for inference on this CPU: load the"
    ):
        FederatedSketchTrainer(
            model=base,
            args=FederatedSketchConfig(output_dir=str(tmp_path), **{**QUIET, **SMALL, "num_rounds": 1}),
            train_dataset=tiny.tokenised(),
            processing_class=tiny.tokenizer(),
            peft_config=tiny.lora_config(),
        )


def test_checkpointing_and_blocks_change_no_run_on_a_4_bit_base(saved_base, tmp_path):
    ends = []
    for block, checkpointing in ((1, False), (3, True), ("auto", True)):
        federation = {"num_rounds": 2, "local_steps": 2, "client_ranks": [1, 2, 3, 4, 6]}
        trainer = FederatedSketchTrainer(
            model=str(saved_base),
            args=FederatedSketchConfig(
                output_dir=str(tmp_path / str(block)),
                **{**QUIET, **SMALL, **federation, "activation_checkpointing": checkpointing},
                per_device_train_clients=block,
            ),
            train_dataset=tiny.tokenised(),
            processing_class=tiny.tokenizer(),
            peft_config=tiny.lora_config(),
            quantization_config=BitsAndBytesConfig(**KINDS["nf4"]),
        )
        start = reference.read_adapter(trainer.model)
        trainer.train()
        assert trainer.model.get_base_model().is_activation_checkpointing == checkpointing
        ends.append(reference.read_adapter(trainer.model))
    assert trainer.layout.block_size == 5 and reference.max_difference(start, ends[0]) > 1e-3
    assert max(reference.max_difference(ends[0], end) for end in ends[1:]) < 1e-5


def test_a_4_bit_base_is_scored_with_its_adapter(tmp_path):
    """Loaded as recipes/evaluate.py loads it; in batches as one by one, and not as without the adapter."""
    fitted(tiny.base_model(torch.float32)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    given = ModelArguments(str(tmp_path), load_in_4bit=True, bnb_4bit_quant_type="nf4", dtype="float32")
    base, words = load_base(given, torch.device("cpu"))
    rows = load_miniature("test", ["boolq", "piqa"], rows_per_task=12)
    plain = score_rows(base, words, rows)
    model = get_peft_model(base, tiny.lora_config(zero_b=False))
    one, many = (score_rows(model, words, rows, batch_size=size) for size in (1, 7))
    assert describe_model(model.get_base_model()).quantization == "4-bit"
    for a, b, c in zip(one.outcomes, many.outcomes, plain.outcomes, strict=True):
        torch.testing.assert_close(a.log_likelihoods, b.log_likelihoods, rtol=0, atol=1e-4)
        assert a.log_likelihoods != c.log_likelihoods
    assert len(score_rows(model, words, rows.select(range(3)), "generate").outcomes) == 3
    model.train()
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()  # training goes on
