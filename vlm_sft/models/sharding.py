"""What FSDP2 needs of a model and of a run, so that a sharded run is the same run."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, TrainingArguments


def is_sharded() -> bool:
    """Whether this process was launched with FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def shard_on_cpu(args: TrainingArguments) -> None:
    """Makes a run that was launched with FSDP shard on CPUs too; leaves any other as it is.

    accelerate 1.15 turns FSDP on only where it takes its processes for those of GPUs: on CPUs each would keep a whole
    copy of the model, without a word.
    """
    if args.use_cpu and is_sharded():
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
        args.accelerator_config = {"use_configured_state": True}


def fit_to_shards(model: PreTrainedModel) -> None:
    """Lets FSDP2 split the model by its own layers, train its head on the rows of all processes, and save adapters.

    - accelerate 1.15 takes the layers from the names that the model gives, and refuses those of CLIP's and SigLIP's
      text parts, which no vision-language model has.
    - TRL 1.16 reads the head's weight past FSDP, by `full_tensor()`, whose backward takes the gradient of this process
      for that of all: each share of an untied head would train on the rows of one process. Here the head is gathered
      as FSDP does it, before its weight is read.
    - Beside each 4-bit weight bitsandbytes lists its scales in the state, which are no parameters: torch 2.13 saves
      them with the adapters, and does not find their place when it loads.
    """
    own = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = {name for name in model._no_split_modules or () if name in own}
    if is_sharded():
        model.base_model.register_forward_hook(partial(_gather_head, model))
        for module in model.modules():
            if hasattr(module, "quant_state"):
                module.register_state_dict_post_hook(_leave_out_scales)  # type: ignore[no-untyped-call]


def _gather_head(model: Any, *_: Any) -> None:
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule) and torch.is_grad_enabled():
        head.unshard()


def _leave_out_scales(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}weight.")]:
        del state[key]
