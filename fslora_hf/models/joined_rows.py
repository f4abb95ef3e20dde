"""Batches with little padding: a client's rows end to end in fewer, longer sequences, each row seeing only itself.

Padding costs what tokens cost, in every layer. Where a model keeps rows apart that follow one another in a sequence,
told by position ids that begin again (transformers calls such sequences packed), joining them changes nothing but
rounding. A client's rows make as many sequences as cost least: attention looks at pairs of positions of a sequence, so
that long ones cost more there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

JOINABLE = {"input_ids", "labels", "attention_mask"}
# Attention reaches about half the rate of the other products, by measurement on CPUs.
_ATTENTION_FACTOR = 2.0
_WORTH = 0.97  # joining costs a little itself


@dataclass(frozen=True)
class StepCost:
    """What a sequence costs, in multiplications: `position` for each position, `pair` for each two of them."""

    position: float
    pair: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> "StepCost":
        """The cost of a model's body; its head scores what has a label, wherever that is."""
        config = model.config.get_text_config()
        layers = [layer for layer in model.base_model.modules() if not any(layer.children())]
        products = sum(layer.in_features * layer.out_features for layer in layers if hasattr(layer, "in_features"))
        heads, depth = getattr(config, "num_attention_heads", 0), getattr(config, "num_hidden_layers", 0)
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
        return cls(float(products), 2.0 * _ATTENTION_FACTOR * depth * width)

    def __call__(self, sequences: int, length: int) -> float:
        return sequences * length * (self.position + self.pair * length)


def join_rows(batch: dict[str, torch.Tensor], clients: int, cost: StepCost) -> dict[str, torch.Tensor]:
    """The batch with each client's rows in as few padded positions as pay, or as it is.

    Args:
        batch: `input_ids`, `labels` and `attention_mask`, each `[clients * rows, length]`, client by client. A batch
            with anything else in it is left alone.
        clients: how many there are.
        cost: of the model.

    Returns:
        `[clients * sequences, length]`, client by client, with `position_ids` that begin again at each row in place of
        `attention_mask`. What follows the last row of a sequence is a row of the batch's padding, without labels. The
        first token of a row has no label, since what is before it does not predict it.
    """
    if set(batch) != JOINABLE:
        return batch
    real = batch["attention_mask"].bool()
    lengths = real.sum(1).tolist()
    rows = len(lengths) // clients
    best, least = None, _WORTH * cost(len(lengths), real.shape[1])
    for sequences in _powers_below(rows):
        dealt = [_deal(lengths[first : first + rows], sequences) for first in range(0, len(lengths), rows)]
        longest = max(sum(lengths[c * rows + row] for row in hand) for c, deal in enumerate(dealt) for hand in deal)
        if cost(clients * sequences, longest) < least:
            best, least = (dealt, longest), cost(clients * sequences, longest)
    if best is None:
        return batch
    dealt, longest = best
    order = [[client * rows + row for row in hand] for client, deal in enumerate(dealt) for hand in deal]
    return _lay_end_to_end(batch, real, lengths, order, longest)


def _powers_below(rows: int) -> list[int]:
    return [2**power for power in range(rows.bit_length()) if 2**power < rows]


def _deal(lengths: Sequence[int], sequences: int) -> list[list[int]]:
    """Rows in `sequences` parts of about the same length in all: the longest first, each to the shortest part."""
    parts, totals = [[] for _ in range(sequences)], [0] * sequences
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        shortest = totals.index(min(totals))
        parts[shortest].append(row)
        totals[shortest] += lengths[row]
    return [sorted(part) for part in parts]


def _lay_end_to_end(batch, real, lengths, order, longest) -> dict[str, torch.Tensor]:
    shape = len(order), longest
    padding = int(batch["input_ids"][~real][0])  # there is some, or nothing would be saved
    joined = {"input_ids": torch.full(shape, padding), "labels": torch.full(shape, -100)}
    joined["position_ids"] = torch.zeros(shape, dtype=torch.int64)
    for sequence, rows in enumerate(order):
        end = 0
        for row in [*rows, None]:
            start, end = end, longest if row is None else end + lengths[row]
            joined["position_ids"][sequence, start:end] = torch.arange(end - start)
            if row is not None:
                joined["input_ids"][sequence, start:end] = batch["input_ids"][row, real[row]]
                joined["labels"][sequence, start:end] = batch["labels"][row, real[row]]
                joined["labels"][sequence, start] = -100
    return joined


@torch.no_grad()
def keeps_rows_apart(model: PreTrainedModel) -> bool:
    """Whether joined rows have the hidden states that they have alone, tried on two sequences of a few tokens.

    The difference must be rounding, and far from what it is where the second row sees the first.
    """
    device, vocabulary = model.get_input_embeddings().weight.device, model.get_input_embeddings().weight.shape[0]
    rows = [torch.arange(start, start + n, device=device).unsqueeze(0) % vocabulary for start, n in ((3, 5), (9, 7))]
    positions = [torch.arange(row.shape[1], device=device).unsqueeze(0) for row in rows]
    was_training = model.training
    model.eval()
    try:
        alone = [model.base_model(input_ids=row, use_cache=False).last_hidden_state for row in rows]
        ids, places = (torch.cat([torch.cat(part, 1), torch.cat(part[::-1], 1)]) for part in (rows, positions))
        joined = model.base_model(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
        mixed = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    except (TypeError, ValueError):  # a model without position ids
        return False
    finally:
        model.train(was_training)
    expected = torch.cat([torch.cat(alone, 1), torch.cat(alone[::-1], 1)])
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 2e-2
    size, apart, off = (torch.linalg.vector_norm(x.float()) for x in (expected, mixed - expected, joined - expected))
    return bool(off <= tolerance * size and off <= 0.1 * apart)
