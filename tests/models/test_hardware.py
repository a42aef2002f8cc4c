"""What a recipe's config fills in for this machine, with GPUs that are imagined and launches that are real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recipe_runs import ROOT
from together import together

import vlm_sft
from vlm_sft.models import hardware
from vlm_sft.models.hardware import best_dtype, own_device, set_hardware_defaults

# In a process of its own: much of what it asks is remembered.
TWO_GPUS = """
import sys
import bitsandbytes  # as importing peft does: it starts CUDA, and what is set after that comes too late
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer

torch.cuda.is_available = torch.accelerator.is_available = lambda: True
torch.cuda.device_count, torch.cuda.is_bf16_supported = lambda: 2, lambda including_emulation=True: True
torch.cuda.set_device = torch.cuda.manual_seed_all = torch.cuda.get_device_name = lambda device: None
Trainer._move_model_to_device = lambda *_: None  # nothing can lie there

from runs import Collate, rows
from trl import SFTTrainer
from vlm_sft import RecipeDefaults
from vlm_sft.models import hardware

hardware.check_compiler = lambda args: None
base, output = sys.argv[1:]
args = RecipeDefaults(output, eval_strategy="no", optim="paged_adamw_32bit", max_length=None)
processor = AutoProcessor.from_pretrained(base)
given = {"train_dataset": rows(4), "processing_class": processor, "data_collator": Collate(processor)}
trainer = SFTTrainer(AutoModelForImageTextToText.from_pretrained(base), args, **given)
print(trainer.args.n_gpu, trainer.args.device, trainer.args.train_batch_size, hardware.own_device(), args.optim.value)
"""


def test_of_several_gpus_a_process_without_launcher_takes_one(tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWO_GPUS, str(tiny_dir("llava15")), str(tmp_path)]
    there = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=there)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "cuda:0", "8", "cuda:0", "paged_adamw_32bit"]
    assert done.stderr.count("training on the first. To use all: accelerate launch") == 1
    assert "--num_processes 2 RECIPE" in done.stderr


@pytest.mark.parametrize(
    ("cuda", "bf16", "other_bf16", "dtype"),
    [
        (False, False, False, torch.float32),
        (True, True, False, torch.bfloat16),
        (True, False, True, torch.float16),
        (False, False, True, torch.bfloat16),  # Intel XPU, Apple MPS
    ],
)
def test_the_dtype_is_what_the_hardware_computes_in(
    cuda: bool, bf16: bool, other_bf16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 and not including_emulation)
    monkeypatch.setattr(hardware, "is_torch_bf16_gpu_available", lambda: other_bf16)
    assert best_dtype() == dtype


@pytest.mark.parametrize(
    ("kind", "rank", "device"), [("cuda", 3, "cuda:3"), ("xpu", 0, "xpu:0"), ("mps", 0, "mps"), ("cpu", 1, "cpu")]
)
def test_a_process_has_the_device_of_its_rank(
    kind: str, rank: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SimpleNamespace(device=torch.device(kind), local_process_index=rank)
    monkeypatch.setattr(hardware, "PartialState", lambda: state)
    assert own_device() == torch.device(device)


# -- the optimizer


@dataclass
class Config(vlm_sft.RecipeDefaults):
    optim: str = "paged_adamw_32bit"


def settle(optim: str, *, use_cpu: bool = True) -> tuple[str, list[str]]:
    args: Any = Config.__new__(Config)
    vars(args).update(optim=optim, bf16=False, fp16=False, use_cpu=use_cpu, dataloader_pin_memory=False)
    changes = set_hardware_defaults(args)
    return str(args.optim), changes


@pytest.mark.parametrize(
    ("gpu", "asked", "chosen"),
    [
        (False, "paged_adamw_32bit", "adamw_torch_fused"),
        (False, "paged_lion_8bit", "adamw_torch_fused"),
        (False, "adamw_8bit", "adamw_8bit"),
        (True, "paged_adamw_32bit", "paged_adamw_32bit"),
    ],
)
def test_a_paged_optimizer_needs_a_gpu(gpu: bool, asked: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    changes = [] if asked == chosen else [f"optimizer {asked} replaced by {chosen}"]
    assert settle(asked) == (chosen, changes)


@pytest.mark.parametrize("gpu", [False, True])
def test_under_fsdp_the_recipes_optimizer_gives_way_and_another_of_bitsandbytes_is_refused(
    gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(hardware, "shard_on_cpu", lambda args: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    replaced = "optimizer paged_adamw_32bit replaced by adamw_torch_fused"
    assert settle("paged_adamw_32bit") == ("adamw_torch_fused", [replaced])
    assert settle("sgd") == ("sgd", [])
    for asked in ("lion_32bit", "adamw_8bit", "paged_adamw_8bit", "ademamix"):
        with pytest.raises(ValueError, match=rf"--optim {asked} is of bitsandbytes.*\(FSDP\): leave it out"):
            settle(asked)


def optimizer_of(folder: Path, optim: str) -> str:
    return str(Config(str(folder), optim=optim, eval_strategy="no").optim)


@pytest.mark.slow
@pytest.mark.loopback
@pytest.mark.sweep
def test_a_launch_with_fsdp_is_heard(tmp_path: Path) -> None:
    found = together(optimizer_of, tmp_path, "paged_adamw_32bit", config="cpu_2proc_fsdp2", limit_s=120)
    assert [name.rpartition(".")[2].lower() for name in found] == ["adamw_torch_fused"] * 2
    with pytest.raises(RuntimeError, match="--optim lion_32bit is of bitsandbytes"):
        together(optimizer_of, tmp_path, "lion_32bit", config="cpu_2proc_fsdp2", limit_s=120)


# -- the compiler


@pytest.mark.parametrize(
    ("gpu", "triton", "compilers", "cc", "header", "missing"),
    [
        (True, True, {"gcc"}, None, True, None),
        (True, True, {"clang"}, None, True, None),
        (True, True, set(), "/opt/cc", True, None),
        (True, True, set(), None, True, "a C compiler not found"),
        (True, True, {"gcc"}, None, False, "Python.h not found"),
        (True, True, set(), None, False, "a C compiler and Python.h not found"),
        (True, False, set(), None, False, None),
        (False, True, set(), None, False, None),
    ],
)
def test_a_compiler_is_asked_for_before_the_rows_are_read(
    gpu: bool,
    triton: bool,
    compilers: set[str],
    cc: str | None,
    header: bool,
    missing: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    monkeypatch.setattr(hardware, "is_triton_available", lambda: triton)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in compilers else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CC", cc) if cc else monkeypatch.delenv("CC", raising=False)
    if header:
        Path(tmp_path, "Python.h").touch()
    look: Callable[[], Any] = lambda: settle("sgd", use_cpu=False)  # noqa: E731
    if missing is None:
        assert look()[0] == "sgd"
    else:
        with pytest.raises(ValueError, match=rf"^{missing}, .*apt-get install gcc python3-dev"):
            look()


@pytest.mark.parametrize("use_cpu", [False, True])
def test_an_accelerator_that_was_never_tried_is_refused_in_a_sentence(
    use_cpu: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("hpu"))
    args = SimpleNamespace(use_cpu=use_cpu, bf16=False, fp16=False, optim="adamw_torch", dataloader_pin_memory=True)
    args.accelerator_config = None
    if use_cpu:
        set_hardware_defaults(args)  # type: ignore[arg-type]
    else:
        with pytest.raises(ValueError, match=r"accelerator of this machine is 'hpu', .*pass --use_cpu"):
            set_hardware_defaults(args)  # type: ignore[arg-type]
