"""Our choices against lm-evaluation-harness's, question by question, and the time of both in one run.

    python recipes/benchmarks/lm_eval_agreement.py --model FOLDER --adapter FOLDER --data_dir FOLDER --cpu

Needs `pip install "lm_eval[hf]"`. Both score the same loaded model on the same rows, a task at a time, in turns: ours,
then the harness. Options count as agreeing if both choose the same one; questions whose two best options lie within
1e-4 nats are counted apart, because rounding decides them. Texts agree if the same answer is read from both. Seconds
count, on both sides, reading and tokenising the rows and asking all questions; what is done once (imports, loading the
model, a first pass of a few rows) is not counted. A batch is so many questions for us, so many prompts with one option
each for the harness: as many sequences in a forward pass. The harness's own default, one prompt at a time, is timed on
the first rows of each task.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fslora_hf.data import load_commonsense
from fslora_hf.evaluation import Outcome, score_rows
from fslora_hf.evaluation.outcomes import own_answers, read_answer
from fslora_hf.storage.files import write_text

NEAR = 1e-4  # nats
WHOLE = ("openbookqa", "ARC-Challenge")  # scored on all their rows
TASKS = (*WHOLE, "ARC-Easy", "boolq", "winogrande")
ROOT = Path(__file__).resolve().parents[2]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or name of the base model")
    parser.add_argument("--adapter", help="folder of an adapter; without it the base is scored")
    parser.add_argument("--data_dir", required=True, help="folder of the commonsense rows in the published layout")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--rows", type=int, default=200, help="options: rows of each task that is not scored whole")
    parser.add_argument("--whole", nargs="*", default=list(WHOLE), help="options: tasks scored on all their rows")
    parser.add_argument("--texts", type=int, default=50, help="generation: rows of each task")
    parser.add_argument("--default_rows", type=int, default=24, help="rows of each task timed at the default, 1")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--output", default=str(ROOT / "docs/benchmarks/lm_eval_agreement.json"))
    return parser.parse_args()


class Harness:
    """lm-eval around a loaded model."""

    def __init__(self, model, tokenizer, batch_size: int):
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        self.model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.tasks = TaskManager(include_path=str(ROOT / "recipes/lm_eval"), include_defaults=False)

    def samples(self, task: str, limit: int | None, protocol: str) -> list[dict]:
        """What it makes of the first rows of a task, in their order."""
        from lm_eval import simple_evaluate

        name = "fslora_" + task.lower().replace("-", "_") + ("_generate" if protocol == "generate" else "")
        quiet = {"bootstrap_iters": 0, "verbosity": "ERROR"}
        found = simple_evaluate(model=self.model, tasks=[name], task_manager=self.tasks, limit=limit, **quiet)
        return sorted(found["samples"][name], key=lambda sample: sample["doc_id"])


def our_outcomes(model, tokenizer, args: argparse.Namespace, task: str, limit: int | None, protocol: str):
    rows = load_commonsense(args.data_dir, [task], "test")
    rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
    asking = {"merge": True, "description": f"{task}, ours"}  # as recipes/evaluate.py asks
    return score_rows(model, tokenizer, rows, protocol, args.batch_size, **asking).outcomes


def compare(model, tokenizer, harness: Harness, args: argparse.Namespace, task: str, protocol: str) -> dict:
    """One task by both; returns counts and seconds."""
    limit = args.texts
    if protocol == "loglikelihood":
        limit = None if task in args.whole else args.rows
    started = time.monotonic()
    ours = our_outcomes(model, tokenizer, args, task, limit, protocol)
    between = time.monotonic()
    samples = harness.samples(task, limit, protocol)
    ended = time.monotonic()
    count = options_agree if protocol == "loglikelihood" else texts_agree
    return {
        "rows": len(ours),
        **count(ours, samples),
        "seconds": between - started,
        "harness_seconds": ended - between,
    }


def options_agree(ours: Sequence[Outcome], samples: Sequence[dict]) -> dict:
    same = near = 0
    largest, differing = 0.0, []
    for number, (outcome, sample) in enumerate(zip(ours, samples, strict=True)):
        theirs = [float(response[0]) for response in sample["filtered_resps"]]
        largest = max(largest, *(abs(a - b) for a, b in zip(outcome.log_likelihoods, theirs, strict=True)))
        best, second = sorted(theirs, reverse=True)[:2]
        if best - second <= NEAR:
            near += 1
        elif outcome.choice == outcome.options[theirs.index(best)]:
            same += 1
        else:
            differing.append(number)
    harness_right = sum(sample["acc"] for sample in samples)
    right = sum(outcome.correct for outcome in ours)
    return {
        "same": same,
        "near": near,
        "differing": differing,
        "largest_difference_nats": largest,
        "right": right,
        "harness_right": int(harness_right),
    }


def texts_agree(ours: Sequence[Outcome], samples: Sequence[dict]) -> dict:
    answers = [
        read_answer(sample["resps"][0][0], outcome.task, own_answers([(outcome.task, outcome.options)]))
        for outcome, sample in zip(ours, samples, strict=True)
    ]
    differing = [i for i, (o, answer) in enumerate(zip(ours, answers, strict=True)) if o.choice != answer]
    same_text = sum(o.text.strip() == s["resps"][0][0].strip() for o, s in zip(ours, samples, strict=True))
    return {
        "same": len(ours) - len(differing),
        "near": 0,
        "differing": differing,
        "same_text": same_text,
        "right": sum(outcome.correct for outcome in ours),
        "harness_right": int(sum(sample["exact_match"] for sample in samples)),
    }


def main() -> None:
    args = arguments()
    os.environ["FSLORA_COMMONSENSE_DIR"] = args.data_dir
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    harness = Harness(model, tokenizer, args.batch_size)
    started = Path(args.output).with_suffix(".partial.json")
    started.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict] = {"loglikelihood": {}, "generate": {}}
    if started.is_file():  # of a run that was killed; remove it to begin again
        results = json.loads(started.read_text(encoding="utf-8"))
    for protocol, found in results.items():
        our_outcomes(model, tokenizer, args, args.tasks[0], 4, protocol)
        harness.samples(args.tasks[0], 4, protocol)
        for task in (task for task in args.tasks if task not in found):
            found[task] = compare(model, tokenizer, harness, args, task, protocol)
            print(protocol, task, json.dumps(found[task]), flush=True)
            started.write_text(json.dumps(results), encoding="utf-8")
    report(results, time_default(model, tokenizer, args), args)
    started.unlink()


def time_default(model, tokenizer, args: argparse.Namespace) -> dict:
    """Log-likelihoods of the first rows of each task: ours, and the harness at its default batch size of 1."""
    harness, seconds, theirs = Harness(model, tokenizer, 1), 0.0, 0.0
    for task in args.tasks:
        started = time.monotonic()
        our_outcomes(model, tokenizer, args, task, args.default_rows, "loglikelihood")
        between = time.monotonic()
        harness.samples(task, args.default_rows, "loglikelihood")
        seconds, theirs = seconds + between - started, theirs + time.monotonic() - between
    rows = args.default_rows * len(args.tasks)
    return {"rows": rows, "seconds": seconds, "harness_seconds": theirs, "times_as_fast": theirs / seconds}


def report(results: dict[str, dict], default: dict, args: argparse.Namespace) -> None:
    totals = {}
    for protocol, found in results.items():
        sums = {key: sum(task[key] for task in found.values()) for key in ("rows", "same", "near")}
        ours, theirs = (sum(task[key] for task in found.values()) for key in ("seconds", "harness_seconds"))
        totals[protocol] = {**sums, "seconds": ours, "harness_seconds": theirs, "times_as_fast": theirs / ours}
        print(f"{protocol}: {json.dumps(totals[protocol])}")
    print(f"harness at its default batch size of 1: {json.dumps(default)}")
    content = {
        "model": Path(args.model).name,
        "adapter": Path(args.adapter).name if args.adapter else None,
        "batch_size": args.batch_size,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "lm_eval")},
        "totals": totals,
        "harness at its default batch size of 1": default,
        "tasks": results,
    }
    output = Path(args.output)
    write_text(output, json.dumps(content, indent=1) + "\n")
    print(f"Written to {output}")


if __name__ == "__main__":
    main()
