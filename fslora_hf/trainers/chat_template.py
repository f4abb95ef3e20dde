"""`chat_template_path` for a frozen base: another model's template, without the tokens that only training would teach.

TRL adds the other model's tokens, resizes the embeddings, and trains both ends of the model whole. Here the base stays
as it is, so a template is taken if its tokens are the base's own, and refused before a model is loaded otherwise.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase
from trl.trainer.utils import get_config_model_id

from ..config.federation import FederatedSketchConfig

_FILES = (".jinja", ".j2")


@contextmanager
def borrowed_template(args: FederatedSketchConfig, model: Any, processing_class: Any) -> Iterator[Any]:
    """Give the tokenizer the template and the end of a turn that `args.chat_template_path` names.

    Yields the processing class, which is loaded if there is none. TRL, meanwhile, is told of no path, unless it is the
    file of a template, which it reads itself.

    Raises:
        ValueError: there is no such template, or it needs tokens that the tokenizer lacks.
    """
    path = args.chat_template_path
    if path is None or (str(path).endswith(_FILES) and os.path.isfile(path)):
        yield processing_class
        return
    source, template = _read(path)
    processing_class = processing_class or _processing_class(args, model)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    _check_tokens(path, source, template, tokenizer)
    processing_class.chat_template = tokenizer.chat_template = template
    tokenizer.eos_token = source.eos_token
    args.chat_template_path = None
    try:
        yield processing_class
    finally:
        args.chat_template_path = path


def end_turns_alike(args: FederatedSketchConfig, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a model end its texts as the template that the tokenizer was given does."""
    path = args.chat_template_path
    if path is None or str(path).endswith(_FILES):
        return
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    if model.can_generate():
        model.generation_config.eos_token_id = tokenizer.eos_token_id


def _read(path: str) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer that a template comes from, and the template."""
    try:
        if str(path).endswith(_FILES):
            raise OSError("no such file")
        source = AutoTokenizer.from_pretrained(path)
        return source, source.get_chat_template()
    except (OSError, ValueError) as error:
        what = " ".join(str(error).split())[:200]
        raise ValueError(
            f"Expected chat_template_path to name a .jinja file or a model with a chat template, found {path!r} "
            f"({what}): correct it."
        ) from error


def _processing_class(args: FederatedSketchConfig, model: Any) -> Any:
    """As TRL loads it."""
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    return AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)


def _check_tokens(
    path: str, source: PreTrainedTokenizerBase, template: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    own = tokenizer.get_vocab()
    added = [token.content for token in source.added_tokens_decoder.values() if token.content not in own]
    missing = sorted({token for token in added if token in template} | ({source.eos_token} - {None, *own}))
    if missing:
        tokens = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"Expected chat_template_path to name a template whose tokens the base model has, found {path!r}, which "
            f"would add {tokens}: a frozen base cannot learn them, so name a .jinja file with the template alone, "
            "which spells them with the tokens that there are, or begin with a model that has them."
        )
