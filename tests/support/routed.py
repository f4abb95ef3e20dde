"""Tiny random models of which not every layer sees every token: mixtures of experts, and one with a vision tower."""

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
)

from tests.support import tiny

TEXT = {
    "vocab_size": len(tiny.VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}


def _gemma3() -> Gemma3ForConditionalGeneration:
    text = Gemma3TextConfig(**{**TEXT, "head_dim": 8, "sliding_window": 16})
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        vision_use_head=False,
    )
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=2, boi_token_index=2
    )
    return Gemma3ForConditionalGeneration(config)


MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **TEXT)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=4, **EXPERTS, **TEXT)),
    "glm4_moe": lambda: Glm4MoeForCausalLM(
        Glm4MoeConfig(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, **EXPERTS, **TEXT)
    ),
    "gemma3": _gemma3,
}


def model(name: str) -> PreTrainedModel:
    """One of them in float32, the same each time, leaving the global random stream as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name]()
