"""Answers the messages that come to a SuperNode with this package's ClientApp, whatever app a run has brought.

    python -m fslora_hf.federation.messenger 127.0.0.1:9094

Flower's own process for this unpacks the bundle that `flwr run` has sent and runs the ClientApp in it, which may be
anybody's. A node starts its SuperNode with `--isolation process`, in which it starts nothing, and this beside it. Of a
message it takes what it is about; the bundle that comes with it is not unpacked, not written and not read. Tasks of
other kinds than a ClientApp's are left alone. Stands on parts of Flower that are not public: with a version in which
they are others it ends with a sentence, and nothing is run.
"""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import time

from .client_app import app  # first: it checks Flower's version
from .flower import other_insides
from .link import end_with_parent

try:
    from flwr.app import Error, Message
    from flwr.common.constant import ErrorCode, SubStatus
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType
    from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output
except ImportError as error:
    raise other_insides(error) from error

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0  # between two questions for a message


def connect(address: str, *interceptors) -> RuntimeHttpClient:
    """A client of the SuperNode's service on this machine."""
    interceptors = [RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), *interceptors]
    return RuntimeHttpClient.from_server_address(
        address, True, None, interceptors, retry_invoker=make_simple_http_retry_invoker()
    )


def wait_for(address: str) -> None:
    """Returns once the SuperNode, which starts at the same time, is there; Flower would warn at every try before."""
    host, _, port = address.rpartition(":")
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5.0).close()
            return
        except OSError:
            time.sleep(0.2)


def answer_one(address: str, token: str) -> None:
    """Answer the message that `token` stands for, with what went wrong where that is so."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # by which Flower ends a process whose run was stopped
    client = connect(address, RuntimeTokenHttpInterceptor(token))
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    context, status, details = None, SubStatus.FAILED, "the message could not be read"
    try:
        message, context, *_ = pull_task_input(client)  # the rest is the run's app
        try:
            reply, status, details = app(message=message, context=context), SubStatus.COMPLETED, ""
        except Exception as error:  # the server is told, as Flower does
            details = f"{type(error)}:<'{error}'>"
            logger.error("A message could not be passed on: %s", error)
            reply = Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=details), reply_to=message)
        push_message(client, reply, context)
    finally:
        push_task_output(client, context, status, details)
        heartbeat.stop()
        client.close()


def main(address: str) -> None:
    """Answer messages for ever, each in a process of its own: Flower's parts for it may end the one they are in."""
    end_with_parent()
    parent, client, fork = os.getppid(), connect(address), multiprocessing.get_context("fork")
    wanted = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    wait_for(address)
    while os.getppid() == parent:
        task = client.AcquireTask(wanted)
        if task.HasField("task") and task.token:
            fork.Process(target=answer_one, args=(address, task.token)).start()
        multiprocessing.active_children()  # lets those that have ended go
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the node ends this
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    main(sys.argv[1])
