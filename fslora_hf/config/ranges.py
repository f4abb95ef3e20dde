"""Numbers that work: the least and the greatest of each setting, so that none fails when a run is under way."""

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, fields
from typing import Any

from ..common.settings import is_a, sentence

LARGEST_SEED = 2**32 - 1  # numpy takes no larger one


@dataclass(frozen=True)
class Range:
    """From `least` to `greatest`, or above the one, or below the other."""

    least: float
    greatest: float
    above: bool = False
    below: bool = False

    def problem(self, name: str, value: Any) -> str | None:
        """A sentence for a number that lies outside, or is none (NaN)."""
        if not (value > self.least if self.above else value >= self.least):
            return sentence(name, f"{'above' if self.above else 'at least'} {self.least}", value, "raise it")
        if not (value < self.greatest if self.below else value <= self.greatest):
            return sentence(name, f"{'below' if self.below else 'at most'} {self.greatest}", value, "lower it")
        return None


def _each(names: str, *bounds: Any, **open_ends: bool) -> dict[str, Range]:
    return dict.fromkeys(names.split(), Range(*bounds, **open_ends))


# What is counted has a bound that no run reaches and every machine can hold. The fields of a federation say theirs in
# their metadata, under `range`; these are of other settings.
RANGES: Mapping[str, Range] = {
    **_each("per_device_train_batch_size per_device_eval_batch_size", 1, 10**6),
    **_each("gradient_accumulation_steps eval_accumulation_steps", 1, 10**6),
    **_each("torch_empty_cache_steps ddp_bucket_cap_mb pad_to_multiple_of", 1, 10**6),
    **_each("dataloader_prefetch_factor", 1, 1024),
    **_each("dataloader_num_workers dataset_num_proc", 0, 1024),
    **_each("lora_r lora_alpha", 1, 2**16),
    **_each("max_length", 2, 2**31 - 1),  # the shift takes the first token from the loss
    **_each("warmup_steps", 0, 10**9),
    **_each("logging_steps", 0, 10**9, above=True),
    **_each("seed data_seed", 0, LARGEST_SEED),
    **_each("learning_rate weight_decay neftune_noise_alpha", 0, 10**6),
    **_each("max_grad_norm", 0, 10**9),  # 0: no clipping
    **_each("adam_beta1 adam_beta2", 0, 1, below=True),
    **_each("adam_epsilon", 1e-30, 1),  # in 32 bits a smaller one is 0, and 0 / 0 the step where a gradient is 0
    **_each("upload_megabytes", 0, 10**12, above=True),
    **_each("join_deadline_s round_deadline_s", 0, 10**9, above=True),  # no clock waits longer
    **_each("ddp_timeout rounds eval_every train_rows_per_task eval_rows_per_task", 1, 10**9),
    **_each("num_clients shards_per_client clients min_clients", 1, 10**9),
}


def range_of(field: Field) -> Range | None:
    """Of a setting, None if it says none."""
    return field.metadata.get("range", RANGES.get(field.name))


def range_problems(settings: Any) -> dict[str, str]:
    """The numbers of a dataclass that lie outside of their range: field name -> sentence."""
    return dict(_range_problems(settings))


def _range_problems(settings: Any) -> Iterator[tuple[str, str]]:
    for each in fields(settings):
        known, value = range_of(each), getattr(settings, each.name)
        problem = known.problem(each.name, value) if known is not None and is_a(value, float) else None
        if problem is not None:
            yield each.name, problem
