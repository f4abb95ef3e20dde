"""Compare methods, rank laws and settings with each other: run or resume every run, evaluate, and write one report.

    python recipes/compare.py --config recipes/comparisons/methods.yaml --data_dir FOLDER

Keys of the comparison and settings of its runs can be given on the command line, too. Every run is a process of its
own (recipes/train.py), started with accelerate if `accelerate_config` names a file of its. Started again after a kill,
a comparison goes on where it stopped; the exit code is 1 if a run failed.
"""

import sys
from pathlib import Path

from fslora_hf.comparison.arguments import Comparison, parse_comparison
from fslora_hf.comparison.folder import Folder
from fslora_hf.comparison.launching import Launcher, Progress, run_all
from fslora_hf.comparison.page import write_report
from fslora_hf.comparison.results import check_alike, is_done, read_run
from fslora_hf.comparison.runs import Run, Variant, runs_of
from fslora_hf.comparison.splits import Split, check_unchanged, splits_of
from fslora_hf.comparison.summary import summarise
from fslora_hf.comparison.tables import to_text

SCRIPT = Path(__file__).with_name("train.py")


def report(comparison: Comparison, variants: list[Variant], runs: list[Run], splits: list[Split]) -> str:
    """Write the report of all finished runs; returns its table."""
    folder, arguments = Folder(comparison.output_dir), comparison.arguments
    finished = [run for run in runs if is_done(run, folder.run(run.name))]
    if not finished:
        raise ValueError("Expected a finished run to report on, found none: see the logs above.")
    results = [read_run(run, folder.run(run.name)) for run in finished]
    check_alike(results)
    budget = {"rounds": arguments.rounds, "upload_megabytes": arguments.upload_megabytes}
    title = arguments.title or comparison.name
    summary = summarise(title, budget, comparison.seeds, variants, results, splits)
    write_report(summary, folder.path)
    return to_text(summary)


def main() -> None:
    try:
        comparison = parse_comparison()
        variants, runs = runs_of(comparison)
        splits = splits_of(runs)
        folder = Folder(comparison.output_dir)
        with folder.claimed(runs, splits):
            launcher = Launcher(folder, SCRIPT, comparison.arguments.accelerate_config)
            failed = run_all(runs, launcher, Progress(runs, folder))
            check_unchanged(runs, splits)
            table = report(comparison, variants, runs, splits)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from here.")
    print(f"\n{table}\n\nReport: {folder.path / 'index.html'}, {folder.path / 'report.md'}")
    if failed:
        names = ", ".join(run.name for run in failed)
        sys.exit(
            f"Expected every run to finish, found {len(failed)} failed ({names}): see their logs, and start again."
        )


if __name__ == "__main__":
    main()
