"""What each setting decides, from which everything is derived that treats settings by it.

Our own fields say it in their metadata, under `decides`; those that come from transformers and TRL in the table below.

| `decides` | a setting of this kind |
|---|---|
| `result` | what is computed: a run is not resumed under another value |
| `server` | what the server does beside it at round ends: evaluations, checkpoints, pushes, giving up |
| `speed` | how fast and in how much memory; of the result rounding and what dropout draws |
| `place` | where a run lies and how it is told: folders, logs, names |

Beside it, a setting may say
- `entry`: under which name of a run's identity a change of it shows (trainers/identity.py), its own if not said; None
  if it may change, or if its default is the only value that works (REFUSED), or the model would not load;
- `node`: whether a node of a federation `obeys` it, `ignores` it or `refuses` it. If not said it obeys what decides
  the result and ignores the rest. A setting that nothing is known of is refused;
- `compared`: in a comparison, `alike` must be the same in all runs, `split` says how rows are dealt to clients, and
  `kept` is part of what was compared though it decides no result.
"""

from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, fields
from types import MappingProxyType
from typing import Any

from ..common.settings import default_of
from .refusals import REFUSED

KINDS = ("result", "server", "speed", "place")
_OWN = object()


@dataclass(frozen=True)
class Decision:
    """What a setting decides; see above."""

    decides: str
    entry: str | None | object = _OWN
    node: str = ""
    compared: str = ""

    @property
    def at_node(self) -> str:
        return self.node or ("obeys" if self.decides == "result" else "ignores")


# A setting of a version of transformers or TRL that we do not know may decide anything, and do anything on a node.
UNKNOWN = Decision("result", node="refuses")
_FIXED = Decision("result", None, "refuses")  # refused under any other value than its default
_FROM_DATA = Decision("result", "data")
_NODES_TOO = Decision("speed", node="obeys")

_INHERITED = (
    # the steps
    (
        Decision("result"),
        "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args "
        "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm neftune_noise_alpha loss_type seed data_seed",
    ),
    (Decision("result", "examples a local step"), "per_device_train_batch_size gradient_accumulation_steps"),
    # the rows, whose tokens and labels the identity knows by a digest
    (Decision("result", "data", compared="alike"), "max_length completion_only_loss assistant_only_loss"),
    (_FROM_DATA, "dataset_text_field dataset_kwargs eos_token pad_token remove_unused_columns"),
    (Decision("result", "data", "refuses"), "chat_template_path"),
    # the model and its adapter
    (Decision("result", "model", compared="alike"), "model_name_or_path load_in_4bit load_in_8bit"),
    (Decision("result", None, compared="alike"), "model_revision bnb_4bit_quant_type"),  # the name of one may change
    (Decision("result", None), "model_init_kwargs use_bnb_nested_quant bnb_4bit_quant_storage router_aux_loss_coef"),
    (Decision("result", "lora r"), "lora_r"),
    (Decision("result", "lora lora_alpha"), "lora_alpha"),
    (Decision("result", "lora lora_dropout"), "lora_dropout"),
    (Decision("result", "lora use_rslora"), "use_rslora"),
    (Decision("result", "adapted layers"), "lora_target_modules"),
    (_FIXED, "lora_target_parameters lora_modules_to_save lora_task_type use_dora"),
    (Decision("result", None, "refuses"), "trust_remote_code accelerator_config fsdp_config"),
    # the best round, which is part of what a run leaves
    (Decision("result", node="ignores"), "metric_for_best_model greater_is_better"),
    # precision and memory: rounding
    (Decision("speed", node="obeys", compared="kept"), "bf16 tf32 full_determinism attn_implementation"),
    (Decision("speed", node="obeys", compared="alike"), "dtype"),
    (
        _NODES_TOO,
        "use_cpu activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing_kwargs "
        "activation_offloading use_cache torch_empty_cache_steps pad_to_multiple_of",
    ),
    (Decision("speed", compared="kept"), "use_liger_kernel liger_kernel_config torch_compile"),
    (
        Decision("speed"),
        "torch_compile_backend torch_compile_mode dataloader_num_workers dataloader_pin_memory "
        "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context "
        "dataloader_drop_last dataset_num_proc local_rank ddp_backend ddp_timeout ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_find_unused_parameters ddp_static_graph per_device_eval_batch_size "
        "eval_accumulation_steps eval_do_concat_batches eval_use_gather_object batch_eval_metrics packing_strategy",
    ),
    # what the server does at round ends
    (
        Decision("server"),
        "save_total_limit save_on_each_node resume_from_checkpoint push_to_hub hub_model_id "
        "hub_revision hub_private_repo hub_token",
    ),
    (
        Decision("server", compared="kept"),
        "eval_on_start prediction_loss_only include_for_metrics load_best_model_at_end",
    ),
    # where a run lies and how it is told; what nothing reads
    (
        Decision("place"),
        "output_dir logging_steps logging_first_step logging_strategy logging_nan_inf_filter "
        "log_on_each_node log_level log_level_replica include_num_input_tokens_seen disable_tqdm report_to run_name "
        "project trackio_space_id trackio_bucket_id trackio_static_space_id debug skip_memory_metrics do_train "
        "do_eval do_predict label_names length_column_name",
    ),
)
INHERITED = {name: decision for decision, names in _INHERITED for name in names.split()}
_METADATA = ("decides", "entry", "node", "compared")


class _Metadata(dict):
    """Of a field; who lists or copies it, as parsers of transformers and TRL do, sees what argparse knows alone."""

    def keys(self) -> list[str]:
        return [name for name in self if name not in (*_METADATA, "range")]

    def copy(self) -> dict[str, Any]:
        return {name: self[name] for name in self.keys()}


def told_by_fields(kind: type) -> type:
    """A dataclass whose fields say what they decide, and can be parsed by transformers' and TRL's parsers."""
    for each in kind.__dataclass_fields__.values():
        each.metadata = MappingProxyType(_Metadata(each.metadata))
    return kind


def decision_of(field: Field) -> Decision:
    """What a setting of any of the dataclasses decides.

    Raises:
        ValueError: its metadata says what is none of the above.
    """
    said = {name: field.metadata[name] for name in _METADATA if name in field.metadata}
    if "decides" in said:
        if said["decides"] not in KINDS:
            raise ValueError(f"Expected {field.name} to decide one of {', '.join(KINDS)}, found {said['decides']!r}.")
        return Decision(**said)
    if field.name in INHERITED:
        return INHERITED[field.name]
    return _FIXED if field.name in REFUSED else UNKNOWN


def decisions(types: Iterable[type]) -> dict[str, Decision]:
    """Of all settings of some dataclasses, by name."""
    return {each.name: decision_of(each) for kind in types for each in fields(kind) if each.init}


def where(types: Iterable[type], chosen: Callable[[Decision], bool]) -> tuple[str, ...]:
    """Names of the settings of some dataclasses whose decisions are chosen, in their order."""
    return tuple(name for name, decision in decisions(types).items() if chosen(decision))


def is_held(decision: Decision) -> bool:
    """Whether a run's identity holds the setting under its own name."""
    return decision.decides == "result" and decision.entry is _OWN


def held_values(settings: Any) -> dict[str, Any]:
    """The settings of an instance that decide its results under their own names, a run's identity.

    One of another version of transformers or TRL, which nothing is known of, is among them once it is changed: a run
    does not become another by an update that adds settings.
    """
    found = {}
    for each in fields(settings):
        decision = decision_of(each)
        if each.init and is_held(decision):
            value = getattr(settings, each.name)
            if decision is not UNKNOWN or value != default_of(each):
                found[each.name] = value
    return found


def held_by_default(settings: Any) -> dict[str, Any]:
    """The defaults of all settings that `held_values` may hold."""
    held = (each for each in fields(settings) if each.init and is_held(decision_of(each)))
    return {each.name: default_of(each) for each in held}
