"""Helpers for distributed runs: print once, run on the main process, reduce a flag."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce

T = TypeVar("T")


def print_main(text: str) -> None:
    """Prints to stderr, on the main process only."""
    if PartialState().is_main_process:
        print(text, file=sys.stderr, flush=True)


def on_main(work: Callable[[], T]) -> T:
    """The result of `work` on the main process, for every process. Its `ValueError` is raised on every process."""
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = work()
        except ValueError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    result: T = outcome[0]
    return result


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any process. Every process must call it."""
    state = PartialState()
    if state.num_processes == 1:
        return flag
    return bool(reduce(torch.tensor(float(flag), device=state.device), reduction="sum") > 0)
