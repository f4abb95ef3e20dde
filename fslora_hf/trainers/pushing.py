"""A trainer's rounds on the Hub: the publisher takes the place of all pushes of the Trainer."""

from collections.abc import Mapping
from typing import Any

from ..common.processes import agree, rank
from ..hub.card_context import COMMONSENSE
from ..hub.publisher import RoundOver, RoundPublisher, find_target
from ..models.description import quantization_of


class PushesRounds:
    """Of a trainer: its hooks of pushing."""

    publisher: RoundPublisher | None = None  # of the first process, with push_to_hub
    card_facts: Mapping[str, Any] = {}  # fields of hub.card_context.CardContext that the trainer cannot know

    def _find_hub(self) -> None:
        """Before the model is loaded: see where rounds go."""
        if self.args.push_to_hub:
            self._hub_target, reached = agree(lambda: find_target(self.args))
            self.publisher = RoundPublisher(self.args, self._hub_target, reached) if rank() == 0 else None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        self.hub_model_id = self._hub_target.repo_id  # which was found, or made, before the model was loaded

    def _open_hub(self) -> None:
        if self.publisher is not None:
            self.publisher.open(lambda: self.identity)

    def _publish(self, resumed: bool = False) -> None:
        if self.publisher is None:
            return
        over = RoundOver(
            number=self.rounds_done,
            is_last=self.run_ends or self.control.should_training_stop,
            ledger=self.ledger_path,
            log=self.state.log_history,
            save=lambda folder: self.snapshot(resumable=self.args.push_resume_state).save(folder),
            facts=self._card_facts,
        )
        self.publisher.publish(over, resumed)

    def _card_facts(self) -> dict[str, Any]:
        """Fields of CardContext that tell of the model and the clients."""
        base, lora = self.model.get_base_model(), self.model.peft_config["default"]
        targets, low, high = lora.target_modules, int(self.client_ranks.min()), int(self.client_ranks.max())
        facts = {"data": f"{len(self.train_dataset):,} rows", **self.card_facts}
        return {
            "base_model": base.config.name_or_path,
            "base_revision": getattr(base.config, "_commit_hash", None),
            "quantization": quantization_of(base),
            "rank": lora.r,
            "alpha": lora.lora_alpha,
            "target_modules": targets if isinstance(targets, str) else sorted(targets),
            "client_ranks": str(low) if low == high else f"{low} to {high}",
            "num_clients": len(self.client_index),
            "clients_per_round": self.cohort_size,
            "best": self.best_words,
            "benchmarks": COMMONSENSE if facts.pop("commonsense", False) else {},
            **facts,
        }

    def push_to_hub(self, commit_message=None, blocking=True, token=None, revision=None, **kwargs):
        """Send the rounds that are still missing on the Hub; returns what became of all, a table when printed.

        Rounds are pushed by `train()`; afterwards there is nothing left to do unless the Hub failed. The arguments are
        the Trainer's and have no effect: each round's commit has a title of its own, and goes where the configuration
        says. None in processes other than the first.

        Raises:
            ValueError: the configuration asks for no pushing.
        """
        if not self.args.push_to_hub:
            raise ValueError(
                "Expected push_to_hub=True in the configuration, found False: set it, so that rounds are kept for "
                "pushing, or upload a checkpoint's folder with `hf upload`."
            )
        return None if self.publisher is None else self.publisher.push_missing()
