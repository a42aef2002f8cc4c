"""What this machine runs: the precision, optimizer, attention and data workers that suit it, on one GPU a process."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.utils.import_utils import is_torch_bf16_gpu_available, is_triton_available

from vlm_sft.common import core_count
from vlm_sft.upstream import is_bitsandbytes_optimizer, is_sharded, shard_on_cpu


def best_dtype() -> torch.dtype:
    """bfloat16 on a GPU that computes in it, float16 on an older one of NVIDIA or AMD, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if is_torch_bf16_gpu_available() else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """As users write it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def own_device() -> torch.device:
    """Where this process trains: the GPU of its local rank, or the CPU (`--use_cpu`, or no GPU)."""
    state = PartialState()
    kind = state.device.type
    return torch.device(kind) if kind in ("cpu", "mps") else torch.device(kind, state.local_process_index)


def best_worker_count() -> int:
    """Data workers for each process: up to four, one core left to the process itself, and none on a lone core. Without
    workers (the Trainer's default) image work, some 95% of collation, runs between the steps."""
    return min(4, core_count() - 1)


def set_hardware_defaults(args: TrainingArguments) -> list[str]:
    """Fills in what the user left open, first of all in a config's `__post_init__`; returns what it replaced, in words.

    Without `bf16` or `fp16` set, `best_dtype` decides. `adamw_torch_fused`, transformers' own default, takes the place
    of a paged optimizer without an NVIDIA or AMD GPU to page from, and of the config's own bitsandbytes optimizer under
    FSDP, which shards its states; one that was asked for is refused there. A launch with FSDP shards on CPUs too.
    Raises ValueError for that, for an accelerator of another kind, and by `check_compiler`."""
    args.use_cpu |= not torch.accelerator.is_available()  # without it, processes on CPUs would train apart
    kind = getattr(torch.accelerator.current_accelerator(), "type", "cpu")
    if not args.use_cpu and kind not in ("cuda", "mps", "xpu", "cpu"):
        found = f"the accelerator of this machine is {kind!r}, on which nothing here was ever tried"
        raise ValueError(f"{found}; expected cuda (NVIDIA or AMD), xpu or mps. To train on its CPU, pass --use_cpu")
    if args.bf16 is None and not args.fp16:
        args.bf16, args.fp16 = best_dtype() == torch.bfloat16, best_dtype() == torch.float16
    shard_on_cpu(args)
    check_compiler(args)
    asked, default = str(getattr(args.optim, "value", args.optim)), getattr(type(args), "optim", None)
    cannot_shard = is_sharded() and is_bitsandbytes_optimizer(asked)
    if cannot_shard and asked != default:
        found = f"--optim {asked} is of bitsandbytes, whose optimizers cannot step sharded weights (FSDP)"
        how = "leave it out, which takes adamw_torch_fused, or launch with accelerate_configs/multi_gpu.yaml"
        raise ValueError(f"{found}: {how}")
    if cannot_shard or (asked.startswith("paged_") and not torch.cuda.is_available()):
        args.optim = "adamw_torch_fused"
    args.dataloader_pin_memory &= torch.cuda.is_available()  # PyTorch warns of it at each evaluation on a CPU
    return [] if args.optim == asked else [f"optimizer {asked} replaced by {args.optim}"]


def check_compiler(args: Any) -> None:
    """Raises ValueError where TRL 1.16's fused head, a Triton kernel on GPUs, could not be compiled at the first step:
    Triton builds its launcher with a C compiler and Python's headers."""
    if args.use_cpu or not torch.cuda.is_available() or not is_triton_available():
        return
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    found = {"a C compiler": compiler, "Python.h": Path(sysconfig.get_path("include"), "Python.h").is_file()}
    if missing := " and ".join(what for what, there in found.items() if not there):
        how = "apt-get install gcc python3-dev (or name your compiler: CC=/path/to/gcc), and run again"
        raise ValueError(f"{missing} not found, and the first step on a GPU compiles TRL's loss: {how}")
