"""The outbox: whole snapshots or none, in order, and what a kill leaves."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

from fslora_hf.hub import outbox as module
from fslora_hf.hub.outbox import Outbox


def tree(weights: bytes = b"w", ledger: str = "{}\n"):
    """A function that writes a round's tree."""

    def fill(folder):
        (folder / "adapter_model.safetensors").write_bytes(weights)
        (folder / "rounds.jsonl").write_text(ledger)
        (folder / "deep").mkdir()
        (folder / "deep" / "README.md").write_text("it")

    return fill


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


class Killed(BaseException):
    """What nothing catches, as a kill."""


def test_a_snapshot_is_found_again_as_it_was_kept(tmp_path):
    kept = Outbox(tmp_path).add(10, tree())
    assert kept == Outbox(tmp_path).get(10) and kept.folder == tmp_path / "round-0010"
    assert [path.as_posix() for path in kept.files] == [
        "adapter_model.safetensors",
        "deep/README.md",
        "rounds.jsonl",
    ]
    record = json.loads((kept.folder / "push.json").read_text())
    assert record == {
        "format": 1,
        "round": 10,
        "tag": "round-0010",
        "message": "Round 10",
        "digest": kept.digest,
        "weights": kept.weights,
        "status": "pending",
        "sent": False,
        "commit": None,
    }


def test_rounds_come_in_their_order_whatever_their_number(tmp_path):
    outbox = Outbox(tmp_path)
    for number in (9, 10000, 2, 300):
        outbox.add(number, tree())
    outbox.mark_pushed(outbox.get(9), "c" * 40)
    assert [snapshot.round for snapshot in outbox.all()] == [2, 9, 300, 10000]
    assert [snapshot.round for snapshot in outbox.pending()] == [2, 300, 10000]


def test_a_digest_is_of_the_tag_the_paths_and_the_contents(tmp_path):
    outbox = Outbox(tmp_path)

    def renamed(folder):
        tree()(folder)
        (folder / "rounds.jsonl").rename(folder / "other.jsonl")

    kept = [outbox.add(1, tree()), outbox.add(2, tree()), outbox.add(3, tree(b"v")), outbox.add(4, renamed)]
    assert len({snapshot.digest for snapshot in kept}) == 4
    assert [snapshot.weights == kept[0].weights for snapshot in kept] == [True, True, False, True]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("a flaw"), Killed()])
def test_an_error_while_filling_leaves_nothing(tmp_path, error):
    outbox = Outbox(tmp_path)

    def fill(folder):
        tree()(folder)
        raise error

    with pytest.raises(type(error)) as raised:
        outbox.add(1, fill)
    assert names(tmp_path) == []
    if isinstance(error, OSError):
        assert str(raised.value) == (
            f"Expected to write round 1 for pushing into {tmp_path}, found 'No space left on device': make room, and "
            "later rounds are pushed; this one is not."
        )
        assert raised.value.errno == errno.ENOSPC


def test_what_a_kill_left_is_removed_on_opening_but_not_beside_the_process_that_adds(tmp_path):
    Outbox(tmp_path).add(1, tree())
    partial = tmp_path / ".round-0002.partial"
    tree()((partial / "files").mkdir(parents=True) or partial / "files")
    assert [snapshot.round for snapshot in Outbox(tmp_path, tidy=False).all()] == [1]
    assert partial.exists()
    Outbox(tmp_path)
    assert names(tmp_path) == ["round-0001"]


def test_pushed_files_go_and_the_record_stays_even_through_a_kill(tmp_path, monkeypatch):
    outbox = Outbox(tmp_path)
    snapshot = outbox.add(1, tree())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            outbox.mark_pushed(snapshot, "c" * 40)
    assert outbox.get(1).status == "pushed" and snapshot.tree.exists()
    again = Outbox(tmp_path)
    assert not snapshot.tree.exists() and names(snapshot.folder) == ["push.json"]
    assert (again.get(1).commit, again.get(1).digest, again.pending()) == ("c" * 40, snapshot.digest, [])


def test_the_same_round_again_is_kept_once_and_replaced_by_other_content(tmp_path):
    outbox = Outbox(tmp_path)
    first = outbox.add(1, tree())
    written = os.stat(first.folder / "push.json").st_ino
    assert outbox.add(1, tree()) == first and os.stat(first.folder / "push.json").st_ino == written
    second = outbox.add(1, tree(ledger="{} {}\n"))
    assert second.digest != first.digest and (second.tree / "rounds.jsonl").read_text() == "{} {}\n"
    assert outbox.all() == [second] and names(tmp_path) == ["round-0001"]


@pytest.mark.parametrize("mark", ["sent", "pushed"])
def test_what_may_be_on_the_hub_is_not_replaced(tmp_path, caplog, mark):
    outbox = Outbox(tmp_path)
    first = outbox.add(1, tree())
    outbox.claim(first) if mark == "sent" else outbox.mark_pushed(first, "c" * 40)
    stands = outbox.get(1)
    assert outbox.add(1, tree(ledger="with other seconds")) == stands and not caplog.records
    assert outbox.add(1, tree(b"other")) == stands == outbox.get(1)
    assert "Expected round 1 with the weights that were sent to the Hub before, found others" in caplog.text
    assert names(tmp_path) == ["round-0001"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_while_replacing_leaves_one_of_the_two(tmp_path, monkeypatch, renames):
    outbox = Outbox(tmp_path)
    first = outbox.add(1, tree())
    done, replace, remove = [], os.replace, shutil.rmtree

    def killing(function):
        def call(path, *args, **kwargs):
            counted = path == first.folder or first.folder in args
            if counted and len(done) == renames or len(done) == 2:
                raise Killed
            if counted:
                done.append(path)
            return function(path, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killing(replace))
        patch.setattr(module.shutil, "rmtree", killing(remove))
        with pytest.raises(Killed):
            outbox.add(1, tree(b"other"))
    left = Outbox(tmp_path, tidy=False).get(1)
    assert Outbox(tmp_path).is_whole(left) and (left.digest == first.digest) == (renames == 1)
    assert names(tmp_path) == ["round-0001"]


@pytest.mark.parametrize("change", ["edit", "add", "remove"])
def test_files_that_changed_since_are_seen(tmp_path, change):
    outbox = Outbox(tmp_path)
    snapshot = outbox.add(1, tree())
    assert outbox.is_whole(snapshot)
    file = snapshot.tree / "rounds.jsonl"
    match change:
        case "edit":
            file.write_text("[]\n")
        case "add":
            (snapshot.tree / "more").touch()
        case "remove":
            shutil.rmtree(snapshot.tree)
    assert not outbox.is_whole(snapshot)


@pytest.mark.parametrize("content", ["", "[]", '{"round": 1}', None])
def test_a_damaged_record_hides_no_other_and_is_mended_by_its_round(tmp_path, content):
    outbox = Outbox(tmp_path)
    for number in (1, 2):
        outbox.add(number, tree())
    record = tmp_path / "round-0001" / "push.json"
    record.unlink() if content is None else record.write_text(content)
    assert [(s.round, s.status) for s in Outbox(tmp_path).all()] == [(1, "damaged"), (2, "pending")]
    assert [s.round for s in outbox.pending()] == [2]
    assert outbox.add(1, tree()).status == "pending"


def test_the_target_is_noted_without_a_token(tmp_path):
    outbox = Outbox(tmp_path)
    with pytest.raises(ValueError, match="^Expected the repository that the rounds go to in .*, found none: name"):
        outbox.read_target()
    outbox.write_target("user/run", "main", True)
    assert outbox.read_target() == {"repo_id": "user/run", "revision": "main", "private": True}
    assert outbox.all() == []
    (tmp_path / "target.json").write_text("[]")
    with pytest.raises(ValueError, match="found damage"):
        outbox.read_target()


def test_what_the_hub_refused_or_someone_damaged_is_replaced(tmp_path):
    """To run the round again is the remedy that both are told."""
    outbox = Outbox(tmp_path)
    assert outbox.claim(outbox.add(1, tree()))
    outbox.release(outbox.get(1))
    assert not outbox.get(1).sent and outbox.add(1, tree(b"other")).weights != outbox.add(2, tree()).weights
    assert outbox.claim(outbox.get(2))
    (tmp_path / "round-0002" / "files" / "rounds.jsonl").write_text("edited")
    again = outbox.add(2, tree())
    assert not again.sent and outbox.is_whole(again)


def test_a_claim_sees_what_became_of_the_snapshot(tmp_path):
    outbox = Outbox(tmp_path)
    first = outbox.add(1, tree())
    outbox.add(1, tree(b"other"))
    assert not outbox.claim(first) and not outbox.get(1).sent
    outbox.mark_pushed(outbox.get(1), "c" * 40)
    outbox.release(first)
    assert outbox.get(1).status == "pushed" and outbox.get(1).sent


def test_room_is_left_for_checkpoints(tmp_path, monkeypatch):
    outbox = Outbox(tmp_path)
    size = sum(path.stat().st_size for path in outbox.add(1, tree()).tree.rglob("*") if path.is_file())
    free = shutil.disk_usage(tmp_path)._replace(free=4 * size - 1)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match="^Expected to write round 2 .*, found 'less room on the disk") as caught:
        outbox.add(2, tree())
    assert caught.value.errno == errno.ENOSPC and names(tmp_path) == ["round-0001"]


def test_two_processes_do_not_change_it_at_once(tmp_path):
    """While one holds the outbox, another's claim waits."""
    outbox = Outbox(tmp_path)
    snapshot = outbox.add(1, tree())
    code = "from fslora_hf.hub.outbox import Outbox; import sys; outbox = Outbox(sys.argv[1], tidy=False)\n"
    code += "print(input(), outbox.claim(outbox.get(1)), flush=True)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    other.stdin.write("claimed\n")
    with outbox._locked():
        other.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(5)
        assert not outbox.get(1).sent
    assert other.communicate(timeout=60)[0] == "claimed True\n" and outbox.get(1).sent and not snapshot.sent
