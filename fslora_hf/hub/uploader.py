"""One snapshot of the outbox becomes one commit and one tag on the Hub, exactly once.

Any call may fail after the Hub has done what it asked, or end when nobody waits for it any more. So every attempt
begins by reading what is there: a commit carries the digest of its snapshot in a line of its message, by which it is
recognised, and it names its parent, so that no second one can land beside it. (The first commit of all has no parent
to name; the Hub makes that one itself when it makes a repository.)
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd

from ..common.foreign_text import foreign_text
from ..storage.checkpoint import STATE_NAME, describe_difference
from .card import BEGIN, merge_card
from .errors import LENGTH, HubError
from .figures import draw_figures
from .outbox import Outbox, Snapshot
from .remote import Commit, HubTarget, Remote, check_target

__all__ = ["HubError", "HubTarget", "check_target", "push_snapshot"]

TRAILER, ROUND, WEIGHTS = "fslora-snapshot: ", "fslora-round: ", "fslora-weights: "
_REFUSED = ("token", "permission", "quota", "content", "name")  # such an answer says that nothing was done


def push_snapshot(
    target: HubTarget,
    outbox: Outbox,
    snapshot: Snapshot,
    *,
    deadline_s: float = 600.0,
    attempts: int = 5,
    pause_s: float = 2.0,
) -> str:
    """Bring a snapshot to the Hub, or find it there; returns its commit id.

    A failure that may pass is met with another attempt, after `pause_s` seconds and twice as many each time.

    Raises:
        HubError: it is not on the Hub, or may be but nobody could tell within `deadline_s` seconds.
    """
    hub = Remote(target, deadline_s)
    for attempt in range(1, attempts + 1):
        try:
            return _attempt(hub, outbox, outbox.get(snapshot.round))
        except HubError as error:
            if not error.again or attempt == attempts or hub.seconds_left <= 0:
                raise
            time.sleep(min(pause_s * 2 ** (attempt - 1), hub.seconds_left))
    raise ValueError(f"Expected at least one attempt, found attempts={attempts}: give a number above 0.")


def _attempt(hub: Remote, outbox: Outbox, snapshot: Snapshot) -> str:
    """Do what is left to be done for a snapshot."""
    if snapshot.status == "pushed":
        return snapshot.commit
    hub.open()
    commit = _tagged(hub, snapshot)
    if commit is None:
        check_run(hub, outbox, _run_of(snapshot))
        commit = _find(hub, outbox, snapshot) or _commit(hub, outbox, snapshot)
        hub.call("create_tag", tag=snapshot.tag, revision=commit)
    if hub.branches.get(_side(snapshot)) == commit:
        hub.call("delete_branch", branch=_side(snapshot))
    outbox.mark_pushed(snapshot, commit)
    return commit


def check_run(hub: Remote, outbox: Outbox, run: Mapping[str, Any] | None) -> None:
    """Raises HubError if the branch holds the rounds of another run than `run`, an identity."""
    head = hub.branches.get(hub.target.revision)
    if head is None or run is None or head in {snapshot.commit for snapshot in outbox.all()}:
        return
    if not hub.call("file_exists", filename=STATE_NAME, revision=head):
        return
    path = Path(hub.call("hf_hub_download", filename=STATE_NAME, revision=head))
    try:
        differences = describe_difference(json.loads(path.read_text(encoding="utf-8"))["run"], run)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        differences = [f"its {STATE_NAME} cannot be read"]
    if differences:
        raise HubError(
            f"Expected no rounds in {hub.target.repo_id}, or those of this run, found another's: "
            f"{foreign_text('; '.join(differences), LENGTH)}. Choose another hub_model_id.",
            "repository",
        )


def _run_of(snapshot: Snapshot) -> dict[str, Any] | None:
    """The identity of the run that a snapshot is of, if it holds one."""
    path = snapshot.tree / STATE_NAME
    return json.loads(path.read_text(encoding="utf-8"))["run"] if path.is_file() else None


def _tagged(hub: Remote, snapshot: Snapshot) -> str | None:
    """The commit that has the snapshot's tag."""
    commit = hub.tags.get(snapshot.tag)
    if commit is None:
        return None
    # A run that was taken up again has the weights of the first, and other seconds in its ledger.
    if not _is_of(next(hub.history(commit)), snapshot):
        raise HubError(
            f"Expected no tag {snapshot.tag} in {hub.target.repo_id}, or that of this very round, found one of other "
            f"content at commit {commit[:8]}: delete the tag and run recipes/push.py, or choose another hub_model_id.",
            "tag",
            this_round=True,
        )
    return commit


def _find(hub: Remote, outbox: Outbox, snapshot: Snapshot) -> str | None:
    """The commit of a snapshot that may have been sent before, here or by the run that this one takes up, if it has
    landed and only its tag is missing."""
    known = {other.commit for other in outbox.all() if other.commit}
    for name in (hub.target.revision, _side(snapshot)):
        for commit in hub.history(hub.branches[name]) if name in hub.branches else ():
            if commit.commit_id in {*known, *hub.tags.values()} and not snapshot.sent:
                break  # what is before a finished round was looked at when that was pushed
            if _is_of(commit, snapshot):
                return commit.commit_id
    return None


def _commit(hub: Remote, outbox: Outbox, snapshot: Snapshot) -> str:
    """Commit the snapshot on top of what is there; returns the commit id.

    Files that stand on the branch unchanged are left out by the client; if all do, its head is the commit.
    """
    branch = hub.target.revision
    head = hub.branches.get(branch)
    if head is not None and _later_stands(hub, outbox, snapshot, head):
        branch, head = _begin_side(hub, snapshot, head)
    if not outbox.claim(snapshot):
        raise HubError(
            f"Expected the files of {snapshot.tag} in {snapshot.tree} as they were kept, found them changed or gone: "
            "restore them, or run the round again.",
            "content",
            this_round=True,
            again=outbox.get(snapshot.round) != snapshot,  # another process is at it, too
        )
    try:
        hub.branches[branch] = _send(hub, snapshot, branch, head)
        return hub.branches[branch]
    except HubError as error:
        if error.kind in _REFUSED:
            outbox.release(snapshot)
        raise


def _send(hub: Remote, snapshot: Snapshot, branch: str, head: str | None) -> str:
    contents = {path.as_posix(): _content(hub, snapshot, path, head) for path in snapshot.files}
    additions = [CommitOperationAdd(*item) for item in {**draw_figures(snapshot), **contents}.items()]
    # One by one: several at once go through a pool of threads that the end of the process waits for.
    for addition in additions:
        hub.call("preupload_lfs_files", additions=[addition], revision=branch, free_memory=False)
    message = {
        "commit_message": snapshot.message,
        "commit_description": f"{TRAILER}{snapshot.digest}\n{ROUND}{snapshot.round}\n{WEIGHTS}{snapshot.weights}",
    }
    return hub.call("create_commit", operations=additions, revision=branch, parent_commit=head, **message).oid


def _content(hub: Remote, snapshot: Snapshot, path: Path, head: str | None) -> Path | bytes:
    """A file as it is committed: as it was kept, but for the card, in which others may have written since."""
    if path.as_posix() != "README.md" or head is None:
        return snapshot.tree / path
    ours = (snapshot.tree / path).read_text(encoding="utf-8")
    if BEGIN not in ours or not hub.call("file_exists", filename="README.md", revision=head):
        return snapshot.tree / path
    existing = Path(hub.call("hf_hub_download", filename="README.md", revision=head))
    return merge_card(ours, existing.read_text("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


def _later_stands(hub: Remote, outbox: Outbox, snapshot: Snapshot, head: str) -> bool:
    """Whether a later round is on the branch, whose head must then stay."""
    tagged = {commit for number, commit in hub.rounds if number > snapshot.round}
    sent = {other.digest for other in outbox.all() if other.round > snapshot.round and other.sent}
    if not tagged and not sent:
        return False
    return any(commit.commit_id in tagged or _trailer(commit, TRAILER) in sent for commit in hub.history(head))


def _begin_side(hub: Remote, snapshot: Snapshot, head: str) -> tuple[str, str]:
    """A branch for a round that comes late, from the round before it; returns its name and head.

    It goes when the commit has its tag.
    """
    name = _side(snapshot)
    if name not in hub.branches:
        earlier = [(number, commit) for number, commit in hub.rounds if number < snapshot.round]
        start = max(earlier)[1] if earlier else [commit.commit_id for commit in hub.history(head)][-1]
        hub.call("create_branch", branch=name, revision=start, exist_ok=True)
        hub.read()
    return name, hub.branches[name]


def _side(snapshot: Snapshot) -> str:
    return f"late-{snapshot.tag}"


def _is_of(commit: Commit, snapshot: Snapshot) -> bool:
    """Whether a commit is of this round of this run, as it was kept or trained again to the same weights."""
    if _trailer(commit, TRAILER) == snapshot.digest:
        return True
    same_round = _trailer(commit, ROUND) == str(snapshot.round)
    return same_round and bool(snapshot.weights) and _trailer(commit, WEIGHTS) == snapshot.weights


def _trailer(commit: Commit, trailer: str) -> str | None:
    lines = commit.message.splitlines()
    return next((line.removeprefix(trailer).strip() for line in lines if line.startswith(trailer)), None)
