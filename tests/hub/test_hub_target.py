"""What is known before training about the repository and the token, and that no token gets into a text."""

import pytest
from huggingface_hub import constants

from fslora_hf.hub.errors import HubError, scrub
from fslora_hf.hub.uploader import HubTarget, check_target
from tests.support.hub_calls import READS, WRITES
from tests.support.hub_pushes import TARGET, add, asked, logged, push, push_all

pytest_plugins = ("tests.support.hub_client",)
pytestmark = pytest.mark.usefixtures("users")


def check(target: HubTarget) -> tuple[HubTarget | None, str]:
    with logged() as text:
        return check_target(target, deadline_s=10.0), "\n".join(text)


def offline_check(target: HubTarget) -> tuple[HubTarget | None, str]:
    constants.HF_HUB_OFFLINE, before = True, constants.HF_HUB_OFFLINE
    try:
        return check(target)
    finally:
        constants.HF_HUB_OFFLINE = before


def test_the_target_is_made_and_its_name_completed(hub, on_client):
    found, text = on_client(check, HubTarget("run", WRITES, private=True))
    assert found == HubTarget("user/run", WRITES, private=True) and text == ""
    assert hub.find("user/run").private
    assert on_client(check, found)[0] == found  # again: it exists
    assert on_client(check, HubTarget("team/run", WRITES))[0].repo_id == "team/run"


def test_a_run_that_began_without_network_makes_the_private_repository_and_the_branch_later(hub, on_client, outbox):
    add(outbox, 1)
    target = HubTarget("run", WRITES, private=True, revision="trial/a")
    on_client(push, outbox.folder, 1, target)
    repository = hub.find("user/run")
    assert repository.private
    assert set(repository.refs()) == {"refs/heads/main", "refs/heads/trial/a", "refs/tags/round-0001"}
    assert repository.resolve("trial/a") == outbox.get(1).commit != repository.resolve("main")


REFUSED = {
    "wrong token": (HubTarget("user/run", "hf_unknown000"), "Expected a token that the Hub takes, found one that it"),
    "reads only": (HubTarget("user/run", READS), "Expected a token that may write to user/run, found one"),
    "someone else's": (HubTarget("other/run", WRITES), "Expected a repository of user or team, .* found other/run"),
    "invalid": (HubTarget("user/a--b", WRITES), "Expected a repository name that the Hub takes, found 'user/a--b'"),
    "no token": (HubTarget("user/run"), "Expected a token to write to user/run with, found none"),
    "two lines": (
        HubTarget("user/run", f"{WRITES}\n"),
        "Expected a token of letters and digits, found one with other",
    ),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_work_is_told_before_training(hub, on_client, which):
    target, sentence = REFUSED[which]
    with pytest.raises(HubError, match=f"^{sentence}") as raised:
        on_client(check, target)
    assert "\n" not in str(raised.value) and str(target.token).strip() not in str(raised.value)


def test_a_public_repository_is_refused_where_a_private_one_is_asked_for(hub, on_client, outbox):
    hub.add("user/run", {"README.md": b"public"})
    target = HubTarget("user/run", WRITES, private=True)
    with pytest.raises(HubError, match="^Expected user/run to be private, as hub_private_repo asks, found it public"):
        on_client(check, target)
    add(outbox, 1)
    missing, table, _ = on_client(push_all, outbox.folder, target)
    assert missing == [1] and "to be private" in table and asked(hub, "/commit/") == []


@pytest.mark.parametrize("how", ["offline", "reset", "stalls", "fails"])
def test_without_a_hub_training_goes_on_after_one_warning(hub, on_client, how):
    if how != "offline":
        hub.fault(
            "whoami-v2",
            times=None,
            **{"reset": dict(reset=True), "stalls": dict(stall_s=60)}.get(how, dict(status=500)),
        )
    found, text = on_client(offline_check if how == "offline" else brief_check, TARGET)
    assert found is None
    assert text.count("Expected") == 1 and text.endswith("Training goes on.") and WRITES not in text


def brief_check(target: HubTarget) -> tuple[HubTarget | None, str]:
    with logged() as text:
        return check_target(target, deadline_s=1.0), "\n".join(text)


# ---- tokens ----


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 409, 412, 413, 422, 429, 500, 503])
def test_no_answer_of_the_hub_brings_the_token_into_a_text_or_file(hub, on_client, outbox, status):
    add(outbox, 1)
    told = {"X-Error-Message": f"the token {WRITES} is odd"}
    hub.fault("commit", status=status, body={"error": f"{WRITES}\nand more"}, headers=told, times=None)
    missing, table, text = on_client(push_all, outbox.folder)
    assert missing == [1] and table.count("Expected") == 1 and len(table.splitlines()) == 2
    assert WRITES not in table + text + repr(TARGET)
    assert not [path for path in outbox.folder.rglob("*") if path.is_file() and WRITES.encode() in path.read_bytes()]


def test_what_looks_like_a_token_is_no_part_of_a_text():
    assert scrub("with hf_someOtherToken and secret!", "secret!") == "with *** and ***"
