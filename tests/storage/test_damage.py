"""The generator of damaged files: the same for the same seed, fast, every kind met, whole where it says so."""

import json
import time

import pytest
import torch
from safetensors.torch import load, save

from tests.support.damage import damaged, pack, unpack, variants

STATE = json.dumps({"round": 4, "run": {"seed": 1, "rows": [1, 2]}, "files": {"a.json": "ab" * 32}}).encode()
LEDGER = b"".join(json.dumps({"round": round, "clients": [1, 2]}).encode() + b"\n" for round in range(5))
TENSORS = save({"a.lora_A.weight": torch.randn(2, 3), "a.lora_B.weight": torch.randn(4, 2)}, {"format": "pt"})
FILES = {"state.json": STATE, "rounds.jsonl": LEDGER, "adapter.safetensors": TENSORS}


@pytest.mark.parametrize("name", FILES)
def test_variants_are_many_fast_and_the_same_for_the_same_seed(name):
    start = time.process_time()
    found = list(variants(name, FILES[name], 7, 1000))
    assert time.process_time() - start < 2
    assert found == list(variants(name, FILES[name], 7, 1000))
    assert found[3] == damaged(name, FILES[name], 7, 3) != damaged(name, FILES[name], 8, 3)
    contents = {each.content for each in found}
    assert len(contents) > 300 and sum(each.content == FILES[name] for each in found) < 50
    assert len({each.how.split(", seed")[0] for each in found}) >= 20


def test_whole_files_of_other_tensors_are_whole():
    assert pack(*unpack(TENSORS)) == TENSORS
    kinds = [
        each for each in variants("a.safetensors", TENSORS, 0, 600) if each.how.startswith(("a tensor", "all te"))
    ]
    shapes = {tuple(tensor.shape) for each in kinds for tensor in load(each.content).values()}
    dtypes = {tensor.dtype for each in kinds for tensor in load(each.content).values()}
    assert (1, 3) in shapes and () in shapes and torch.int8 in dtypes and torch.float64 in dtypes
