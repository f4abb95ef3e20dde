"""One repository of the test Hub: a bare git repository, so that commit ids and histories are real."""

import hashlib
import os
import re
import subprocess
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

DATE = "--date=format-local:%Y-%m-%dT%H:%M:%S.000Z"
NONE = "0" * 40  # git's name for a ref that is not there


@dataclass(frozen=True)
class Large:
    """A file whose bytes lie beside git, which holds a pointer to them."""

    sha256: str
    size: int

    @property
    def pointer(self) -> bytes:
        """The file that git holds."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


@dataclass(frozen=True)
class Link:
    """A symbolic link, which the Hub's API cannot make but a push by git can."""

    target: str


Content = bytes | Large | Link


class RefMoved(Exception):
    """A branch or tag is not where the caller took it to be: someone else wrote it, or it exists already."""


class Repository:
    """Reads and commits, each through git itself; whoever does both at once holds `lock`."""

    def __init__(self, folder: Path, private: bool = False):
        self.folder = folder
        self.private = private
        self.lock = threading.RLock()
        self._large: dict[str, Large] = {}  # by the id of the pointer's blob
        self.git("init", "--quiet", "--bare", "--initial-branch=main", "--template=")  # no sample hooks

    def git(self, *arguments: str, stdin: bytes = b"") -> bytes:
        """What git prints; a CalledProcessError if it fails."""
        alone = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "TZ": "UTC"}
        alone |= {"GIT_COMMITTER_NAME": "Hub", "GIT_COMMITTER_EMAIL": "hub@localhost"}
        command = ["git", "--literal-pathspecs", "--git-dir", str(self.folder), *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, check=True, env=alone).stdout

    # ---- branches and tags ----

    def refs(self) -> dict[str, str]:
        """Full name -> commit id, of branches and tags (annotated tags are followed)."""
        shown = "--format=%(refname) %(objectname) %(*objectname)"
        lines = self.git("for-each-ref", shown, "refs/heads", "refs/tags").decode().splitlines()
        return {name: (peeled or oid) for name, oid, peeled in (line.split(" ") for line in lines)}

    def resolve(self, revision: str) -> str | None:
        """The commit id of a branch, tag, full ref or commit id, None if there is none."""
        refs = self.refs()
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in refs:
                return refs[name]
        if re.fullmatch("[0-9a-f]{40}", revision):
            kinds = self.git("cat-file", "--batch-check=%(objecttype)", stdin=revision.encode()).decode()
            return revision if kinds.strip() == "commit" else None
        return None

    def set_ref(self, ref: str, new: str, old: str = NONE, drop: str | None = None) -> None:
        """Move a ref from `old` (`NONE`: it is not there) to `new` and drop another with it, or raise a RefMoved."""
        lines = [f"update {ref} {new} {old}\n", *([f"delete {drop}\n"] if drop else [])]
        try:
            self.git("update-ref", "--stdin", stdin="".join(lines).encode())
        except subprocess.CalledProcessError as error:
            raise RefMoved(error.stderr.decode()) from None

    def tag(self, name: str, commit: str, message: str | None = None) -> None:
        """A tag, annotated if there is a message; a RefMoved if it exists."""
        if message:
            tagger = f"Hub <hub@localhost> {int(time.time())} +0000"
            text = f"object {commit}\ntype commit\ntag {name}\ntagger {tagger}\n\n{message}\n"
            commit = self.git("mktag", stdin=text.encode()).decode().strip()
        self.set_ref(f"refs/tags/{name}", commit)

    def is_name(self, ref: str) -> bool:
        """Whether git takes this as the full name of a ref."""
        try:
            self.git("check-ref-format", ref)
        except subprocess.CalledProcessError:
            return False
        return True

    # ---- commits ----

    def commit(
        self, files: Mapping[str, Content | None], message: str, branch: str = "main", author: str = "Hub"
    ) -> str:
        """A commit on top of the branch that writes the files, or deletes those that are None; returns its id.

        The objects are written first; the branch moves last, and only if it still is where it was (else a RefMoved).
        """
        written = f"refs/hub/{uuid.uuid4().hex}"
        text = message.encode()
        stream = [b"commit %s\nmark :1\n" % written.encode()]
        stream.append(f"author {author} <{author}@localhost> now\n".encode())
        stream.append(b"committer Hub <hub@localhost> now\ndata %d\n%s\n" % (len(text), text))
        with self.lock:
            head = self.refs().get(f"refs/heads/{branch}")
            if head is not None:
                stream.append(b"from %s\n" % head.encode())
            # Deletions first: a folder may make room for a file of its name.
            for path, content in sorted(files.items(), key=lambda item: item[1] is not None):
                stream.append(self._change(path, content))
            stream.append(b"\nget-mark :1\n")
            commit = self.git("fast-import", "--quiet", "--date-format=now", stdin=b"".join(stream)).decode().strip()
            try:
                self.set_ref(f"refs/heads/{branch}", commit, head or NONE, drop=written)
            except RefMoved:
                self.git("update-ref", "-d", written)
                raise
        return commit

    def _change(self, path: str, content: Content | None) -> bytes:
        if content is None:
            return b"D %s\n" % path.encode()
        mode = b"120000" if isinstance(content, Link) else b"100644"
        data = content
        if isinstance(content, Link):
            data = content.target.encode()
        elif isinstance(content, Large):
            data = content.pointer
            self._large[blob_id(data)] = content
        return b"M %s inline %s\ndata %d\n%s\n" % (mode, path.encode(), len(data), data)

    # ---- files beside git, where git-lfs keeps them ----

    def large_file(self, sha256: str) -> Path:
        """Where the bytes of a large file lie, or would."""
        return self.folder / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256

    def store(self, content: bytes) -> Large:
        """Keep the bytes of a large file."""
        large = Large(hashlib.sha256(content).hexdigest(), len(content))
        path = self.large_file(large.sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return large

    # ---- reading ----

    def entries(self, commit: str, paths: Iterable[str] = (), recursive: bool = False) -> list[dict]:
        """The named files and folders, or all; of a path that ends in a slash, what the folder holds."""
        flags = ["-z", "-l", "--full-tree", *(["-r", "-t"] if recursive else [])]
        listed = self.git("ls-tree", *flags, commit, "--", *paths).decode().split("\0")[:-1]
        return [self._entry(*line.split("\t", 1)) for line in listed]

    def log(self, commit: str, path: str | None = None) -> list[dict]:
        """The history of a commit, latest first; with a path, of that file or folder."""
        fields = ["--format=%H%x00%s%x00%b%x00%cd%x00%an%x1e", DATE]
        text = self.git("log", *fields, commit, "--", *([path] if path else [])).decode()
        commits = [record.strip("\n").split("\0") for record in text.split("\x1e")[:-1]]
        return [
            {"id": oid, "title": title, "message": body.strip(), "date": date, "authors": [{"user": author}]}
            for oid, title, body, date, author in commits
        ]

    def read(self, oid: str) -> bytes:
        """The bytes of the file that a blob holds or points to."""
        large = self._large.get(oid)
        return self.git("cat-file", "blob", oid) if large is None else self.large_file(large.sha256).read_bytes()

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> bytes of all files of a revision; none if there is no such revision."""
        commit = self.resolve(revision)
        entries = self.entries(commit, recursive=True) if commit else []
        return {entry["path"]: self.read(entry["oid"]) for entry in entries if entry["type"] == "file"}

    def _entry(self, described: str, path: str) -> dict:
        _, kind, oid, size = described.split()
        if kind == "tree":
            return {"type": "directory", "oid": oid, "size": 0, "path": path}
        large = self._large.get(oid)
        if large is None:
            return {"type": "file", "oid": oid, "size": int(size), "path": path}
        pointed = {"oid": large.sha256, "size": large.size, "pointerSize": int(size)}
        return {"type": "file", "oid": oid, "size": large.size, "path": path, "lfs": pointed}


def blob_id(content: bytes) -> str:
    """The id that git gives a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
