"""Law 10: the head at scored positions equals the model's own loss; for any other head TRL's stays."""

import copy

import pytest
import torch
import transformers as hf
from torch.nn import functional as F
from trl import SFTConfig, SFTTrainer

from fslora_hf.models import scored_head as head
from fslora_hf.models.scored_head import add_scored_head, scored_log_probs
from tests.support import tiny

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
GPTJ = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 32}
FAMILIES = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, SMALL),
    "tied llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {**SMALL, "tie_word_embeddings": True}),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, SMALL),
    "gemma2, soft cap": (hf.Gemma2ForCausalLM, hf.Gemma2Config, {**SMALL, "final_logit_softcapping": 2.0}),
    "granite, scaled": (hf.GraniteForCausalLM, hf.GraniteConfig, {**SMALL, "logits_scaling": 3.0}),
    "cohere, scaled": (hf.CohereForCausalLM, hf.CohereConfig, {**SMALL, "logit_scale": 0.25}),
    "phi, biased": (hf.PhiForCausalLM, hf.PhiConfig, SMALL),
    "gpt-j, biased": (hf.GPTJForCausalLM, hf.GPTJConfig, {**GPTJ, "bos_token_id": None, "eos_token_id": 1}),
}


def make_model(family: str, dtype: torch.dtype):
    """A frozen random model whose logits are far from equal; the global random stream stays as it was."""
    kind, config, settings = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config(**settings)).to(dtype).eval()
        if model.get_output_embeddings().bias is not None:
            torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model.requires_grad_(False)


def make_batch():
    """Two rows of 9 tokens, the second padded; a prompt, gaps, and a scored first token that the shift takes away."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        ids = torch.randint(2, 32, (2, 9))
    labels = ids.clone()
    labels[0, :4] = labels[0, 6] = labels[1, 6:] = -100
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Nudge(torch.nn.Module):
    """Adds a trainable vector to the last norm's input, as an adapter far below the head would."""

    def __init__(self, inner, dtype):
        super().__init__()
        self.inner, self.vector = inner, torch.nn.Parameter(torch.zeros(16, dtype=dtype))

    def forward(self, hidden, *args, **kwargs):
        return self.inner(hidden + self.vector, *args, **kwargs)


def nudge(model) -> torch.nn.Parameter:
    inner = model.base_model
    name = "final_layernorm" if hasattr(inner, "final_layernorm") else "ln_f" if hasattr(inner, "ln_f") else "norm"
    wrapped = Nudge(getattr(inner, name), model.dtype)
    setattr(inner, name, wrapped)
    return wrapped.vector


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_law_10_loss_and_gradient_equal_the_models_own(family, dtype):
    model, batch = make_model(family, dtype), make_batch()
    vector = nudge(model)
    (expected_gradient,) = torch.autograd.grad(expected := model(**batch).loss, vector)
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1].double()
    assert add_scored_head(model)
    out = model(**batch, fused_lm_head=True)
    ours = -out.log_probs.sum() / out.label_mask.sum()
    (gradient,) = torch.autograd.grad(ours, vector)
    # Llama and its kin compute the loss in float32 whatever the model's precision, so float64 is compared below, too.
    torch.testing.assert_close(ours.double(), expected.double(), rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    assert expected_gradient.abs().max() > 1e-3

    mask = batch["labels"][:, 1:] != -100
    assert torch.equal(out.label_mask, mask) and out.log_probs.dtype == dtype
    exact = logits.log_softmax(-1).gather(-1, batch["labels"][:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 1e-5}
    torch.testing.assert_close(out.log_probs.double(), exact * mask, **tolerance)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(out.entropy.double(), entropy * mask, **tolerance)
    top1 = (logits.argmax(-1) == batch["labels"][:, 1:]) & mask
    assert torch.equal(out.is_top1.bool(), top1)


@pytest.mark.parametrize("family", FAMILIES)
def test_law_10_gradient_in_float64(family):
    """Against cross-entropy on the model's own logits, all in float64."""
    model, batch = make_model(family, torch.float64), make_batch()
    vector = nudge(model)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    (expected,) = torch.autograd.grad(loss, vector)
    assert add_scored_head(model)
    (gradient,) = torch.autograd.grad(-model(**batch, fused_lm_head=True).log_probs.sum(), vector)
    assert expected.abs().max() > 1e-3
    # Norms of most families compute in float32; through the final one both paths go alike.
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_scored_log_probs_against_finite_differences(bias, softcap):
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight, labels = torch.randn(7, 4, dtype=torch.float64), torch.tensor([0, 6, 3, 3, 1])
    offset = torch.randn(7, dtype=torch.float64) if bias else None

    def log_probs(hidden):
        return scored_log_probs(hidden, weight, offset, labels, 0.7, softcap)[0]

    assert torch.autograd.gradcheck(log_probs, hidden)


def test_top1_is_right_where_the_label_wins_and_where_it_does_not():
    weight = torch.eye(3, dtype=torch.float64)
    hidden = torch.tensor([[5.0, 1, 0], [5.0, 1, 0], [0.0, 0, 9]], dtype=torch.float64)
    _, entropy, is_top1 = scored_log_probs(hidden, weight, None, torch.tensor([0, 1, 2]))
    assert is_top1.tolist() == [1, 0, 1]
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=hidden).entropy())


@pytest.mark.parametrize("elements", [1, 32 * 3, 32 * 7])
def test_chunks_change_nothing(monkeypatch, elements):
    """One position at a time, and chunks that do not divide the number of positions."""
    model, batch = make_model("gemma2, soft cap", torch.float64), make_batch()
    vector = nudge(model)
    assert add_scored_head(model)
    rows, linear = [], F.linear
    ends = []
    for size in (head._CHUNK_ELEMENTS, elements):
        monkeypatch.setattr(head, "_CHUNK_ELEMENTS", size)
        out = model(**batch, fused_lm_head=True)
        (gradient,) = torch.autograd.grad(out.log_probs.sum(), vector)
        ends.append([out.log_probs, out.entropy, out.is_top1, gradient])
    for whole, chunked in zip(*ends, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-13, atol=1e-14)
    monkeypatch.setattr(head.F, "linear", lambda x, w, b=None: (rows.append((len(x), len(w))), linear(x, w, b))[1])
    scored_log_probs(torch.ones(10, 4), torch.ones(32, 4), None, torch.zeros(10, dtype=torch.int64))
    assert [n for n, vocabulary in rows if vocabulary == 32] == [
        min(max(1, elements // 32), 10 - start) for start in range(0, 10, max(1, elements // 32))
    ]


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the shapes of all tensors that operators return, also inside autograd functions."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape))
        return result


def test_logits_exist_at_scored_positions_only(monkeypatch):
    """No tensor over [positions, vocabulary] has more rows than a chunk, in forward or backward."""
    model, batch = make_model("llama", torch.float32), make_batch()
    vector = nudge(model)
    assert add_scored_head(model)
    scored = int((batch["labels"][:, 1:] != -100).sum())
    for elements, most in ((2**24, scored), (32 * 2, 2)):
        monkeypatch.setattr(head, "_CHUNK_ELEMENTS", elements)
        with LargestTensor() as seen:
            torch.autograd.grad(model(**batch, fused_lm_head=True).log_probs.sum(), vector)
        # 32 is the vocabulary and no other axis; (16, 32) is a view of the head's own weight.
        wide = [shape for shape in seen.shapes if shape and shape[-1] == 32 and shape != (16, 32)]
        assert (most, 32) in wide and all(len(shape) == 2 and shape[0] <= most for shape in wide), wide


def test_a_batch_without_labels_gives_a_zero_that_can_be_differentiated():
    model, batch = make_model("llama", torch.float64), make_batch()
    vector = nudge(model)
    assert add_scored_head(model)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = -model(**batch, fused_lm_head=True).log_probs.sum()
    (gradient,) = torch.autograd.grad(loss, vector)
    assert loss == 0 and (gradient == 0).all()


def test_other_calls_of_the_model_are_its_own():
    model, batch = make_model("llama", torch.float64), make_batch()
    expected = copy.deepcopy(model)(**batch)
    assert add_scored_head(model)
    out = model(**batch)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)
    assert model.generate(batch["input_ids"][:1], max_new_tokens=2, do_sample=False).shape == (1, 11)


def test_the_probe_leaves_mode_and_random_stream_alone():
    model = make_model("llama", torch.float64).train()
    stream = torch.get_rng_state()
    assert add_scored_head(model)
    assert model.training and torch.equal(torch.get_rng_state(), stream)


class OddLinear(torch.nn.Linear):
    """A head that is not plain, as quantized ones are."""


def odd_head(model):
    model.lm_head.__class__ = OddLinear


def trained_head(model):
    model.lm_head.weight.requires_grad_(True)


def unknown_scaling(model):
    """The model's logits are three times its head's, which no configuration says."""
    forward = type(model).forward

    class Scaled(type(model)):
        def forward(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            out.logits = out.logits * 3
            return out

    model.__class__ = Scaled


def fewer_logits(model):
    forward = type(model).forward

    class Fewer(type(model)):
        def forward(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            out.logits = out.logits[..., :-1]
            return out

    model.__class__ = Fewer


@pytest.mark.parametrize("change", [odd_head, trained_head, unknown_scaling, fewer_logits])
def test_law_10_any_other_head_stays(change):
    model = make_model("llama", torch.float32)
    change(model)
    model.forward = before = model.forward
    assert add_scored_head(model) is False
    assert model.forward is before


def test_trl_heads_result_is_the_same(tmp_path):
    """Both heads behind the call of SFTTrainer, which puts its own in place first."""
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=64)
    trainer = SFTTrainer(
        model=tiny.base_model(torch.float32),
        args=args,
        train_dataset=tiny.tokenised().remove_columns("client_id"),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora_config(zero_b=False),
    )
    model, batch = trainer.model.eval(), make_batch()
    theirs = model(**batch, fused_lm_head=True)
    patched = model.get_base_model().forward
    assert add_scored_head(model.get_base_model())
    ours = model(**batch, fused_lm_head=True)
    assert model.get_base_model().forward is not patched
    for name in ("log_probs", "entropy", "label_mask", "is_top1"):
        torch.testing.assert_close(
            getattr(ours, name).float(), getattr(theirs, name).float(), rtol=1e-5, atol=1e-5, msg=name
        )
