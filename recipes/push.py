"""Send what is missing of a run's rounds to the Hub, once: after a failure, a kill, or a run without network.

    python recipes/push.py OUTPUT_DIR [--repo_id OWNER/NAME] [--token TOKEN]

Rounds that are there already are recognised. Prints what became of every round; the exit code is 1 if any is missing.
Give the token by `hf auth login` or HF_TOKEN where others can see your command lines.
"""

import argparse
import sys
from pathlib import Path

from fslora_hf.common.command_line import TokenParser
from fslora_hf.hub.outbox import OUTBOX_NAME, Outbox
from fslora_hf.hub.pusher import push_pending
from fslora_hf.hub.uploader import HubTarget


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = TokenParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="that of the run")
    parser.add_argument(
        "--repo_id", help="another repository than the run's; rounds pushed before stay where they are"
    )
    parser.add_argument("--token", help="a token with write access; that of this machine's login if left out")
    parser.add_argument("--deadline", type=float, default=600.0, help="seconds to wait for a round (default: 600)")
    return parser.parse_args(arguments)


def find_outbox(output_dir: str) -> Outbox:
    """The outbox of a run.

    Raises:
        ValueError: there is none.
    """
    folder = Path(output_dir) / OUTBOX_NAME
    if not folder.is_dir():
        raise ValueError(
            f"Expected the output_dir of a run that pushes rounds, found no {OUTBOX_NAME} in {output_dir}: name "
            "another, or train with push_rounds."
        )
    return Outbox(folder, tidy=False)  # the run may still be going on


def find_target(outbox: Outbox, repo_id: str | None, token: str | None) -> HubTarget:
    """Where the run's rounds go, or to a repository of that name with the run's other settings."""
    noted = outbox.read_target()
    return HubTarget(repo_id or noted["repo_id"], token, noted["private"], noted["revision"])


def main() -> None:
    options = parse()
    try:
        outbox = find_outbox(options.output_dir)
        target = find_target(outbox, options.repo_id, options.token)
        report = push_pending(target, outbox, deadline_s=options.deadline)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(report)
    sys.exit(1 if report.missing else 0)


if __name__ == "__main__":
    main()
