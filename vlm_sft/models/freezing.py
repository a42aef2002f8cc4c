"""Which parts train and in which precision: set by part, checked, and shown as a table."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from vlm_sft.models.parts import PARTS, ModelParts, listed, part_of, parts_of


def freeze(model: nn.Module, *, train: Sequence[str] = ("projector",), model_parts: ModelParts | None = None) -> None:
    """Makes the parameters of the named parts trainable and all others frozen.

    A head that shares the embedding's weight belongs to the language model. Freeze before the Trainer is made.

    Raises ValueError for an unknown part, one without parameters of its own, quantized weights that would have to
    train, and a model with adapters (where `lora_config` decides).
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            "freeze would change which adapters train; give lora_config parts= and projector= instead, and load_model "
            "is_trainable."
        )
    asked = _asked(model, train, model_parts)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in asked)


def check_trainable(
    model: nn.Module, *, train: Sequence[str] = ("projector",), model_parts: ModelParts | None = None
) -> str:
    """`parameter_table` of a model that trains exactly the named parts.

    Raises ValueError with the parameters that train although frozen was asked, and the other way round. For a model
    with adapters ask `check_adapters`.
    """
    asked = _asked(model, train, model_parts)
    names = dict(model.named_parameters())
    extra = [name for name, parameter in names.items() if parameter.requires_grad and parameter not in asked]
    lacking = [name for name, parameter in names.items() if not parameter.requires_grad and parameter in asked]
    if extra or lacking:
        raise ValueError(
            f"train={tuple(train)}, but {len(extra)} parameters of other parts train ({listed(extra)}) and "
            f"{len(lacking)} of these do not ({listed(lacking)}); call freeze with the same parts, "
            "after everything that sets requires_grad."
        )
    return parameter_table(model, model_parts=model_parts)


def parameter_table(model: nn.Module, *, model_parts: ModelParts | None = None) -> str:
    """One line a part: parameters, how many of them train, their dtypes, and how many are quantized."""
    parts = parts_of(model, model_parts=model_parts)
    by_part: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        by_part[part_of(name, parts)].append(parameter)
    by_part["total"] = [parameter for members in by_part.values() for parameter in members]
    rows: list[tuple[str, ...]] = [("part", "parameters", "trainable", "quantized", "dtypes")]
    for part in (*PARTS, "total"):
        members = by_part[part]
        packed = [parameter for parameter in members if _is_packed(parameter)]
        dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in members})
        counts = (members, [parameter for parameter in members if parameter.requires_grad], packed)
        rows.append((part, *(f"{sum(map(_size, group)):,}" for group in counts), ", ".join(dtypes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:4], widths[1:4]), row[4]]).rstrip() for row in rows
    )


def upcast_trainable(model: nn.Module) -> None:
    """Puts the trainable parameters into float32: what fp16 training needs, and bf16 training of whole parts.

    A bfloat16 weight of 0.02 cannot move by less than 6e-5, which an AdamW step at a learning rate of 2e-5 never
    reaches. Call it after the Trainer is made (TRL 1.16 casts the adapters of a quantized base to bfloat16) and
    before `train()`. The forward pass then needs the autocast that `bf16=True` or `fp16=True` brings.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def check_precision(model: nn.Module, *, fp16: bool) -> None:
    """Refuses trainable parameters that the precision of this run cannot train.

    Raises ValueError for float16 ones, and with `fp16=True` for any but float32: the gradient scaler unscales no
    others. And for a SmolVLM whose embeddings are in another dtype than its tower. Warns of bfloat16 ones outside
    adapters, which lose small updates.
    """
    names: dict[str, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            names[str(parameter.dtype).removeprefix("torch.")].append(name)
    refused = {dtype: found for dtype, found in names.items() if dtype == "float16" or (fp16 and dtype != "float32")}
    if refused:
        faults = "; ".join(f"{len(found)} in {dtype} ({listed(found)})" for dtype, found in refused.items())
        raise ValueError(
            f"fp16={fp16} and trainable parameters that it cannot train: {faults}. Call "
            "upcast_trainable(trainer.model) before train(), or train in bf16."
        )
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # It casts the features of an image to the dtype of its first parameter, and merges them with the embeddings
    # (transformers 5.23, modeling_smolvlm.py).
    if base.config.model_type == "smolvlm" and base.dtype != (held := base.get_input_embeddings().weight.dtype):
        raise ValueError(
            f"The tower is in {base.dtype} and the embeddings in {held}, which SmolVLM cannot merge; load it with "
            'load_model(dtype="float32"): bf16=True or fp16=True still computes in 16 bit.'
        )
    if lossy := [name for name in names["bfloat16"] if ".lora_" not in name]:
        warnings.warn(
            f"{len(lossy)} weights outside adapters train in bfloat16 ({listed(lossy)}), where an update much smaller "
            "than the weight has no effect; call upcast_trainable(trainer.model) before train().",
            stacklevel=2,
        )


def _asked(model: nn.Module, train: Sequence[str], model_parts: ModelParts | None) -> set[nn.Parameter]:
    """The parameters of the named parts."""
    if isinstance(train, str) or not train or not set(train) <= set(PARTS):
        raise ValueError(f"train={train!r}: a tuple of one or more of {', '.join(PARTS)}.")
    parts = parts_of(model, model_parts=model_parts)
    by_part: dict[str, dict[str, nn.Parameter]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        by_part[part_of(name, parts)][name] = parameter
    tied = not by_part["head"] and "language" in train
    if empty := [part for part in train if not by_part[part] and not (part == "head" and tied)]:
        raise ValueError(
            f"train={tuple(train)}, but {' and '.join(empty)} has no parameters of its own. A head that shares the "
            "embedding's weight trains with 'language'."
        )
    asked = {name: parameter for part in train for name, parameter in by_part[part].items()}
    if packed := [name for name, parameter in asked.items() if _is_packed(parameter)]:
        raise ValueError(
            f"train={tuple(train)}, but {len(packed)} of these weights are quantized ({listed(packed)}) and cannot be "
            "trained; load without quantization (no --load_in_4bit), or train adapters with lora_config."
        )
    return set(asked.values())


def _is_packed(parameter: Any) -> bool:
    return not parameter.is_floating_point() or getattr(parameter, "quant_state", None) is not None


def _size(parameter: Any) -> int:
    """Weights held, also where two 4-bit ones share a byte."""
    packing = getattr(parameter, "quant_state", None)
    return math.prod(packing.shape) if packing is not None else parameter.numel()
