"""A trainer's rounds on the Hub: the publisher takes the place of all pushes of the Trainer."""

from collections.abc import Mapping
from typing import Any

from ..common.processes import agree, rank
from ..hub.publisher import RoundPublisher, find_target


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
            self.publisher.open(self, lambda: self.identity)

    def _publish(self, resumed: bool = False) -> None:
        if self.publisher is not None:
            self.publisher.publish(resumed)

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
