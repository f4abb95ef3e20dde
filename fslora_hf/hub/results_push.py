"""Results of evaluations sent to a data set of results on the Hub, each at a path that its content decides."""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd

from ..reports.entries import read_results
from ..storage.result_files import OUTCOMES, RESULTS, slug
from .errors import HubError
from .results import SCHEME, ResultsRepository, check_size, said

_ATTEMPTS = 5
_PAUSE = 1.0  # seconds before the second attempt, twice as many before each that follows
_ROUND = re.compile(r"[ ,]+round \d+$")
_MODEL = ("digest", "dtype", "quantization")
_NO_TOKEN = "pass a token with write access to it as --token, or log in with 'hf auth login'"
_NO_ROOM = "free some room or raise the quota"
_REMEDIES = {401: _NO_TOKEN, 403: _NO_TOKEN, 404: _NO_TOKEN, 402: _NO_ROOM, 413: _NO_ROOM}
README = """\
---
pretty_name: Evaluation results
tags:
- fslora_hf
- evaluation-results
viewer: false
---

# Evaluation results

Each `<run>/<round>-<identity>-<protocol>.results.json` is one evaluation: its scores with standard errors, and what
they depend on (base model, adapter, prompt, questions, settings, versions). The file `*.outcomes.jsonl` beside it says
what became of every question. The identity is a hash of all that decides the scores.

Rank them with [fslora_hf](https://arxiv.org/abs/2501.19389):

```sh
python recipes/leaderboard.py {address}
```
"""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation as it is sent: its path in the repository, and the bytes there and of its outcomes."""

    path: str
    results: bytes
    outcomes: bytes | None

    @property
    def outcomes_path(self) -> str:
        return self.path.removesuffix(RESULTS) + OUTCOMES

    @property
    def scores(self) -> Any:
        return _scores(self.results)


def push_results(
    paths: Iterable[str | Path], repo_id: str, private: bool | None = None, token: str | None = None
) -> dict[str, bool]:
    """Add results files, and their outcomes, to a data set repository, which is created if there is none.

    What is there already is not sent again, so that a push that failed can be repeated.

    Args:
        paths: files, and folders to search for them.
        private: create the repository as a private one; one that is public is refused then.

    Returns the path of each evaluation in the repository, and whether it was added now.

    Raises:
        FileNotFoundError, ValueError: there is nothing to send; a file is damaged; the Hub refuses; or the repository
            holds other scores of the same evaluation, in which case nothing is sent.
    """
    if "/" not in repo_id:
        raise ValueError(f"Expected repo_id to be owner/name, found {repo_id!r}: name the owner, too.")
    evaluations = _gather(paths)
    hub = ResultsRepository(repo_id, "dataset", token)
    _open(hub, private)
    added = None
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE * 2 ** (attempt - 1))
            hub.files()  # where the files are if only the answer was lost, or what someone else added
        operations = _operations(hub, evaluations)
        sent = {operation.path_in_repo for operation in operations}
        added = {each.path: each.path in sent for each in evaluations} if added is None else added
        if not operations or _committed(hub, operations, last=attempt == _ATTEMPTS - 1):
            break
    return added


def evaluation_path(results: Mapping[str, Any]) -> str:
    """Where a repository of results keeps an evaluation: by its run, its round, and all that decides its scores."""
    adapter = results["adapter"] or {}
    number = adapter.get("round")
    stage = "base" if not adapter else "adapter" if number is None else f"round-{number:04d}"
    model = {key: results["model"].get(key) for key in _MODEL}
    decides = [results[key] for key in ("protocol", "settings", "prompt_hash", "rows_hash")]
    decides += [model if model["digest"] else results["model"], adapter.get("digest")]
    identity = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    run = slug([_ROUND.sub("", results["name"])])[:80].strip("-.") or "run"
    return f"{run}/{stage}-{identity}-{results['protocol']}{RESULTS}"


def _gather(paths: Iterable[str | Path]) -> list[Evaluation]:
    found: dict[str, Evaluation] = {}
    for entry in read_results(paths):
        source = Path(entry.source)
        results = json.loads(source.read_text(encoding="utf-8"))
        outcomes = source.with_name(results["outcomes"])
        path = evaluation_path(results)
        results["outcomes"] = Path(path).name.removesuffix(RESULTS) + OUTCOMES
        text = json.dumps(results, indent=1, allow_nan=False) + "\n"
        made = Evaluation(path, text.encode(), outcomes.read_bytes() if outcomes.is_file() else None)
        for file, content in ((source, made.results), (outcomes, made.outcomes or b"")):
            check_size(str(file), len(content))
        same = found.setdefault(path, made)
        _check_same(same.scores, made, f"the files at {entry.source} and elsewhere")
    return list(found.values())


def _scores(results: str | bytes) -> Any:
    """The scores of a results file, None of something else."""
    try:
        return json.loads(results)["scores"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _check_same(scores: Any, evaluation: Evaluation, where: str) -> None:
    if scores != evaluation.scores:
        raise ValueError(
            f"Expected {evaluation.path} once, found other scores of the same evaluation in {where}: nothing was "
            "sent; find out which is right, and remove the other."
        )


def _open(hub: ResultsRepository, private: bool | None) -> None:
    """Read the repository, made if there is none."""
    try:
        hub.files()
    except HubError as error:
        if error.kind != "repository":
            raise
        _written(hub, "create_repo", private=private, exist_ok=True)
        hub.files()
    if private and not hub.private:
        raise ValueError(
            f"Expected {hub.repo} to be private, found it public: make it private in its settings, or push without "
            "--private."
        )


def _operations(hub: ResultsRepository, evaluations: Iterable[Evaluation]) -> list[CommitOperationAdd]:
    """What the repository lacks.

    Raises:
        ValueError: it holds other scores of an evaluation.
    """
    wanted: dict[str, bytes] = {}
    for each in evaluations:
        if each.path in hub.sizes:
            _check_same(_scores(hub.text(each.path)), each, hub.repo)
        else:
            wanted[each.path] = each.results
        if each.outcomes is not None and each.outcomes_path not in hub.sizes:
            wanted[each.outcomes_path] = each.outcomes
    is_new = not any(name.endswith(RESULTS) for name in hub.sizes)
    if wanted and is_new and "README.md" not in hub.sizes:
        wanted["README.md"] = README.format(address=f"{SCHEME}datasets/{hub.repo}").encode()
    return [CommitOperationAdd(path, content) for path, content in wanted.items()]


def _committed(hub: ResultsRepository, operations: list[CommitOperationAdd], last: bool) -> bool:
    """Whether the commit was made as far as is known; an error that another attempt cannot mend is raised."""
    count = sum(operation.path_in_repo.endswith(RESULTS) for operation in operations)
    message = f"Add {count} evaluation{'' if count == 1 else 's'}"
    try:
        _written(hub, "create_commit", operations=operations, commit_message=message, parent_commit=hub.commit)
    except HubError as error:
        if last or not error.again:
            raise
        return False
    return True


def _written(hub: ResultsRepository, method: str, **arguments: Any) -> None:
    """Make a call that writes.

    Raises:
        HubError: the Hub refuses, or fails (`again`).
    """
    try:
        hub.call(method, **arguments)
        return
    except Exception as caught:  # the client's errors have no common type
        status = getattr(getattr(caught, "response", None), "status_code", None)
        what = said(caught, hub.api.token)
    remedy = _REMEDIES.get(status, "run this again later: what has arrived is not sent twice")
    final = status is not None and 400 <= status < 500 and status not in (408, 409, 412, 429)
    # Not from the cause, whose text may hold a token.
    raise HubError(
        f"Expected to add results to {hub.repo} on the Hub, found '{what}': {remedy}.", "server", again=not final
    )
