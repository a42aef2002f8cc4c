"""Every private or fragile name of our dependencies that we touch, with its version and why.

Each function here works round one fault, or reads one thing that has no public name. tests/test_upstream.py shows each
fault on a small case and goes red when the name is gone, or when the fault is, so that the function can go too. It also
holds what these modules rely on in place:

- training/batches.py: batch_size, lengths and generator of LengthGroupedSampler, seed and set_epoch of
  BatchRebalanceSampler (transformers 5.23), below accelerate 1.15's batch samplers: to order rows by seed and epoch.
- training/optim.py: `optimizer_cls_and_kwargs` may hold a callable that makes the optimizer of a model, and
  `get_decay_parameter_names` reads nothing of its Trainer (transformers 5.23): for rates by part.
- training/callbacks.py: `log_probs` [B, T - 1] of TRL 1.16's fused head, to name the row of a NaN.
- data/check_rows.py, proof.py: `Dataset._fingerprint` (datasets 5.2), to know rows again.
- evaluation/callback.py, training/callbacks.py: callbacks run in the order of `callback_handler.callbacks`, and an
  evaluation before the save of its step (transformers 5.23): answers are scored, then the random state is put back.
"""

from __future__ import annotations

import inspect
import os
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

TWO_WAY_IMAGES = ("deepseek_ocr2", "gemma3", "gemma4", "molmo2", "paligemma")
"""Families in which the tokens of an image see each other in both directions. FlashAttention takes no such mask, and
transformers 5.23 drops it without a word (masking_utils.flash_attention_mask)."""


def is_sharded() -> bool:
    """Whether this process was launched with FSDP: by accelerate 1.15's own variable, which no function reads."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def shard_on_cpu(args: TrainingArguments) -> None:
    """Makes a run that was launched with FSDP shard on CPUs too; leaves any other as it is.

    accelerate 1.15 turns FSDP on only where it takes its processes for those of GPUs: on CPUs each would keep a whole
    copy of the model, without a word.
    """
    if args.use_cpu and is_sharded():
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
        args.accelerator_config = {"use_configured_state": True}


def name_own_layers(model: PreTrainedModel) -> None:
    """Leaves in the model's `_no_split_modules` the layers that it has.

    accelerate 1.15 splits a model for FSDP2 by these names and refuses those that are not there: CLIP's and SigLIP's
    text layers, which no vision-language model has (transformers 5.23).
    """
    own = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = {name for name in model._no_split_modules or () if name in own}


def gather_head(model: PreTrainedModel) -> None:
    """Gathers an FSDP2 head as FSDP does it, before TRL reads its weight.

    TRL 1.16 reads it past FSDP, by `full_tensor()`, whose backward takes the gradient of this process for that of all:
    each shard of an untied head would train on the rows of one process.
    """
    model.base_model.register_forward_hook(partial(_gather_head, model))


def _gather_head(model: Any, *_: Any) -> None:
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule) and torch.is_grad_enabled():
        head.unshard()


def leave_out_scales(model: nn.Module) -> None:
    """Keeps the scales of 4-bit weights out of the model's state.

    bitsandbytes 0.50.2 lists them there next to each weight, although they are not parameters: torch 2.13 saves them
    with a sharded model's adapters, and does not find their place when it loads.
    """
    for module in model.modules():
        if hasattr(module, "quant_state"):
            module.register_state_dict_post_hook(_drop_scales)  # type: ignore[no-untyped-call]


def _drop_scales(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}weight.")]:
        del state[key]


def fit_to_shards(model: PreTrainedModel) -> None:
    """All that FSDP2 needs of a model, so that a sharded run is the same run."""
    name_own_layers(model)
    if is_sharded():
        gather_head(model)
        leave_out_scales(model)


def keep_packing(model: nn.Module) -> None:
    """Leaves the 4-bit weights of a model on a CPU as they were loaded.

    Where a CPU has AVX512-BF16, bitsandbytes 0.50.2 packs them again at the first forward in eval mode, for a kernel
    that rounds to bfloat16 and passes no gradient: after an evaluation, training would fail or skip whole layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def set_commit(config: PreTrainedConfig, revision: str | None) -> None:
    """Keeps the commit that a model was read at in its config, which never writes it to config.json.

    transformers kept it there itself until 5.23, whose `resolve_revision` now returns it as an attribute of the
    revision that was asked for.
    """
    config._commit_hash = getattr(revision, "resolved", revision)


def commit_of(config: PreTrainedConfig) -> str | None:
    """What `set_commit` kept."""
    return getattr(config, "_commit_hash", None)


def save_with_own_names(model: PreTrainedModel, folder: str | os.PathLike[str], **options: Any) -> None:
    """Saves a model under the names of its parameters.

    By default transformers 5.23 writes the Hub's older names. Its Trainer finds none of them when it resumes from such
    a checkpoint or loads the best one, and continues with the weights it has. No argument of the Trainer reaches
    `save_original_format`.
    """
    type(model).save_pretrained(model, folder, save_original_format=False, **options)


def limit_pixels(image_processor: Any, max_pixels: int) -> None:
    """Sets the number of pixels an image may have at most.

    Qwen-VL's processors have no attribute for it: they keep it as `longest_edge` of a size whose two edges are numbers
    of pixels, while in other families they are edges (transformers 5.23). Such a processor takes `max_pixels`.

    Raises ValueError for a processor that does not count pixels, and for what is not a number of them.
    """
    size = dict(image_processor.size or {})
    known = inspect.get_annotations(getattr(image_processor, "valid_kwargs", object))
    if "max_pixels" not in known or not {"shortest_edge", "longest_edge"} <= size.keys():
        raise ValueError(
            f"max_pixels={max_pixels}: a {type(image_processor).__name__} does not resize by the number of pixels (its "
            f"size is {size}); leave max_pixels out for this family."
        )
    if isinstance(max_pixels, bool) or not isinstance(max_pixels, int) or max_pixels < 1:
        raise ValueError(f"max_pixels={max_pixels!r}: a number of pixels, such as 1003520 (1,280 tokens of 28 x 28).")
    least = min(size["shortest_edge"], max_pixels)
    image_processor.size = type(image_processor.size)(shortest_edge=least, longest_edge=max_pixels)


def seed_workers(loader: Any, seed: int) -> None:
    """Lets the loader draw what it gives its workers from a generator of its own.

    accelerate 1.15 keeps PyTorch's loader as `base_dataloader`, reads what it makes a resumed loader of from it, and
    passes no attribute on that is set on its own.
    """
    getattr(loader, "base_dataloader", loader).generator = torch.Generator().manual_seed(seed)


def lacks_dora(module: Any) -> bool:
    """Whether PEFT 0.21.2 has no working DoRA for this layer.

    It has none for other quantizers' layers, and on a CPU it breaks 8-bit ones (utils/integrations.py,
    dequantize_module_weight): it puts a weight that lies there back as a copy without the scales, which bitsandbytes
    0.50.2 has moved to the layer, and the second forward fails.
    """
    if type(module).__name__ == "Linear8bitLt":
        return bool(module.weight.device.type == "cpu")
    return not isinstance(module, nn.Linear) and type(module).__name__ != "HQQLinear"
