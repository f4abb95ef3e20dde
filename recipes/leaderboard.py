"""Rank results files of evaluations in one table.

    python recipes/leaderboard.py PATH [PATH ...] [--metric accuracy] [--reference NAME] [--output_dir DIR]

A PATH is a `*.results.json`, a folder that is searched for them at any depth, a data set of results on the Hub
(`hf://datasets/owner/name`), or a model there whose rounds were evaluated (`hf://owner/name`); `@revision` may follow.
The table is printed; with `--output_dir` it is written there, too, as leaderboard.txt, .md, .csv and .html (a page
that needs no network).
"""

import argparse
import sys
from pathlib import Path

from fslora_hf.hub.results import read_all
from fslora_hf.reports.entries import METRICS
from fslora_hf.reports.leaderboard import Leaderboard, rank
from fslora_hf.reports.leaderboard_page import to_html
from fslora_hf.reports.leaderboard_tables import CSV_START, MARK, to_csv, to_markdown, to_text
from fslora_hf.storage.files import make_folder, write_text

# How each file is made, and what it holds early on by which we know it for ours.
WRITERS = {
    "leaderboard.txt": (to_text, MARK),
    "leaderboard.md": (to_markdown, f"<!-- {MARK} -->"),
    "leaderboard.csv": (to_csv, ",".join(CSV_START)),
    "leaderboard.html": (to_html, f'<meta name="generator" content="{MARK}">'),
}
EARLY = 2000  # characters


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", metavar="PATH", nargs="+", help="a results file, a folder, or an address on the Hub")
    parser.add_argument("--metric", default="accuracy", choices=METRICS, help="what to rank by")
    parser.add_argument("--reference", help="compare with this entry, by name or file; the best one if left out")
    parser.add_argument("--allow_other_prompts", action="store_true", help="rank entries whose prompts differ, too")
    parser.add_argument("--output_dir", help="write the table there as text, Markdown, CSV and HTML")
    return parser.parse_args(arguments)


def write_leaderboard(leaderboard: Leaderboard, folder: str | Path) -> list[Path]:
    """Write the four files into `folder`; older leaderboards there are replaced, each in one step.

    Raises:
        FileExistsError: a file of that name is not a leaderboard; nothing is written then.
    """
    folder = Path(folder)
    for name, (_, mark) in WRITERS.items():
        if (folder / name).exists() and not _is_ours(folder / name, mark):
            raise FileExistsError(
                f"Expected {folder / name} to be a leaderboard of this script or not there, found something else: "
                "move it away, or name another --output_dir."
            )
    make_folder(folder)
    for name, (render, _) in WRITERS.items():
        write_text(folder / name, render(leaderboard) + "\n")
    return [folder / name for name in WRITERS]


def _is_ours(path: Path, mark: str) -> bool:
    if not path.is_file():
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        return mark in file.read(EARLY)


def main() -> None:
    options = parse()
    try:
        entries = read_all(options.paths)
        leaderboard = rank(entries, options.metric, options.reference, options.allow_other_prompts)
        print(to_text(leaderboard))
        if options.output_dir:
            names = ", ".join(str(path) for path in write_leaderboard(leaderboard, options.output_dir))
            print(f"\nWritten: {names}")
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
