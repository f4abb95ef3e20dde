"""FederatedSketchConfig: its defaults, what it refuses and in which words, and that it survives copies."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from transformers import Trainer
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from fslora_hf.common.settings import SettingsError
from fslora_hf.config.federation import FederatedSketchConfig
from fslora_hf.config.fields import METHODS, RANK_DISTRIBUTIONS, SERVER_OPTIMIZERS
from fslora_hf.config.refusals import LOCAL_OPTIMIZERS, REFUSED
from fslora_hf.methods import METHODS as METHOD_CLASSES
from fslora_hf.rounds.ranks import RANK_LAWS
from fslora_hf.rounds.server import ServerState

ROUND_ENDS = "checkpoints are written at round ends, so remove it and set save_rounds"
EVALUATION = "evaluations run at round ends, so remove it and set eval_rounds"
LENGTH = "num_rounds and local_steps say how long a run is, so remove it and set those"
WHOLE_COPY = "each process trains its own clients on a whole copy of the model, so leave it out"
OWN_ROW = "every example belongs to one client and keeps a row of its own, so remove it"
PLAN = "the plan of a round says which examples a step sees and in which order, so remove it"


def make(**settings) -> FederatedSketchConfig:
    return FederatedSketchConfig(**{"output_dir": "unused", "use_cpu": True, "bf16": False} | settings)


def problems_of(**settings) -> list[str]:
    with pytest.raises(ValueError) as caught:
        make(**settings)
    assert isinstance(caught.value, SettingsError)
    # The message lists each problem on a line of its own.
    assert str(caught.value).split("\n- ")[1:] == caught.value.problems
    return caught.value.problems


def test_the_defaults_are_the_papers_algorithm():
    config = make()
    expected = {
        "num_rounds": 100,
        "clients_per_round": None,
        "local_steps": 20,
        "per_device_train_clients": 1,
        "method": "fslora",
        "client_id_column": "client_id",
        "min_examples": 1,
        "client_ranks": None,
        "rank_distribution": "homogeneous",
        "min_rank": None,
        "max_rank": None,
        "sketch_scope": "module",
        "server_optim": "sgd",
        "server_learning_rate": None,
        "upload_top_k": None,
        "error_feedback": False,
        "upload_budget": None,
        "client_weighting": "uniform",
        "save_rounds": 10,
        "max_lost_rounds": 3,
        "eval_rounds": 0,
        "push_rounds": 10,
        "push_resume_state": False,
        "push_eval_results": True,
        "push_eval_yaml": False,
        "hub_deadline": 600.0,
        "eval_protocol": None,
        "eval_num_beams": 4,
        "eval_max_new_tokens": 32,
        "overlong_prompts": "truncate",
        "save_strategy": "no",
        "eval_strategy": "no",
        "average_tokens_across_devices": False,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    added = {f.name for f in dataclasses.fields(FederatedSketchConfig)} - {
        f.name for f in dataclasses.fields(SFTConfig)
    }
    assert added < expected.keys() and all(
        f.metadata["help"] for f in dataclasses.fields(FederatedSketchConfig) if f.name in added
    )


def test_names_are_those_of_the_parts_they_configure():
    assert METHODS == tuple(METHOD_CLASSES)
    assert RANK_DISTRIBUTIONS == tuple(RANK_LAWS)
    for optimizer in SERVER_OPTIMIZERS:
        ServerState({"m": torch.zeros(1, 2)}, {"m": torch.zeros(2, 1)}, optimizer, 1.0)
    with pytest.raises(KeyError):
        ServerState({"m": torch.zeros(1, 2)}, {"m": torch.zeros(2, 1)}, "no such optimizer", 1.0)


@pytest.mark.parametrize(
    ("optimizer", "rate", "resolved"),
    [("sgd", None, 1.0), ("sgd_momentum", None, 1.0), ("adam", None, 1e-3), ("adamw", None, 1e-3), ("sgd", 2, 2.0)],
)
def test_the_servers_rate_depends_on_its_optimizer(optimizer, rate, resolved):
    assert make(server_optim=optimizer, server_learning_rate=rate).resolved_server_learning_rate == resolved


NEW_BASIS = (
    "flexlora learns in new directions each round, in which neither a part of a step nor moments of "
    "earlier rounds mean anything, so remove it."
)

SHARE = "give a share such as 0.1, or remove it to send all."

# Every refusal, word by word: what was expected, what was found and how to mend it.
REFUSALS = [
    ({"save_strategy": "steps"}, f"save_strategy to be left at 'no', found 'steps': {ROUND_ENDS}."),
    ({"save_strategy": "epoch"}, f"save_strategy to be left at 'no', found 'epoch': {ROUND_ENDS}."),
    ({"save_steps": 100}, f"save_steps to be left at 500, found 100: {ROUND_ENDS}."),
    ({"eval_strategy": "steps"}, f"eval_strategy to be left at 'no', found 'steps': {EVALUATION}."),
    ({"eval_steps": 100}, f"eval_steps to be unset, found 100: {EVALUATION}."),
    ({"eval_delay": 2}, f"eval_delay to be left at 0, found 2: {EVALUATION}."),
    ({"num_train_epochs": 1}, f"num_train_epochs to be left at 3.0, found 1: {LENGTH}."),
    ({"max_steps": 10}, f"max_steps to be left at -1, found 10: {LENGTH}."),
    (
        {"push_to_hub": True, "hub_always_push": True},
        "hub_always_push to be left at False, found True: "
        "every chosen round is pushed, whatever is under way, so remove it.",
    ),
    (
        {"hub_strategy": "end"},
        "hub_strategy to be left at 'every_save', found 'end': "
        "rounds are pushed, each whole, so remove it and set push_rounds.",
    ),
    (
        {"load_best_model_at_end": True, "eval_rounds": 0},
        "eval_rounds to be above 0 with load_best_model_at_end, found 0: "
        "set it, so that there are rounds to choose from.",
    ),
    (
        {"save_only_model": True},
        "save_only_model to be left at False, found True: "
        "a run resumes from the server's state beside the model, so remove it.",
    ),
    (
        {"enable_jit_checkpoint": True},
        "enable_jit_checkpoint to be left at False, found True: "
        "it would save in the middle of a round, so remove it and set save_rounds.",
    ),
    (
        {"fp16": True},
        "fp16 to be left at False, found True: "
        "one client's overflow would skip the step of all others, so use bf16 or neither.",
    ),
    (
        {"bf16_full_eval": True},
        "bf16_full_eval to be left at False, found True: it would round the global adapter itself, so remove it.",
    ),
    (
        {"fp16_full_eval": True},
        "fp16_full_eval to be left at False, found True: it would round the global adapter itself, so remove it.",
    ),
    ({"fsdp": "full_shard"}, f"fsdp to be unset, found 'full_shard': {WHOLE_COPY}."),
    ({"fsdp": True}, f"fsdp to be unset, found True: {WHOLE_COPY}."),
    ({"deepspeed": {"zero": 3}}, f"deepspeed to be unset, found {{'zero': 3}}: {WHOLE_COPY}."),
    ({"deepspeed": "ds.json"}, f"deepspeed to be unset, found 'ds.json': {WHOLE_COPY}."),
    ({"parallelism_config": "tp"}, f"parallelism_config to be unset, found 'tp': {WHOLE_COPY}."),
    (
        {"auto_find_batch_size": True},
        "auto_find_batch_size to be left at False, found True: "
        "batches are planned ahead, so remove it and lower per_device_train_batch_size.",
    ),
    ({"packing": True}, f"packing to be left at False, found True: {OWN_ROW}."),
    ({"eval_packing": True}, f"eval_packing to be unset, found True: {OWN_ROW}."),
    ({"padding_free": True}, f"padding_free to be left at False, found True: {OWN_ROW}."),
    ({"ignore_data_skip": True}, f"ignore_data_skip to be left at False, found True: {PLAN}."),
    ({"shuffle_dataset": True}, f"shuffle_dataset to be left at False, found True: {PLAN}."),
    ({"dataloader_in_order": False}, f"dataloader_in_order to be left at True, found False: {PLAN}."),
    (
        {"train_sampling_strategy": "sequential"},
        f"train_sampling_strategy to be left at 'random', found 'sequential': {PLAN}.",
    ),
    (
        {"label_smoothing_factor": 0.1},
        "label_smoothing_factor to be left at 0.0, found 0.1: "
        "the loss is computed from the labels' log-probabilities alone, so remove it.",
    ),
    (
        {"restore_callback_states_from_checkpoint": True},
        "restore_callback_states_from_checkpoint to be left at False, found True: "
        "what a round end leaves is in its own state file, so remove it.",
    ),
    (
        {"optim_target_modules": "all-linear"},
        "optim_target_modules to be unset, found 'all-linear': "
        "it belongs to optimizers that mix clients, so remove it.",
    ),
    (
        {"truncation_mode": "keep_end"},
        "truncation_mode to be left at 'keep_start', found 'keep_end': "
        "overlong_prompts says what becomes of long rows, so remove it and set that.",
    ),
    (
        {"router_aux_loss_coef": 0.01},
        "router_aux_loss_coef to be unset, found 0.01: "
        "the auxiliary loss of a batch mixes its clients, so remove it or set it to 0.0.",
    ),
    ({"local_steps": "20"}, "local_steps to be an integer, found '20': write an integer without quotes."),
    ({"local_steps": True}, "local_steps to be an integer, found True: write an integer."),
    ({"local_steps": 2.0}, "local_steps to be an integer, found 2.0: write an integer."),
    ({"num_rounds": None}, "num_rounds to be an integer, found None: write an integer."),
    ({"num_rounds": 0}, "num_rounds to be at least 1, found 0: raise it."),
    ({"clients_per_round": -1}, "clients_per_round to be at least 1, found -1: raise it."),
    ({"per_device_train_clients": 0}, "per_device_train_clients to be at least 1, found 0: raise it."),
    *(
        (
            {"per_device_train_clients": value},
            f"per_device_train_clients to be a number of clients, or auto, found {value!r}: write one of these.",
        )
        for value in (None, "all", 1.5, True)
    ),
    ({"min_examples": 0}, "min_examples to be at least 1, found 0: raise it."),
    ({"save_rounds": -1}, "save_rounds to be at least 0, found -1: raise it."),
    ({"eval_rounds": -1}, "eval_rounds to be at least 0, found -1: raise it."),
    ({"max_rank": 0}, "max_rank to be at least 1, found 0: raise it."),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps to be at least 1, found 0: raise it."),
    ({"max_length": 1}, "max_length to be at least 2, found 1: raise it."),
    ({"warmup_steps": -1}, "warmup_steps to be at least 0, found -1: raise it."),
    ({"learning_rate": float("nan")}, "learning_rate to be at least 0, found nan: raise it."),
    ({"learning_rate": "1e-4"}, "learning_rate to be a number, found '1e-4': write a number without quotes."),
    ({"server_learning_rate": 0}, "server_learning_rate to be above 0, found 0: raise it."),
    ({"server_learning_rate": float("inf")}, "server_learning_rate to be at most 1000000, found inf: lower it."),
    ({"hub_deadline": 0.0}, "hub_deadline to be above 0, found 0.0: raise it."),
    ({"hub_deadline": float("inf")}, "hub_deadline to be at most 1000000000, found inf: lower it."),
    ({"upload_budget": 0.0}, "upload_budget to be above 0, found 0.0: raise it."),
    ({"upload_top_k": 0.0}, f"upload_top_k to be above 0 and at most 1, found 0.0: {SHARE}"),
    ({"upload_top_k": 1.5}, f"upload_top_k to be above 0 and at most 1, found 1.5: {SHARE}"),
    ({"upload_top_k": float("nan")}, f"upload_top_k to be above 0 and at most 1, found nan: {SHARE}"),
    (
        {"error_feedback": True},
        "error_feedback to be off without upload_top_k, found True: set upload_top_k, or remove it.",
    ),
    (
        {"error_feedback": True, "upload_top_k": 0.1, "method": "flexlora"},
        "error_feedback to be off with method=flexlora, found True: what a client leaves out would mean nothing in "
        "its next round, so remove it.",
    ),
    (
        {"error_feedback": True, "upload_top_k": 0.1, "push_resume_state": True},
        "push_resume_state to be off beside error_feedback, found True: what clients have not sent stays with them, "
        "so remove one of the two.",
    ),
    ({"use_cpu": "yes"}, "use_cpu to be true or false, found 'yes': write true or false without quotes."),
    ({"client_id_column": 3}, "client_id_column to be a text, found 3: write a text."),
    (
        {"method": "fslor"},
        "method to be one of fslora, fedit, hetlora, flexlora, flora, flora_residual, ffa_lora or "
        "module:Class, found 'fslor': did you mean "
        "fslora.",
    ),
    (
        {"method": "xyz"},
        "method to be one of fslora, fedit, hetlora, flexlora, flora, flora_residual, ffa_lora or "
        "module:Class, found 'xyz': choose one of "
        "these.",
    ),
    (
        {"method": "flexlora", "server_optim": "adam"},
        f"server_optim to be sgd with method=flexlora, found 'adam': {NEW_BASIS}",
    ),
    (
        {"method": "flexlora", "server_optim": "sgd_momentum", "server_learning_rate": 0.5},
        f"server_optim to be sgd with method=flexlora, found 'sgd_momentum': {NEW_BASIS}",
    ),
    (
        {"method": "flora", "push_to_hub": True},
        "push_to_hub to be off with method=flora, found True: a round on the Hub is an adapter, and this method "
        "changes the base, so remove it or set method to flora_residual.",
    ),
    (
        {"method": "flora", "server_optim": "adam"},
        f"server_optim to be sgd with method=flora, found 'adam': {NEW_BASIS.replace('flexlora', 'flora')}",
    ),
    (
        {"method": "flexlora", "server_learning_rate": 0.5},
        f"server_learning_rate to be 1 or unset with method=flexlora, found 0.5: {NEW_BASIS}",
    ),
    (
        {"rank_distribution": "gaussian"},
        "rank_distribution to be one of homogeneous, uniform, normal, heavy_tail_low, found 'gaussian': "
        "choose one of these.",
    ),
    ({"sketch_scope": "layer"}, "sketch_scope to be one of module, model, found 'layer': choose one of these."),
    (
        {"server_optim": "adam_w"},
        "server_optim to be one of sgd, sgd_momentum, adam, adamw, found 'adam_w': did you mean adamw.",
    ),
    (
        {"client_weighting": "examples"},
        "client_weighting to be one of uniform, num_examples, found 'examples': did you mean num_examples.",
    ),
    (
        {"overlong_prompts": "cut"},
        "overlong_prompts to be one of truncate, drop, keep_start, found 'cut': choose one of these.",
    ),
    (
        {"client_ranks": 4},
        "client_ranks to be a list with a rank for each client, found 4: write one, as in [4, 8, 16].",
    ),
    (
        {"client_ranks": []},
        "client_ranks to be a list with a rank for each client, found []: write one, as in [4, 8, 16].",
    ),
    (
        {"client_ranks": [4, "8"]},
        "client_ranks[1] to be an integer of at least 1, found '8': give every client such a rank.",
    ),
    (
        {"client_ranks": [4, 0]},
        "client_ranks[1] to be an integer of at least 1, found 0: give every client such a rank.",
    ),
    (
        {"client_ranks": [True]},
        "client_ranks[0] to be an integer of at least 1, found True: give every client such a rank.",
    ),
    (
        {"client_ranks": [4, 8], "rank_distribution": "uniform", "min_rank": 1},
        "client_ranks to be unset beside min_rank, rank_distribution, found [4, 8]: "
        "remove client_ranks or min_rank, rank_distribution.",
    ),
    (
        {"rank_distribution": "uniform", "min_rank": 9, "max_rank": 8},
        "min_rank to be at most max_rank (8), found 9: lower it or raise max_rank.",
    ),
    (
        {"min_rank": 2, "max_rank": 8},
        "min_rank to be unset or equal to max_rank (8) for homogeneous ranks, found 2: "
        "remove it, or choose a rank_distribution under which ranks differ.",
    ),
]


@pytest.mark.parametrize(("settings", "text"), REFUSALS, ids=[str(settings)[:60] for settings, _ in REFUSALS])
def test_a_setting_that_cannot_work_is_refused(settings, text):
    assert problems_of(**settings) == [f"Expected {text}"]


def test_every_refused_setting_has_a_case_above():
    assert REFUSED.keys() <= {name for settings, _ in REFUSALS for name in settings}


@pytest.mark.parametrize(
    "settings",
    [
        {"save_strategy": "no", "eval_strategy": "no", "packing": False, "eval_packing": False, "fsdp": ""},
        {"router_aux_loss_coef": 0.0, "label_smoothing_factor": 0.0, "deepspeed": None, "max_steps": -1},
        {"rank_distribution": "normal", "min_rank": 1, "max_rank": 8, "clients_per_round": 3},
        {"max_rank": 4, "min_rank": 4, "save_rounds": 0, "max_length": None, "warmup_steps": 0.1},
        {"method": "flexlora", "server_optim": "sgd", "server_learning_rate": 1.0},
        {"method": "hetlora", "server_optim": "adam", "server_learning_rate": 0.5},
        {"torch_compile": False, "neftune_noise_alpha": 5, "data_seed": 3, "resume_from_checkpoint": "a/path"},
    ],
)
def test_explicit_values_that_work_are_taken(settings):
    config = make(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_all_problems_are_told_at_once():
    found = problems_of(
        num_rounds=0,
        local_steps="20",
        method="fslor",
        optim="adafactor",
        save_strategy="steps",
        deepspeed={"zero": 3},
        packing=True,
        min_rank=9,
        max_rank=8,
        rank_distribution="normal",
        torch_empty_cache_steps=-1,  # refused by transformers itself
    )
    starts = ["num_rounds", "local_steps", "method", "optim", "save_strategy", "deepspeed", "packing", "min_rank"]
    for name in starts:
        assert sum(text.startswith(f"Expected {name} to be ") for text in found) == 1, name
    assert any("torch_empty_cache_steps" in text for text in found)
    assert len(found) == len(starts) + 1


def test_a_value_refused_here_does_not_trip_the_classes_above():
    assert len(problems_of(warmup_steps="many")) == 1
    assert len(problems_of(load_best_model_at_end=True, save_steps=3, eval_strategy="epoch")) == 3


@pytest.mark.parametrize("name", [each.value for each in OptimizerNames if each.value not in LOCAL_OPTIMIZERS])
def test_other_optimizers_are_refused_with_the_reason(name):
    [text] = problems_of(optim=name)
    assert text.startswith(f"Expected optim to be one of {', '.join(LOCAL_OPTIMIZERS)}, found '{name}': ")
    reasons = {
        "adafactor": "row and column statistics mix clients",
        "8bit": "quantized in blocks that mix clients",
        "4bit": "quantized in blocks that mix clients",
        "galore": "projects whole matrices",
        "apollo": "projects whole matrices",
        "lomo": "inside the backward pass",
        "paged": "pages are never freed",
    }
    wanted = [reason for part, reason in reasons.items() if part in name]
    assert not wanted or any(reason in text for reason in wanted)
    assert text.endswith(", so choose one of these.")


def test_an_unknown_optimizer_or_schedule_is_compared_with_known_ones():
    assert problems_of(optim="adamw_torch_fuse")[0].endswith(
        "found 'adamw_torch_fuse': did you mean adamw_torch_fused."
    )
    assert problems_of(lr_scheduler_type="cosin")[0].endswith("found 'cosin': did you mean cosine.")
    for name in ("reduce_lr_on_plateau", "greedy"):
        [text] = problems_of(lr_scheduler_type=name)
        assert text.endswith("the rate is a function of the round, not of what it led to, so choose one of these.")


@pytest.mark.parametrize("name", LOCAL_OPTIMIZERS)
def test_local_optimizers_treat_stacked_clients_one_by_one(name):
    """Two clients in one tensor move as each does alone: the property that the allowed names stand for."""
    pytest.importorskip("bitsandbytes")
    kind, options = Trainer.get_optimizer_cls_and_kwargs(make(optim=name, weight_decay=0.1, learning_rate=0.1))
    start, gradients = torch.randn(2, 8, 16), torch.randn(3, 2, 8, 16) * torch.tensor([1.0, 100.0]).view(1, 2, 1, 1)

    def after_three_steps(rows: slice) -> torch.Tensor:
        parameter = torch.nn.Parameter(start[rows].clone())
        optimizer = kind([parameter], **options)
        for gradient in gradients:
            parameter.grad = gradient[rows].clone()
            optimizer.step()
        return parameter.detach()

    together = after_three_steps(slice(0, 2))
    alone = torch.cat([after_three_steps(slice(0, 1)), after_three_steps(slice(1, 2))])
    assert not torch.equal(together, start)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        (
            "ACCELERATE_USE_DEEPSPEED",
            "true",
            "the launch to be free of DeepSpeed, found 'ACCELERATE_USE_DEEPSPEED=true'",
        ),
        ("ACCELERATE_USE_FSDP", "True", "the launch to be free of FSDP, found 'ACCELERATE_USE_FSDP=True'"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "the launch to be free of Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "the launch to be free of a parallelism_config"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "the launch's mixed_precision to be no or bf16, found 'fp16'"),
    ],
)
def test_what_accelerate_was_told_is_checked_too(monkeypatch, variable, value, text):
    monkeypatch.setenv(variable, value)
    [found] = problems_of()
    assert found.startswith(f"Expected {text}") and "launch with one of recipes/accelerate_configs" in found
    assert len(problems_of(num_rounds=0)) == 2


def test_the_recipes_bf16_takes_precedence_over_the_launcher(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert make(bf16=True).mixed_precision == "bf16"


def test_activation_checkpointing_is_on_without_a_warning_and_follows_either_name():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on, off = make(), make(activation_checkpointing=False)
    assert (on.activation_checkpointing, on.gradient_checkpointing) == (True, True)
    assert (off.activation_checkpointing, off.gradient_checkpointing) == (False, False)
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):
        old = make(gradient_checkpointing=False)
    assert (old.activation_checkpointing, old.gradient_checkpointing) == (False, False)


def test_copies_keep_every_setting():
    original = make(client_ranks=(1, 2), server_optim="adamw", lr_scheduler_type="cosine", optim="sgd", min_examples=3)
    copy = dataclasses.replace(original, num_rounds=7)
    assert (
        copy.num_rounds == 7
        and copy.client_ranks == [1, 2]
        and copy.to_dict() == original.to_dict() | {"num_rounds": 7}
    )
    # to_dict() writes a placeholder for tokens, whatever they are.
    told = {
        name: value for name, value in json.loads(original.to_json_string()).items() if not name.endswith("_token")
    }
    assert FederatedSketchConfig(**told).to_json_string() == original.to_json_string()


def test_ranks_may_be_an_array_and_a_resume_flag_a_text():
    assert make(client_ranks=np.array([2, 4])).client_ranks == [2, 4]
    assert make(resume_from_checkpoint="true").resume_from_checkpoint is True
    assert make(resume_from_checkpoint=False).resume_from_checkpoint is False


def test_token_counts_are_never_averaged_over_processes():
    assert make(average_tokens_across_devices=True).average_tokens_across_devices is False


def test_a_long_list_does_not_fill_the_screen():
    [text] = problems_of(client_ranks=[4] * 100_000, max_rank=4)
    assert len(text) < 300
