"""Import, commands, quickstart and a recipe without the calls that only Linux has, and with data workers that are
started anew (spawn, forkserver) instead of forked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from recipe_data import noise
from recipe_runs import ROOT

ELSEWHERE = Path(__file__).parent / "other_machine"


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("elsewhere")
    lines = []
    for n, image in enumerate(noise(12)):
        image.save(folder / f"{n}.png")
        lines.append({"image": f"{n}.png", "question": f"What is {n}?", "answer": f"It is {n}."})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder / "rows.jsonl"


def ran(command: list[str], folder: Path, method: str = "spawn") -> str:
    """What it printed to stderr and stdout."""
    path = os.pathsep.join([str(ELSEWHERE), str(ROOT)])
    settings = {**os.environ, "PYTHONPATH": path, "START_METHOD": method}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr + done.stdout


@pytest.mark.slow
def test_it_imports_and_locks_a_folder_once(tmp_path: Path) -> None:
    code = """
import os, signal, sys, vlm_sft
from vlm_sft.common import core_count, ends_within, lock_file, peak_memory
assert not hasattr(os, "sched_getaffinity") and core_count() == os.cpu_count()
args = vlm_sft.RecipeDefaults("outputs", use_cpu=True)
assert args.dataloader_num_workers == min(4, os.cpu_count() - 1) and peak_memory() > 10**8
with ends_within(0.1):
    pass
lock_file(held := open("lock", "a"))
if os.fork() == 0:
    try:
        lock_file(open("lock", "a"))
    except (BlockingIOError, PermissionError):
        os._exit(0)
    os._exit(1)
assert os.wait()[1] == 0
print("as it should be", file=sys.stderr)
"""
    assert "as it should be" in ran(["-c", code], tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_recipe_trains_with_workers_that_are_started_anew(
    method: str, rows: Path, tiny_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    flags = ["--model_name_or_path", str(tiny_dir("llava15")), "--dataset_name", str(rows), "--max_steps", "2"]
    flags += ["--warmup_steps", "0", "--eval_steps", "2", "--per_device_train_batch_size", "2"]
    flags += ["--gradient_accumulation_steps", "1", "--dataloader_num_workers", "2", "--output_dir", "run"]
    ran([str(ROOT / "recipes" / "llava15_sft.py"), *flags], tmp_path, method)
    record = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert record["settings"]["training"]["dataloader_num_workers"] == 2
    assert record["peak_memory_bytes"]["process"] > 10**8
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.sweep
def test_rows_are_checked_and_audited(rows: Path, tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    data = ["--model", str(tiny_dir("llava15")), "--dataset", str(rows)]
    assert "12 rows" in ran(["-m", "vlm_sft", "check", *data, "--num_proc", "2"], tmp_path)
    ran(["-m", "vlm_sft", "audit", *data, "--html", "audit.html"], tmp_path)
    assert (tmp_path / "audit.html").is_file()


@pytest.mark.sweep
def test_the_quickstart_runs(tmp_path: Path) -> None:
    flags = ["--num_train_rows", "64", "--num_eval_rows", "8", "--num_train_epochs", "1", "--num_layers", "1"]
    recipe = str(ROOT / "recipes" / "quickstart.py")
    assert "read correctly" in ran([recipe, *flags, "--dataloader_num_workers", "2"], tmp_path)
