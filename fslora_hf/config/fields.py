"""The settings that a federation adds to those of a Trainer, whatever its kind.

What their metadata says: `decides` in decides.py, `range` in ranges.py.
"""

from dataclasses import dataclass, field

from ..methods import METHODS as METHOD_CLASSES
from ..rounds.ranks import RANK_LAWS
from ..storage.result_files import PROTOCOLS
from .decides import told_by_fields
from .ranges import Range

METHODS = tuple(METHOD_CLASSES)
RANK_DISTRIBUTIONS = tuple(RANK_LAWS)
EVAL_PROTOCOLS = (*PROTOCOLS, "loss")
SERVER_OPTIMIZERS = ("sgd", "sgd_momentum", "adam", "adamw")


@told_by_fields
@dataclass
class FederationFields:
    """A mixin before a configuration of transformers or TRL."""

    # Its entry is None, as upload_budget's: a run may be made longer or shorter, which changes no round of it but for
    # a schedule that ends with the run, of which a resume warns.
    num_rounds: int = field(
        default=100,
        metadata={
            "decides": "result",
            "range": Range(1, 10**9),
            "entry": None,
            "help": "Number of rounds of the run.",
        },
    )
    clients_per_round: int | None = field(
        default=None,
        metadata={
            "decides": "result",
            "range": Range(1, 10**9),
            "node": "ignores",
            "help": "Number of clients that take part in a round. None: all of them.",
        },
    )
    local_steps: int = field(
        default=20,
        metadata={
            "decides": "result",
            "range": Range(1, 10**6),
            "help": "Optimizer steps each client takes in a round.",
        },
    )
    # None, which is refused, makes the command line read this field as text.
    per_device_train_clients: int | str | None = field(
        default=1,
        metadata={
            "decides": "speed",
            "range": Range(1, 10**9),
            "help": "Clients a process trains in the same step: a number, or `auto` for as many as fit into its "
            "memory, which is measured before the first round. Changes speed and memory; of the result only rounding "
            "and which numbers dropout draws.",
        },
    )
    method: str = field(
        default="fslora",
        metadata={
            "decides": "result",
            "help": "What clients receive and how it is averaged: random sketches (fslora), the whole adapter "
            "(fedit), its first rows weighted by norm (hetlora), the best part of averaged products (flexlora), B "
            "alone (ffa_lora), or new adapters that are stacked and folded into the base (flora) or kept beside it "
            "(flora_residual); or a class in a file of your own, as module:Class.",
            "metavar": f"{{{','.join(METHODS)},MODULE:CLASS}}",
        },
    )
    client_id_column: str = field(
        default="client_id",
        metadata={
            "decides": "result",
            "entry": "data",
            "compared": "split",
            "help": "Integer column of the training data that says whose a row is.",
        },
    )
    min_examples: int = field(
        default=1,
        metadata={
            "decides": "result",
            "range": Range(1, 10**9),
            "entry": "data",
            "compared": "split",
            "help": "Fewest examples a client may be left with once the data is prepared.",
        },
    )
    client_ranks: list[int] | None = field(
        default=None,
        metadata={
            "decides": "result",
            "node": "ignores",
            "help": "Rank of each client, the i-th for the i-th smallest id. Instead of rank_distribution.",
        },
    )
    rank_distribution: str = field(
        default="homogeneous",
        metadata={
            "decides": "result",
            "node": "ignores",
            "help": "Law that client ranks are drawn by, once for a run.",
            "choices": RANK_DISTRIBUTIONS,
        },
    )
    min_rank: int | None = field(
        default=None,
        metadata={
            "decides": "result",
            "range": Range(1, 2**16),
            "node": "ignores",
            "help": "Least rank of a client. None: 1, and max_rank for the homogeneous law.",
        },
    )
    max_rank: int | None = field(
        default=None,
        metadata={
            "decides": "result",
            "range": Range(1, 2**16),
            "node": "ignores",
            "help": "Greatest rank of a client. None: the rank of the global adapter.",
        },
    )
    sketch_scope: str = field(
        default="module",
        metadata={
            "decides": "result",
            "help": "Whether a client's sketch is drawn for each module or once for the model.",
            "choices": ("module", "model"),
        },
    )
    server_optim: str = field(
        default="sgd",
        metadata={
            "decides": "result",
            "help": "Optimizer the server applies to the negative average update: torch's, without weight decay. "
            "sgd at rate 1 is plain averaging.",
            "choices": SERVER_OPTIMIZERS,
        },
    )
    server_learning_rate: float | None = field(
        default=None,
        metadata={
            "decides": "result",
            "range": Range(0, 10**6, above=True),
            "help": "Rate of the server. None: 1.0 for sgd and sgd_momentum, else 0.001.",
        },
    )
    client_weighting: str = field(
        default="uniform",
        metadata={
            "decides": "result",
            "help": "Weights of the average: all alike, or in proportion to the clients' examples.",
            "choices": ("uniform", "num_examples"),
        },
    )
    upload_top_k: float | None = field(
        default=None,
        metadata={
            "decides": "result",
            "help": "Share of its update that a client sends, such as 0.1: the numbers that are largest in size, and "
            "their places. None: all.",
        },
    )
    error_feedback: bool = field(
        default=False,
        metadata={
            "decides": "result",
            "help": "With upload_top_k, a client keeps what it does not send and adds it to its next update. Not with "
            "methods that learn in new directions each round.",
        },
    )
    upload_budget: float | None = field(
        default=None,
        metadata={
            "decides": "result",
            "range": Range(0, 10**12, above=True),
            "entry": None,
            "node": "ignores",
            "help": "End the run after the round in which all uploads together reach so many megabytes (10**6 bytes). "
            "None: after num_rounds, which is the most in any case.",
        },
    )
    save_rounds: int = field(
        default=10,
        metadata={
            "decides": "server",
            "range": Range(0, 10**9),
            "help": "Write a checkpoint every so many rounds and after the last. 0: never.",
        },
    )
    max_lost_rounds: int = field(
        default=3,
        metadata={
            "decides": "server",
            "range": Range(0, 10**9),
            "help": "End the run with an error after so many rounds in a row that fold no update, or in which most "
            "clients' losses are not finite or have leapt (of fewer than three clients a round, after more). "
            "0: never.",
        },
    )
    eval_rounds: int = field(
        default=0,
        metadata={
            "decides": "server",
            "range": Range(0, 10**9),
            "compared": "kept",
            "help": "Evaluate every so many rounds and after the last. 0: never.",
        },
    )
    eval_protocol: str | None = field(
        default=None,
        metadata={
            "decides": "server",
            "compared": "alike",
            "help": "How an evaluation asks rows with options: loglikelihood scores each, generate reads the answer "
            "from a text, loss asks nothing. None: loglikelihood where the rows have options, else loss.",
            "choices": EVAL_PROTOCOLS,
        },
    )
    eval_num_beams: int = field(
        default=4,
        metadata={
            "decides": "server",
            "range": Range(1, 1024),
            "compared": "alike",
            "help": "Beams of eval_protocol generate. 1: greedy.",
        },
    )
    eval_max_new_tokens: int = field(
        default=32,
        metadata={
            "decides": "server",
            "range": Range(1, 10**6),
            "compared": "alike",
            "help": "Tokens that eval_protocol generate writes at most.",
        },
    )
    overlong_prompts: str = field(
        default="truncate",
        metadata={
            "decides": "result",
            "entry": "data",
            "compared": "alike",
            "help": "Rows longer than max_length: truncate cuts the prompt from the left, drop leaves the row out, "
            "keep_start cuts the end, answers too, as SFTTrainer does.",
            "choices": ("truncate", "drop", "keep_start"),
        },
    )

    push_rounds: int = field(
        default=10,
        metadata={
            "decides": "server",
            "range": Range(0, 10**9),
            "help": "With push_to_hub, push every so many rounds and after the last, each as a commit with a tag such "
            "as round-0010. 0: the last alone.",
        },
    )
    push_resume_state: bool = field(
        default=False,
        metadata={
            "decides": "server",
            "help": "Push what a run is resumed from beside each round (resume_from_checkpoint hub).",
        },
    )
    push_eval_results: bool = field(
        default=True,
        metadata={
            "decides": "server",
            "help": "Push the result files of evaluated rounds, into results/ of the repository.",
        },
    )
    push_eval_yaml: bool = field(
        default=False,
        metadata={
            "decides": "server",
            "help": "Push scores as .eval_results/*.yaml, too, which registered benchmarks show.",
        },
    )
    hub_deadline: float = field(
        default=600.0,
        metadata={
            "decides": "server",
            "range": Range(0, 10**9, above=True),
            "help": "Seconds for the push of a round, after which it is given up and tried later.",
        },
    )

    save_strategy: str = field(
        default="no",
        metadata={"decides": "result", "entry": None, "node": "refuses", "help": "Not used: see save_rounds."},
    )
    eval_strategy: str = field(
        default="no",
        metadata={"decides": "result", "entry": None, "node": "refuses", "help": "Not used: see eval_rounds."},
    )
    average_tokens_across_devices: bool = field(
        default=False,
        metadata={
            "decides": "speed",
            "node": "obeys",
            "help": "Not used: each client's loss is the mean over its own tokens.",
        },
    )
    # SFTConfig turns checkpointing on by this deprecated name, which warns every user who left it alone.
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "decides": "speed",
            "node": "obeys",
            "help": "Deprecated name of activation_checkpointing.",
            "nargs": "?",
            "const": True,
        },
    )

    @property
    def resolved_server_learning_rate(self) -> float:
        """The server's rate, with the default of its optimizer filled in."""
        if self.server_learning_rate is not None:
            return float(self.server_learning_rate)
        return 1.0 if self.server_optim in ("sgd", "sgd_momentum") else 1e-3
