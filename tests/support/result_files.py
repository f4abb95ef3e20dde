"""Results files of made-up evaluations, for tests of what reads them."""

import json
import math

REFERENCE = {"a": "1100", "b": "10"}
OTHER = {"a": "1000", "b": "11"}


def evaluation(folder, file, marks, *, norm=None, ids=None, with_outcomes=True, **changes):
    """Write one evaluation: `marks` by task has 1 for a right answer, 0 for a wrong one and - for none.

    `norm` are the marks of accuracy_norm, the same if None; `ids` the questions' by task; `changes` go over the
    fields of the results file.
    """
    protocol = changes.get("protocol", "loglikelihood")
    lines, scores = [], []
    for task, given in marks.items():
        normed = (norm or marks)[task]
        for i, (mark, norm_mark) in enumerate(zip(given, normed, strict=True)):
            line = {"question": ids[task][i] if ids else f"{task}{i}", "task": task, "answer": "yes"}
            line |= {"choice": {"1": "yes", "0": "no", "-": None}[mark], "correct": mark == "1"}
            line |= {"choice_norm": "yes" if norm_mark == "1" else "no"} if protocol == "loglikelihood" else {}
            lines.append(line)
        n = len(given)
        shares = {"accuracy": given.count("1") / n, "format_validity": 1 - given.count("-") / n}
        if protocol == "loglikelihood":
            shares["accuracy_norm"] = normed.count("1") / n
        for metric, p in shares.items():
            score = {"task": task, "metric": metric, "value": p, "standard_error": math.sqrt(p * (1 - p) / n)}
            scores.append(score | {"rows": n, "majority_rate": 0.5})
    scores.append({**scores[0], "task": "average"})
    results = {
        "format": 1,
        "name": file,
        "protocol": protocol,
        "prompt_hash": "a" * 16,
        "rows_hash": "b" * 16,
        "model": {"name": "tiny", "revision": None, "dtype": "float32", "quantization": None},
        "adapter": None,
        "settings": {},
        "seed": 0,
        "scores": scores,
        "versions": {"torch": "2.13"},
        "not_finite": 0,
        "tied": 0,
        "time": "2026-11-22T18:40:00+00:00",
        "outcomes": f"{file}.outcomes.jsonl",
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{file}.results.json"
    path.write_text(json.dumps(results | changes, indent=1), encoding="utf-8")
    if with_outcomes:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{file}.outcomes.jsonl").write_text(text, encoding="utf-8")
    return path


def adapter(number):
    return {"name": "run", "revision": None, "round": number, "digest": "c" * 16}
