"""The local work of one client on the simulator's trainer: of a round, the clients' half alone."""

import numpy as np

from ..common import host_memory
from ..common.processes import gather
from ..methods import ClientAdapter, method_class
from ..rounds.local import Returned
from ..trainers.callbacks import RoundCallback
from ..trainers.sft import FederatedSketchTrainer
from ..updates.feedback import ErrorFeedback


class _OneRound(RoundCallback):
    """Ends `train()` with the round that it began with; the ledger is the server's."""

    returned: Returned | None = None

    def on_step_end(self, args, state, control, **kwargs):
        run = self.trainer.run
        _, _, local_step = run.locate_step(state.global_step - 1)
        if local_step == args.local_steps - 1:
            (self.returned,) = run.clients.collect()
            run.rounds_done += 1
            control.should_training_stop = True


class NodeTrainer(FederatedSketchTrainer):
    """A FederatedSketchTrainer with the rows of one client, which runs single rounds of a federation's.

    Its examples and learning rate in round t are the simulator's for this client; dropout draws by round and client,
    where the simulator does by round and process. The model stays loaded from round to round.

    Args: as FederatedSketchTrainer's; `args.client_ranks` holds the client's rank.
    """

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

    def _halves(self, method, updates):
        return self._clients_here(method, updates, lambda client: self._received), None  # the server is elsewhere

    def _round_began(self, plan):
        (client,) = plan.clients
        # Each client has dropout of its own, also on nodes that are all the first process of theirs.
        self._steps.begin_round(self.args.seed, "dropout", plan.round, client.client_id)

    def train_round(self, round: int, received: ClientAdapter) -> Returned:
        """Take the local steps of a round, from 0, beginning with this adapter; returns what the client sends.

        Raises:
            ValueError: the round is not one of this run, or with `upload_top_k` a targeted layer was not trained.
        """
        if not 0 <= round < self.args.num_rounds:
            raise ValueError(f"Expected a round from 0 to {self.args.num_rounds - 1}, found {round}: the server runs "
                             "another recipe; start it anew.")  # fmt: skip
        self._bind_callbacks()
        kept = self.args.device.type == "cpu" and host_memory.keep_freed_memory()
        self._received = received
        self._open_run()
        try:
            self.run.rounds_done = round
            self._take_steps()  # without looking for a run in output_dir: a node keeps none
            if self.args.upload_top_k is not None:  # of which the server sees a part
                self._movement.judge(round, self.round_plan(round).learning_rate, gather)
            return self._round_callback.returned
        finally:
            self._received = self._round_callback.returned = None  # as large as adapters, until the next round
            self._close_run()
            if kept:
                host_memory.return_freed_memory()

    def log(self, logs, start_time=None):
        """Nothing: what a round came to goes to the server, which keeps the ledger."""
