"""Work that several processes of one run do together, forked from one that has imported everything."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.forkserver
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

CONFIGS = Path(__file__).parents[1] / "accelerate_configs"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def forks() -> Any:
    """A context of `multiprocessing` whose processes start from one that has imported everything. There is one such for
    all tests of this process, and what the first of them asks it to import counts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_distributed", "runs", "transformers.models.llava.modeling_llava"])
    with pytest.MonkeyPatch.context() as patch:  # what it does not find it passes over
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        multiprocessing.forkserver.ensure_running()
    return context


def together(
    work: Callable[..., Any], *arguments: Any, processes: int = 2, config: str = "cpu_2proc", limit_s: float = 240
) -> list[Any]:
    """What `work(*arguments)` returns in each process, under the environment that `accelerate launch` would set.

    An exception is raised here again as RuntimeError with the trace of each process it came from. Processes that have
    not ended within `limit_s` seconds are killed, and TimeoutError says which.
    """
    answers = forks().Queue()
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), **_sharding(config)}
    started = [forks().Process(target=_one, args=(rank, shared, work, arguments, answers)) for rank in range(processes)]
    for process in started:
        process.start()
    found: dict[int, Any] = {}
    end = time.monotonic() + limit_s
    try:
        while len(found) < processes and time.monotonic() < end:
            try:
                rank, result = answers.get(timeout=1)
                found[rank] = result
            except queue.Empty:
                if not any(process.is_alive() for process in started):
                    break
    finally:
        for process in started:
            process.join(5)
            process.kill()
    if failed := [str(result) for result in found.values() if isinstance(result, _Failure)]:
        raise RuntimeError("\n".join(failed))
    if missing := sorted({*range(processes)} - {*found}):
        raise TimeoutError(f"no result of process {missing} within {limit_s} seconds")
    return [found[rank] for rank in range(processes)]


class _Failure(str):
    pass


def _one(rank: int, shared: dict[str, str], work: Any, arguments: tuple[Any, ...], answers: Any) -> None:
    os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    try:
        answers.put((rank, work(*arguments)))
    except BaseException:
        answers.put((rank, _Failure(f"process {rank}: {traceback.format_exc()}")))
    answers.close()
    answers.join_thread()
    os._exit(0)  # a process group would wait here for those that failed


def _sharding(config: str) -> dict[str, str]:
    """As accelerate.utils.launch sets them for this file (accelerate 1.15)."""
    settings = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text("utf-8"))
    if settings["distributed_type"] != "FSDP":
        return {}
    section = {key.upper(): str(value) for key, value in settings["fsdp_config"].items()}
    return {"ACCELERATE_USE_FSDP": "true", **section}
