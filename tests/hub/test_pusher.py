"""Pushing beside training: kills, a Hub that stalls while the process ends, rounds that are tried again."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fslora_hf.hub.outbox import Outbox
from fslora_hf.hub.pusher import BackgroundPusher
from tests.support.hub_calls import WRITES
from tests.support.hub_pushes import FAST, TARGET, add, all_answered, assert_on_hub, logged, push_all, wait_for

pytest_plugins = ("tests.support.hub_client",)
pytestmark = pytest.mark.usefixtures("users")


# ---- kills, and the end of the process ----

PROGRAM = """
import sys
from fslora_hf.hub.outbox import Outbox
from fslora_hf.hub.pusher import BackgroundPusher
from fslora_hf.hub.uploader import HubTarget
pusher = BackgroundPusher(HubTarget("user/run", sys.argv[2]), Outbox(sys.argv[1]), deadline_s=float(sys.argv[3]))
pusher.wake()
print(pusher.close(float(sys.argv[4])), flush=True)
"""


def program(folder, environment, deadline_s=60.0, wait_s=60.0):
    arguments = [str(folder), WRITES, str(deadline_s), str(wait_s)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("lands", [False, True], ids=["not-landed", "landed"])
@pytest.mark.parametrize("pattern", ["repos/create", "preupload", "commit", "tag"])
def test_a_killed_push_is_taken_up(hub, on_client, outbox, client_environment, pattern, lands):
    add(outbox, 1, 2)
    fault = hub.fault(pattern, stall_s=60)
    process = program(outbox.folder, client_environment)
    wait_for(lambda: fault.hits == 1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    if lands:
        hub.release()
        wait_for(lambda: all_answered(hub))
    assert on_client(push_all, outbox.folder)[0] == []
    assert_on_hub(hub, outbox, 1, 2)
    if not lands:  # the request of the dead lands at last
        hub.release()
        wait_for(lambda: all_answered(hub))
        assert_on_hub(hub, outbox, 1, 2)


@pytest.mark.parametrize("upload_mode", ["lfs"])
@pytest.mark.parametrize("pattern", ["commit", "storage"])
def test_a_hub_that_stalls_does_not_keep_the_process_from_ending(
    hub, outbox, client_environment, upload_mode, pattern
):
    add(outbox, 1)
    hub.fault(pattern, stall_s=300, times=None)
    process = program(outbox.folder, client_environment, wait_s=3.0)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "not sent yet" in printed
    hub.mend()
    wait_for(lambda: all_answered(hub))  # before its repositories go


def in_background(folder, wakes: int, wait_s: float = 20.0, **limits):
    """Report of a pusher that is woken several times, each time when it has nothing to do; and what was logged."""
    with logged() as text:
        pusher = BackgroundPusher(TARGET, Outbox(folder), **(FAST | limits))
        for _ in range(wakes):
            pusher.wake()
            time.sleep(0.3)
        report = pusher.close(wait_s)
    return report.missing, str(report), text


def in_background_once_broken(folder):
    """The same, with an outbox that breaks when it is first read."""
    reads, pending = [], Outbox.pending

    def broken(outbox):
        reads.append(outbox)
        if len(reads) == 1:
            raise RuntimeError("a flaw")
        return pending(outbox)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Outbox, "pending", broken)
        return in_background(folder, 1)


# ---- beside training ----


def test_a_pusher_takes_up_failed_rounds_at_later_wakes_and_warns_once(hub, on_client, outbox):
    add(outbox, 1, 2)
    hub.fault("commit", status=403, times=2)
    missing, table, text = on_client(in_background, outbox.folder, 3)
    assert missing == []
    assert len(text) == 1 and text[0].startswith("Expected a token that may write to user/run, found one that may not")
    assert_on_hub(hub, outbox, 1, 2)


def test_a_pusher_reports_what_stays_missing_and_why(hub, on_client, outbox):
    add(outbox, 1, 2)
    hub.fault("commit", status=413, times=None)
    missing, table, text = on_client(in_background, outbox.folder, 2)
    assert missing == [1, 2] and len(text) == 1
    assert "Expected room for the round in user/run, found that the Hub refuses more (413" in table.splitlines()[1]
    assert outbox.get(1).files and outbox.get(2).files


def test_a_pusher_survives_what_nobody_foresaw(hub, on_client, outbox):
    add(outbox, 1)
    missing, _, text = on_client(in_background_once_broken, outbox.folder)
    assert missing == [] and len(text) == 1 and "found 'a flaw'" in text[0]
    assert_on_hub(hub, outbox, 1)


def test_a_pusher_does_not_repeat_what_was_told_before_training(hub, on_client, outbox):
    add(outbox, 1)
    hub.fault("refs", reset=True, times=None)
    missing, table, text = on_client(in_background, outbox.folder, 1, warned=("network", "server"))
    assert missing == [1] and "Expected to reach the Hub" in table and text == []


def test_an_interrupt_ends_the_wait_and_nothing_else(tmp_path, caplog, monkeypatch):
    pusher = BackgroundPusher(TARGET, Outbox(tmp_path))

    def interrupted(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pusher._thread, "join", interrupted)
        assert pusher.close(60.0).missing == []
    assert "The wait for the Hub was broken off: send what is missing with recipes/push.py." in caplog.text
    pusher._thread.join(20)
    assert not pusher._thread.is_alive()
