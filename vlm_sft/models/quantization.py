"""A 4-bit config for the language model alone, and the check of what came out, also by a config of your own.

transformers 5.23 skips a module by its path from the root: `["vision_tower", "lm_head"]` leaves no tower in 16 bit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.import_utils import is_bitsandbytes_available

from vlm_sft.common import listed
from vlm_sft.models.hardware import best_dtype, dtype_name
from vlm_sft.models.parts import PARTS, ModelParts, linear_layers, part_of, parts_of, root_of, stacked_weights
from vlm_sft.upstream import is_sharded


def nf4_config(
    model_or_config: PreTrainedModel | PreTrainedConfig,
    *,
    compute_dtype: torch.dtype | None = None,
    experts_in_16bit: bool = False,
) -> BitsAndBytesConfig:
    """4-bit NormalFloat for the language model's linear layers; tower, projector and head stay as loaded.

    NF4 with double quantization takes 4.13 bits a weight (QLoRA, arXiv 2305.14314). The default of `compute_dtype` is
    `best_dtype()`. The packed tensors are stored as uint8, or in the compute dtype under FSDP (it shards no integers).
    bitsandbytes packs no experts that are stacked in one weight, as transformers 5 keeps those of a mixture: most of
    the model stays in 16 bit, which `experts_in_16bit=True` accepts.

    Raises ImportError without bitsandbytes; ValueError for a model whose parts cannot be told, and for stacked experts
    that are not accepted, with their share and memory."""
    if not is_bitsandbytes_available():
        raise ImportError("4-bit needs bitsandbytes 0.50.2 or newer: pip install bitsandbytes, or load in 16 bit.")
    dtype = best_dtype() if compute_dtype is None else compute_dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"compute_dtype={compute_dtype!r}: a float dtype such as torch.bfloat16")
    model = root_of(model_or_config)
    parts = parts_of(model)
    if (experts := _experts(model, parts)) and not experts_in_16bit:
        how = "accept that by experts_in_16bit=True (of load_model or nf4_config), or load without 4-bit"
        raise ValueError(f"{model.config.model_type}: bitsandbytes leaves {_share(model, parts)}; {how}.")
    modules = dict(model.named_modules())
    by_weight = [name for name in modules.keys() - linear_layers(modules) if type(modules[name]) is nn.Linear]
    kept = sorted(name for name in by_weight if part_of(name, parts) == "language")
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if is_sharded() else None,
        llm_int8_skip_modules=[*parts.vision, *parts.projector, *parts.head, *parts.other, *experts, *kept],
    )


def check_quantized(model: nn.Module) -> tuple[list[str], str]:
    """The quantized layers of this loaded model, once they are the language model's linear layers and no others, each
    packed as the model's own config states (type, double quantization, compute and storage dtype); and a sentence on
    them and on what was kept. Raises ValueError with the difference, and for a model without a bitsandbytes config."""
    parts = parts_of(model)
    config: Any = getattr(model.config, "quantization_config", None)
    if not isinstance(config, BitsAndBytesConfig):
        how = "load it with load_model(..., load_in_4bit=True)"
        raise ValueError(f"{type(model).__name__} has no bitsandbytes config; {how}.")
    linears = linear_layers(dict(model.named_modules()))
    asked = {name for name in linears if part_of(name, parts) == "language"}
    packed = {name for name, module in linears.items() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")}
    others = {
        name: weight
        for name, weight in model.named_parameters()
        if ".lora_" not in name and name.rpartition(".")[0] not in packed
    }
    experts, skipped = _experts(model, parts), {*(config.llm_int8_skip_modules or ())}
    differences = {
        "stacked experts stay in 16 bit, which experts_in_16bit=True accepts": experts.keys() - skipped,
        "language layers left unquantized": asked - packed,
        "quantized outside the language model": packed - asked,
        "packed differently from the config": {
            f"{name} ({fault})" for name in packed & asked if (fault := _unlike(linears[name], config))
        },
        "norms, embeddings or kept layers that are not floats": {
            name for name, weight in others.items() if not weight.is_floating_point()
        },
    }
    if found := [f"{len(names)} {what}: {listed(names)}" for what, names in differences.items() if names]:
        how = f"The skip list was {config.llm_int8_skip_modules}; build it with nf4_config, on a 16-bit checkpoint."
        raise ValueError(f"Quantization differs from what was asked. {'; '.join(found)}. {how}")
    kept = Counter(part_of(name, parts) for name in linears.keys() - packed)
    counts = ", ".join(f"{part} {kept[part]}" for part in PARTS if part in kept)
    dtypes = "/".join(sorted({dtype_name(weight.dtype) for weight in others.values()}))
    kind = "int8"
    if config.load_in_4bit:
        double = "with" if config.bnb_4bit_use_double_quant else "without"
        compute, storage = map(dtype_name, (config.bnb_4bit_compute_dtype, config.bnb_4bit_quant_storage))
        kind = f"{config.bnb_4bit_quant_type} {double} double quantization (compute {compute}, storage {storage})"
    sentence = f"{kind} on {len(packed)} linear layers of the language model; kept in {dtypes}: {counts} linear layers"
    return sorted(packed), f"{sentence}, all norms and embeddings{f'; {_share(model, parts)}' if experts else ''}"


def _experts(model: nn.Module, parts: ModelParts) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in stacked_weights(model).items() if part_of(name, parts) == "language"}


def _share(model: nn.Module, parts: ModelParts) -> str:
    """What a mixture keeps in 16 bit, and how much of the language model that is."""
    experts, linears = _experts(model, parts), linear_layers(dict(model.named_modules())).items()
    stacked = sum(weight.numel() for weight in experts.values())
    others = sum(m.in_features * m.out_features for name, m in linears if part_of(name, parts) == "language")
    share = f"{stacked / (stacked + others):.1%} of the language model's matrices, {2 * stacked / 2**30:.2f} GiB"
    return f"{len(experts)} stacked experts in 16 bit ({share})"


def _unlike(layer: Any, config: BitsAndBytesConfig) -> str:
    """How a packed layer differs from the config it was loaded with; empty where it does not."""
    packing: Any = getattr(layer.weight, "quant_state", None)
    found = {"dtype": (layer.weight.dtype, torch.int8 if config.load_in_8bit else "packed")}
    if packing is not None and config.load_in_4bit:
        found = {
            "type": (packing.quant_type, config.bnb_4bit_quant_type),
            "double quantization": (packing.nested, config.bnb_4bit_use_double_quant),
            "compute dtype": (layer.compute_dtype, config.bnb_4bit_compute_dtype),
            "storage dtype": (layer.weight.dtype, config.bnb_4bit_quant_storage),
        }
    return ", ".join(f"{what} {is_} instead of {should}" for what, (is_, should) in found.items() if is_ != should)
