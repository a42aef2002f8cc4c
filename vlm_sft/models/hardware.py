"""What this machine runs: the precision, optimizer and data workers that suit it, and one GPU for one process."""

from __future__ import annotations

import os
import sys

import torch
from transformers import TrainingArguments

from vlm_sft.upstream import shard_on_cpu


def best_dtype() -> torch.dtype:
    """bfloat16 on a GPU that computes in it, float16 on an older one, float32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def dtype_name(dtype: torch.dtype) -> str:
    """As users write it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def best_worker_count() -> int:
    """Data workers for each process: up to four, one core left to the process itself, and none on a lone core.

    Image work is some 95% of collation; without workers (the Trainer's default) it runs between the steps.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, min(4, len(os.sched_getaffinity(0)) // processes - 1))


def set_hardware_defaults(args: TrainingArguments) -> None:
    """Fills in what the user left open: call it first in the `__post_init__` of a recipe's config.

    Without `bf16` or `fp16` set, `best_dtype` decides. A paged optimizer gives way to `adamw_torch` where there is no
    GPU to page from. Several GPUs and no launcher: this process takes the first one and says how to use all, since
    SFTTrainer refuses `nn.DataParallel`. A launch with FSDP shards on CPUs too (`shard_on_cpu`).
    """
    if "LOCAL_RANK" not in os.environ and torch.cuda.device_count() > 1:
        # The only way to hide devices from the Trainer; it must come before CUDA is first used.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        print("Several GPUs, one process: training on the first. To use all: accelerate launch RECIPE", file=sys.stderr)
    if args.bf16 is None and not args.fp16:
        args.bf16, args.fp16 = best_dtype() == torch.bfloat16, best_dtype() == torch.float16
    args.use_cpu |= not torch.accelerator.is_available()  # without it, processes on CPUs would train apart
    shard_on_cpu(args)
    if args.optim.startswith("paged_") and not torch.cuda.is_available():
        args.optim = "adamw_torch"
    args.dataloader_pin_memory &= torch.cuda.is_available()  # PyTorch warns of it at each evaluation on a CPU
