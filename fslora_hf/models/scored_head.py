"""The LM head at scored positions only.

TRL's fused head works in float32 and, without Triton, projects every position through the vocabulary, masked or not.
This one projects the positions that have a label, in the model's own precision, some rows at a time, and never keeps
logits: the gradient of each token's log-probability is formed while its logits are at hand. It takes the place of
TRL's behind the same call, ``model(..., labels=..., fused_lm_head=True)`` (trl 1.16.0).
"""

import functools
import types

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

_CHUNK_ELEMENTS = 2**24  # logits held at a time: 64 MiB in float32


def add_scored_head(model: PreTrainedModel) -> bool:
    """Make `model(..., fused_lm_head=True)` compute log-probabilities with the head of this module.

    The model's scaling and soft cap of logits are read from its configuration, and a probe of a few tokens compares
    the result with the model's own logits; if they differ, or the head is no plain linear layer, nothing is changed.

    Returns whether the head was put in place.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.requires_grad:
        return False
    scale, softcap = _logit_transform(model.config.get_text_config())
    if not _agrees_with_model(model, head, scale, softcap):
        return False
    other_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head or kwargs.get("shift_labels") is not None:
            if fused_lm_head:
                kwargs["fused_lm_head"] = True
            return other_forward(*args, labels=labels, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        labels = labels[:, 1:].to(hidden.device)
        mask = labels != -100
        scored = scored_log_probs(hidden[mask], head.weight, head.bias, labels[mask], scale, softcap)
        # masked_scatter keeps a batch without any label connected to the model: its loss is a differentiable zero.
        log_probs, entropy, is_top1 = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in scored)
        return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask)

    model.forward = types.MethodType(forward, model)
    return True


def scored_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability of each label, entropy, and whether the label is the likeliest token, each `[positions]`.

    Args:
        hidden: `[positions, hidden]`; gradients flow to it alone.
        weight, bias: the frozen head, `[vocabulary, hidden]` and `[vocabulary]`.
        labels: `[positions]`, no ignored ones.
        scale, softcap: the logits are `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`.

    Log-probabilities are in the precision of the logits, at least float32.
    """
    return _ScoredLogProbs.apply(hidden, weight, bias, labels, scale, softcap)


class _ScoredLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, softcap):
        rows = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        wants_gradient = ctx.needs_input_grad[0]
        parts = [
            _score_chunk(h, weight, bias, y, scale, softcap, wants_gradient)
            for h, y in zip(hidden.split(rows), labels.split(rows), strict=True)
        ]
        log_probs, entropy, is_top1, *gradient = (torch.cat(column) for column in zip(*parts, strict=True))
        if wants_gradient:
            ctx.save_for_backward(gradient[0])
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx, grad_log_probs, *_):
        (gradient,) = ctx.saved_tensors
        return (grad_log_probs.unsqueeze(-1) * gradient).to(gradient.dtype), None, None, None, None, None


def _score_chunk(hidden, weight, bias, labels, scale, softcap, wants_gradient):
    """Log-probability, entropy and top-1 of a few positions, with `d log_prob / d hidden` if asked for."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    slope = None
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_()
        slope = 1 - logits.square() if wants_gradient else None
        logits = logits.mul(softcap)
    top, winner = logits.max(dim=-1, keepdim=True)
    logits.sub_(top)
    at_label = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    probabilities = logits.exp()
    total = probabilities.sum(dim=-1)
    log_total = total.log()
    entropy = log_total - torch.linalg.vecdot(probabilities, logits) / total
    scored = at_label - log_total, entropy, (winner.squeeze(1) == labels).to(log_total.dtype)
    if not wants_gradient:
        return scored
    # d log p(label) / d logits = onehot(label) - p
    probabilities.mul_(-1 / total.unsqueeze(1))
    probabilities.scatter_add_(1, labels.unsqueeze(1), torch.ones_like(total).unsqueeze(1))
    if slope is not None:
        probabilities.mul_(slope)
    gradient = (probabilities.to(weight.dtype) @ weight).to(hidden.dtype)
    return *scored, gradient.mul_(scale)


def _logit_transform(config) -> tuple[float, float | None]:
    """The factor and the soft cap that this family of models puts on its logits (transformers 5.23.0).

    Cohere multiplies by `logit_scale`, Falcon-H1 by `lm_head_multiplier`, Granite divides by `logits_scaling`, Gemma 2
    and 3 cap. A family that does anything else is caught by the probe.
    """
    for name in ("logit_scale", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name)), getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None)
    return 1.0 if divisor is None else 1.0 / divisor, getattr(config, "final_logit_softcapping", None)


@torch.no_grad()
def _agrees_with_model(model: PreTrainedModel, head: nn.Linear, scale: float, softcap: float | None) -> bool:
    """Whether this module's log-probabilities are those of the model's own logits, on a probe of five tokens."""
    was_training = model.training
    model.eval()
    probe = torch.arange(5, device=model.get_input_embeddings().weight.device).unsqueeze(0) % head.weight.shape[0]
    try:
        logits = type(model).forward(model, input_ids=probe, use_cache=False).logits[0]
        hidden = model.base_model(input_ids=probe, use_cache=False).last_hidden_state[0]
    finally:
        model.train(was_training)
    ours = F.linear(hidden.to(head.weight.device), head.weight, head.bias) * scale
    ours = ours if softcap is None else softcap * torch.tanh(ours / softcap)
    if logits.shape != ours.shape:
        return False
    tolerance = 1e-4 if head.weight.dtype in (torch.float32, torch.float64) else 2e-2
    difference = torch.linalg.vector_norm(logits.float() - ours.float())
    return bool(difference <= tolerance * torch.linalg.vector_norm(logits.float()))
