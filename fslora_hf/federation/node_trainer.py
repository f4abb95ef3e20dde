"""The local work of one client on the simulator's trainer and engine: rounds of which it is all there is."""

from dataclasses import dataclass

import numpy as np
import torch
from trl import SFTTrainer

from ..common import host_memory
from ..common.processes import gather
from ..methods import ClientAdapter, method_class
from ..rounds.round import RoundEngine
from ..trainers.callbacks import RoundCallback
from ..trainers.sft import FederatedSketchTrainer
from ..updates.feedback import ErrorFeedback


@dataclass(frozen=True)
class LocalResult:
    """What a client's local steps came to: the change of A `[k, in]` and B `[out, k]` by module, without what is left
    out of it, and the client's mean loss."""

    A: dict[str, torch.Tensor]
    B: dict[str, torch.Tensor]
    loss: float


class _LocalEngine(RoundEngine):
    """Trains what came over the wire, and keeps the change for the server instead of folding it."""

    received: ClientAdapter
    result: LocalResult

    def begin_round(self, round):
        self.round, plan = round, self.plan(round)
        self._positions = {client.client_id: position for position, client in enumerate(plan.clients)}
        return plan

    def _receive(self, client):
        return self.received

    def collect(self):
        (client,) = self._block
        update = self._update(client, *self.stack.change(0), self.received)
        loss = (self._losses / self.layout.local_steps).item()
        update = self.updates.send(self.round, client, update)
        self.result = LocalResult(update.A, update.B, loss)
        self.abandon()

    def close_round(self):
        return {"round": self.round, "bytes_up": 0}


class _OneRound(RoundCallback):
    """Ends `train()` with the round that it began with; the ledger is the server's."""

    def on_step_end(self, args, state, control, **kwargs):
        _, _, local_step = self.trainer.locate_step(state.global_step - 1)
        if local_step == args.local_steps - 1:
            self.trainer.collect()
            self.aggregate()
            control.should_training_stop = True


class NodeTrainer(FederatedSketchTrainer):
    """A FederatedSketchTrainer with the rows of one client, which runs single rounds of a federation's.

    Its examples and learning rate in round t are the simulator's for this client; dropout draws by round and client,
    where the simulator does by round and process. The model stays loaded from round to round.

    Args: as FederatedSketchTrainer's; `args.client_ranks` holds the client's rank.
    """

    _engine_class = _LocalEngine
    feedback: ErrorFeedback | None = None  # with `error_feedback`: what was left out of the updates so far

    def __init__(self, *args, callbacks=(), **kwargs):
        super().__init__(*args, callbacks=[*callbacks, _OneRound()], **kwargs)

    def set_rank(self, rank: int) -> None:
        """Train at this rank from now on."""
        if self.client_ranks.tolist() != [rank]:
            self.client_ranks = np.array([rank])
            self._plan_rounds(self.client_index, self.model.peft_config["default"].r)

    def _open_feedback(self):
        return self.feedback

    @property
    def method(self):
        return method_class(self.args.method)()

    def train_round(self, round: int, received: ClientAdapter) -> LocalResult:
        """Take the local steps of a round, from 0, beginning with this adapter.

        Raises:
            ValueError: the round is not one of this run, or with `upload_top_k` a targeted layer was not trained.
        """
        if not 0 <= round < self.args.num_rounds:
            raise ValueError(f"Expected a round from 0 to {self.args.num_rounds - 1}, found {round}: the server runs "
                             "another recipe; start it anew.")  # fmt: skip
        self._bind_callbacks()
        kept = self.args.device.type == "cpu" and host_memory.keep_freed_memory()
        self._open_run()
        try:
            self._engine.received = received
            self.rounds_done = round
            SFTTrainer.train(self)  # ours would look for a run in output_dir; a node keeps none
            if self.args.upload_top_k is not None:  # of which the server sees a part
                self._movement.judge(round, self.round_plan(round).learning_rate, gather)
            return self._engine.result
        finally:
            self._close_run()
            if kept:
                host_memory.return_freed_memory()

    def begin_round(self, round: int) -> None:
        super().begin_round(round)
        (client,) = self.round_plan(round).clients
        # Each client has dropout of its own, also on nodes that are all the first process of theirs.
        self._steps.begin_round(self.args.seed, "dropout", round, client.client_id)

    def log(self, logs, start_time=None):
        """Nothing: what a round came to goes to the server, which keeps the ledger."""
