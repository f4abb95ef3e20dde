"""What the ways of running a round have in common: the clients' work, the clock, and adapters in and out of PEFT.

An adapter is `{module name: (A [rank, in], B [out, rank])}`, the name as it was before PEFT wrapped the model.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from step_rows import QUIET  # beside this file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fslora_hf.data.clients import ClientIndex
from fslora_hf.models.adapter import PEFT_PREFIX
from fslora_hf.rounds.plan import RoundPlan, plan_round

Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]
SEED = 0


class Clock:
    """Wall-clock seconds of rounds, and of named parts of them; `rounds` holds one dictionary a round.

    The first round begins with the clock, each other one when the round before it ends.

    Args:
        synchronize: waits for whatever a GPU still has to do.
    """

    def __init__(self, synchronize: Callable[[], Any] = lambda: None):
        self.rounds: list[dict[str, float]] = []
        self._synchronize, self._parts = synchronize, {}
        self._begun = self._now()

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begun = self._now()
        yield
        self._parts[name] = self._parts.get(name, 0.0) + self._now() - begun

    def end_round(self) -> None:
        now = self._now()
        self.rounds.append({"seconds": now - self._begun, **self._parts})
        self._begun, self._parts = now, {}


@dataclass(frozen=True)
class Setup:
    """What is trained; the same for all ways.

    Attributes:
        load: reads the base model anew, to where it trains.
        base: the base model that is resident; None for `reload`, which has none.
        lora: of the global rank; plain, without rsLoRA.
        start: the global adapter before the first round.
        rows: `input_ids`, `labels` and `client_id`.
        ranks: of the clients, by ascending id; all of them take part in every round.
        batch_size: rows of one client in a local step.
        use_cpu: whether to leave a GPU alone.
        optim: `adamw_torch_fused`, the Trainer's default, or `sgd`; without weight decay.
        max_grad_norm: what each client's gradient is clipped to.
    """

    load: Callable[[], PreTrainedModel]
    base: PreTrainedModel | None
    lora: LoraConfig
    start: Adapter
    rows: Dataset
    tokenizer: PreTrainedTokenizerBase
    ranks: list[int]
    rounds: int
    local_steps: int
    batch_size: int
    use_cpu: bool
    optim: str = "adamw_torch_fused"
    learning_rate: float = 1e-4
    max_grad_norm: float = 1.0
    index: ClientIndex = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "index", ClientIndex.from_column(np.array(self.rows["client_id"])))

    @property
    def training(self) -> dict[str, Any]:
        """Arguments of SFTConfig, and so of FederatedSketchConfig."""
        return QUIET | dict(
            seed=SEED,
            use_cpu=self.use_cpu,
            per_device_train_batch_size=self.batch_size,
            optim=self.optim,
            weight_decay=0.0,
            learning_rate=self.learning_rate,
            max_grad_norm=self.max_grad_norm,
        )

    def plan(self, round: int) -> RoundPlan:
        """What FederatedSketchTrainer.round_plan gives, without a trainer."""
        return plan_round(
            round,
            seed=SEED,
            index=self.index,
            ranks=np.array(self.ranks),
            global_rank=self.lora.r,
            clients_per_round=len(self.ranks),
            local_steps=self.local_steps,
            examples_per_step=self.batch_size,
            learning_rate=lambda round: self.learning_rate,
        )


def with_adapter(base: PreTrainedModel, lora: LoraConfig, adapter: Adapter) -> PeftModel:
    """`base`, not a copy, with `adapter` as its adapter `default`."""
    model = get_peft_model(base, copy.deepcopy(lora))
    write_adapter(model, adapter)
    return model


def write_adapter(model: PeftModel, adapter: Adapter) -> None:
    state = {f"{PEFT_PREFIX}{name}.lora_{side}.weight": half
             for name, pair in adapter.items() for side, half in zip("AB", pair, strict=True)}  # fmt: skip
    set_peft_model_state_dict(model, state)


def read_adapter(model: PeftModel) -> Adapter:
    """A copy of the adapter `default`."""
    state = {name.removeprefix(PEFT_PREFIX): half.clone() for name, half in get_peft_model_state_dict(model).items()}
    names = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    return {name: (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) for name in names}


def zeros(adapter: Adapter) -> Adapter:
    return {name: (torch.zeros_like(A), torch.zeros_like(B)) for name, (A, B) in adapter.items()}


def added(adapter: Adapter, change: Adapter) -> Adapter:
    return {name: (A + change[name][0], B + change[name][1]) for name, (A, B) in adapter.items()}
