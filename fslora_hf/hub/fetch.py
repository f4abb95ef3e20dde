"""A round of a run from its Hub repository, to resume from: safetensors and JSON only, checked before use."""

import errno
import os
import re
import shutil
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download

from ..common.foreign_text import foreign_text
from ..storage.checkpoint import SERVER_NAME, STATE_NAME, CheckpointError, read_state
from ..storage.disk_errors import START_AGAIN, WriteError, is_full, told
from ..storage.files import sync_path, sync_tree
from ..storage.ledger import LEDGER_NAME, read_records
from ..storage.result_files import IN_LOOP, OUTCOMES, RESULTS
from ..storage.state_file import parse_state
from .errors import HubError, check_token, scrub

RESULTS_FOLDER = "results/"  # in the repository of a run
RESUMED = (  # what a run is resumed from, beside the state file that holds the checksums of these
    "adapter_model.safetensors",
    "adapter_config.json",
    SERVER_NAME,
    "trainer_state.json",
    "training_args.json",
    LEDGER_NAME,
)
_ENDINGS = (".safetensors", ".json", ".jsonl")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_LARGEST_TEXT = 200 * 2**20  # bytes of a JSON file that are read at most
_MOST_FILES = 100  # of a state that is fetched


def parse_source(text: str, own_repository: str | None, own_branch: str | None) -> tuple[str, str | None] | None:
    """Repository and revision of `hub`, `hub@revision`, `owner/name@revision`; None if the text is no such source.

    `hub` alone is the run's own repository and branch; another repository is told from a folder by its revision.

    Raises:
        ValueError: the run's own repository is asked for and there is none.
    """
    name, _, revision = text.partition("@")
    if name == "hub":
        if own_repository is None:
            raise ValueError(
                "Expected a repository to resume from, found resume_from_checkpoint=hub without hub_model_id: set "
                "hub_model_id, or name owner/name@round-0010."
            )
        return own_repository, revision or own_branch
    if revision and _REPOSITORY.fullmatch(name) and not Path(text).exists():
        return name, revision
    return None


def fetch_round(repository: str, revision: str | None, folder: Path, token: str | None = None) -> Path:
    """Download what a run is resumed from into `folder/checkpoint-<round>`, the ledger and the results of evaluated
    rounds beside it; returns the checkpoint's folder. Files that stand there from an earlier call are replaced.

    Raises:
        CheckpointError: the repository or revision cannot be read, or holds no state to resume from.
        HubError: the token is none that could be sent.
    """
    named = f"{repository}@{revision}" if revision else repository
    shutil.rmtree(folder, ignore_errors=True)
    try:
        check_token(token)
        return _fetch(HfApi(token=token), repository, revision, folder)
    except (CheckpointError, HubError):
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        found, remedy = f"damage ({scrub(_first_line(error), token)})", "name another round"
    except Exception as error:  # the client's errors have no common type
        if is_full(error):
            raise WriteError.of(errno.ENOSPC, named, os.strerror(errno.ENOSPC), START_AGAIN) from None
        found = f"'{scrub(_first_line(error), token)}'"
        remedy = (
            "correct the name, log in with `hf auth login`, or name a round that was pushed with push_resume_state"
        )
    # Not from the cause, whose text may hold a token.
    raise CheckpointError(f"Expected the state of a run in {named} on the Hub, found {found}: {remedy}.")


def _fetch(api: HfApi, repository: str, revision: str | None, folder: Path) -> Path:
    commit = api.model_info(repository, revision=revision).sha
    state = parse_state(_download(api, repository, commit, STATE_NAME))
    round, names = state["round"], [check_name(name) for name in state["files"]]
    if len(names) > _MOST_FILES:
        raise ValueError(f"{len(names):,} files in {STATE_NAME}")
    if missing := sorted({*RESUMED} - {*names}):
        raise CheckpointError(
            f"Expected what a run is resumed from in {repository} at round {round}, found {', '.join(missing)} "
            "missing: name a round that was pushed with push_resume_state."
        )
    target = folder / f"checkpoint-{round}"
    target.mkdir(parents=True)
    for name in [STATE_NAME, *names]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_download(api, repository, commit, name), target / name)
    read_state(target)  # the checksums of all of it
    shutil.copyfile(target / LEDGER_NAME, folder / LEDGER_NAME)
    found = [record.get("round") for record in read_records(folder / LEDGER_NAME)]
    if len(found) != round or found != [*range(len(found))]:
        raise ValueError(f"{LEDGER_NAME} does not hold the rounds before")
    _fetch_results(api, repository, commit, folder / IN_LOOP)
    return target


def _fetch_results(api: HfApi, repository: str, commit: str, folder: Path) -> None:
    """Download the result files of evaluated rounds, which later cards and plots show, too."""
    for name in api.list_repo_files(repository, revision=commit):
        if name.startswith(RESULTS_FOLDER) and name.endswith((RESULTS, OUTCOMES)):
            check_name(name)
            folder.mkdir(exist_ok=True)
            shutil.copyfile(_download(api, repository, commit, name), folder / PurePosixPath(name).name)


def take_in(checkpoint: Path, output_dir: Path, name: str) -> Path:
    """Move a download, but for the ledger, to where a run keeps such files; returns the checkpoint's folder.

    From here on the run is resumed like any other.
    """
    with told(output_dir / name):
        for path in sorted((checkpoint.parent / IN_LOOP).glob("*")):
            (output_dir / IN_LOOP).mkdir(exist_ok=True)
            os.replace(path, output_dir / IN_LOOP / path.name)
        sync_tree(checkpoint)
        os.replace(checkpoint, output_dir / name)
        sync_path(output_dir)
    return output_dir / name


def _download(api: HfApi, repository: str, commit: str, name: str) -> Path:
    """A file of a commit out of the client's cache; what it links to there is a file of the cache itself."""
    path = Path(hf_hub_download(repository, name, revision=commit, token=api.token))
    if not name.endswith(".safetensors") and path.stat().st_size > _LARGEST_TEXT:
        raise ValueError(f"{name} has {path.stat().st_size} bytes")
    return path


def check_name(name: str, endings: tuple[str, ...] = _ENDINGS) -> str:
    """The path of a file inside its repository, of a kind that is only ever read as data.

    Raises:
        ValueError: it could leave the folder, or is of another kind.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
        raise ValueError(f"the path {name!r} leads out of the folder")
    if path.suffix not in endings:
        raise ValueError(f"{name!r} ends in none of {', '.join(endings)}")
    return name


def _first_line(error: BaseException) -> str:
    return foreign_text(str(error).strip().split("\n")[0]) or type(error).__name__
