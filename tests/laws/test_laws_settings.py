"""Law 12: a setting that decides a result says so in its field, and a run is not resumed under another value."""

import json
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace

import pytest
from transformers import HfArgumentParser
from trl import ModelConfig, SFTConfig, TrlParser

from fslora_hf.common.settings import SettingsError
from fslora_hf.comparison.arguments import ComparisonArguments
from fslora_hf.config import decides
from fslora_hf.config.arguments import ModelArguments, RecipeArguments
from fslora_hf.config.federation import FederatedSketchConfig
from fslora_hf.config.fields import FederationFields
from fslora_hf.config.refusals import REFUSED
from fslora_hf.federation.server import FederationArguments
from fslora_hf.storage.checkpoint import CheckpointError, describe_difference
from fslora_hf.trainers.identity import identity
from fslora_hf.trainers.resume import _refuse_other_run
from tests.support import tiny
from tests.support.worker_train import QUIET, SMALL

TYPES = (RecipeArguments, FederatedSketchConfig, ModelArguments)
DECISIONS = decides.decisions(TYPES)
RUN = {**QUIET, **SMALL, "num_rounds": 2, "local_steps": 1, "save_rounds": 1}
# Another value of settings for which one more, or the other of two, is none.
OTHERS = {
    "method": "fedit",
    "rank_distribution": "uniform",
    "client_ranks": [1, 2, 3, 4, 2],
    "clients_per_round": 2,
    "min_rank": 1,
    "max_rank": 3,
    "sketch_scope": "model",
    "server_optim": "sgd_momentum",
    "server_learning_rate": 0.5,
    "client_weighting": "num_examples",
    "upload_top_k": 0.5,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "optim": "sgd",
    "optim_args": "betas=(0.5, 0.9)",
    "neftune_noise_alpha": 5.0,
    "loss_type": "dft",
    "data_seed": 7,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
}
HELD = [name for name, decision in DECISIONS.items() if decides.is_held(decision)]


def other(value):
    return not value if isinstance(value, bool) else value + 1


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return build(tmp_path_factory.mktemp("run"))


def build(folder, **settings):
    from fslora_hf import FederatedSketchTrainer

    return FederatedSketchTrainer(
        model=tiny.base_model(),
        args=FederatedSketchConfig(output_dir=str(folder), **{**RUN, **settings}),
        train_dataset=tiny.tokenised(),
        eval_dataset=tiny.tokenised(seed=1) if settings.get("eval_rounds") else None,
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora_config(),
    )


def identity_with(trainer, name, value):
    """The identity of a run that differs in one setting, checked or not."""
    args = trainer.args
    before, cohort = getattr(args, name), trainer.cohort_size
    setattr(args, name, value)
    try:
        cohort = value if name == "clients_per_round" else cohort
        return identity(args, trainer.model, trainer.train_dataset, len(trainer.client_index), cohort)
    finally:
        setattr(args, name, before)


def test_every_setting_says_what_it_decides():
    """Also those of transformers and TRL: one that a new version adds is to be thought of."""
    undecided = [name for name, decision in DECISIONS.items() if decision is decides.UNKNOWN]
    assert not undecided, f"say in config/decides.py what {undecided} decide"
    assert not decides.INHERITED.keys() - DECISIONS.keys(), "settings that are gone"
    for kind in (FederationFields, RecipeArguments, FederationArguments, ComparisonArguments):
        assert all(each.metadata.get("decides") in decides.KINDS for each in fields(kind)), kind
    held = [each.name for each in fields(FederationArguments) if decides.is_held(decides.decision_of(each))]
    assert held == ["recipe", "overrides"], "what a run's identity does not hold has an entry of None"
    inherited = {each.name for kind in (SFTConfig, ModelConfig) for each in fields(kind)}
    assert decides.INHERITED.keys() <= inherited, "a field of ours says it itself"
    assert {each.decides for each in DECISIONS.values()} == {*decides.KINDS}
    assert {each.at_node for each in DECISIONS.values()} == {"obeys", "ignores", "refuses"}


def test_the_identity_has_what_entries_name(trainer):
    found = identity_with(trainer, "num_rounds", 2)
    named = {each.entry for each in DECISIONS.values() if isinstance(each.entry, str)}
    assert {*HELD} | named <= found.keys()


@pytest.mark.parametrize("name", HELD)
def test_law_12_another_value_is_another_run(trainer, name):
    before = identity_with(trainer, "num_rounds", 2)
    value = OTHERS[name] if name in OTHERS else other(getattr(trainer.args, name))
    (difference,) = describe_difference(before, identity_with(trainer, name, value))
    assert difference.startswith(f"{name} was ")


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_law_12_what_shows_elsewhere_shows(trainer, name):
    before = identity_with(trainer, "num_rounds", 2)
    changed = identity_with(trainer, name, other(getattr(trainer.args, name)))
    assert len(describe_difference(before, changed)) == 1


SAME = [name for name, each in DECISIONS.items() if each.decides != "result" or each.entry is None]


@pytest.mark.parametrize("name", [name for name in SAME if name in FederatedSketchConfig.__dataclass_fields__])
def test_law_12_what_decides_no_result_makes_no_other_run(trainer, name):
    before = identity_with(trainer, "num_rounds", 2)
    assert identity_with(trainer, name, "another") == before


OURS_BESIDE = [each.name for each in fields(FederationFields) if DECISIONS[each.name].decides != "result"]
BESIDE = {"per_device_train_clients": 2, "eval_protocol": "loss", "gradient_checkpointing": False}


@pytest.fixture(scope="module")
def plain_adapter(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain"))


def trained(folder, **settings):
    trainer = build(folder, num_rounds=1, **settings)
    trainer.train()
    return [tensor.detach().clone() for tensor in trainer.global_tensors]


@pytest.mark.parametrize("name", OURS_BESIDE)
def test_law_12_what_is_said_to_decide_no_result_changes_none(plain_adapter, tmp_path, name):
    value = BESIDE[name] if name in BESIDE else other(decides.default_of(FederationFields.__dataclass_fields__[name]))
    changed = trained(tmp_path, **{name: value})
    assert max((a - b).abs().max().item() for a, b in zip(plain_adapter, changed, strict=True)) < 1e-9


@pytest.mark.parametrize("name", REFUSED)
def test_law_12_a_setting_of_one_value_has_no_other(name, tmp_path):
    assert DECISIONS[name].entry is None
    if name == "router_aux_loss_coef":
        return
    with pytest.raises(SettingsError, match=f"Expected {name} to be "):
        FederatedSketchConfig(output_dir=str(tmp_path), **{name: 17})


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"sketch_scope": "model"},
        {"server_learning_rate": 0.5},
        {"max_length": 6},
        {"clients_per_round": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_law_12_a_run_is_not_resumed_under_another_value(stopped, tmp_path, change):
    with pytest.raises(CheckpointError, match="Expected a checkpoint of this run, found another's"):
        build(stopped, **change).train(resume_from_checkpoint=True)


def test_law_12_a_run_is_resumed_where_nothing_of_it_changes(stopped):
    args = {"per_device_train_clients": 2, "logging_steps": 7, "save_rounds": 2, "dataloader_num_workers": 0}
    assert build(stopped, **args).train(resume_from_checkpoint=True).global_step > 0


def test_a_run_that_is_resumed_in_another_precision_says_so(stopped, caplog):
    build(stopped, bf16=True).train(resume_from_checkpoint=True)
    (line,) = [text for text in caplog.messages if "rounded otherwise" in text]
    assert line.startswith("The run was begun with bf16 False and goes on with True: from here on")


def test_a_run_that_is_resumed_as_it_was_warns_of_nothing(stopped, caplog):
    build(stopped, per_device_train_clients=2).train(resume_from_checkpoint=True)
    assert not [text for text in caplog.messages if "begun with" in text and "rounded" in text]


@pytest.fixture
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    build(folder, num_rounds=1).train()
    return folder


@dataclass
class OfTomorrow(FederatedSketchConfig):
    """As a version of transformers or TRL that adds a setting."""

    added: float = field(default=0.0, metadata={"help": "New."})


def test_a_setting_of_tomorrow_is_held_once_it_is_used(trainer, tmp_path):
    assert decides.decisions([OfTomorrow])["added"] is decides.UNKNOWN
    plain = decides.held_values(OfTomorrow(output_dir=str(tmp_path), use_cpu=True))
    assert plain == decides.held_values(FederatedSketchConfig(output_dir=str(tmp_path), use_cpu=True))
    assert decides.held_values(OfTomorrow(output_dir=str(tmp_path), use_cpu=True, added=1.0)) == {
        **plain,
        "added": 1.0,
    }


def difference_of(saved, current, args) -> str:
    """What a resume is told of two identities, nothing if it goes on."""
    try:
        _refuse_other_run("here", saved, SimpleNamespace(identity=current, args=args))
    except CheckpointError as error:
        return str(error)
    return ""


def test_law_12_a_run_of_a_version_without_a_setting_goes_on_under_its_default_alone(trainer):
    """As a checkpoint of an earlier version, whose identity has no such entry."""
    default = FederatedSketchConfig.__dataclass_fields__["weight_decay"].default
    plain = identity_with(trainer, "weight_decay", default)
    earlier = {name: value for name, value in plain.items() if name != "weight_decay"}
    assert not difference_of(earlier, plain, trainer.args)
    changed = identity_with(trainer, "weight_decay", 0.5)
    assert "weight_decay was 0.0 and is 0.5" in difference_of(earlier, changed, trainer.args)


def test_law_12_a_version_before_error_feedback(trainer):
    """It has no entry of it, and none of the ranks' list, which are then held as None."""
    plain = identity_with(trainer, "num_rounds", 2)
    earlier = {name: value for name, value in plain.items() if name not in ("error_feedback", "client_ranks")}
    assert not difference_of(earlier, plain, trainer.args)
    assert "error_feedback was None and is True" in difference_of(
        earlier, identity_with(trainer, "error_feedback", True), trainer.args
    )


def test_law_12_a_setting_that_nothing_is_known_of(trainer, tmp_path):
    args = OfTomorrow(output_dir=str(tmp_path), use_cpu=True)
    plain, used = decides.held_values(args), decides.held_values(replace(args, added=1.0))
    plain, used = json.loads(json.dumps(plain)), json.loads(json.dumps(used))
    assert not difference_of(used, used, args) and not difference_of(plain, plain, args)
    assert "added was 0.0 and is 1.0" in difference_of(plain, used, args)
    assert "added was 1.0 and is 0.0" in difference_of(used, plain, args)


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_parsers_of_others_take_what_fields_say(parser, tmp_path):
    flags = ["--num_rounds", "3", "--output_dir", str(tmp_path), "--use_cpu", "--num_clients", "2"]
    flags += ["--model_name_or_path", "x"]
    recipe, args, _ = parser(TYPES).parse_args_into_dataclasses(flags)
    assert args.num_rounds == 3 and recipe.num_clients == 2
    assert FederatedSketchConfig.__dataclass_fields__["num_rounds"].metadata["decides"] == "result"


def test_a_decision_is_one_of_those_there_are():
    @dataclass
    class Wrong:
        setting: int = field(default=0, metadata={"decides": "reslut"})

    with pytest.raises(ValueError, match="Expected setting to decide one of result, .*, found 'reslut'"):
        decides.decisions([Wrong])


def test_a_node_obeys_nothing_that_is_not_decided_on():
    assert replace(decides.UNKNOWN).at_node == "refuses" and decides.Decision("result").at_node == "obeys"
    assert {decides.Decision(kind).at_node for kind in decides.KINDS if kind != "result"} == {"ignores"}
