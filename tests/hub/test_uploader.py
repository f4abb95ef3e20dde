"""One snapshot, one commit, one tag: whatever the Hub does, through the real client in both modes of upload."""

import shutil
import threading

import pytest

from fslora_hf.hub.outbox import Outbox
from tests.support.hub_pushes import FAST, add, asked, assert_on_hub, push, push_all, wait_for, weights

pytest_plugins = ("tests.support.hub_client",)
pytestmark = pytest.mark.usefixtures("users")


def test_rounds_become_commits_and_tags_in_their_order(hub, on_client, outbox, upload_mode):
    add(outbox, 4, 2, 6)
    missing, table, text = on_client(push_all, outbox.folder)
    assert (missing, text) == ([], "")
    assert_on_hub(hub, outbox, 2, 4, 6)
    repository = hub.find("user/run")
    titles = repository.git("log", "--reverse", "--format=%s", "main").decode().splitlines()
    assert titles == ["initial commit", "Round 2", "Round 4", "Round 6"]
    assert [line.split() for line in table.splitlines()[1:]] == [
        [str(n), f"round-{n:04d}", outbox.get(n).commit[:12], "yes"] for n in (2, 4, 6)
    ]
    assert asked(hub, "/storage/") == ([200] * 6 if upload_mode == "lfs" else [])


FAULTS = {
    "the Hub fails": ("commit", dict(status=503)),
    "the connection is reset": ("commit", dict(reset=True)),
    "the answer to the commit is lost": ("commit", dict(drop_answer=True)),
    "the answer to the commit is torn": ("commit", dict(truncate=True)),
    "the commit is refused for its parent": ("commit", dict(status=412)),
    "refs cannot be read": ("refs", dict(status=500)),
    "the preupload fails": ("preupload", dict(status=503)),
    "the tag fails": ("tag", dict(status=500)),
    "the answer to the tag is lost": ("tag", dict(drop_answer=True)),
    "the answer to the creation is lost": ("repos/create", dict(drop_answer=True)),
    "too many requests": ("commit", dict(status=429)),
    "a page of another server": ("refs", dict(status=200, body=b"<html>Log in to the network</html>")),
    "an answer of another kind": ("commit", dict(status=200, body=[])),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda name: name.replace(" ", "-"))
def test_a_passing_failure_is_survived(hub, on_client, outbox, fault):
    pattern, what = FAULTS[fault]
    ordered = hub.fault(pattern, **what)
    add(outbox, 1, 2)
    missing, table, _ = on_client(push_all, outbox.folder)
    assert missing == [] and ordered.hits == 1, table
    assert_on_hub(hub, outbox, 1, 2)


@pytest.mark.parametrize("upload_mode", ["lfs"])
@pytest.mark.parametrize("pattern", ["objects/batch", "storage", "objects/verify"])
def test_a_passing_failure_of_a_large_file_is_survived(hub, on_client, outbox, upload_mode, pattern):
    hub.fault(pattern, status=503)
    add(outbox, 1)
    assert on_client(push_all, outbox.folder)[0] == []
    assert_on_hub(hub, outbox, 1)


def test_a_stalled_commit_is_given_up_and_its_late_landing_recognised(hub, on_client, outbox):
    add(outbox, 1, 2)
    on_client(push, outbox.folder, 1)
    hub.fault("commit", stall_s=60)
    missing, table, _ = on_client(push_all, outbox.folder, deadline_s=2.0)
    assert missing == [2] and "Expected to reach the Hub for user/run, found no answer" in table
    hub.release()  # only now the Hub executes what nobody waits for any more
    wait_for(lambda: asked(hub, "/commit/") == [200, 200])
    assert on_client(push_all, outbox.folder)[0] == []
    assert_on_hub(hub, outbox, 1, 2)
    assert asked(hub, "/commit/") == [200, 200]


def test_a_stalled_commit_that_lands_after_the_next_attempt_is_refused(hub, on_client, outbox):
    add(outbox, 1)
    hub.fault("commit", stall_s=60)
    assert on_client(push_all, outbox.folder, deadline_s=2.0)[0] == [1]
    assert on_client(push_all, outbox.folder)[0] == []
    hub.release()
    wait_for(lambda: asked(hub, "/commit/") == [412, 200])  # by when they came
    assert_on_hub(hub, outbox, 1)


def test_the_commit_of_someone_else_stays(hub, on_client, outbox):
    add(outbox, 1, 2)
    on_client(push, outbox.folder, 1)
    stalled = hub.fault("commit", stall_s=60)
    done = start(on_client, push, outbox.folder, 2)
    wait_for(lambda: stalled.hits == 1)
    theirs = hub.add("user/run", {"NOTES.md": b"by hand"}, message="Notes")
    hub.release()
    commit = done()
    assert asked(hub, "/commit/") == [200, 412, 200]
    repository = hub.find("user/run")
    log = repository.git("log", "--format=%H", "main").decode().split()
    assert log[:3] == [commit, theirs, outbox.get(1).commit]
    assert repository.files()["NOTES.md"] == b"by hand"
    assert_on_hub(hub, outbox, 1, 2)


def start(on_client, function, *args):
    """Begin what `on_client` does; returns a function that waits for it."""
    results = []
    thread = threading.Thread(target=lambda: results.append(on_client(function, *args)))
    thread.start()

    def wait():
        thread.join(60)
        return results[0]

    return wait


def test_a_failure_keeps_the_order_of_rounds(hub, on_client, outbox):
    add(outbox, 1, 2, 3)
    fault = hub.fault("commit", status=503, after=1, times=None)
    missing, table, _ = on_client(push_all, outbox.folder)
    assert missing == [2, 3] and fault.hits == FAST["attempts"]  # the third is not tried
    lines = table.splitlines()
    assert "Expected the Hub to do what was asked for user/run, found an error of its own (503" in lines[2]
    assert lines[3].endswith("not sent yet: send it with recipes/push.py")
    hub.mend()
    assert on_client(push_all, outbox.folder)[0] == []
    assert_on_hub(hub, outbox, 1, 2, 3)


def test_a_tag_of_other_content_is_reported_and_later_rounds_go_on(hub, on_client, outbox):
    theirs = hub.add("user/run", {"README.md": b"other"}, tag="round-0002")
    add(outbox, 1, 2, 3)
    missing, table, _ = on_client(push_all, outbox.folder)
    assert missing == [2]
    assert table.splitlines()[2].split(maxsplit=3)[3] == (
        "Expected no tag round-0002 in user/run, or that of this very round, found one of other content at commit "
        f"{theirs[:8]}: delete the tag and run recipes/push.py, or choose another hub_model_id."
    )
    repository = hub.find("user/run")
    assert repository.refs()["refs/tags/round-0002"] == theirs
    assert outbox.get(2).status == "pending" and outbox.get(2).files
    # The tag is deleted by hand, and the round goes beside `main`, which stays the third.
    repository.git("update-ref", "-d", "refs/tags/round-0002")
    assert on_client(push_all, outbox.folder)[0] == []
    assert_on_hub(hub, outbox, 1, 2, 3)
    parents = repository.git("rev-list", "--parents", "-1", "round-0002").decode().split()
    assert parents == [outbox.get(2).commit, outbox.get(1).commit]


@pytest.mark.parametrize("pattern", ["branch", "commit", "tag"])
@pytest.mark.parametrize("what", [dict(drop_answer=True), dict(status=500)], ids=["lost", "failed"])
def test_a_late_round_survives_failures_and_leaves_no_branch(hub, on_client, outbox, pattern, what):
    add(outbox, 2)
    on_client(push, outbox.folder, 2)
    add(outbox, 1)
    fault = hub.fault(pattern, **what)
    on_client(push, outbox.folder, 1)
    assert fault.hits == 1
    assert_on_hub(hub, outbox, 1, 2)


def test_two_that_push_the_same_round_make_one_commit(hub, on_client, outbox, tmp_path):
    shutil.copytree(add(outbox, 1) or outbox.folder, tmp_path / "other")
    on_client(push, outbox.folder, 1)
    on_client(push, tmp_path / "other", 1)
    assert asked(hub, "/commit/") == [200]
    assert_on_hub(hub, outbox, 1)
    assert Outbox(tmp_path / "other").get(1).commit == outbox.get(1).commit


def test_files_that_changed_since_are_not_sent(hub, on_client, outbox):
    add(outbox, 1, 2)
    (outbox.get(1).tree / "README.md").write_text("changed")
    missing, table, _ = on_client(push_all, outbox.folder)
    assert missing == [1] and "as they were kept, found them changed or gone: restore them" in table


@pytest.mark.parametrize(
    "pattern, status, sentence",
    [
        ("validate-yaml", 400, "Expected a README.md that the Hub takes for user/run, found one that it refuses"),
        ("commit", 422, "Expected a commit that the Hub takes for user/run, found that it refuses this one"),
    ],
)
def test_content_that_the_hub_refuses_is_reported_and_later_rounds_go_on(
    hub, on_client, outbox, pattern, status, sentence
):
    add(outbox, 1, 2)
    hub.fault(pattern, status=status, body={"error": "it is wrong", "errors": [{"message": "it is wrong"}]})
    missing, table, _ = on_client(push_all, outbox.folder)
    assert (
        missing == [1] and f"{sentence} ({status if pattern == 'commit' else ''}" in table and "it is wrong" in table
    )
    assert not outbox.get(1).sent  # no such commit can land, so that the round may be run again
    assert on_client(push_all, outbox.folder)[0] == []  # beside `main`, which stays the second
    assert_on_hub(hub, outbox, 1, 2)


def test_a_round_that_is_trained_again_after_its_commit_is_not_committed_again(hub, on_client, outbox):
    add(outbox, 1)
    hub.fault("commit", drop_answer=True)
    assert on_client(push_all, outbox.folder, attempts=1)[0] == [1]
    again = weights(1) | {"rounds.jsonl": b"with other seconds"}
    outbox.add(1, lambda folder: [(folder / name).write_bytes(content) for name, content in again.items()])
    assert on_client(push_all, outbox.folder)[0] == []
    assert_on_hub(hub, outbox, 1)


@pytest.mark.parametrize("upload_mode", ["lfs"])
def test_a_large_file_without_room_is_told_as_such(hub, on_client, outbox, upload_mode):
    add(outbox, 1)
    refused = {"oid": "0" * 64, "size": 1, "error": {"code": 422, "message": "storage quota reached"}}
    hub.fault("objects/batch", body={"transfer": "basic", "objects": [refused]})
    missing, table, _ = on_client(push_all, outbox.folder)
    assert missing == [1] and "Expected room for the round in user/run" in table and "storage quota reached" in table
