"""Two processes speak once, decide once and agree."""

from __future__ import annotations

import contextlib
import io
import os
import socket
from typing import Any

import pytest
from together import forks

from vlm_sft.distributed import any_rank, on_main, print_main


def one_of_two(rank: int, port: int, answers: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    from accelerate import PartialState

    PartialState(cpu=True, backend="gloo")

    def refuse() -> None:
        raise ValueError(f"refused by {rank}")

    try:
        on_main(refuse)
    except ValueError as error:
        refused = str(error)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        print_main(f"rank {rank} speaks")
    decided = on_main(lambda: f"decided by {rank}")
    answers.put((rank, decided, refused, any_rank(rank == 1), any_rank(False), said.getvalue()))
    PartialState().destroy_process_group()


@pytest.mark.slow
@pytest.mark.loopback
def test_two_processes_agree() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = forks().Queue()
    processes = [forks().Process(target=one_of_two, args=(rank, port, answers)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = sorted(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    assert found == [
        (0, "decided by 0", "refused by 0", True, False, "rank 0 speaks\n"),
        (1, "decided by 0", "refused by 0", True, False, ""),
    ]


def test_one_process_needs_no_other() -> None:
    assert on_main(lambda: 7) == 7
    assert any_rank(True)
    assert not any_rank(False)
