"""The processes of a launch as seen from inside one; without torch.distributed running there is one."""

import sys
from collections.abc import Callable
from typing import Any


def _running() -> bool:
    """Who has not loaded torch is in no group; pushing and ranking do without it."""
    return "torch.distributed" in sys.modules and _distributed().is_available() and _distributed().is_initialized()


def _distributed():
    from torch import distributed

    return distributed


def rank() -> int:
    """This process's number, from 0."""
    return _distributed().get_rank() if _running() else 0


def world() -> int:
    """The number of processes."""
    return _distributed().get_world_size() if _running() else 1


def agree(decide: Callable[[], Any]) -> Any:
    """The first process decides, and every process gets its answer, or its error: nobody waits for the others."""
    if world() == 1:
        return decide()
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = decide()
        except Exception as error:  # whatever it is, the others must not wait for it
            answer[1] = error
    _distributed().broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def leave() -> None:
    """End the process group, if there is one: a process that exits within it may be aborted, its work done."""
    if _running():
        _distributed().destroy_process_group()


def gather(value: Any) -> list[Any]:
    """Every process's value, by rank, in every process."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    _distributed().all_gather_object(values, value)
    return values
