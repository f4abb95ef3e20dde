"""The text of a model card: what a run is, how to load it, its scores, how to make it again."""

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from ..common.foreign_text import LONGEST_MESSAGE
from ..reports.markdown import count, duration, fenced, one_line, percent, plain, size, without_tokens
from ..reports.tables import as_markdown
from .card_context import CardContext, hub_id, round_tag
from .card_scores import SHOWN_ROUNDS, score_section

# Name, source and what each client trains, to follow "trained by federated learning: ".
_METHODS = {
    "fslora": (
        "Federated Sketching LoRA",
        "2501.19389",
        "a random part of the adapter that fits its rank, drawn anew each round",
    ),
    "fedit": ("FedIT", "2305.05644", "a copy of the whole adapter"),
    "hetlora": ("HetLoRA", "2401.06432", "the first rows of the adapter that fit its rank"),
    "flexlora": ("FlexLoRA", "2402.11505", "the best part of the adapter that fits its rank"),
    "flora": ("FLoRA", "2409.05976", "a new adapter of its rank, which is then folded into the base"),
    "flora_residual": ("FLoRA", "2409.05976", "a new adapter of its rank beside the adapter that all have"),
    "ffa_lora": ("FFA-LoRA", "2403.12313", "the half B of the adapter, A being frozen"),
}


def card_body(context: CardContext) -> str:
    """The Markdown below the metadata."""
    parts = [f"# {plain(context.name)}", _introduction(context), _loading(context), _facts(context)]
    parts += [score_section(context), _plots(context.plots)]
    if context.command:
        parts.append(f"## Reproduce\n\n{fenced(without_tokens(context.command), 'sh')}")
    parts.append(f"## Citation\n\n{fenced(context.citation, 'bibtex')}")
    return "\n\n".join(part for part in parts if part)


# ---- sections ----


def _introduction(context: CardContext) -> str:
    name, _, part = _METHODS.get(context.method, (context.method, None, "its part of the adapter"))
    progress = f"after {context.rounds_done} of {context.num_rounds} rounds"
    if context.rounds_done == context.num_rounds:
        progress = f"after {count(context.rounds_done, 'round')}"
    return (
        f"A LoRA adapter for {_base(context)}, trained by federated learning with {plain(name)} and shown here "
        f"{progress}. In each round {count(context.clients_per_round, 'client')} of {context.num_clients:,} trained "
        f"{part}, and a server averaged what they returned; {_crossed_the_wire(context.simulated)}"
    )


def _crossed_the_wire(simulated: bool) -> str:
    if simulated:
        return "the federation was simulated, so bytes were counted and not sent."
    return "each client was a node of its own, which kept its rows, and bytes are those that were sent."


def _base(context: CardContext) -> str:
    return _link(context, context.base_model) or f"`{_shown_base(context)}`"


def _shown_base(context: CardContext) -> str:
    """The base's name, of a local folder the last part: the card is no place for a machine's paths."""
    if hub_id(context.base_model):
        return context.base_model
    return one_line(re.split(r"[/\\]", context.base_model.rstrip("/\\"))[-1]).replace("`", "'")


def _link(context: CardContext, name: str, kind: str = "") -> str | None:
    known = hub_id(name)
    return known and f"[{plain(known)}]({context.endpoint}/{kind}{known})"


def _loading(context: CardContext) -> str:
    arguments = json.dumps(_shown_base(context), ensure_ascii=False)
    if context.base_revision:
        arguments = f"\n    {arguments},\n    revision={json.dumps(context.base_revision)},\n"
    local = "" if hub_id(context.base_model) else "  # your copy of it"
    tags = [f"`{round_tag(number)}`" for number in sorted({*context.pushed_rounds, context.rounds_done})]
    if len(tags) > SHOWN_ROUNDS:
        tags[2:-3] = ["..."]
    repo, tag = json.dumps(context.repo_id), json.dumps(context.tag)
    code = f"""\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({arguments}){local}
model = PeftModel.from_pretrained(base, {repo}, revision={tag})
tokenizer = AutoTokenizer.from_pretrained({repo}, revision={tag})"""
    return (
        f"## Load it\n\n{fenced(code, 'python')}\n\n"
        f"Each pushed round has a tag of its own ({', '.join(tags)}), and `main` holds the latest.\n\n"
        "> [!WARNING]\n"
        f"> Do not use `AutoModelForCausalLM.from_pretrained({repo}, revision={tag})`: the revision would be applied "
        "to the base model as well, which has none of that name."
    )


def _facts(context: CardContext) -> str:
    name, paper, _ = _METHODS.get(context.method, (context.method, None, ""))
    base = _base(context) + (f" at `{one_line(context.base_revision)[:12]}`" if context.base_revision else "")
    targets = [context.target_modules] if isinstance(context.target_modules, str) else sorted(context.target_modules)
    links = ", ".join(filter(None, (_link(context, name, "datasets/") for name in context.datasets)))
    total = context.totals
    facts = {
        "base model": base + (f", in {plain(context.quantization)}" if context.quantization else ""),
        "data": plain(context.data, LONGEST_MESSAGE) + (f" ({links})" if links else ""),
        "method": plain(name) + (f" ([arXiv:{paper}](https://arxiv.org/abs/{paper}))" if paper else ""),
        "adapter": f"LoRA of rank {context.rank}, alpha {context.alpha:g}, on {', '.join(map(plain, targets))}",
        "clients": f"{context.num_clients:,}, of ranks {plain(context.client_ranks)}",
        "a round": f"{count(context.clients_per_round, 'client')}, {count(context.local_steps, 'local step')} each",
        "rounds": f"{context.rounds_done:,} of {context.num_rounds:,}",
        **({"best round": plain(context.best)} if context.best else {}),
        "bytes moved": _moved(total),
        "refused updates": f"{total['refused']:,}" if total["refused"] else "none",
        "training time": duration(total["seconds"]),
    }
    lines = [["", plain(context.name)], *([key.replace(" ", "&nbsp;"), value] for key, value in facts.items())]
    return "## The run\n\n" + as_markdown(lines, left=(0, 1))


def _moved(total: Mapping[str, Any]) -> str:
    if not total["ratio"]:
        return "none"
    moved, down, up, full = (size(total[f"bytes_{key}"]) for key in ("total", "down", "up", "full_rank"))
    share = percent(total["ratio"])
    return f"{moved} ({down} to clients, {up} back): **{share} %** of the {full} of full-rank federated LoRA"


def _plots(plots: Mapping[str, str]) -> str:
    lines = [f"![{plain(title)}]({quote(path)})" for title, path in plots.items()]
    return "\n\n".join(["## Plots", *lines]) if lines else ""
