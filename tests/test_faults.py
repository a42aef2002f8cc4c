"""No run is lost: what kills it, fills its disk or takes its data leaves the last good checkpoint, and is named."""

from __future__ import annotations

import ast
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from recipe_data import captions, chats
from recipe_runs import ROOT, run
from test_distributed import FULL, LORA, SMALL, losses_in
from together import together
from transformers import TrainerCallback

from vlm_sft import ChatCollator, load_conversations, load_processor
from vlm_sft.models.manifest import verify_checkpoint
from vlm_sft.training.checkpoints import SafeCheckpoints, latest_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.loopback]
launched = pytest.mark.faults

TWO = ("--gradient_accumulation_steps", "1")


@pytest.fixture(scope="module")
def flags_of(tiny_dir: Callable[[str], Path], tmp_path_factory: Any) -> Callable[..., list[str]]:
    data = chats(tmp_path_factory.mktemp("data") / "chats", train=40, test=4)

    def flags(recipe: Sequence[str], output: Path, *more: object) -> list[str]:
        model = ["--model_name_or_path", tiny_dir("llava15"), "--dataset_name", data]
        return [str(word) for word in (*model, *recipe[1:], *SMALL, *TWO, "--output_dir", output, *more)]

    return flags


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """launch(config, recipe, flags, fault): a run by two processes; what is left of it is killed with the test."""
    started = []

    def start(config: str, recipe: str, flags: Sequence[str], fault: str = "", port: int = 0) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(port)]
        script = ["tests/faulty.py", fault] if fault else []
        command = [
            *words,
            "--config_file",
            f"accelerate_configs/{config}.yaml",
            *script,
            f"recipes/{recipe}.py",
            *flags,
        ]
        log = (tmp_path / "log").open("w")
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, text=True, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ends_within(process: subprocess.Popen[str], seconds: float, log: Path) -> str:
    process.wait(timeout=seconds)
    return log.read_text("utf-8")


def until(text: str, log: Path, *, limit_s: float = 120) -> float:
    """When the text was there."""
    end = time.monotonic() + limit_s
    while text not in (log.read_text("utf-8") if log.exists() else ""):
        assert time.monotonic() < end, log.read_text("utf-8")[-3000:]
        time.sleep(0.2)
    return time.monotonic()


def losses_of(recipe: str, flags: list[str]) -> None:
    run(recipe, flags)


# Killed under a launcher, and taken up again.


@launched
@pytest.mark.parametrize("config", ["cpu_2proc", "cpu_2proc_fsdp2"])
@pytest.mark.parametrize("fault", ["kill@on_pre_optimizer_step:2:1", "kill@on_prediction_step:4:0"])
def test_a_process_that_is_killed_ends_the_others_and_the_run_goes_on(
    fault: str, config: str, flags_of: Any, launch: Any, tmp_path: Path
) -> None:
    """In the middle of a step, and during an evaluation."""
    output = tmp_path / "output"
    flags = flags_of(LORA, output)
    began = time.monotonic()
    said = ends_within(process := launch(config, LORA[0], flags, fault), 120, tmp_path / "log")
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL) received" in said
    print(f"ended after {time.monotonic() - began:.0f} s")
    assert verify_checkpoint(output / "checkpoint-2") == []
    together(losses_of, LORA[0], flags, config=config)
    together(losses_of, LORA[0], flags_of(LORA, tmp_path / "whole"), config=config)
    assert losses_in(output) == pytest.approx(losses_in(tmp_path / "whole"), abs=1e-6)


@launched
@pytest.mark.parametrize("config", ["cpu_2proc", "cpu_2proc_fsdp2"])
def test_any_process_killed_at_any_step_and_the_run_goes_on(
    config: str, flags_of: Any, launch: Any, tmp_path: Path
) -> None:
    """With workers and grouping; VLM_SFT_KILLS and VLM_SFT_SEED as in test_kills.py."""
    more = ("--dataloader_num_workers", 1, "--dataloader_persistent_workers", "True")
    more += ("--dataloader_multiprocessing_context", "fork")  # those of a fork server would not know the recipe
    whole = flags_of(LORA, tmp_path / "whole", *more)
    together(losses_of, LORA[0], whole, config=config)
    draw = random.Random(f"{os.environ.get('VLM_SFT_SEED', '0')} {config}")
    events = ("on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_save", "on_prediction_step")
    for number in range(int(os.environ.get("VLM_SFT_KILLS", "1"))):
        event, rank = draw.choice(events), draw.randrange(2)
        # The last save is at step 4, an evaluation at 2 and 4, and steps begin at 0 to 3.
        step = draw.choice((2, 4)) if event in events[3:] else draw.randrange(1, 4)
        output = tmp_path / str(number)
        flags = flags_of(LORA, output, *more)
        process = launch(config, LORA[0], flags, f"kill@{event}:{step}:{rank}")
        said = ends_within(process, 120, tmp_path / "log")
        assert "Signal 9 (SIGKILL) received" in said, (event, step, rank)
        together(losses_of, LORA[0], flags, config=config)
        assert losses_in(output) == losses_in(tmp_path / "whole"), (event, step, rank)


@launched
@pytest.mark.parametrize("config", ["cpu_2proc", "cpu_2proc_fsdp2"])
def test_out_of_memory_at_one_process_ends_all(config: str, flags_of: Any, launch: Any, tmp_path: Path) -> None:
    process = launch(config, LORA[0], flags_of(LORA, tmp_path / "output"), "memory@on_pre_optimizer_step:2:1")
    failed = until("the memory that was asked for", tmp_path / "log")
    said = ends_within(process, 120, tmp_path / "log")
    assert time.monotonic() - failed < 120
    assert process.returncode != 0
    assert "step 3, process 1: out of memory" in said


@launched
def test_launches_end_with_0_each_time(flags_of: Any, launch: Any, tmp_path: Path) -> None:
    """A SIGABRT was seen once, when processes of a group ended."""
    for number in range(3):
        said = ends_within(
            process := launch("cpu_2proc", LORA[0], flags_of(LORA, tmp_path / str(number))), 300, tmp_path / "log"
        )
        assert process.returncode == 0, said[-3000:]
        assert "SIGABRT" not in said


@launched
def test_the_others_end_within_a_minute_with_the_cause(flags_of: Any, launch: Any, tmp_path: Path) -> None:
    """One waits in a collective for the other, which fails."""
    process = launch("cpu_2proc", LORA[0], flags_of(LORA, tmp_path / "output"), "raise@on_step_begin:2:1")
    failed = until("the fault that was asked for", tmp_path / "log")
    said = ends_within(process, 60, tmp_path / "log")
    assert time.monotonic() - failed < 60
    assert process.returncode != 0
    assert "RuntimeError: the fault that was asked for" in said


@launched
@pytest.mark.parametrize("config", ["cpu_2proc", "cpu_2proc_fsdp2"])
def test_sigterm_to_the_launcher_saves(config: str, flags_of: Any, launch: Any, tmp_path: Path) -> None:
    """As Slurm and Kubernetes end a job: the launcher passes it on, and each process finishes its step."""
    output = tmp_path / "output"
    process = launch(
        config,
        LORA[0],
        flags_of(
            LORA,
            output,
            "--max_steps",
            2000,
            "--eval_strategy",
            "no",
            "--save_steps",
            1000,
            "--load_best_model_at_end",
            "False",
        ),
    )
    until("{'loss'", tmp_path / "log")
    process.send_signal(signal.SIGTERM)
    said = ends_within(process, 60, tmp_path / "log")
    saved = re.search(r"SIGTERM: saved .*checkpoint-(\d+); stopped after \1 of 2000 steps", said)
    assert saved, said[-3000:]
    assert verify_checkpoint(output / f"checkpoint-{saved[1]}") == []


def dies_in_a_save(recipe: str, flags: list[str], point: str) -> None:
    """The process that writes is killed with half a file of its second checkpoint written."""
    save, replace = torch.save, Path.replace

    def is_doomed(path: object) -> bool:
        return "checkpoint-4" in str(path) and point in str(path)

    torch.save = lambda what, to, *rest, **options: runs.half(to) if is_doomed(to) else save(what, to, *rest, **options)
    Path.replace = lambda self, to: runs.half(self) if is_doomed(to) else replace(self, to)  # type: ignore
    run(recipe, flags)


@pytest.mark.parametrize(
    ("recipe", "config", "point"),
    [
        pytest.param(LORA, "cpu_2proc", "optimizer.pt"),
        pytest.param(LORA, "cpu_2proc", "manifest.json", marks=pytest.mark.faults),
        pytest.param(LORA, "cpu_2proc", "training_args.bin", marks=pytest.mark.faults),
        pytest.param(FULL, "cpu_2proc_fsdp2", "pytorch_model_fsdp.bin", marks=pytest.mark.faults),
        pytest.param(FULL, "cpu_2proc_fsdp2", "optimizer.bin", marks=pytest.mark.faults),
        pytest.param(FULL, "cpu_2proc_fsdp2", "manifest.json", marks=pytest.mark.faults),
    ],
)
def test_kill_9_in_a_shared_save_leaves_the_checkpoint_before(
    recipe: Sequence[str], config: str, point: str, flags_of: Any, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    flags = flags_of(recipe, output)
    with pytest.raises((RuntimeError, TimeoutError)):
        together(dies_in_a_save, recipe[0], flags, point, config=config, limit_s=60)
    assert verify_checkpoint(output / "checkpoint-2") == []
    assert verify_checkpoint(output / "checkpoint-4") == ["it has no manifest.json, so its save did not end"]
    together(losses_of, recipe[0], flags, config=config)
    assert verify_checkpoint(output / "checkpoint-4") == []
    assert (output / "incomplete-checkpoint-4").is_dir()


@launched
def test_a_port_in_use_is_said(flags_of: Any, launch: Any, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = launch("multi_node", LORA[0], flags_of(LORA, tmp_path / "output"), port=port)
        said = ends_within(process, 60, tmp_path / "log")
    assert process.returncode != 0
    assert f"on port `{port}`, but another process is utilizing it" in said


# In one process.


@pytest.fixture(scope="module")
def llava(tiny_dir: Any) -> Path:
    return tiny_dir("llava15")


class At(TrainerCallback):
    def __init__(self, event: str, step: int, act: Callable[[], None]) -> None:
        setattr(self, event, lambda args, state, control, **_: act() if state.global_step == step else None)


def test_a_folder_that_cannot_be_written_is_named(llava: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        runs.trainer(llava, tmp_path / "file" / "output", callbacks=[SafeCheckpoints()])
    with pytest.raises(ValueError, match=r"--output_dir /proc/self cannot be written: .*; choose another"):
        runs.trainer(llava, Path("/proc/self"), callbacks=[SafeCheckpoints()]).train()


def loses_a_worker(base: Path, output: Path) -> None:
    def kill() -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGKILL)

    options = {"dataloader_num_workers": 1, "max_steps": 40, "dataset": runs.rows(80)}
    runs.trainer(base, output, callbacks=[SafeCheckpoints(), At("on_step_end", 3, kill)], **options).train()


def test_a_killed_worker_is_said_and_the_run_can_go_on(llava: Path, tmp_path: Path) -> None:
    # torch's own words, by how far the worker had come with a batch.
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid|Connection reset by peer|raise EOFError"):
        together(loses_a_worker, llava, tmp_path, processes=1, limit_s=60)
    again = runs.trainer(llava, tmp_path, callbacks=[SafeCheckpoints()], max_steps=40, dataset=runs.rows(80))
    assert latest_checkpoint(again) == str(tmp_path / "checkpoint-2")


def test_pictures_that_vanish_are_named(llava: Path, tmp_path: Path) -> None:
    file = captions(tmp_path / "data")
    data = load_conversations(str(file), image_folder=str(file.parent / "images"))["train"]
    collator = ChatCollator(load_processor(llava))
    gone = At("on_step_end", 2, lambda: shutil.rmtree(file.parent / "images"))
    trainer = runs.trainer(
        llava, tmp_path / "out", callbacks=[SafeCheckpoints(), gone], dataset=data, collator=collator, max_steps=8
    )
    with pytest.raises((ValueError, FileNotFoundError), match=r"row \d+.*\.png"):
        trainer.train()
    assert verify_checkpoint(tmp_path / "out/checkpoint-2") == []


@launched
def test_the_locale_and_the_clock_do_not_matter(flags_of: Any, tmp_path: Path) -> None:
    """Under an ASCII locale in another zone, and with checkpoints from 1980 and 2040."""
    output = tmp_path / "output"
    odd = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Pacific/Kiritimati"}
    for steps in (4, 6):
        flags = flags_of(LORA, output, "--max_steps", steps, "--save_steps", 1, "--eval_steps", 1)
        done = subprocess.run(
            [sys.executable, f"recipes/{LORA[0]}.py", *flags],
            cwd=ROOT,
            env=os.environ | odd,
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        if steps == 4:
            for step, year in ((4, 1980), (3, 2040)):
                when = time.mktime((year, 1, 1, 0, 0, 0, 0, 0, 0))
                for path in (output / f"checkpoint-{step}", *(output / f"checkpoint-{step}").iterdir()):
                    os.utime(path, (when, when))
    state = json.loads((output / "checkpoint-6/trainer_state.json").read_text("utf-8"))
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert verify_checkpoint(output / "checkpoint-6") == []
    assert (output / "checkpoint-5").is_dir()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root and leave to mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_small_disk_that_fills_up_keeps_the_last_checkpoint(llava: Path, small_disk: Path) -> None:
    def fill() -> None:
        with (small_disk / "else").open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(65536))

    output = small_disk / "out"
    trainer = runs.trainer(llava, output, callbacks=[SafeCheckpoints(), At("on_step_begin", 3, fill)])
    with pytest.raises((ValueError, OSError, RuntimeError)):
        trainer.train()
    (small_disk / "else").unlink()
    again = runs.trainer(llava, output, callbacks=[SafeCheckpoints()])
    assert latest_checkpoint(again) == str(output / "checkpoint-2")


# The table.


def test_the_table_names_tests_that_are_there() -> None:
    text = (ROOT / "docs/faults.md").read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(set(named)) >= 20
    for file, name in named:
        functions = [node.name for node in ast.parse((ROOT / file).read_text("utf-8")).body if hasattr(node, "name")]
        assert name in functions, f"{file} has no {name}"
