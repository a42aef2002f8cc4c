"""What every test stands on: one thread, no network, deprecations as errors, a tiny twin of each family."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

TORCHVISION_CPU = str(Path(__file__).parent / "torchvision_cpu")
sys.path.insert(0, TORCHVISION_CPU)
sys.modules.pop("sitecustomize", None)  # a distribution may bring one of its own
import sitecustomize  # noqa: E402, F401

_home = tempfile.TemporaryDirectory(prefix="hf-home-")
# Set before any library reads them; launched processes inherit them. The server of forked processes finds what it is to
# import by PYTHONPATH alone (Python 3.11), and what it does not find it leaves to each of them.
os.environ.update(
    PYTHONPATH=os.pathsep.join(
        filter(None, [TORCHVISION_CPU, str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
    ),
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HOME=_home.name,
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
)

import gc  # noqa: E402
import ipaddress  # noqa: E402
import logging  # noqa: E402
import socket  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

torch.set_num_threads(1)

LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: launches real processes; runs by default")
    config.addinivalue_line("markers", "loopback: may open connections to this machine")
    config.addinivalue_line("markers", "faults: launches runs and kills them; `make test-faults` runs it")
    config.addinivalue_line(
        "markers", "families: every family of today through the whole trip; `make test-families` runs it"
    )
    config.addinivalue_line(
        "markers", "sweep: on each recipe, launch and family what others show on one; `make test-sweep` runs it"
    )
    config.addinivalue_line("markers", "web: needs Chromium or the packages of .venv/web; `make test-browser` runs it")
    for category in ("DeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"error::{category}")
    # What the libraries do among themselves, and we cannot write otherwise. Later lines win.
    for message in (
        "`torch.jit.script_method` is deprecated",  # torch 2.13, at import of its own functions
        "__array__ implementation doesn't accept a copy keyword",  # transformers 5.23, grids of GLM-4V's images
        "`is_gradient_checkpointing` is deprecated",  # peft 0.21.2 asks transformers 5.23
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


# The longest files, in this order: started first, they leave no process of pytest-xdist alone at the end.
LONGEST = ("test_distributed.py", "test_deletions.py", "test_recipes.py", "test_resume.py", "test_checkpoints.py")


def pytest_collection_finish() -> None:
    """Every run of a Trainer collects garbage: what the libraries made at import is none, and looking through it was a
    third of such a run."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


THEIR_OWN = ("Processor` defines `image_processor_class", "arguments=({'guidance_scale'})")  # PaddleOCR-VL, Janus


class _DeprecationsRaise(logging.Handler):
    """transformers and trl log most of their deprecations instead of warning."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message and not any(own in message for own in THEIR_OWN):
            raise DeprecationWarning(message)


@pytest.fixture(autouse=True)
def logged_deprecations_are_errors() -> Iterator[None]:
    handler = _DeprecationsRaise(logging.WARNING)
    for library in LIBRARIES:
        logging.getLogger(library).addHandler(handler)
    yield
    for library in LIBRARIES:
        logging.getLogger(library).removeHandler(handler)


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections and name look-ups fail the test at once; `pytest.fail` passes through `except Exception`."""
    local = request.node.get_closest_marker("loopback") is not None

    def is_loopback(host: Any) -> bool:
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    def check(host: Any) -> None:
        if not (local and is_loopback(host)):
            hint = "mark it with @pytest.mark.loopback" if is_loopback(host) else "tests run offline"
            pytest.fail(f"the test reaches for {host!r} over the network: {hint}")

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        def connect(sock: socket.socket, address: Any) -> Any:
            if sock.family != socket.AF_UNIX:  # workers of a DataLoader talk over AF_UNIX
                check(address[0])
            return original(sock, address)

        return connect

    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        check(host)
        return resolve(host, *arguments, **options)

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_dir(family): a folder that from_pretrained reads, one for the whole session; never write to it."""
    from vlm_sft.tools import tiny  # here, so that tests of pure functions start without transformers

    folders: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in folders:
            folders[family] = tiny.save(family, tmp_path_factory.mktemp(family))
        return folders[family]

    return folder_of


@pytest.fixture(scope="session")
def tiny_model(tiny_dir: Callable[[str], Path]) -> Callable[..., Any]:
    """tiny_model(family, **options): a fresh copy, in evaluation mode, options as from_pretrained takes them."""

    from transformers import AutoModelForImageTextToText

    from vlm_sft.upstream import keep_packing

    def model_of(family: str, **options: Any) -> Any:
        model = AutoModelForImageTextToText.from_pretrained(tiny_dir(family), **options)
        keep_packing(model)
        return model

    return model_of


@pytest.fixture(scope="session")
def tiny_processor(tiny_dir: Callable[[str], Path]) -> Callable[..., Any]:
    """tiny_processor(family, **options): a fresh copy, options as from_pretrained takes them."""

    from transformers import AutoProcessor

    def processor_of(family: str, **options: Any) -> Any:
        return AutoProcessor.from_pretrained(tiny_dir(family), **options)

    return processor_of


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache for datasets that no other test has written to, and no progress bars."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what tests have to show (`record_property("shown", text)`), and how many random conversations each
    property was tried on."""
    passed = [(report.nodeid, dict(report.user_properties)) for report in terminalreporter.getreports("passed")]
    for test, properties in passed:
        if "shown" in properties:
            terminalreporter.section(test)
            terminalreporter.line(properties["shown"])
    counts = {test: properties["conversations"] for test, properties in passed if "conversations" in properties}
    if counts:
        terminalreporter.section("random conversations")
        for test, count in sorted(counts.items()):
            terminalreporter.line(f"{count:6d}  {test}")


@pytest.fixture
def workers_asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many workers each `DataLoader` of `in_processes` took, where processes are forked."""
    asked: list[int] = []

    class Asked(DataLoader[Any]):
        def __init__(self, *args: Any, num_workers: int, **kwargs: Any) -> None:
            asked.append(num_workers)
            super().__init__(*args, num_workers=num_workers, **kwargs)

    monkeypatch.setattr("vlm_sft.common.DataLoader", Asked)
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: "fork")
    return asked
