"""Law 2: the size of a block and the number of processes change nothing beyond rounding.

Five clients of five ranks in all layouts, against one client a step. Blocks of 2 on 2 processes make three blocks in
two turns: the last block is ragged, and in the second turn the second process borrows it.
"""

import json

import pytest

from tests.support import reference
from tests.support.worker_train import build, check_same_ledger, launch, load_result

pytest_plugins = ("tests.support.forked",)
EXACT = 1e-9
ARGS = {
    "optim": "adamw_torch",
    "num_rounds": 3,
    "local_steps": 2,
    "gradient_accumulation_steps": 2,
    "weight_decay": 0.1,
    "max_grad_norm": 0.05,
    "lr_scheduler_type": "cosine",
    "client_weighting": "num_examples",
    "client_ranks": [1, 2, 4, 6, 3],
    "server_optim": "adamw",
}
LORA = {"rslora": True}
METHODS = {  # what differs from the arguments above
    "fslora": {},
    "hetlora": {"server_optim": "sgd_momentum"},
    "flexlora": {"server_optim": "sgd"},
    "flora_residual": {"server_optim": "sgd"},
    "ffa_lora": {"client_ranks": None},
}


@pytest.fixture(scope="module", params=METHODS)
def one_client_a_step(request, tmp_path_factory):
    """The sequential run of a method: its arguments, its folder and its final global adapter."""
    args = {**ARGS, "method": request.param, **METHODS[request.param]}
    folder = tmp_path_factory.mktemp("sequential")
    trainer = build(folder, {**args, "per_device_train_clients": 1}, LORA)
    start = reference.read_adapter(trainer.model)
    trainer.train()
    end = reference.read_adapter(trainer.model)
    assert trainer.state.global_step == 3 * 5 * 2  # rounds x blocks x local steps
    assert reference.max_difference(start, end) > 1e-3
    return args, folder, end


@pytest.mark.parametrize("block, steps", [(2, 18), (3, 12), (5, 6), (8, 6)])
def test_law_2_blocks(one_client_a_step, tmp_path, block, steps):
    args, folder, end = one_client_a_step
    trainer = build(tmp_path, {**args, "per_device_train_clients": block}, LORA)
    trainer.train()
    assert trainer.state.global_step == steps
    assert reference.max_difference(reference.read_adapter(trainer.model), end) < EXACT
    check_same_ledger(tmp_path, folder)


@pytest.mark.slow
def test_law_2_two_processes(one_client_a_step, fork_ranks, tmp_path):
    args, folder, end = one_client_a_step
    job = {
        "output_dir": str(tmp_path / "run"),
        "args": {**args, "per_device_train_clients": 2},
        "lora": LORA,
        "dtype": "float64",
        "result": str(tmp_path / "end"),
    }
    if args.get("method", "fslora") == "fslora":  # torchrun itself
        finished = launch(job, tmp_path)
        assert finished.returncode == 0, finished.stderr[-3000:]
    else:
        assert fork_ranks(job) == [0, 0]
    first, second = load_result(tmp_path / "end", 0), load_result(tmp_path / "end", 1)
    assert reference.max_difference(first, second) == 0  # both processes hold the same global adapter
    assert reference.max_difference(first, end) < EXACT
    check_same_ledger(tmp_path / "run", folder)


@pytest.mark.slow
def test_what_a_process_borrows_is_in_no_log(fork_ranks, tmp_path):
    """Blocks of 4 on one process make the same turns as blocks of 2 on two, of which one borrows."""
    every = {**ARGS, "save_rounds": 1, "logging_steps": 1, "include_num_input_tokens_seen": "non_padding"}
    logs = []
    for name, block in (("one", 4), ("two", 2)):
        job = {
            "output_dir": str(tmp_path / name),
            "args": {**every, "per_device_train_clients": block},
            "lora": LORA,
            "dtype": "float64",
            "result": str(tmp_path / f"{name}-end"),
        }
        assert set(fork_ranks(job, processes=4 // block)) == {0}
        (state,) = (tmp_path / name).glob("checkpoint-12/trainer_state.json")
        logs.append(json.loads(state.read_text())["log_history"])
    told = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "num_input_tokens_seen", "client_loss")
    one, two = ([{key: line[key] for key in told if key in line} for line in log] for log in logs)
    assert len(one) == len(two) == 3 * 5 and sum("num_tokens" in line for line in one) == 12
    for line, other in zip(one, two, strict=True):
        assert line == pytest.approx(other, rel=1e-6)  # losses are logged in float32
    check_same_ledger(tmp_path / "two", tmp_path / "one")
