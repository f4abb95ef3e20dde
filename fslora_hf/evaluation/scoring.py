"""From a recipe to result files: what recipes/evaluate.py does, callable from elsewhere."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import get_quantization_config

from ..common.processes import agree, world
from ..config.federation import FederatedSketchConfig
from ..config.recipe import ModelArguments
from ..models.description import adapter_digest, describe_model
from ..models.folding import folded_base
from ..models.quantized import keep_as_stored
from ..storage.result_files import slug
from .journal import Journal
from .results import AdapterSource, Subject, find_results, identity, make_results, versions, write_results
from .runner import EvaluationProtocol, make_protocol, score_rows
from .subjects import EvaluationArguments, FoundAdapter, check_base_name, check_base_shapes, find_adapters

logger = logging.getLogger(__name__)


def evaluate(
    arguments: EvaluationArguments, args: FederatedSketchConfig, model_args: ModelArguments, rows: Dataset
) -> tuple[list[dict[str, Any]], Path]:
    """Score what `arguments` name on `rows`; returns the contents of the result files, and their folder.

    The base model comes first where it is asked for, or nothing else or a whole run is named. Results that stand in
    the folder already are read, not made again; an evaluation that was killed goes on.

    Raises:
        ValueError: there is nothing to score, an adapter does not fit the base, or the folder holds other results.
    """
    device = args.device  # asked for first: it also sets up the processes
    adapters, run = agree(lambda: find_adapters(arguments.adapter))
    for found in adapters:
        check_base_name(found, model_args.model_name_or_path, arguments.allow_other_base)
    folder = Path(arguments.results_dir or (run / "evaluation" if run else "outputs/evaluation"))
    # A recipe that measures the loss alone in training can be scored all the same.
    asked = "loglikelihood" if args.eval_protocol in (None, "loss") else args.eval_protocol
    protocol = make_protocol(asked, args.eval_num_beams, args.eval_max_new_tokens)
    model, tokenizer = load_base(model_args, device)
    for found in adapters:
        check_base_shapes(found, model)
    subjects = [None, *adapters] if run or arguments.with_base or not adapters else adapters
    results = []
    for found in subjects:
        with _with_adapter(model, found) as scored:
            subject = _subject(scored, found, model_args)
            label = found.label if found else slug([Path(model_args.model_name_or_path).name])
            results.append(
                _score(subject, scored, tokenizer, protocol, rows, args, folder, f"{label}.{protocol.name}")
            )
    return results, folder


def load_base(model_args: ModelArguments, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model, in the precision and quantization that the recipe asks for, and its tokenizer."""
    source = {"revision": model_args.model_revision}
    quantization = get_quantization_config(model_args)
    options = {} if quantization is None else {"quantization_config": quantization, "device_map": {"": device}}
    dtype = model_args.dtype if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        dtype=dtype,
        attn_implementation=model_args.attn_implementation,
        **source,
        **options,
    )
    if quantization is None:
        model.to(device)
    keep_as_stored(model)
    return model.eval(), AutoTokenizer.from_pretrained(model_args.model_name_or_path, **source)


@contextmanager
def _with_adapter(base: PreTrainedModel, found: FoundAdapter | None) -> Iterator[nn.Module]:
    """The base with an adapter, and the base alone again afterwards."""
    if found is None:
        yield base
        return
    with folded_base(base, found.folder):
        model = PeftModel.from_pretrained(base, str(found.folder))
        try:
            yield model.eval()
        finally:
            model.unload()


def _subject(model: nn.Module, found: FoundAdapter | None, model_args: ModelArguments) -> Subject:
    if found is None:
        return Subject(Path(model_args.model_name_or_path).name, describe_model(model))
    base = describe_model(model.get_base_model())
    digest = adapter_digest(get_peft_model_state_dict(model, save_embedding_layers=False))
    return Subject(found.name, base, AdapterSource(found.source, digest, found.revision, found.round))


def _score(
    subject: Subject,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    protocol: EvaluationProtocol,
    rows: Dataset,
    args: FederatedSketchConfig,
    folder: Path,
    name: str,
) -> dict[str, Any]:
    """The results of one subject: those that stand, or new ones."""
    wanted = identity(subject, protocol, rows)
    journal, started = Journal(folder, name, wanted | {"versions": versions()}), time.monotonic()
    standing = agree(lambda: _standing(folder, name, wanted, journal))
    if standing is not None:
        return standing
    batch_size = args.per_device_eval_batch_size
    asking = {"journal": journal, "merge": True, "description": f"Scoring {subject.name}"}
    scores = score_rows(model, tokenizer, rows, protocol, batch_size, **asking)
    results = make_results(
        subject,
        protocol,
        rows,
        scores,
        seed=args.seed,
        seconds=time.monotonic() - started,
        processes=world(),
        batch_size=batch_size,
    )
    agree(lambda: (write_results(folder, name, results, scores), journal.remove()))
    return results


def _standing(folder: Path, name: str, wanted: dict[str, Any], journal: Journal) -> dict[str, Any] | None:
    found = find_results(folder, name, wanted)
    if found is not None:
        logger.info("Read from %s, not made again.", folder / name)
        journal.remove()  # of an attempt that was killed right after it wrote its results
    return found
