"""Rows of a client joined in sequences: nothing but padding is lost, and each row sees only itself."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
)

from fslora_hf.models.adapter import global_pair
from fslora_hf.models.joined_rows import StepCost, join_rows, keeps_rows_apart
from fslora_hf.models.scored_head import add_scored_head
from tests.support import reference, tiny
from tests.support.worker_train import build, check_same_ledger

FREE = StepCost(1.0, 0.0)  # attention costs nothing
SIZE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8}
MODELS = {
    "llama": LlamaConfig(**SIZE),
    "llama, eager": LlamaConfig(**SIZE, attn_implementation="eager"),
    "mistral, window of 4": MistralConfig(**SIZE, sliding_window=4),
    "qwen3": Qwen3Config(**SIZE),
    "gemma2, window of 8": Gemma2Config(
        **SIZE, sliding_window=8, query_pre_attn_scalar=8, attn_implementation="eager"
    ),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128),
}


def make_model(config):
    """In float64, but for eager attention, whose softmax is in float32."""
    torch.manual_seed(0)
    dtype = torch.float32 if config._attn_implementation == "eager" else torch.float64
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train(False)


def make_batch(lengths: list[int], left: bool = False) -> dict[str, torch.Tensor]:
    """Rows of random tokens, padded with 1; the first third of each has no label."""
    longest, generator = max(lengths), torch.Generator().manual_seed(len(lengths))
    batch = {"input_ids": torch.full((len(lengths), longest), 1), "attention_mask": torch.zeros(len(lengths), longest)}
    batch["attention_mask"] = batch["attention_mask"].long()
    batch["labels"] = torch.full((len(lengths), longest), -100)
    for row, length in enumerate(lengths):
        part = slice(longest - length, None) if left else slice(0, length)
        tokens = torch.randint(3, 60, (length,), generator=generator)
        batch["input_ids"][row, part] = tokens
        batch["labels"][row, part] = torch.where(torch.arange(length) < length // 3, -100, tokens)
        batch["attention_mask"][row, part] = 1
    return batch


def rows_of(batch: dict[str, torch.Tensor], clients: int) -> list[set]:
    """What each client's rows hold, as (tokens, labels but for the first)."""
    found = []
    for part in range(clients):
        rows = set()
        for name in ("input_ids", "labels"):
            assert len(batch[name]) % clients == 0
        share = len(batch["labels"]) // clients
        for row in range(part * share, (part + 1) * share):
            ids, labels = batch["input_ids"][row], batch["labels"][row]
            if "position_ids" not in batch:
                real = batch["attention_mask"][row].bool()
                pieces = [(ids[real], labels[real])]
            else:
                starts = [*torch.nonzero(batch["position_ids"][row] == 0).flatten().tolist(), len(ids)]
                pieces = [(ids[a:b], labels[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
                for a, b in zip(starts, starts[1:], strict=False):
                    assert torch.equal(batch["position_ids"][row, a:b], torch.arange(b - a)) and labels[a] == -100
            rows |= {(tuple(i.tolist()), tuple(t.tolist()[1:])) for i, t in pieces if (i != 1).any()}
        found.append(rows)
    return found


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("clients, lengths", [(1, [3, 9, 4, 2]), (2, [5, 5, 12, 4, 3, 2]), (3, [7, 2, 6, 3, 9, 4])])
def test_nothing_but_padding_is_lost(clients, lengths, left):
    batch = make_batch(lengths, left)
    joined = join_rows(batch, clients, FREE)
    assert set(joined) == {"input_ids", "labels", "position_ids"}
    assert rows_of(joined, clients) == rows_of(batch, clients) and all(rows_of(batch, clients))
    rows = len(lengths) // clients
    assert (joined["input_ids"] != 1).sum() == sum(lengths)
    whole = max(sum(lengths[first : first + rows]) for first in range(0, len(lengths), rows))
    assert joined["input_ids"].numel() <= clients * whole


def test_a_clients_rows_make_as_many_sequences_as_cost_least():
    unequal = make_batch([40, 3, 3, 4, 38, 5, 2, 3])
    assert join_rows(unequal, 1, FREE)["input_ids"].shape == (1, 98)
    by_two = join_rows(unequal, 1, StepCost(1.0, 0.01))  # 98 * 1.98, 2 * 49 * 1.49, 4 * 40 * 1.4, 8 * 40 * 1.4
    assert by_two["input_ids"].shape == (2, 49)
    for lengths, cost in (([10, 8, 9, 10], StepCost(0.0, 1.0)), ([7, 7, 7, 7], FREE), ([9], FREE)):
        batch = make_batch(lengths)
        assert join_rows(batch, 1, cost) is batch  # pairs are all that costs, no padding, one row
    more = {**unequal, "token_type_ids": unequal["labels"]}
    assert join_rows(more, 1, FREE) is more  # what it means is not known


def test_what_a_model_costs_is_counted():
    base = tiny.base_model(torch.float64)
    found = StepCost.of(base)
    config = base.config
    width, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    layer = 2 * width * config.num_attention_heads * config.head_dim + 2 * width * kv
    layer += 3 * width * config.intermediate_size
    assert found.position == config.num_hidden_layers * layer
    assert found.pair == 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    assert found(3, 10) == 3 * 10 * (found.position + 10 * found.pair)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_joined_rows_have_the_loss_and_gradients_of_their_own(config):
    model, clients = make_model(config), 2
    assert keeps_rows_apart(model) and add_scored_head(model.requires_grad_(False))
    batch = make_batch([11, 3, 6, 4, 9, 5])
    weight = model.get_input_embeddings().weight.requires_grad_()
    sums, gradients = [], []
    for given in (batch, join_rows(batch, clients, FREE)):
        found = model(**given, use_cache=False, fused_lm_head=True).log_probs
        sums.append(found.view(clients, -1).sum(1))
        gradients.append(torch.autograd.grad((sums[-1] * torch.tensor([1.0, 2.0])).sum(), weight)[0])
    close = {"rtol": 0, "atol": 1e-11} if model.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(sums[1], sums[0], **close)
    torch.testing.assert_close(gradients[1], gradients[0], **close)
    assert sums[0].abs().min() > 1 and gradients[0].abs().max() > 0.1


def test_models_that_mix_joined_rows_are_told():
    recurrent = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4, expand=1)
    assert not keeps_rows_apart(make_model(recurrent))
    deaf = make_model(LlamaConfig(**SIZE))
    forward = deaf.model.forward
    deaf.model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    assert not keeps_rows_apart(deaf)
    half = make_model(LlamaConfig(**SIZE)).to(torch.bfloat16)
    assert keeps_rows_apart(half)


class Shifted(torch.nn.Module):
    """Hidden states of tokens alone, shifted by `joined` in rows told to be apart, by `mixed` in others together."""

    def __init__(self, joined: float, mixed: float):
        super().__init__()
        self.words, self.joined, self.mixed = torch.nn.Embedding(64, 8), joined, mixed

    def get_input_embeddings(self):
        return self.words

    def base_model(self, input_ids, position_ids=None, use_cache=False):
        shift = 0.0 if len(input_ids) == 1 else self.mixed if position_ids is None else self.joined
        return SimpleNamespace(last_hidden_state=self.words(input_ids) + shift)


@pytest.mark.parametrize("joined, mixed, apart", [(1e-6, 1.0, True), (1e-2, 1.0, False), (1e-6, 1e-6, False)])
def test_what_joining_changes_must_be_rounding_and_less_than_mixing_does(joined, mixed, apart):
    assert keeps_rows_apart(Shifted(joined, mixed)) == apart


@pytest.mark.parametrize("block", [1, 3])
def test_a_run_is_the_same_with_and_without_joining(tmp_path, monkeypatch, block):
    args = {"optim": "adamw_torch", "num_rounds": 2, "local_steps": 2, "client_ranks": [1, 2, 4, 6, 3]}
    args |= {"per_device_train_clients": block, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    ends = {}
    for joining in (True, False):
        trainer = build(tmp_path / str(joining), args)
        trainer._joining = FREE if joining else None
        batches = list(trainer.get_train_dataloader())
        assert joining == any("position_ids" in batch for batch in batches)
        assert sum(int(batch["tokens"]) for batch in batches) > 0
        trainer.train()
        ends[joining] = reference.read_adapter(trainer.model), trainer._total_train_tokens
    assert reference.max_difference(ends[True][0], ends[False][0]) < 1e-9 and ends[True][1] == ends[False][1]
    check_same_ledger(tmp_path / "True", tmp_path / "False")


def test_the_trainer_asks_its_own_model(tmp_path):
    assert build(tmp_path, {"neftune_noise_alpha": 5.0})._joining is None
    trainer = build(tmp_path, {})
    assert trainer._joining.pair == StepCost.of(tiny.base_model(torch.float64)).pair
    adapters = sum(tensor.numel() for side in global_pair(trainer.model) for tensor in side.values())
    assert trainer._joining.position == StepCost.of(tiny.base_model(torch.float64)).position + adapters
