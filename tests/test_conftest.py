"""The ground that the other tests stand on holds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.request
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.utils import is_torchvision_available


def open_despite_errors() -> None:
    try:
        urllib.request.urlopen("https://huggingface.co", timeout=1)
    except Exception as error:
        raise AssertionError("a loop of retries would have swallowed it") from error


def test_network_is_refused_and_no_except_clause_hides_it() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"'huggingface\.co'.*tests run offline"):
        open_despite_errors()
    with socket.socket() as bare, pytest.raises(pytest.fail.Exception, match=r"'192\.0\.2\.1'"):
        bare.connect(("192.0.2.1", 80))


def test_loopback_needs_its_marker() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(pytest.fail.Exception, match=r"@pytest\.mark\.loopback"),
    ):
        socket.create_connection(server.getsockname(), timeout=1)


@pytest.mark.loopback
def test_loopback_passes_with_its_marker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=1).close()
    with pytest.raises(pytest.fail.Exception, match="offline"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)


def test_processes_of_this_machine_may_talk() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        ours.sendall(b"x")
        assert theirs.recv(1) == b"x"


def test_deprecations_are_errors_warned_or_logged(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(FutureWarning):
        warnings.warn("old", FutureWarning, stacklevel=1)
    with pytest.raises(DeprecationWarning, match="torch_dtype"):
        tiny_model("idefics3", torch_dtype="float32")


def test_one_thread_here_and_in_launched_processes() -> None:
    assert torch.get_num_threads() == 1
    script = "import os, sys; print(os.environ['OMP_NUM_THREADS'], 'sitecustomize' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "True"]
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_torchvision_imports_beside_this_torch() -> None:
    assert is_torchvision_available()
    from torchvision.transforms.v2 import functional

    assert functional.resize(torch.zeros(3, 4, 4), [2, 2]).shape == (3, 2, 2)
