"""The few helpers that two rooms share. Nothing here knows a conversation, a part of a model or a run."""

from __future__ import annotations

import os
import pickle
import random
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

import numpy as np
import psutil
import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, PreTrainedConfig


def base_of(model: Any) -> Any:
    """The model itself, without the PEFT wrapper where it has one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def eos_ids(eos_token_id: int | Sequence[int] | None) -> list[int]:
    """`eos_token_id` of a generation config as a list; it may be a number, a list or None."""
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


def is_quantized(weight: nn.Parameter) -> bool:
    """Whether bitsandbytes holds this weight in 4 or 8 bits, whatever dtype stores it."""
    return not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None


def core_count() -> int:
    """The cores that this process may use, those of a launched run shared; where the system does not tell (macOS,
    Windows), those of the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def listed(names: Collection[str]) -> str:
    """The first six names in alphabetical order and how many more there are, for a message."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(sorted(names)[:6]) + more or "none"


def on_meta(config: PreTrainedConfig) -> Any:
    """The model of this config without its weights (0.2 s at 7B)."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)  # type: ignore[no-untyped-call]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module has its own mode again, so a frozen part in eval mode stays so."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after so many seconds, and again where it was caught, in the main thread; in others, and on
    Windows, there is no limit."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_: Any) -> None:
        raise TimeoutError(f"it did not end within {seconds:g} seconds")

    former = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def lock_file(file: IO[str]) -> None:
    """Locks a file until it is closed or the process ends; BlockingIOError or PermissionError where another process has
    it. Not by flock, as filelock does: data workers that outlive a killed run would keep it."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def peak_memory() -> int:
    """Bytes of RAM that this process held at most; on Windows, those that it holds now."""
    try:
        import resource
    except ImportError:
        return int(psutil.Process().memory_info().rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rng_state() -> tuple[Any, ...]:
    """The state of each random number generator that training draws from; `restore_rng` puts it back."""
    device = torch.get_device_module().get_rng_state() if torch.accelerator.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), device


def restore_rng(state: tuple[Any, ...]) -> None:
    """Puts back what `rng_state` returned."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        torch.get_device_module().set_rng_state(state[3])


def in_processes(work: Callable[[Any], Any], items: Any, batch_size: int, num_proc: int) -> Iterator[Any]:
    """What `work` makes of each batch of the items, in their order: in so many processes, or with 0 in this one. The
    random state is left as it was, as a `DataLoader` draws a seed for its workers."""
    before, collate = rng_state(), partial(_pickled, work) if num_proc else work
    try:
        for found in DataLoader(items, batch_size=batch_size, collate_fn=collate, num_workers=num_proc):
            yield pickle.loads(found) if num_proc else found
    finally:
        restore_rng(before)


def _pickled(work: Callable[[Any], Any], batch: Any) -> bytes:
    """By `pickle` itself: a `DataLoader` hands each tensor over by a file descriptor, of which there may be too few."""
    return pickle.dumps(work(batch))
