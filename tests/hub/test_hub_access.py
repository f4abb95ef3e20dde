"""Repositories of the test Hub come, go and open to whom they should, as the real client sees it."""

import pytest

from tests.support.hub_calls import OTHER, READS, WRITES, commit, create, outcome, post

pytest_plugins = ("tests.support.hub_client",)


def test_a_repository_is_created_once_and_deleted(hub, on_client, users):
    assert on_client(create, "it") == f"{hub.url}/user/it"
    assert hub.requests[-1].status == 200
    assert on_client(outcome, "create") == ("HfHubHTTPError", 409)
    assert on_client(create, exist_ok=True) == f"{hub.url}/user/it"
    assert on_client(create, "team/it", repo_type="dataset") == f"{hub.url}/datasets/team/it"
    assert on_client(outcome, "create", "other/it") == ("HfHubHTTPError", 403)
    assert list(hub.find("user/it").files()) == [".gitattributes"]
    on_client(outcome, "delete_repo", "user/it", token=WRITES)
    assert hub.find("user/it") is None
    assert on_client(outcome, "delete_repo", "user/it", token=WRITES) == ("RepositoryNotFoundError", 404)


def test_names_that_cannot_be_are_refused(hub, users):
    for name in ("a..b", "a--b", "-a", "a" * 97):
        body = [{"name": name, "organization": None, "type": "model"}]
        assert post(f"{hub.url}/api/repos/create", body) == 400


def test_tokens_open_what_they_may(hub, on_client, users):
    assert on_client(outcome, "whoami", token=WRITES)["name"] == "user"
    assert on_client(outcome, "whoami", token=READS)["auth"]["accessToken"]["role"] == "read"
    hub.add("user/it", {"a.json": b"1"})
    expected = {
        "hf_unknown": ("HfHubHTTPError", 401),
        False: ("HfHubHTTPError", 401),
        READS: ("HfHubHTTPError", 403),
        OTHER: ("HfHubHTTPError", 403),
    }
    for token, refused in expected.items():
        assert on_client(outcome, "commit", {"a.json": b"2"}, token=token) == refused
        assert on_client(outcome, "tag", "v", token=token) == refused
        assert on_client(outcome, "auth_check", "user/it", token=token, write=True) == refused
    assert on_client(outcome, "auth_check", "user/it", token=WRITES, write=True) is None
    assert on_client(outcome, "auth_check", "user/it", token=READS) is None
    assert on_client(outcome, "create", token="hf_unknown") == ("HfHubHTTPError", 401)
    assert on_client(outcome, "create", "user/new", token=READS) == ("HfHubHTTPError", 403)
    assert on_client(outcome, "whoami", token="hf_unknown") == ("HfHubHTTPError", 401)
    assert on_client(outcome, "repo_exists", "user/it", token="hf_unknown") == ("HfHubHTTPError", 401)
    assert on_client(outcome, "repo_exists", "user/it", token=OTHER) is True
    assert hub.find("user/it").files() == {"a.json": b"1"}


def test_a_private_repository_is_not_there_for_others(hub, on_client, users):
    on_client(create, private=True)
    on_client(commit, {"a.json": b"1"})
    assert on_client(outcome, "read", "a.json", "main", READS) == b"1"
    assert on_client(outcome, "model_info", "user/it", token=WRITES).private is True
    gone = ("RepositoryNotFoundError", 404)
    for token in (False, OTHER):
        assert on_client(outcome, "model_info", "user/it", token=token) == gone
        assert on_client(outcome, "list_repo_refs", "user/it", token=token) == gone
    assert on_client(outcome, "commit", {"a.json": b"2"}, token=OTHER) == gone
    assert on_client(outcome, "delete_repo", "user/it", token=OTHER) == gone


def validated(text: str) -> str | None:
    try:
        commit({"README.md": text.encode()})
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ("license: mit\ntags: [lora]\nbase_model: user/base", None),
        ("license: [", "no YAML"),
        ("tags: 3", '"tags" must be'),
        ("model-index: [{name: it, results: [{task: {type: text-generation}, metrics: []}]}]", "dataset.type"),
    ],
)
def test_a_card_is_checked_before_it_is_sent(hub, on_client, users, metadata, error):
    hub.create("user/it")
    found = on_client(validated, f"---\n{metadata}\n---\n# It\n")
    assert (found is None) if error is None else (error in found)
    assert list(hub.find("user/it").files()) == ([] if error else ["README.md"])
