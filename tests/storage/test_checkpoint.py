"""Checkpoints are whole or not there, their files are checked, and the ledger survives being torn."""

import errno
import hashlib
import json
import logging
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from fslora_hf.storage.checkpoint import (
    STATE_NAME,
    CheckpointError,
    describe_difference,
    last_checkpoint,
    read_state,
    rotate,
    whole_folder,
)
from fslora_hf.storage.ledger import Marker, append_round, find_rounds, keep_rounds, mark, read_records

RUN = {"seed": 1, "ranks": (1, 2)}  # as JSON gives it back, a tuple is a list


def write(target, round: int = 3, run: dict = RUN, content: str = "adapter"):
    with whole_folder(target, round, run) as folder:
        (folder / "sub").mkdir()
        (folder / "a.txt").write_text(content)
        (folder / "sub" / "b.txt").write_text("b")
    return target


def files(folder) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too, and its content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_written_checkpoint_reads_back(tmp_path):
    state = read_state(write(tmp_path / "new" / "checkpoint-6"))
    assert state["round"] == 3 and state["run"] == {"seed": 1, "ranks": [1, 2]}
    assert sorted(state["files"]) == ["a.txt", "sub/b.txt"]
    assert sorted(files(tmp_path)) == [f"new/checkpoint-6/{name}" for name in ("a.txt", STATE_NAME, "sub/b.txt")]


@pytest.mark.parametrize("name", ["a.txt", "sub/b.txt"])
@pytest.mark.parametrize("damage", ["changed", "removed"])
def test_a_checksum_mismatch_is_an_error(tmp_path, name, damage):
    path = write(tmp_path / "checkpoint-6") / name
    path.write_text("other") if damage == "changed" else path.unlink()
    found = "[0-9a-f]{12}" if damage == "changed" else "nothing"
    message = rf"Expected .*{name} with the checksum [0-9a-f]{{12}}, found {found}: .*restore it or resume"
    with pytest.raises(CheckpointError, match=message):
        read_state(tmp_path / "checkpoint-6")
    assert read_state(tmp_path / "checkpoint-6", verify=False)["round"] == 3


@pytest.mark.parametrize("text", ["{", "[]", '{"round": 3}', "null", ""])
def test_a_damaged_state_file_is_an_error(tmp_path, text):
    (write(tmp_path / "checkpoint-6") / STATE_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=f"Expected a readable {STATE_NAME} in .*, found damage .*: resume from"):
        read_state(tmp_path / "checkpoint-6")


def test_a_named_unfinished_checkpoint_is_an_error(tmp_path):
    (write(tmp_path / "checkpoint-6") / STATE_NAME).unlink()
    for folder in (tmp_path / "checkpoint-6", tmp_path / "missing"):
        message = f"Expected a finished checkpoint in .*, found no {STATE_NAME}: name a finished one, or pass"
        with pytest.raises(CheckpointError, match=message):
            read_state(folder)


def test_the_last_checkpoint_has_most_rounds_and_unfinished_ones_are_passed_over(tmp_path, caplog):
    write(tmp_path / "checkpoint-100", round=2)
    write(tmp_path / "checkpoint-20", round=10)  # fewer steps, more rounds: written by more processes
    write(tmp_path / "checkpoint-30", round=9)
    (write(tmp_path / "checkpoint-200", round=50) / STATE_NAME).unlink()
    shutil.copytree(tmp_path / "checkpoint-20", tmp_path / ".checkpoint-300.partial")
    (tmp_path / "checkpoint-note.txt").write_text("not a folder")
    (tmp_path / "other").mkdir()
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
    passed_over = [
        f"Passing over the unfinished checkpoint {tmp_path / name}." for name in (".checkpoint-300.partial",)
    ]
    assert caplog.messages == [*passed_over, f"Passing over the unfinished checkpoint {tmp_path / 'checkpoint-200'}."]


def test_no_last_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "missing") is None


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


DISK_FULL = "^Expected to write the checkpoint .*checkpoint-9, found 'No space left on device': make room, and resume "


@pytest.mark.parametrize("moment", ["first file", "state file", "fsync", "rename"])
def test_a_full_disk_leaves_earlier_checkpoints_whole(tmp_path, monkeypatch, moment):
    write(tmp_path / "checkpoint-6", round=2)
    before = files(tmp_path)
    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=DISK_FULL + "with .*; earlier checkpoints are whole"),
    ):
        if moment == "first file":
            with whole_folder(tmp_path / "checkpoint-9", 3, RUN) as folder:
                (folder / "half").write_text("half")
                no_space()
        name = {"state file": "pathlib.Path.write_text", "fsync": "os.fsync", "rename": "os.replace"}.get(moment)
        with whole_folder(tmp_path / "checkpoint-9", 3, RUN) as folder:
            (folder / "a.txt").write_text("a")
            patch.setattr(name, no_space)
    assert files(tmp_path) == before and not list(tmp_path.glob(".*"))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


@contextmanager
def small_files():
    """Files end at 2000 bytes, which a writer meets as it meets a full disk. Nothing else may write meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # Python ignores the signal that goes with it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_under_safetensors_is_told_like_any_other(tmp_path):
    """Its writer raises an error of its own, which is no OSError."""
    write(tmp_path / "checkpoint-6", round=2)
    before = files(tmp_path)
    message = "Expected to write the checkpoint .*checkpoint-9, found 'File too large': make room, .*; earlier "
    with pytest.raises(OSError, match=message), whole_folder(tmp_path / "checkpoint-9", 3, RUN) as folder:
        with small_files():
            save_file({"a": torch.zeros(10_000)}, folder / "adapter_model.safetensors")
    assert files(tmp_path) == before


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
def test_another_error_leaves_no_checkpoint_and_the_next_save_succeeds(tmp_path, error):
    with pytest.raises(type(error)), whole_folder(tmp_path / "checkpoint-9", 3, RUN) as folder:
        (folder / "half").write_text("half")
        raise error
    assert last_checkpoint(tmp_path) is None
    assert sorted(read_state(write(tmp_path / "checkpoint-9"))["files"]) == ["a.txt", "sub/b.txt"]


def test_the_same_round_of_the_same_run_is_replaced(tmp_path):
    write(tmp_path / "checkpoint-6", content="old")
    write(tmp_path / "checkpoint-6", content="new")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    assert (tmp_path / "checkpoint-6" / "a.txt").read_text() == "new"


def test_a_failed_replacement_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    write(tmp_path / "checkpoint-6", content="old")
    before = files(tmp_path)
    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError, match="Expected to write the checkpoint"):
        write(tmp_path / "checkpoint-6", content="new")
    assert files(tmp_path) == before


def test_another_state_at_the_same_step_is_moved_aside(tmp_path, caplog):
    """Another round (in another layout steps count otherwise), another run, and an unfinished folder, one by one."""
    target = tmp_path / "checkpoint-6"
    write(target, round=1, content="first")
    with caplog.at_level(logging.WARNING):
        write(target, round=3, content="second")
    assert f"{target} holds another state (round-1); it is kept as checkpoint-6-round-1." in caplog.messages
    write(target, round=3, run={"seed": 2}, content="third")
    write(target, round=3, content="fourth")
    (target / STATE_NAME).unlink()
    write(target, content="fifth")
    assert {path.name: (path / "a.txt").read_text() for path in tmp_path.iterdir()} == {
        "checkpoint-6": "fifth",
        "checkpoint-6-round-1": "first",
        "checkpoint-6-round-3": "second",
        "checkpoint-6-round-3-older": "third",
        "checkpoint-6-unfinished": "fourth",
    }


def test_describe_difference():
    saved, current = {"a": 1, "b": [1], "gone": 5}, {"a": 2, "b": [1], "new": None}
    assert describe_difference(saved, current) == ["a was 1 and is 2", "gone was 5 and is None"]
    assert describe_difference(saved, saved) == []


# ---- The ledger ----


def make_ledger(path, rounds: int = 3, torn: str = ""):
    for t in range(rounds):
        append_round(path, {"round": t, "loss": t / 3})
    with open(path, "a") as file:
        file.write(torn)
    return path


def test_a_ledger_reads_back(tmp_path):
    path = make_ledger(tmp_path / "rounds.jsonl")
    assert read_records(path) == [{"round": t, "loss": t / 3} for t in range(3)]
    assert len(path.read_text().splitlines()) == 3


def test_a_ledger_holds_json_that_any_reader_takes(tmp_path):
    with pytest.raises(ValueError):
        append_round(tmp_path / "rounds.jsonl", {"round": 0, "loss": float("nan")})
    assert not (tmp_path / "rounds.jsonl").exists() or not (tmp_path / "rounds.jsonl").read_text()


@pytest.mark.parametrize("torn", ['{"round": 3, "lo', '{"round": 3', "{"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    path = make_ledger(tmp_path / "rounds.jsonl", torn=torn)
    assert [record["round"] for record in read_records(path)] == [0, 1, 2]
    assert keep_rounds(path, 3) == 3
    append_round(path, {"round": 3})
    assert [json.loads(line)["round"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


def test_a_damaged_line_elsewhere_is_an_error(tmp_path):
    """Unless nothing before the checkpoint is missed."""
    path = make_ledger(tmp_path / "rounds.jsonl", torn="{torn\n")
    append_round(path, {"round": 4})
    before = path.read_text()
    with pytest.raises(
        ValueError, match=r"hold each of the 5 rounds .* found round 3 missing \(line 4 is no round's rec"
    ):
        keep_rounds(path, 5)
    assert path.read_text() == before
    with pytest.raises(ValueError, match="Expected a round's JSON record on line 4 of .*, found '{torn': give"):
        read_records(path)
    assert keep_rounds(path, 2) == 2 and [record["round"] for record in read_records(path)] == [0, 1]


def test_keep_rounds_cuts_back_and_leaves_no_other_file(tmp_path):
    path = make_ledger(tmp_path / "rounds.jsonl", 5)
    assert keep_rounds(path, 2) == 2 and [record["round"] for record in read_records(path)] == [0, 1]
    find_rounds(path, 2).write(tmp_path / "new.jsonl")
    assert (tmp_path / "new.jsonl").read_text() == path.read_text()
    find_rounds(tmp_path / "missing", 2).write(tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").read_text() and find_rounds(tmp_path / "missing", 2).rounds == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.jsonl", "none.jsonl", "rounds.jsonl"]


@pytest.mark.parametrize("rounds", [5, 4, 1])
def test_a_ledger_that_begins_as_it_was_seen_is_cut_without_parsing_it(tmp_path, monkeypatch, rounds):
    path = make_ledger(tmp_path / "rounds.jsonl", rounds)
    seen, whole = mark(path), path.read_bytes()
    assert seen == {"rounds": rounds, "bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    append_round(path, {"round": rounds, "loss": 1.0})
    monkeypatch.setattr("fslora_hf.storage.ledger._parse", None)
    kept = find_rounds(path, rounds, seen)
    kept.write(tmp_path / "new.jsonl"), kept.write(path)
    assert kept.rounds == rounds and path.read_bytes() == whole == (tmp_path / "new.jsonl").read_bytes()


def test_a_ledger_that_grows_is_marked_without_being_read_again(tmp_path):
    """Else checkpoints of a long run would cost more and more."""
    path = make_ledger(tmp_path / "rounds.jsonl", 3)
    marker = Marker(path)
    assert marker.mark() == mark(path)
    append_round(path, {"round": 3, "loss": 1.0})
    expected, content = mark(path), bytearray(path.read_bytes())
    assert marker.mark() == expected and expected["rounds"] == 4
    content[0] ^= 1
    path.write_bytes(content)
    assert marker.mark() == expected != mark(path)
    path.unlink()
    assert marker.mark() is None


def test_one_changed_byte_of_a_ledger_is_seen(tmp_path):
    path = make_ledger(tmp_path / "rounds.jsonl", 5)
    seen, content = mark(path), bytearray(path.read_bytes())
    for place in range(0, len(content), 7):
        damaged = bytes(content[:place]) + bytes([content[place] ^ 1]) + bytes(content[place + 1 :])
        path.write_bytes(damaged)
        try:
            kept = find_rounds(path, 5, seen)
        except ValueError as error:
            assert "to hold each" in str(error)
        else:  # another number: every line is a record, which the caller looks at
            assert kept.records is not None and kept.rounds == 5


LEDGERS = {
    "a line missing": ([0, 1, 3], "found round 2 missing: restore it from a copy"),
    "the last missing": ([0, 1, 2], "found round 3 missing"),
    "of two processes": ([0, 1, 3, 4, 2, 5, 3, 6], "found two different records of round 3"),
}


@pytest.mark.parametrize("case", LEDGERS)
def test_a_ledger_must_hold_each_round_once(tmp_path, case):
    rounds, message = LEDGERS[case]
    path = tmp_path / "rounds.jsonl"
    path.write_text("".join(json.dumps({"round": round, "n": n}) + "\n" for n, round in enumerate(rounds)))
    with pytest.raises(ValueError, match=message):
        find_rounds(path, 4)


@pytest.mark.parametrize("text", ["", '{"round": 2}\n{"round": 3}\n'])
def test_the_first_rounds_of_a_ledger_are_missed_if_they_were_there(tmp_path, text):
    """A run may have gone on without its ledger; one that was emptied is damaged."""
    path = make_ledger(tmp_path / "rounds.jsonl", 4)
    seen = mark(path)
    path.write_text(text)
    assert find_rounds(path, 4).rounds == len(text.splitlines())
    assert find_rounds(path, 4, mark(path)).rounds == len(text.splitlines())
    with pytest.raises(
        ValueError, match="each of the 4 rounds before the checkpoint once, found round 0 missing: rest"
    ):
        find_rounds(path, 4, seen)


def test_a_ledger_is_mended_where_nothing_is_lost(tmp_path):
    """Doubled lines, another order, garbage between, other ends of lines."""
    path, lines = tmp_path / "rounds.jsonl", [json.dumps({"round": t}) + "\n" for t in range(4)]
    for mended, text in {
        "line 3 repeats round 1": lines[:2] + lines[1:],
        "line 1 is no round's record": ["\n", *lines],
        "its lines were not in order": [lines[0], lines[2], lines[1], lines[3]],
        "or not ended as they should": [line.replace("\n", "\r\n") for line in lines],
    }.items():
        path.write_bytes("".join(text).encode())
        kept = find_rounds(path, 3)
        assert mended in kept.mended and path.read_bytes() == "".join(text).encode()
        kept.write(path)
        assert path.read_text() == "".join(lines[:3])
    assert not find_rounds(path, 3).mended


def test_lines_of_later_rounds_among_the_earlier_are_cut_away(tmp_path):
    path = tmp_path / "rounds.jsonl"
    path.write_text("".join(json.dumps({"round": round}) + "\n" for round in (0, 5, 1, 2)))
    assert keep_rounds(path, 3) == 3 and [record["round"] for record in read_records(path)] == [0, 1, 2]


def test_a_ledger_that_is_a_folder(tmp_path):
    (tmp_path / "rounds.jsonl").mkdir()
    with pytest.raises(ValueError, match="Expected the ledger .* to be a file, found a folder: restore"):
        find_rounds(tmp_path / "rounds.jsonl", 3)


def test_keep_rounds_writes_no_line_again(tmp_path, monkeypatch):
    """Sixty megabytes of ten thousand rounds are not copied, nor opened to write where there is nothing to cut."""
    path = make_ledger(tmp_path / "rounds.jsonl", 5)
    file, written = path.stat().st_ino, path.stat().st_mtime_ns
    assert keep_rounds(path, 5) == 5 and (path.stat().st_ino, path.stat().st_mtime_ns) == (file, written)
    assert keep_rounds(path, 3) == 3 and path.stat().st_ino == file
    assert [record["round"] for record in read_records(path)] == [0, 1, 2]


def test_keep_rounds_keeps_the_right_lines_of_a_ledger_in_another_order(tmp_path):
    path = tmp_path / "rounds.jsonl"
    path.write_text('{"round": 2}\n{"round": 0}\n{"round": 1}\n')
    assert keep_rounds(path, 2) == 2 and [record["round"] for record in read_records(path)] == [0, 1]


def test_keep_rounds_reads_records_that_others_wrote(tmp_path):
    """Another order of keys, no space, and a whole last line without its end."""
    path = tmp_path / "rounds.jsonl"
    path.write_text('{"loss": 1.0, "round": 0}\n{"round":1}\n{"round": 2}')
    assert keep_rounds(path, 3) == 3
    append_round(path, {"round": 3})
    assert [record["round"] for record in read_records(path)] == [0, 1, 2, 3]
    assert keep_rounds(path, 1) == 1 and read_records(path) == [{"loss": 1.0, "round": 0}]


@pytest.mark.parametrize("torn", ["", '{"round": 5, "lo'])
def test_a_ledger_is_replaced_in_one_step(tmp_path, monkeypatch, torn):
    source, path = make_ledger(tmp_path / "other.jsonl", 5, torn=torn), make_ledger(tmp_path / "rounds.jsonl", 1)
    before = source.read_text(), path.read_text()
    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError):
        find_rounds(source, 2).write(path)
    assert (source.read_text(), path.read_text()) == before


def test_rotation_keeps_the_most_rounds_whatever_the_steps(tmp_path):
    """Another layout of processes takes other steps for a round; what was moved aside and what is unfinished stays."""
    for name, round in (("checkpoint-20", 2), ("checkpoint-12", 3), ("checkpoint-16", 4), ("checkpoint-9-round-1", 1)):
        with whole_folder(tmp_path / name, round, {}) as folder:
            (folder / "adapter").write_text(name)
    (tmp_path / "checkpoint-99").mkdir()
    rotate(tmp_path, None, 4)
    assert len(list(tmp_path.iterdir())) == 5
    rotate(tmp_path, 2, 4)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint-12", "checkpoint-16", "checkpoint-9-round-1", "checkpoint-99"]
