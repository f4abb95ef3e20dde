"""What each process of scale.py measures; a function a kind of measurement, which returns numbers by name.

Seconds are wall-clock. Bytes are the most that the process held meanwhile (Linux: VmHWM) beyond what it held before.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from server import LAYERS, SHAPES
from step_rows import QUIET, make_tokenizer

from fslora_hf.common.host_memory import forget_peak, held_bytes, peak_bytes
from fslora_hf.data.clients import ClientIndex
from fslora_hf.rounds.plan import RoundPlan, plan_round
from fslora_hf.rounds.ranks import client_ranks

# Layers of which a cohort's adapters are handed over: server.py's, or a few numbers to try the script with.
ADAPTED = {"llama3.2-3b": SHAPES, "small": {"q_proj": (16, 16), "k_proj": (16, 8), "down_proj": (24, 16)}}
TOKENS, VOCABULARY = 4, 32  # of the rows and the model of which only the trainer around them is timed


class Timer:
    """Seconds and bytes of what is done within `with`, by name; seconds of the same name add up."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def memory(self, name: str) -> Iterator[None]:
        forget_peak()
        before = held_bytes()
        yield
        self.bytes[name] = max(0, peak_bytes() - before)

    def readings(self) -> dict[str, float]:
        seconds = {f"{name}_seconds": value for name, value in self.seconds.items()}
        return seconds | {f"{name}_bytes": value for name, value in self.bytes.items()}


def make_planner(options, index: ClientIndex, ranks: np.ndarray, cohort: int) -> Callable[[int], RoundPlan]:
    return partial(
        plan_round,
        seed=0,
        index=index,
        ranks=ranks,
        global_rank=options.rank,
        clients_per_round=cohort,
        local_steps=options.local_steps,
        examples_per_step=options.batch_size,
        learning_rate=lambda round: 1e-4,
    )


def make_column(options, clients: int) -> np.ndarray:
    """Whose each row is: `options.examples` rows of every client, in no order."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(clients), options.examples))


def planning(options, clients: int, cohort: int) -> dict[str, float]:
    """The client index and ranks; the plan of the first round, of later ones and of late ones; a cohort's sketches."""
    timer, column = Timer(), make_column(options, clients)
    modules = [f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in SHAPES]
    with timer.memory("all"):
        with timer.time("index"):
            index = ClientIndex.from_column(column)
            ranks = client_ranks(clients, law="uniform", min_rank=1, max_rank=options.rank, seed=0)
        planner, held = make_planner(options, index, ranks, cohort), held_bytes()
        with timer.time("first_plan"):
            plan = planner(0)
        with timer.time("sketches"):
            for client in plan.clients:
                for module in modules:
                    client.sketch(module)
        resident = max(0, held_bytes() - held)
    later, late = (
        statistics.median(_seconds(planner, start + number) for number in range(options.plans))
        for start in (1, options.late_round)
    )
    return timer.readings() | {"later_plan_seconds": later, "late_plan_seconds": late, "plan_bytes": resident}


def _seconds(planner: Callable[[int], RoundPlan], round: int) -> float:
    start = time.perf_counter()
    planner(round)
    return time.perf_counter() - start


def hand_over(options, clients: int, cohort: int, low: int, high: int) -> dict[str, float]:
    """A round without its local steps: clients into the stack, their changes out, the server's step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from fslora_hf.methods import METHODS
    from fslora_hf.models.adapter import global_pair
    from fslora_hf.models.stack import ClientStack
    from fslora_hf.rounds.layout import Layout
    from fslora_hf.rounds.local import LocalClients
    from fslora_hf.rounds.round import Round
    from fslora_hf.rounds.run import FederatedRun
    from fslora_hf.rounds.server import ServerState
    from fslora_hf.updates.bounds import CheckFinite
    from fslora_hf.updates.pipeline import Pipeline

    torch.manual_seed(0)
    shapes = ADAPTED[options.layer]
    # The base weights are neither read nor written, so they are left as the allocator gave them.
    layer = nn.ModuleDict({name: nn.utils.skip_init(nn.Linear, *wide, bias=False) for name, wide in shapes.items()})
    model = get_peft_model(layer, LoraConfig(r=options.rank, target_modules=[*shapes], init_lora_weights=False))
    index = ClientIndex.from_column(make_column(options, clients))
    ranks = client_ranks(clients, law="uniform", min_rank=low, max_rank=high, seed=0)
    stack, state = ClientStack(model, options.block, high), ServerState(*global_pair(model))
    stack.attach()

    def run(size: int, timer: Timer) -> None:
        layout = Layout(size, local_steps=1, block_size=options.block)
        plan = lru_cache(make_planner(options, index, ranks, size))
        plan(0)
        updates = Pipeline([CheckFinite()])
        half = Round(method=METHODS["fslora"](), state=state, updates=updates)
        federated = FederatedRun(plan, layout, num_rounds=1)
        federated.open(LocalClients(layout=layout, stack=stack, receive=half.give, updates=updates), half)
        with timer.memory("round"):
            federated.begin_round(0)
            for wave in range(layout.waves):
                with timer.time("hand_over"):
                    federated.hand_over(wave)
                for tensor in stack.parameters():  # in place of local steps
                    tensor.data.add_(1e-3)
                with timer.time("fold"):
                    federated.collect()
            with timer.time("close"):
                federated.aggregate()
        federated.close()

    run(1, Timer())  # whatever the first call of a function sets up
    timer = Timer()
    run(cohort, timer)
    adapter = sum(tensor.numel() * tensor.element_size() for side in (state.A, state.B) for tensor in side.values())
    return timer.readings() | {"adapter_bytes": adapter}


def make_rows(rows: int, clients: int):
    """Tokenised rows of few tokens, dealt to clients in turn."""
    import pyarrow as pa
    from datasets import Dataset

    tokens = pa.array(np.random.default_rng(0).integers(2, VOCABULARY, rows * TOKENS))
    lists = pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * TOKENS), tokens)
    return Dataset(pa.table({"input_ids": lists, "labels": lists, "client_id": np.arange(rows) % clients}))


def make_trainer(federated: bool, rows, output_dir: str, callbacks=(), **settings):
    """A trainer of a Llama so small that only what surrounds it takes time."""
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from fslora_hf import FederatedSketchConfig, FederatedSketchTrainer

    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    shared = QUIET | dict(output_dir=output_dir, use_cpu=True)
    return (FederatedSketchTrainer if federated else SFTTrainer)(
        model=LlamaForCausalLM(config),
        args=(FederatedSketchConfig if federated else SFTConfig)(**shared, **settings),
        train_dataset=rows,
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
        callbacks=[*callbacks],
    )


def first_step(trainer, **train_options) -> float:
    """Seconds from the call of `train()` until the first step has its batch and its clients."""
    from transformers import TrainerCallback

    class Reached(Exception):
        """Ends `train()` there."""

    class Stop(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            raise Reached

    trainer.add_callback(Stop())  # after the callback that hands clients over
    start = time.perf_counter()
    try:
        trainer.train(**train_options)
    except Reached:
        return time.perf_counter() - start
    raise RuntimeError("Expected the run to take a step, found none to take.")


def startup(options, trainer: str) -> dict[str, float]:
    """Construction of one of the trainers on many rows, a client each, and `train()` up to its first step."""
    federated, clients = trainer == "federated", options.startup_clients
    if federated:
        settings = dict(clients_per_round=min(100, clients), num_rounds=1, local_steps=1, save_rounds=0)
    else:
        settings = dict(max_steps=1, save_strategy="no")
    with tempfile.TemporaryDirectory() as folder:
        # First on few rows: modules and caches are set up once in a process, whatever the number of clients.
        make_trainer(federated, make_rows(200, 200), f"{folder}/warm", **settings)
        timer, rows = Timer(), make_rows(clients, clients)
        with timer.memory("construction"), timer.time("construction"):
            built = make_trainer(federated, rows, f"{folder}/run", **settings)
        with timer.memory("first_step"):
            timer.seconds["first_step"] = first_step(built)
    return timer.readings()


def resume(options, round: int) -> dict[str, float]:
    """From `train(resume_from_checkpoint=True)` to the first step after `round` rounds.

    Round 1 is run. The checkpoint of a later round is round 1's, written anew by the library's own functions under
    the other number, with as many lines of the ledger and entries of the Trainer's log as that many rounds leave.
    """
    from transformers import TrainerCallback

    class StopAfterARound(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    rows = make_rows(options.resume_clients, options.resume_clients)
    cohort = min(options.resume_cohort, options.resume_clients)
    settings = dict(num_rounds=options.late_round + 1, local_steps=1, clients_per_round=cohort, save_rounds=1,
                    per_device_train_clients=cohort, per_device_train_batch_size=1)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(True, rows, folder, [StopAfterARound()], **settings).train()
        (checkpoint,) = Path(folder).glob("checkpoint-*")
        if round > 1:
            renumber(checkpoint, round)
        timer, trainer = Timer(), make_trainer(True, rows, folder, **settings)
        size = (Path(folder) / "rounds.jsonl").stat().st_size
        with timer.memory("resume"):
            timer.seconds["resume"] = first_step(trainer, resume_from_checkpoint=True)
        if trainer.rounds_done != round:
            raise RuntimeError(f"Expected the run to go on after {round} rounds, found {trainer.rounds_done}.")
    return timer.readings() | {"ledger_bytes": size}


def renumber(checkpoint: Path, round: int) -> None:
    """Make a run's only checkpoint, of round 1 and one step, and its ledger those of a later round."""
    from fslora_hf.storage.checkpoint import STATE_NAME, read_state, whole_folder

    folder = checkpoint.parent
    record = json.loads((folder / "rounds.jsonl").read_text())
    with open(folder / "rounds.jsonl", "w", encoding="utf-8") as ledger:  # first: a checkpoint marks how it stands
        ledger.writelines(json.dumps({**record, "round": number}) + "\n" for number in range(round))
        ledger.flush()
        os.fsync(ledger.fileno())
    with whole_folder(folder / f"checkpoint-{round}", round, read_state(checkpoint)["run"]) as later:
        for path in checkpoint.iterdir():
            if path.name != STATE_NAME:
                shutil.copy(path, later)
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        entries = state["log_history"]
        state["log_history"] = [{**entry, "step": step} for step in range(1, round + 1) for entry in entries]
        state |= {"global_step": round, "epoch": float(round)}
        (later / "trainer_state.json").write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")
    shutil.rmtree(checkpoint)


KINDS = {"planning": planning, "hand_over": hand_over, "startup": startup, "resume": resume}
