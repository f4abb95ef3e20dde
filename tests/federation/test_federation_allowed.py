"""What a node obeys of a recipe, what it takes no notice of and what it refuses: every setting, and every trick."""

import json
import os
import pathlib
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from fslora_hf.common.settings import default_of
from fslora_hf.config.decides import is_held, where
from fslora_hf.config.federation import FederatedSketchConfig
from fslora_hf.federation import allowed
from fslora_hf.federation.node import Node, NodeSettings
from fslora_hf.federation.packet import Packet
from tests.support import federated

PAGE = (Path(__file__).resolve().parents[2] / "docs/federation.md").read_text()
FIELDS = {each.name: each for kind in allowed.RECIPE_TYPES for each in fields(kind)}
SECRET = "hf_" + "aBcDeFgH1jKlMnOpQrStUvWx2z"
GOOD = {  # of the settings whose value is looked at
    "method": "fedit",
    "attn_implementation": "sdpa",
    "dtype": "bfloat16",
    "model_init_kwargs": {"dtype": "auto", "attn_implementation": "eager", "device_map": {"": 0}, "use_cache": False},
    "dataset_kwargs": {"add_special_tokens": False},
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
}


def table() -> dict[str, str]:
    """Setting -> what the page says that a node does with it."""
    section = PAGE.split("## Which settings a node obeys")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (\w+).*? \| .* \|$", section, flags=re.MULTILINE)
    named = [(name, verb) for names, verb in rows for name in re.findall(r"`(\w+)`", names)]
    assert len(named) == len(dict(named)), "a setting has two rows"
    return dict(named)


def other_than_default(name: str):
    """A value of a setting that is not its default."""
    default = default_of(FIELDS[name])
    return not default if isinstance(default, bool) else default + 1 if isinstance(default, int | float) else "other"


@pytest.fixture(autouse=True)
def _without_collection(monkeypatch):
    """A node frees the last trainer's memory before it builds the next: 0.3 s of each of these tests."""
    monkeypatch.setattr("fslora_hf.federation.node.gc.collect", lambda: 0)


def invite(folder: Path, recipe: dict, **settings) -> Packet:
    node = Node(NodeSettings(client_id=0, folder=str(folder / "node"), **settings))
    return node.answer(Packet({"kind": "join", "session": "s", "recipe": recipe}))


def test_every_setting_has_a_row():
    """Of the page, and those that it names are those that there are: a new setting is decided on, or refused."""
    undecided = sorted(FIELDS.keys() - table().keys())
    assert not undecided, f"say in config/decides.py and docs/federation.md what a node does with {undecided}"
    assert table().keys() == {*FIELDS, "env"}
    assert {*allowed.OBEYED} | {*allowed.IGNORED} <= FIELDS.keys()
    # Of what decides a result, a node takes no notice of who takes part and of which round is the best.
    servers = "clients_per_round client_ranks rank_distribution min_rank max_rank".split()
    servers += ["metric_for_best_model", "greater_is_better"]
    assert {*where([FederatedSketchConfig], is_held)} - {*allowed.OBEYED} == {*servers}


@pytest.mark.parametrize("name", [*FIELDS, "env", "a_setting_of_tomorrow"])
def test_a_node_does_what_the_table_says(tmp_path, name):
    value = GOOD.get(name) or (other_than_default(name) if name in FIELDS else {"FSLORA_X": "1"})
    does = table().get(name, "refuses")
    if does == "obeys":
        kept = allowed.obeyed({name: value})
        assert kept[name] == (value | {"use_safetensors": True} if name == "model_init_kwargs" else value)
        assert allowed.told_to_nodes({name: value}) == {name: value}
    elif does == "ignores":
        assert name not in allowed.obeyed({name: value}) | allowed.obeyed({name: value}, trusts_code=True)
        assert allowed.told_to_nodes({name: value}) == {}
    else:
        assert does == "refuses"
        answer = invite(tmp_path, {name: value})
        assert answer.kind == "failed" and f"Expected a recipe without {name}, found" in answer.header["reason"]
        assert "start the node with --trust_code if you trust whoever starts runs" in answer.header["reason"]
        assert allowed.obeyed({name: value}, trusts_code=True) == {name: value}
        if name in FIELDS:
            assert not list(allowed.refusals({name: default_of(FIELDS[name])}))
    assert "FSLORA_X" not in os.environ


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "evil:X"},
        {"attn_implementation": "owner/kernel"},
        {"attn_implementation": "kernels-community/flash-attn2"},
        {"attn_implementation": "paged|owner/kernel"},
        {"attn_implementation": "flash_attention_3"},  # whose package is not here: the Hub's would be fetched
        {"attn_implementation": ["sdpa"]},
        {"model_init_kwargs": {"trust_remote_code": True}},
        {"model_init_kwargs": {"weights_only": False}},
        {"model_init_kwargs": {"use_safetensors": False}},
        {"model_init_kwargs": {"allow_all_kernels": True}},
        {"model_init_kwargs": {"use_kernels": True}},
        {"model_init_kwargs": {"attn_implementation": "owner/kernel"}},
        {"model_init_kwargs": '{"attn_implementation": "owner/kernel"}'},
        {"model_init_kwargs": "a text"},
        {"model_init_kwargs": ["attn_implementation"]},
        {"model_init_kwargs": {"text_config": {"attn_implementation": "owner/kernel"}}},
        {"model_init_kwargs": {"cache_dir": "/home/x"}},
        {"model_init_kwargs": {"offload_folder": "/home/x"}},
        {"model_init_kwargs": {"offload_state_dict": True}},
        {"model_init_kwargs": {"device_map": {"model.layers.0": "disk"}}},
        {"model_init_kwargs": {"max_memory": {"cpu": 1}}},
        {"model_init_kwargs": {"token": SECRET}},
        {"model_init_kwargs": {"proxies": {"https": "http://user:password@x"}}},
        {"model_init_kwargs": {"gguf_file": "x.gguf"}},
        {"model_init_kwargs": {"quantization_config": {"quant_method": "gptq"}}},
        {"model_init_kwargs": {"revision": "another"}},
        {"model_init_kwargs": {"dtype": {"": "float32"}}},
        {"dtype": "__class__"},
        {"dataset_kwargs": {"num_proc": 10**9}},
        {"activation_checkpointing_kwargs": {"context_fn": "x"}},
        {"gradient_checkpointing_kwargs": {"use_reentrant": {"x": 1}}},
    ],
    ids=lambda recipe: json.dumps(recipe).replace(SECRET, "..."),
)
def test_what_could_bring_code_or_reach_out_is_refused(tmp_path, recipe):
    answer = invite(tmp_path, recipe)
    (name,) = recipe
    assert answer.kind == "failed" and f"Expected a recipe without {name}" in answer.header["reason"]
    assert "--trust_code" in answer.header["reason"] and SECRET not in answer.header["reason"]
    assert allowed.obeyed(recipe, trusts_code=True) == recipe


class _Evil:
    """Leaves a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.marker),)


@pytest.mark.parametrize("beside", ["safetensors", "nothing"])
@pytest.mark.parametrize("keys", [{"weights_only": False, "use_safetensors": False}, {}], ids=["asked", "unasked"])
def test_no_node_unpickles_weights(tmp_path, keys, beside):
    source = federated.write_model_and_rows(tmp_path)
    marker, config = tmp_path / "marker", source / "model" / "config.json"
    torch.save(_Evil(marker), source / "model" / "pytorch_model.bin")
    values = json.loads(config.read_text())
    config.write_text(json.dumps({key: values[key] for key in values if "dtype" not in key}))
    if beside == "nothing":
        (source / "model" / "model.safetensors").unlink()
    recipe = yaml.safe_load(federated.write_recipe(source, tmp_path, client_ranks=None).read_text())
    answer = invite(tmp_path, recipe | ({"model_init_kwargs": keys} if keys else {}))
    assert not marker.exists()
    if keys:
        assert "weights_only" in answer.header["reason"] and "use_safetensors" in answer.header["reason"]
    elif beside == "nothing":
        assert "Expected weights (*.safetensors) in" in answer.header["reason"]
    else:
        assert answer.kind == "joined", answer.header


@pytest.mark.parametrize("text", ["", '{"use_cache": false}'], ids=["none", "as a text"])
def test_a_node_loads_safetensors_alone_also_unasked(text):
    assert allowed.obeyed({"model_init_kwargs": text})["model_init_kwargs"]["use_safetensors"] is True


@pytest.mark.parametrize(
    "configuration",
    [{"attn_implementation": "owner/kernel"}, {"text_config": {"experts_implementation": "owner/kernel"}}],
    ids=str,
)
def test_a_model_that_asks_for_a_kernel_is_refused(tmp_path, configuration):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **configuration}))
    (problem,) = allowed.model_refusals(str(tmp_path), "main")
    assert "_implementation in the model's config.json, found 'owner/kernel'" in problem and "--trust_code" in problem
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "attn_implementation": "sdpa"}))
    assert not list(allowed.model_refusals(str(tmp_path), "main"))


def test_a_node_asks_the_model_itself(tmp_path):
    source = federated.write_model_and_rows(tmp_path)
    config = source / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attn_implementation": "owner/kernel"}))
    recipe = yaml.safe_load(federated.write_recipe(source, tmp_path).read_text())
    answer = invite(tmp_path, recipe)
    assert answer.kind == "failed" and "in the model's config.json" in answer.header["reason"]


def test_a_model_with_an_adapter_of_its_own_is_refused(tmp_path):
    """transformers would load the adapter, and of a repository of the Hub the base that it names, which nobody saw."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/other"}))
    (problem,) = allowed.model_refusals(str(tmp_path), "main")
    assert "without an adapter beside the model's config.json" in problem and "--trust_code" in problem


@pytest.mark.parametrize("part", ["tokenizer", "model"])
def test_nobody_at_the_terminal_is_asked_to_run_code(tmp_path, monkeypatch, part):
    source, marker, asked = federated.write_model_and_rows(tmp_path), tmp_path / "marker", []
    monkeypatch.setattr("builtins.input", lambda *texts: asked.append(texts) or "y")
    (source / "model" / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    name, auto = {
        "tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Own", None]}}),
        "model": ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}),
    }[part]
    auto |= {"tokenizer_class": "Own"} if part == "tokenizer" else {}
    file = source / "model" / name
    file.write_text(json.dumps(json.loads(file.read_text()) | auto))
    answer = invite(tmp_path, yaml.safe_load(federated.write_recipe(source, tmp_path, client_ranks=None).read_text()))
    assert answer.kind == "failed" and not asked and not marker.exists()


def test_nodes_are_told_no_secret(caplog):
    values = {"pad_token": "<pad>", "model_revision": "0123456789abcdef0123456789abcdef01234567", "lora_r": 4,
              "model_init_kwargs": {"token": SECRET, "use_cache": False, "use_auth_token": True,
                                    "a": [{"api_key": "mine"}, SECRET, "x"]}, "eos_token": SECRET}  # fmt: skip
    told = allowed.told_to_nodes(values | {"hub_token": SECRET})
    assert told == {name: values[name] for name in ("pad_token", "model_revision", "lora_r")} | {
        "model_init_kwargs": {"use_cache": False, "use_auth_token": True, "a": [{}, "x"]}
    }
    assert SECRET not in caplog.text and "Nodes are not told" in caplog.text
    assert "model_init_kwargs.token" in caplog.text


def test_no_secret_in_a_text_of_a_mapping_is_told():
    text = '{"token": "no-known-prefix", "use_cache": false}'
    assert allowed.told_to_nodes({"model_init_kwargs": text}) == {"model_init_kwargs": {"use_cache": False}}


def test_no_token_of_the_server_crosses_the_wire(tmp_path):
    settings = {"num_rounds": 1, "hub_token": SECRET, "model_init_kwargs": {"token": SECRET}}
    recipe = federated.write_recipe(federated.write_model_and_rows(tmp_path), tmp_path, **settings)
    exchange = federated.LocalExchange(federated.make_nodes(tmp_path))
    federated.federate(recipe, exchange)
    assert len(exchange.came) > federated.CLIENTS
    assert not [packet for _, packet in exchange.sent if SECRET.encode() in packet.to_bytes()]


def test_no_row_of_a_node_crosses_the_wire_in_an_error(tmp_path, caplog):
    row = {"instruction": "Is it? Answer format: true/false", "output": "MY DIARY", "answer": "true"}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    recipe = federated.write_recipe(federated.write_model_and_rows(tmp_path), tmp_path, client_ranks=None)
    answer = invite(tmp_path, yaml.safe_load(recipe.read_text()), data=str(tmp_path / "own.jsonl"))
    assert answer.header["reason"].startswith("client 0: Expected --data to hold rows that can be used")
    assert "DIARY" not in answer.header["reason"] and "DIARY" in caplog.text  # which its owner is told


def test_no_token_in_a_file_of_a_node_crosses_the_wire(tmp_path):
    source = federated.write_model_and_rows(tmp_path)
    (tmp_path / "credentials.csv").write_text(f"user,{SECRET}\na,b\n")
    settings = {"dataset": str(tmp_path / "credentials.csv"), "partition": "column", "partition_column": "x"}
    recipe = federated.write_recipe(source, tmp_path, client_ranks=None, **settings)
    answer = invite(tmp_path, yaml.safe_load(recipe.read_text()))
    assert "found ['user', '***']" in answer.header["reason"]
