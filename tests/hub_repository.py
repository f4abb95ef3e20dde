"""One repository of the test Hub: a bare git repository, so that commit ids and histories are real."""

import os
import re
import subprocess
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

DATE = "--date=format-local:%Y-%m-%dT%H:%M:%S.000Z"


class Repository:
    """Reads and commits, each through git itself; whoever does both at once holds `lock`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock = threading.RLock()
        self.git("init", "--quiet", "--bare", "--initial-branch=main")

    def git(self, *arguments: str, stdin: bytes = b"") -> bytes:
        """What git prints; a CalledProcessError if it fails."""
        alone = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "TZ": "UTC"}
        command = ["git", "--literal-pathspecs", "--git-dir", str(self.folder), *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, check=True, env=alone).stdout

    def refs(self) -> dict[str, str]:
        """Full name -> commit id, of branches and tags (annotated tags are followed)."""
        lines = self.git("for-each-ref", "--format=%(refname) %(objectname) %(*objectname)").decode().splitlines()
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

    def commit(self, files: Mapping[str, bytes | None], message: str, branch: str = "main") -> str:
        """A commit on top of the branch that writes the files, or deletes those that are None; returns its id."""
        text = message.encode()
        stream = [b"commit refs/heads/%s\nmark :1\n" % branch.encode()]
        stream.append(b"committer Hub <hub@localhost> now\ndata %d\n%s\n" % (len(text), text))
        with self.lock:
            head = self.resolve(branch)
            if head is not None:
                stream.append(b"from %s\n" % head.encode())
            for path, content in files.items():
                if content is None:
                    stream.append(b"D %s\n" % path.encode())
                else:
                    stream.append(b"M 100644 inline %s\ndata %d\n%s\n" % (path.encode(), len(content), content))
            stream.append(b"\nget-mark :1\n")
            return self.git("fast-import", "--quiet", "--date-format=now", stdin=b"".join(stream)).decode().strip()

    def tag(self, name: str, commit: str) -> None:
        """A tag; a CalledProcessError if it exists."""
        self.git("update-ref", f"refs/tags/{name}", commit, "0" * 40)

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
        """The bytes of a blob."""
        return self.git("cat-file", "blob", oid)

    @staticmethod
    def _entry(described: str, path: str) -> dict:
        _, kind, oid, size = described.split()
        if kind == "tree":
            return {"type": "directory", "oid": oid, "size": 0, "path": path}
        return {"type": "file", "oid": oid, "size": int(size), "path": path}
