"""Tiny stand-ins: a random Llama, a real tokenizer of a few words, and data sets of clients of unequal size."""

from functools import lru_cache

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(29)]
VOCABULARY = ["<pad>", "</s>", "<unk>", *WORDS]
TARGETS = ["q_proj", "v_proj", "down_proj"]  # three shapes: square, fewer outputs than inputs, fewer still
# Sparse ids, not in order; shards from 1 row to more than any round reads.
SHARDS = {70: 4, 3: 1, 10**12: 9, 41: 25, 8: 2}


def tokenizer() -> PreTrainedTokenizerFast:
    """Splits at white space; one token a word."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=128
    )


def base_model(dtype: torch.dtype = torch.float64, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of 2 layers, the same for the same seed, leaving the global random stream as it was.

    Llama's norms compute in float32 whatever the model's precision; laws stated in float64 need norms that do not.
    """
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.3,  # far from linear, so that every mistake shows
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(dtype)
    if dtype == torch.float64:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child).__name__ == "LlamaRMSNorm":
                    norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=dtype)
                    norm.weight.data.copy_(child.weight.data)
                    setattr(module, name, norm)
    return model


def lora_config(
    r: int = 6, *, alpha: int = 12, rslora: bool = False, dropout: float = 0.0, zero_b: bool = True
) -> LoraConfig:
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        use_rslora=rslora,
        lora_dropout=dropout,
        init_lora_weights=zero_b,  # False draws B as well
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )


def tokenised(shards: dict[int, int] = SHARDS, *, seed: int = 0) -> Dataset:
    """`input_ids`, `labels`, `client_id`: rows of 3 to 12 tokens, the clients' rows shuffled among each other.

    Most rows score a suffix only; every fourth scores all its tokens, so also its first, which the shift takes away.
    The same data set is made once: nothing changes one.
    """
    return _tokenised(tuple(shards.items()), seed)


@lru_cache(maxsize=64)
def _tokenised(shards: tuple[tuple[int, int], ...], seed: int) -> Dataset:
    rng = np.random.default_rng(seed)
    owners = rng.permutation([client for client, size in shards for _ in range(size)])
    rows = []
    for row, client in enumerate(owners.tolist()):
        ids = rng.integers(3, len(VOCABULARY), size=rng.integers(3, 13)).tolist()
        prompt = 0 if row % 4 == 0 else int(rng.integers(1, len(ids)))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "client_id": client})
    return Dataset.from_list(rows)


def texts(shards: dict[int, int] = SHARDS, *, seed: int = 0) -> Dataset:
    """`prompt`, `completion`, `client_id`: the same, as text for `tokenizer()`."""
    rng = np.random.default_rng(seed)
    owners = rng.permutation([client for client, size in shards.items() for _ in range(size)])
    rows = [
        {
            "prompt": " ".join(rng.choice(WORDS, size=rng.integers(1, 9))) + " ",
            "completion": " ".join(rng.choice(WORDS, size=rng.integers(1, 5))) + " ",
            "client_id": client,
        }
        for client in owners.tolist()
    ]
    return Dataset.from_list(rows)
