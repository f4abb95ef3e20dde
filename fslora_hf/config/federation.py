"""The configuration of a federated run: TRL's `SFTConfig`, and what a federation adds to it."""

import math
from dataclasses import dataclass, fields

from trl import SFTConfig

from ..common.settings import SettingsError, default_of, field_problems, is_a, said
from .fields import FederationFields
from .refusals import contradictions, launcher_problems, meaningless, trial_problems, wrong_values

_OF_SEVERAL_KINDS = {"resume_from_checkpoint", "accelerator_config"}  # the latter an object of accelerate's in a copy


@dataclass
class FederatedSketchConfig(FederationFields, SFTConfig):
    """What `FederatedSketchTrainer` needs to know: every field of TRL's `SFTConfig`, and those of a federation.

    A run is `num_rounds` rounds. In each, `clients_per_round` clients take `local_steps` optimizer steps on
    `per_device_train_batch_size * gradient_accumulation_steps` of their own examples; the server then averages what
    they changed. `learning_rate`, its schedule and `warmup_steps` count rounds; `seed` fixes all that is drawn. The
    defaults are the algorithm of W. Fang et al., "Federated Sketching LoRA", arXiv 2501.19389.

    Other defaults than `SFTConfig`'s: `save_strategy` is `no` (see `save_rounds`), `average_tokens_across_devices` is
    False, and `activation_checkpointing` is on unless turned off, without the warning about its former name.

    Raises:
        SettingsError: a ValueError with one line for each setting that cannot work.
    """

    def __post_init__(self):
        self._normalise()
        problems = field_problems(self, besides=_OF_SEVERAL_KINDS) | wrong_values(self) | meaningless(self)
        sentences = [*problems.values(), *contradictions(self, problems.keys())]
        launcher = launcher_problems(self)
        # The classes above check the rest, and must not stumble over what is already known to be wrong.
        for each in fields(self):
            if each.name in problems:
                setattr(self, each.name, default_of(each))
        try:
            if not launcher:  # with DeepSpeed asked for, the classes above would set it up
                super().__post_init__()
                sentences += trial_problems(self)
        except Exception as error:  # whatever a value of another kind makes them stumble over
            text = f"Expected settings that transformers takes, found '{said(error)}': correct what it names."
            raise SettingsError([*sentences, *launcher, text]) from None  # the cause's text may quote a secret
        if sentences or launcher:
            raise SettingsError(sentences + launcher)

    def _normalise(self) -> None:
        """Write settings that have several forms in one."""
        # It would scale one client's loss by the token counts of clients in other processes.
        self.average_tokens_across_devices = False
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):  # a bool, or its text on the command line
            self.resume_from_checkpoint = str(self.resume_from_checkpoint).lower() == "true"
        block = self.per_device_train_clients
        if isinstance(block, str) and block.isdecimal():  # a number on the command line
            self.per_device_train_clients = int(block)
        if self.debug is None:  # as TRL's own parser leaves it
            self.debug = ""
        if self.max_grad_norm == math.inf:  # no clipping, in a form that JSON has
            self.max_grad_norm = 0.0
        for name in ("adam_beta1", "adam_beta2"):  # 0 in a file: torch takes no integer
            beta = getattr(self, name)
            setattr(self, name, float(beta) if is_a(beta, int) and beta == 0 else beta)
        ranks = self.client_ranks.tolist() if hasattr(self.client_ranks, "tolist") else self.client_ranks
        if isinstance(ranks, (list, tuple)):  # numpy's integers as Python's, which JSON can hold
            ranks = [int(rank) if is_a(rank, int) else rank for rank in ranks]
        self.client_ranks = ranks
