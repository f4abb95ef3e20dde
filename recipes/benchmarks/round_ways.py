"""Ways to run rounds of federated sketching LoRA on one machine: this library's, and three that others take.

Each is a function of a `Setup` and a `Clock` that runs all rounds and returns the global adapter after the last. All
train the same clients at the same ranks on the same batches, by the same plan, and average alike: in exact arithmetic
they return the same adapter, but for `deep_copy` under AdamW (see there). The other ways are written from descriptions
of what people do, in as few lines as that takes; where a description leaves a choice, they get the cheaper one.
"""

import copy
import gc
import tempfile
from collections.abc import Callable
from functools import partial

import torch
from peft import PeftModel
from round_setup import (  # beside this file
    Adapter,
    Clock,
    Setup,
    added,
    read_adapter,
    with_adapter,
    write_adapter,
    zeros,
)
from torch.nn import functional as F
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fslora_hf import FederatedSketchConfig, FederatedSketchTrainer
from fslora_hf.models.adapter import PEFT_PREFIX
from fslora_hf.rounds.plan import ClientPlan
from fslora_hf.trainers.callbacks import RoundCallback

# ---- This library ----


class TimedRounds(RoundCallback):
    """Reads the clock where a round's parts begin and end; all that the callback does counts, its ledger included."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock = clock

    def on_step_begin(self, args, state, control, **kwargs):
        if self.trainer.run.locate_step(state.global_step)[2] == 0:
            with self.clock.part("hand_over"):
                super().on_step_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        _, wave, local_step = self.trainer.run.locate_step(state.global_step - 1)
        if local_step < args.local_steps - 1:
            return
        with self.clock.part("aggregation"):
            super().on_step_end(args, state, control, **kwargs)
        if wave == self.trainer.layout.waves - 1:
            self.clock.end_round()


def ours(setup: Setup, clock: Clock, block: int = 1) -> Adapter:
    """FederatedSketchTrainer, `block` clients a step."""
    model = with_adapter(setup.base, setup.lora, setup.start)
    with tempfile.TemporaryDirectory() as folder:
        trainer = FederatedSketchTrainer(
            model=model,
            args=FederatedSketchConfig(
                output_dir=folder,
                **setup.training,
                num_rounds=setup.rounds,
                local_steps=setup.local_steps,
                client_ranks=setup.ranks,
                per_device_train_clients=block,
                save_rounds=0,
            ),
            train_dataset=setup.rows,
            processing_class=setup.tokenizer,
            callbacks=[TimedRounds(clock)],
        )
        trainer.train()
    return read_adapter(model)


# ---- The published code's way ----


def deep_copy(setup: Setup, clock: Clock) -> Adapter:
    """A deep copy of the whole model for each client of each round, its dense adapter masked down to the sketch.

    Every client holds, trains and returns the adapter at the global rank r, whatever its own rank k: it starts from
    `B S` with the sketch's diagonal `S` (r / k on its k columns, 0 elsewhere), masks gradients, and divides by `S`
    when it is done. Beside the copy there are two dictionaries of masks with a tensor for every parameter of the
    model, base included, as the published code has them. It is this library's reading of that code with its sketch in
    effect (as shipped, no mask is ever applied), and a cheap one: one copy is held at a time, masks are multiplied
    in on the adapter alone, and there is no optimizer but the local one.

    Under SGD this is the training of rank-k pairs exactly, once gradients of B are scaled by `S^2`: one factor is the
    gradient of the client's own B, by which it is clipped, the other makes up for the division at the end. AdamW
    ignores how gradients are scaled, so that B moves at k / r of the learning rate; the same work, another result.
    """
    model = with_adapter(setup.base, setup.lora, setup.start)
    now = read_adapter(model)
    for round in range(setup.rounds):
        plan = setup.plan(round)
        change = zeros(now)
        for client in plan.clients:
            returned = _train_masked(setup, copy.deepcopy(model), client, plan.learning_rate)
            for name, halves in change.items():
                for half, moved in zip(halves, returned[name], strict=True):
                    half.add_(moved, alpha=client.weight)
        now = added(now, change)
        write_adapter(model, now)
        clock.end_round()
    return now


def _train_masked(setup: Setup, model: PeftModel, client: ClientPlan, learning_rate: float) -> Adapter:
    """The change of the dense pairs, `A [r, in]`, `B [out, r]`, by a client's local steps; `model` is used up."""
    before, (kept, factor) = read_adapter(model), _masks(setup, model, client)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = _optimizer(setup, trained.values(), learning_rate)
    model.train()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.mul_(factor[name])
    rows = setup.rows.select(client.example_ids.flatten()).to_list()
    for first in range(0, len(rows), setup.batch_size):
        batch = rows[first : first + setup.batch_size]
        full_logits_loss(model, batch, setup.tokenizer.pad_token_id).backward()
        for name, parameter in trained.items():
            parameter.grad.mul_(kept[name]).mul_(factor[name])
        torch.nn.utils.clip_grad_norm_(trained.values(), setup.max_grad_norm)
        for name, parameter in trained.items():
            parameter.grad.mul_(factor[name])
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.div_(factor[name].clamp(min=1.0))  # where it is zero, nothing is kept
    after = read_adapter(model)
    names = {module: [f"{PEFT_PREFIX}{module}.lora_{side}.default.weight" for side in "AB"] for module in before}
    return {
        module: tuple(kept[n] * (new - old) for n, new, old in zip(names[module], after[module], pair, strict=True))
        for module, pair in before.items()
    }


def _masks(setup: Setup, model: PeftModel, client: ClientPlan) -> tuple[dict[str, torch.Tensor], ...]:
    """Masks by parameter name, each as large as its parameter: which entries the client trains (0 or 1), and what
    they are scaled by (r / k or 0 in B, else 1)."""
    kept, factor = ({name: torch.ones_like(p) for name, p in model.named_parameters()} for _ in range(2))
    for module in setup.start:
        A, B = (f"{PEFT_PREFIX}{module}.lora_{side}.default.weight" for side in "AB")
        chosen = kept[A].new_zeros(setup.lora.r)
        chosen[torch.as_tensor(client.sketch(module), device=chosen.device)] = 1.0
        kept[A].mul_(chosen.unsqueeze(1))
        kept[B].mul_(chosen)
        factor[B].mul_(chosen * (setup.lora.r / client.rank))
    return kept, factor


def _optimizer(setup: Setup, parameters, learning_rate: float) -> torch.optim.Optimizer:
    kind = {"sgd": torch.optim.SGD, "adamw_torch_fused": partial(torch.optim.AdamW, fused=True)}[setup.optim]
    return kind(parameters, lr=learning_rate, weight_decay=0.0)


def full_logits_loss(model: PeftModel, rows: list[dict], pad_token_id: int) -> torch.Tensor:
    """Mean negative log-likelihood of the scored tokens, from the logits of all tokens in at least float32, as
    transformers' own loss for causal language models."""
    collator = DataCollatorForLanguageModeling(pad_token_id=pad_token_id)
    batch = {key: tensor.to(model.device) for key, tensor in collator(rows).items()}
    labels = F.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:]
    logits = model(**batch, use_cache=False).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


# ---- A Trainer for each client ----


def swap(setup: Setup, clock: Clock) -> Adapter:
    """A fresh SFTTrainer for each client, whose rank-k adapter is put around one resident base."""
    return _client_by_client(setup, clock, lambda: setup.base)


def reload(setup: Setup, clock: Clock) -> Adapter:
    """The same with the base model read from disk for each client, as a simulated client that starts from nothing for
    every message does."""

    def fresh() -> PreTrainedModel:
        gc.collect()  # a Trainer is a cycle, and holds the model before this one
        return setup.load()

    return _client_by_client(setup, clock, fresh)


def _client_by_client(setup: Setup, clock: Clock, base: Callable[[], PreTrainedModel]) -> Adapter:
    now = setup.start
    for round in range(setup.rounds):
        plan = setup.plan(round)
        change = zeros(now)
        for client in plan.clients:
            rows = {name: torch.as_tensor(client.sketch(name), device=A.device) for name, (A, _) in now.items()}
            held = {name: (A[rows[name]], B[:, rows[name]]) for name, (A, B) in now.items()}
            trained = _train_with_sft(setup, base(), held, client, plan.learning_rate)
            for name, (A, B) in change.items():
                A[rows[name]] += client.weight * (trained[name][0] - held[name][0])
                B[:, rows[name]] += client.weight * (trained[name][1] - held[name][1])
        now = added(now, change)
        clock.end_round()
    return now


def _train_with_sft(
    setup: Setup, base: PreTrainedModel, held: Adapter, client: ClientPlan, learning_rate: float
) -> Adapter:
    """What a client holds after its local steps; `base` is left without an adapter."""
    lora = copy.deepcopy(setup.lora)
    lora.r = client.rank  # with lora_alpha as it is, the scale alpha / k makes up for the rows that are left out
    model = with_adapter(base, lora, held)
    rows = setup.rows.select(client.example_ids.flatten()).select_columns(["input_ids", "labels"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                **setup.training | {"learning_rate": learning_rate},
                max_steps=setup.local_steps,
                train_sampling_strategy="sequential",
                dataset_kwargs={"skip_prepare_dataset": True},
                save_strategy="no",
            ),
            train_dataset=rows,
            processing_class=setup.tokenizer,
        )
        trainer.train()
    trained = read_adapter(model)
    model.unload()
    return trained
