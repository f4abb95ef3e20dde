"""Imported by the fork server of tests, so that its children find imports, patterns and modules ready."""

import gc
import tempfile

import tests.support.random_kills  # noqa: F401  (and with it recipes/, that children run)
from tests.support.worker_train import SMALL, build

with tempfile.TemporaryDirectory() as folder:  # much is imported and compiled at a first round and a first save only
    build(folder, {**SMALL, "num_rounds": 1, "local_steps": 1, "clients_per_round": 1, "save_rounds": 1}).train()
gc.collect()
gc.freeze()  # children collect their own garbage only
