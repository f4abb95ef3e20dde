"""Names that modules had before they lay in rooms still name them."""

import sys
from importlib import import_module

import pytest

from fslora_hf.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_a_module_is_found_by_its_old_name(old):
    assert import_module(f"fslora_hf.{old}") is import_module(f"fslora_hf.{MOVED[old]}")


def test_a_module_keeps_its_own_name_whatever_is_found_beside_it():
    """Threads may import two at once."""
    (finder,) = [each for each in sys.meta_path if type(each).__module__ == "fslora_hf.moved"]
    specs = [finder.find_spec(f"fslora_hf.{old}") for old in ("partition", "clients")]
    found = [finder.create_module(spec) for spec in specs]
    for module, spec in zip(found, specs, strict=True):
        module.__spec__ = spec  # as the import machinery does
        finder.exec_module(module)
    assert [module.__spec__.name for module in found] == ["fslora_hf.data.partition", "fslora_hf.data.clients"]


def test_what_scripts_import_by_old_names_is_there():
    """What the README, the docs, the recipes or a user's own method ever imported from them."""
    from fslora_hf.clients import ClientIndex
    from fslora_hf.config import FederatedSketchConfig
    from fslora_hf.folding import FoldedBase
    from fslora_hf.methods import Method, first_rows, zeros_like_pair
    from fslora_hf.partition import partition
    from fslora_hf.report import read_ledger
    from fslora_hf.sketch import draw
    from fslora_hf.trainer import FederatedSketchTrainer

    named = (ClientIndex, FoldedBase, Method, first_rows, zeros_like_pair, partition, read_ledger, draw)
    named += (FederatedSketchConfig,)
    assert all(map(callable, named)) and FederatedSketchTrainer.__name__ == "FederatedSketchTrainer"
    with pytest.raises(ModuleNotFoundError):
        import_module("fslora_hf.never_there")
