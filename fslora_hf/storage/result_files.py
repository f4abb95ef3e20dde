"""Names and forms of result files, for what reads them without a model at hand (evaluation/results.py writes them)."""

import re
from collections.abc import Sequence

FORMAT = 1
IN_LOOP = "eval_rounds"  # folder in output_dir of what is scored during training
PROTOCOLS = ("loglikelihood", "generate")
RESULTS, OUTCOMES = ".results.json", ".outcomes.jsonl"


def slug(parts: Sequence[str]) -> str:
    """A file name out of some words."""
    return re.sub(r"[^\w.-]+", "-", "-".join(parts)).strip("-.")
