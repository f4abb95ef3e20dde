"""Files that are written in one step: what an error, a kill and another process leave of them."""

import errno
import os
import pickle
import threading

import pytest

from fslora_hf.storage import files
from fslora_hf.storage.disk_errors import WriteError, is_full, told
from fslora_hf.storage.files import append_line, whole_file, whole_files, write_text


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.json"
    with whole_file(path) as file:
        file.write(b"one")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"one" and names(tmp_path) == ["a.json"]
    with pytest.raises(KeyError), whole_file(path) as file:
        file.write(b"two")
        raise KeyError
    assert path.read_bytes() == b"one" and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("refused", ["os.fsync", "os.replace", "os.open"])
def test_a_full_disk_leaves_the_old_file_and_one_sentence(tmp_path, monkeypatch, refused):
    path = tmp_path / "a.json"
    write_text(path, "one")
    with monkeypatch.context() as patch, pytest.raises(WriteError) as caught:
        patch.setattr(refused, no_space)
        write_text(path, "two", "ask again")
    assert str(caught.value) == f"Expected to write {path}, found 'No space left on device': make room, and ask again."
    assert pickle.loads(pickle.dumps(caught.value)).found == "No space left on device"  # as it goes to other processes
    assert caught.value.errno == errno.ENOSPC and path.read_text() == "one" and names(tmp_path) == ["a.json"]


def test_what_a_kill_left_is_taken_up(tmp_path):
    (tmp_path / ".a.json.partial").write_text("half of something that was much longer")
    write_text(tmp_path / "a.json", "one")
    assert (tmp_path / "a.json").read_text() == "one" and names(tmp_path) == ["a.json"]


def test_each_of_two_writers_writes_a_whole_file(tmp_path, monkeypatch):
    """The second comes while the first is half done, waits for it, and does not write into what it has renamed."""
    path, waiting, second = tmp_path / "a", threading.Event(), None
    lock = files.lock_file

    def announced(*args, **kwargs):
        if threading.current_thread() is second:
            waiting.set()
        return lock(*args, **kwargs)

    monkeypatch.setattr(files, "lock_file", announced)
    with whole_file(path) as file:
        file.write(b"first, half")
        file.flush()
        second = threading.Thread(target=write_text, args=(path, "second"))
        second.start()
        assert waiting.wait(10)
        file.write(b" and half")
    first = path.read_bytes()
    second.join(10)
    assert first in (b"first, half and half", b"second") and path.read_bytes() == b"second"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("at_once", [False, True])
def test_a_line_that_does_not_fit_leaves_no_part_of_itself(tmp_path, monkeypatch, at_once):
    path = tmp_path / "rounds.jsonl"
    append_line(path, "one")
    opened = open

    class Full:
        def __init__(self, *args, **kwargs):
            self.file = opened(*args, **kwargs)

        def write(self, content):
            if at_once or len(content) < 5:
                no_space()
            return self.file.write(content[:2])

        def __enter__(self):
            return self

        def __exit__(self, *reason):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

    with monkeypatch.context() as patch, pytest.raises(WriteError, match="found 'No space left .*': make room"):
        patch.setattr("builtins.open", Full)
        append_line(path, "second")
    assert path.read_text() == "one\n"
    append_line(path, "second")
    assert path.read_text() == "one\nsecond\n"


def test_native_writers_are_told_like_any_other_and_flaws_pass(tmp_path):
    with pytest.raises(WriteError, match="^Expected to write b, found 'No space left on device': make room, and x.$"):
        with told("b", "x"), told("a"):
            raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(WriteError, match="found 'Permission denied': let it be written to, and start again"):
        with told("a"):
            raise PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(TypeError), told("a"):
        raise TypeError("a flaw")


def test_files_of_a_folder_arrive_together_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "kept").write_text("kept")
    with whole_files(tmp_path, updates=("README.md", "absent")) as folder:
        assert names(folder) == ["README.md"]
        (folder / "README.md").write_text("card, updated")
        (folder / "below").mkdir()
        (folder / "below" / "a").write_text("one")
    assert names(tmp_path) == ["README.md", "below", "kept"] and (tmp_path / "below" / "a").read_text() == "one"
    with pytest.raises(WriteError, match=f"files into {tmp_path}"), whole_files(tmp_path) as folder:
        (folder / "README.md").write_text("half")
        no_space()
    assert names(tmp_path) == ["README.md", "below", "kept"]
    assert (tmp_path / "README.md").read_text() == "card, updated"


def test_a_full_disk_is_found_behind_what_others_raise():
    try:
        try:
            no_space()
        except OSError as error:
            raise RuntimeError("could not generate the data set") from error
    except RuntimeError as error:
        assert is_full(error)
    assert not is_full(RuntimeError("x")) and not is_full(PermissionError(errno.EACCES, "x"))
