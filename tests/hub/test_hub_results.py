"""Results of evaluations on the Hub: sent once, read back, and ranked beside local ones."""

import contextlib
import importlib
import io
import json
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from fslora_hf.hub import results as hub_results
from fslora_hf.hub import results_push
from fslora_hf.hub.results import parse_address, read_all, read_hub_results
from fslora_hf.hub.results_push import evaluation_path, push_results
from fslora_hf.reports.entries import read_results
from tests.support.hub_calls import OTHER, READS, WRITES
from tests.support.hub_repository import Link
from tests.support.result_files import OTHER as OTHER_MARKS
from tests.support.result_files import REFERENCE, adapter, evaluation

pytest_plugins = ("tests.support.hub_client",)


@pytest.fixture
def local(tmp_path) -> Path:
    """A folder with results of a base and of a round."""
    evaluation(tmp_path / "local", "base", REFERENCE)
    evaluation(tmp_path / "local", "round-0010", OTHER_MARKS, name="smol run, round 10", adapter=adapter(10))
    return tmp_path / "local"


def files(folder: Path, prefix: str = "") -> dict[str, bytes]:
    return {f"{prefix}{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}


def of(hub, repo_id: str = "user/results") -> dict[str, bytes]:
    return hub.find(repo_id, "dataset").files()


def commits(hub, repo_id: str = "user/results") -> int:
    return len(hub.find(repo_id, "dataset").git("rev-list", "main").split())


# ---- what runs in the client's process ----


def push(*paths, repo_id="user/results", token=WRITES, attempts=5, **options):
    """What was added, or the sentence."""
    results_push._PAUSE, results_push._ATTEMPTS = 0.01, attempts
    try:
        return push_results(paths, repo_id, token=token, **options)
    except (ValueError, OSError) as error:
        return str(error)


def read(*arguments, largest=hub_results.LARGEST, **options):
    hub_results.LARGEST = largest
    try:
        return read_hub_results(*arguments, **options)
    except (ValueError, OSError) as error:
        return str(error)


# ---- reading ----


@pytest.mark.parametrize(
    ("repo_type", "prefix", "start"),
    [("dataset", "any/depth/", "hf://datasets/user/it@"), ("model", "results/", "hf://user/it@")],
)
def test_entries_are_those_of_the_local_files(hub, on_client, local, repo_type, prefix, start):
    commit = hub.add("user/it", files(local, prefix) | {"README.md": b"x", "model.pkl": b"x"}, repo_type)
    found = on_client(read, "user/it", repo_type=repo_type)
    expected = read_results([local])
    assert [replace(entry, source="") for entry in found] == [replace(entry, source="") for entry in expected]
    assert [entry.source for entry in found] == [
        f"{start}{commit[:8]}/{prefix}{Path(entry.source).name}" for entry in expected
    ]
    fetched = {request.path for request in hub.requests if "/resolve/" in request.path}
    assert fetched and all(path.endswith((".json", ".jsonl")) for path in fetched)


def test_a_revision_and_one_commit_for_all_files(hub, on_client, local):
    hub.add("user/it", files(local, "results/"), tag="round-0010")
    hub.add("user/it", {f"results/{path.name}": None for path in local.iterdir()})
    assert len(on_client(read, "user/it", "round-0010")) == 2
    assert on_client(read, "user/it").startswith("Expected results files (results/*.results.json) at hf://user/it")
    fetched = [request.path for request in hub.requests if "/resolve/" in request.path]
    assert len({path.split("/resolve/")[1].split("/")[0] for path in fetched}) == 1


def test_results_outside_their_folder_are_not_a_models_rounds(hub, on_client, local):
    hub.add("user/it", files(local) | files(local, "results/"))
    assert len(on_client(read, "user/it")) == 2


def test_without_outcomes_there_are_no_answers(hub, on_client, tmp_path):
    path = evaluation(tmp_path / "r", "base", REFERENCE, with_outcomes=False)
    hub.add("user/it", {path.name: path.read_bytes()}, "dataset")
    (entry,) = on_client(read, "user/it", repo_type="dataset")
    assert entry.answers is None


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.results.json", b"{", "Expected JSON in hf://datasets/user/it@"),
        ("a.results.json", b"\xff", "Expected UTF-8 text in a.results.json of user/it, found byte 0"),
        ("a.results.json", Link("/etc/passwd"), "Expected JSON in hf://datasets/user/it@"),
        ("a:b.results.json", b"{}", "Expected JSON within user/it, found that the path 'a:b.results.json' leads out"),
        ("a\\b.results.json", b"{}", "Expected JSON within user/it, found that the path"),
    ],
)
def test_what_is_no_results_file_is_told(hub, on_client, name, content, sentence):
    hub.add("user/it", {name: content}, "dataset")
    assert on_client(read, "user/it", repo_type="dataset").startswith(sentence)


@pytest.mark.parametrize("name", ["../up.results.json", "/root.results.json", "a/../../up.results.json"])
def test_a_listed_path_that_leads_out_is_not_fetched(hub, on_client, local, name):
    hub.add("user/it", files(local), "dataset")
    hub.fault("tree", body=[{"type": "file", "path": name, "oid": "0" * 40, "size": 3}])
    assert on_client(read, "user/it", repo_type="dataset").startswith(
        "Expected JSON within user/it, found that the path"
    )
    assert not [request for request in hub.requests if "/resolve/" in request.path]


def test_outcomes_named_elsewhere_are_not_followed(hub, on_client, local):
    text = (local / "base.results.json").read_text().replace("base.outcomes", "../x.outcomes")
    hub.add("user/it", {"a/base.results.json": text.encode(), "x.outcomes.jsonl": b""}, "dataset")
    assert "to be the name of a file beside it" in on_client(read, "user/it", repo_type="dataset")


def test_a_large_file_is_not_fetched(hub, on_client, local):
    hub.add("user/it", files(local), "dataset")
    told = on_client(read, "user/it", repo_type="dataset", largest=10)
    assert re.match(r"Expected at most 0 MB in base\.results\.json of user/it, found 0\.0 MB", told)
    assert not [request for request in hub.requests if "/resolve/" in request.path]


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ("user/it", {"status": 500}),
        ("user/it", {"reset": True}),
        ("tree", {"status": 403}),
        ("resolve", {"status": 403}),
    ],
)
def test_a_hub_that_fails_is_told(hub, on_client, local, stage, fault):
    hub.add("user/it", files(local), "dataset")
    hub.fault(stage, times=None, **fault)
    assert on_client(read, "user/it", repo_type="dataset").startswith("Expected the data set user/it")


def test_what_cannot_be_seen_is_told(hub, on_client, users):
    hub.create("user/hidden", private=True)
    for name, options in (("user/none", {}), ("user/hidden", {}), ("user/hidden", {"token": OTHER}), ("a b/c", {})):
        told = on_client(read, name, **options)
        assert told.startswith(f"Expected the model {name} on the Hub, found none that can be read (")
        assert OTHER not in told
    assert on_client(read, "user/it", token="hf_a\nb").startswith("Expected a token of letters and digits")


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("hf://datasets/ann/results", ("ann/results", None, "dataset")),
        ("hf://datasets/ann/results@v1", ("ann/results", "v1", "dataset")),
        ("hf://ann/run@refs/pr/1", ("ann/run", "refs/pr/1", "model")),
    ],
)
def test_addresses(address, parts):
    assert parse_address(address) == parts


@pytest.mark.parametrize(
    "address", ["hf://ann", "hf://datasets/ann", "hf://a/b/c", "hf://datasets/a/b/c", "hf://a/b@"]
)
def test_no_addresses(address):
    with pytest.raises(ValueError, match="^Expected an address hf://"):
        parse_address(address)


def test_places_are_mixed_and_each_counts_once(hub, on_client, local, tmp_path):
    hub.add("user/it", files(local, "results/"))
    address = "hf://user/it"
    entries = on_client(read_all, [address, str(local), f"{address}@main", str(local / "base.results.json"), address])
    assert [entry.source.startswith("hf://") for entry in entries] == [False, False, True, True]


# ---- sending ----


def test_results_are_sent_once(hub, on_client, users, local):
    added = on_client(push, str(local))
    base, tenth = sorted(added)
    assert added == {base: True, tenth: True}
    assert re.fullmatch(r"base/base-[0-9a-f]{16}-loglikelihood\.results\.json", base)
    assert re.fullmatch(r"smol-run/round-0010-[0-9a-f]{16}-loglikelihood\.results\.json", tenth)
    held = of(hub)
    outcomes = [path.replace(".results.json", ".outcomes.jsonl") for path in (base, tenth)]
    assert set(held) == {".gitattributes", "README.md", base, tenth, *outcomes}
    assert held[outcomes[1]] == (local / "round-0010.outcomes.jsonl").read_bytes()
    sent, original = json.loads(held[tenth]), json.loads((local / "round-0010.results.json").read_text())
    assert sent == original | {"outcomes": Path(outcomes[1]).name}
    readme = held["README.md"].decode()
    assert "viewer: false" in readme and "python recipes/leaderboard.py hf://datasets/user/results" in readme
    made = commits(hub)
    assert on_client(push, str(local)) == {base: False, tenth: False}
    assert commits(hub) == made == 2
    entries = on_client(read, "user/results", repo_type="dataset")
    assert [entry.scores for entry in entries] == [entry.scores for entry in read_results([local])]


def test_another_run_is_added_and_the_readme_left_alone(hub, on_client, users, local, tmp_path):
    hub.add("user/results", {"README.md": b"mine"}, "dataset")
    on_client(push, str(local / "base.results.json"))
    more = evaluation(tmp_path / "more", "m", REFERENCE, name="other, round 3", adapter=adapter(3))
    (path,) = on_client(push, str(more))
    assert path.startswith("other/round-0003-") and path in of(hub)
    assert of(hub)["README.md"] == b"mine" and len(on_client(read, "user/results", repo_type="dataset")) == 2


def test_evaluated_again_with_equal_scores_is_there_already(hub, on_client, users, local):
    on_client(push, str(local))
    before = of(hub)
    path = local / "base.results.json"
    path.write_text(path.read_text().replace("2026-11-22", "2026-12-24"))
    assert set(on_client(push, str(local)).values()) == {False}
    assert of(hub) == before


def test_other_scores_of_the_same_evaluation_are_refused_and_nothing_is_sent(hub, on_client, users, local, tmp_path):
    on_client(push, str(local))
    before = of(hub)
    evaluation(local, "base", {"a": "1110", "b": "10"})
    evaluation(local, "new", REFERENCE, name="new, round 1", adapter=adapter(1))
    told = on_client(push, str(local))
    assert re.match(r"Expected base/base-\w+-loglikelihood\.results\.json once, found other scores", told)
    assert "user/results" in told and of(hub) == before
    evaluation(tmp_path / "twice", "base", REFERENCE)
    told = on_client(push, str(local), str(tmp_path / "twice"), repo_id="user/fresh")
    assert "once, found other scores" in told and hub.find("user/fresh", "dataset") is None


def test_what_stands_damaged_in_the_repository_is_left_alone(hub, on_client, users, local):
    (path,) = on_client(push, str(local / "base.results.json"))
    hub.add("user/results", {path: b"{}"}, "dataset")
    assert "once, found other scores" in on_client(push, str(local)) and of(hub)[path] == b"{}"


def test_outcomes_that_were_missing_are_added(hub, on_client, users, tmp_path):
    path = evaluation(tmp_path / "r", "base", REFERENCE, with_outcomes=False)
    on_client(push, str(path))
    evaluation(tmp_path / "r", "base", REFERENCE)
    (name,) = on_client(push, str(path))
    assert name.replace(".results.json", ".outcomes.jsonl") in of(hub)


@pytest.mark.parametrize("fault", [{"drop_answer": True}, {"status": 503}, {"reset": True}, {"status": 412}])
def test_a_commit_that_fails_once_is_made_once(hub, on_client, users, local, fault):
    hub.create("user/results", "dataset").commit({"x": b""}, "first")
    hub.fault("commit", **fault)
    assert set(on_client(push, str(local)).values()) == {True}
    assert commits(hub) == 2 and len(on_client(read, "user/results", repo_type="dataset")) == 2


def test_what_someone_else_commits_meanwhile_stays(hub, on_client, users, local):
    hub.add("user/results", {"x": b""}, "dataset")
    waiting = hub.fault("commit", stall_s=30)
    pushed = []
    thread = threading.Thread(target=lambda: pushed.append(on_client(push, str(local))))
    thread.start()
    while not waiting.hits:
        threading.Event().wait(0.02)
    hub.add("user/results", {"theirs": b"1"}, "dataset")
    hub.release()
    thread.join()
    assert set(pushed[0].values()) == {True} and of(hub)["theirs"] == b"1" and commits(hub) == 3


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [({"status": 413}, "free some room"), ({"status": 500, "times": None}, "run this again later")],
)
def test_a_hub_that_refuses_is_told_and_the_push_can_be_repeated(hub, on_client, users, local, fault, remedy):
    hub.fault("commit", **fault)
    told = on_client(push, str(local), attempts=2)
    assert told.startswith("Expected to add results to user/results on the Hub, found") and remedy in told
    hub.mend()
    assert set(on_client(push, str(local)).values()) == {True}


@pytest.mark.parametrize("token", [READS, OTHER, "hf_nobodys_token"])
def test_a_token_that_may_not_write(hub, on_client, users, local, token):
    told = on_client(push, str(local), token=token)
    assert told.startswith("Expected") and token not in told and hub.find("user/results", "dataset") is None


def test_private_stays_private(hub, on_client, users, local):
    on_client(push, str(local), private=True)
    assert hub.find("user/results", "dataset").private
    on_client(push, str(local), repo_id="user/open")
    before = of(hub, "user/open")
    evaluation(local, "new", REFERENCE, name="new", adapter=adapter(1))
    assert on_client(push, str(local), repo_id="user/open", private=True).startswith(
        "Expected user/open to be private"
    )
    assert of(hub, "user/open") == before


def test_a_name_without_an_owner_and_nothing_to_send(tmp_path):
    with pytest.raises(ValueError, match="^Expected repo_id to be owner/name"):
        push_results([tmp_path], "results")
    with pytest.raises(FileNotFoundError, match="^Expected results files"):
        push_results([tmp_path], "user/results")


def test_the_path_tells_apart_what_decides_the_scores(local):
    results = json.loads((local / "round-0010.results.json").read_text())
    differing = [
        {},
        {"settings": {"num_beams": 1}},
        {"protocol": "generate"},
        {"prompt_hash": "d" * 16},
        {"rows_hash": "d" * 16},
        {"adapter": adapter(11)},
        {"adapter": {**adapter(10), "digest": "d" * 16}},
        {"adapter": None},
        {"model": {**results["model"], "quantization": "4-bit"}},
        {"model": {**results["model"], "digest": "d" * 16}},
    ]
    paths = [evaluation_path(results | change) for change in differing]
    assert len(set(paths)) == len(paths)
    same = [{"time": "x"}, {"seed": 3}, {"versions": {}}, {"scores": []}]
    assert {evaluation_path(results | change) for change in same} == {paths[0]}


@pytest.mark.parametrize(
    ("name", "run"),
    [("../../etc", "etc"), ("a/b, round 3", "a-b"), ("", "run"), ("..", "run"), ("x" * 300, "x" * 80), ("é ü", "é-ü")],
)
def test_a_runs_name_is_one_folder(local, name, run):
    results = json.loads((local / "base.results.json").read_text())
    assert evaluation_path(results | {"name": name}).split("/")[0] == run
    assert evaluation_path(results | {"name": name}).count("/") == 1


# ---- the recipes ----


def recipe(name, *arguments) -> tuple[object, str]:
    """The exit code or sentence of a script's `main`, and what it printed."""
    script, code = importlib.import_module(f"recipes.{name}"), 0
    with (
        mock.patch.object(sys, "argv", [name, *map(str, arguments)]),
        contextlib.redirect_stdout(io.StringIO()) as out,
    ):
        try:
            script.main()
        except SystemExit as end:
            code = end.code
    return code, out.getvalue()


def test_the_recipes_send_and_rank(hub, on_client, users, local, tmp_path):
    sending = ("push_results", local, "--repo_id", "user/results", "--token", WRITES)
    code, printed = on_client(recipe, *sending)
    assert code == 0 and printed.count("added: ") == 2 and WRITES not in printed
    code, printed = on_client(recipe, *sending)
    assert code == 0 and printed.count("there already: ") == 2
    own = evaluation(tmp_path / "own", "own", {"a": "1111", "b": "11"})
    board = tmp_path / "board"
    code, printed = on_client(recipe, "leaderboard", own, "hf://datasets/user/results", "--output_dir", board)
    assert code == 0 and "smol run, round 10" in printed
    assert re.search(r"^ *1 +own ", printed, re.MULTILINE)
    assert "hf://datasets/user/results@" in (board / "leaderboard.csv").read_text()
    code, printed = on_client(recipe, "leaderboard", "hf://datasets/user/none")
    assert code.startswith("Expected the data set user/none on the Hub") and not printed
    code, _ = on_client(recipe, *sending[:-1], "hf_nobody")
    assert code.startswith("Expected") and "hf_nobody" not in code
