"""Add results files of evaluations to a data set of results on the Hub.

    python recipes/push_results.py PATH [PATH ...] --repo_id OWNER/NAME [--private] [--token TOKEN]

A PATH is a `*.results.json` or a folder that is searched for them at any depth; the outcomes beside them are sent,
too. The repository is created if there is none. Results that are there already are not sent again, and other scores of
the same evaluation are refused. `recipes/leaderboard.py hf://datasets/OWNER/NAME` ranks what is there. Give the token
by `hf auth login` or HF_TOKEN where others can see your command lines.
"""

import argparse
import sys

from fslora_hf.common.command_line import TokenParser
from fslora_hf.hub.results_push import push_results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = TokenParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", metavar="PATH", nargs="+", help="a results file, or a folder to search for them")
    parser.add_argument("--repo_id", required=True, help="the data set repository, as owner/name")
    parser.add_argument(
        "--private", action="store_true", help="create it as a private one, and send nothing if it is public"
    )
    parser.add_argument("--token", help="a token with write access; that of this machine's login if left out")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    try:
        added = push_results(options.paths, options.repo_id, options.private or None, options.token)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    for path, is_new in added.items():
        print(f"{'added' if is_new else 'there already'}: {path}")


if __name__ == "__main__":
    main()
