"""Folders for runs that nobody has named: no run is lost to the next."""

from pathlib import Path


def unused_folder(folder: str) -> str:
    """The folder, or with a number behind it if something is in it already."""
    candidate, number = Path(folder), 1
    while candidate.exists() and not (candidate.is_dir() and not any(candidate.iterdir())):
        number += 1
        candidate = Path(f"{folder}-{number}")
    return str(candidate)
