"""A 4-bit config for the language model alone, and the check of what came out, also by a config of your own.

bitsandbytes skips a module by its path from the root, and any skip list of one's own replaces the one that protects
`lm_head` (transformers 5.23): `["vision_tower", "lm_head"]` leaves no tower in 16 bit. So: full paths.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.import_utils import is_bitsandbytes_available

from vlm_sft.common import listed
from vlm_sft.models.hardware import best_dtype, dtype_name
from vlm_sft.models.parts import PARTS, ModelParts, linear_layers, part_of, parts_of, root_of, stacked_weights
from vlm_sft.upstream import is_sharded

_PACKED = ("Linear4bit", "Linear8bitLt")


@dataclass(frozen=True)
class QuantizationReport:
    """What `check_quantized` found: the packed layers, and a sentence on them and on what was kept."""

    quantized: tuple[str, ...]
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def nf4_config(
    model_or_config: PreTrainedModel | PreTrainedConfig,
    *,
    compute_dtype: torch.dtype | None = None,
    experts_in_16bit: bool = False,
) -> BitsAndBytesConfig:
    """4-bit NormalFloat for the language model's linear layers; tower, projector and head stay as loaded.

    NF4 with double quantization takes 4.13 bits a weight (QLoRA, arXiv 2305.14314). The default of `compute_dtype` is
    `best_dtype()`. The packed tensors are stored as uint8, or in the compute dtype in a run launched with FSDP, which
    shards no integers.

    bitsandbytes packs no experts that are stacked in one weight, as transformers 5 keeps those of a mixture: most of
    the model stays in 16 bit, which `experts_in_16bit=True` accepts.

    Raises ImportError without bitsandbytes; ValueError for a model whose parts cannot be told, and for stacked experts
    that are not accepted, with their share and memory.
    """
    if not is_bitsandbytes_available():
        raise ImportError("4-bit needs bitsandbytes 0.46.1 or newer: pip install bitsandbytes, or load in 16 bit.")
    dtype = best_dtype() if compute_dtype is None else compute_dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"compute_dtype={compute_dtype!r}: a float dtype such as torch.bfloat16")
    model = root_of(model_or_config)
    parts = parts_of(model)
    if (experts := _experts(model, parts)) and not experts_in_16bit:
        raise ValueError(
            f"{model.config.model_type}: bitsandbytes leaves {_share(model, parts)}; accept that by "
            "experts_in_16bit=True (of load_model or nf4_config), or load without 4-bit."
        )
    modules = dict(model.named_modules())
    by_weight = [name for name in modules.keys() - linear_layers(modules) if type(modules[name]) is nn.Linear]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if is_sharded() else None,
        llm_int8_skip_modules=[
            *(*parts.vision, *parts.projector, *parts.head, *parts.other, *experts),
            *sorted(name for name in by_weight if part_of(name, parts) == "language"),
        ],
    )


def check_quantized(model: nn.Module) -> QuantizationReport:
    """What is quantized in this loaded model, once that is the language model's linear layers and nothing else.

    Also looks into each packed layer for the type, double quantization, compute and storage dtype that the model's
    own config states. Raises ValueError with the difference, and for a model without a bitsandbytes config.
    """
    parts = parts_of(model)
    config: Any = getattr(model.config, "quantization_config", None)
    if not isinstance(config, BitsAndBytesConfig):
        raise ValueError(
            f"{type(model).__name__} has no bitsandbytes config; load it with load_model(..., load_in_4bit=True)."
        )
    linears = linear_layers(dict(model.named_modules()))
    asked = {name for name in linears if part_of(name, parts) == "language"}
    packed = {name for name, module in linears.items() if type(module).__name__ in _PACKED}
    unlike = {name: fault for name in packed & asked if (fault := _unlike(linears[name], config))}
    own = {name: parameter for name, parameter in model.named_parameters() if ".lora_" not in name}
    others = {name: parameter for name, parameter in own.items() if name.rpartition(".")[0] not in packed}
    experts, skipped = _experts(model, parts), {*(config.llm_int8_skip_modules or ())}
    differences = {
        "stacked experts stay in 16 bit, which experts_in_16bit=True accepts": experts.keys() - skipped,
        "language layers left unquantized": asked - packed,
        "quantized outside the language model": packed - asked,
        "packed differently from the config": {f"{name} ({fault})" for name, fault in unlike.items()},
        "norms, embeddings or kept layers that are not floats": {
            name for name, parameter in others.items() if not parameter.is_floating_point()
        },
    }
    if found := [f"{len(names)} {what}: {listed(names)}" for what, names in differences.items() if names]:
        raise ValueError(
            f"Quantization differs from what was asked. {'; '.join(found)}. The skip list was "
            f"{config.llm_int8_skip_modules}; build it with nf4_config, and load the original 16-bit checkpoint."
        )
    kept = Counter(part_of(name, parts) for name in linears.keys() - packed)
    counts = ", ".join(f"{part} {kept[part]}" for part in PARTS if part in kept)
    dtypes = "/".join(sorted({dtype_name(parameter.dtype) for parameter in others.values()}))
    return QuantizationReport(
        tuple(sorted(packed)),
        f"{_kind(config)} on {len(packed)} linear layers of the language model; kept in {dtypes}: {counts} linear "
        f"layers, all norms and embeddings{f'; {_share(model, parts)}' if experts else ''}",
    )


def _experts(model: nn.Module, parts: ModelParts) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in stacked_weights(model).items() if part_of(name, parts) == "language"}


def _share(model: nn.Module, parts: ModelParts) -> str:
    """What a mixture keeps in 16 bit, and how much of the language model that is."""
    experts = _experts(model, parts)
    stacked = sum(weight.numel() for weight in experts.values())
    linears = linear_layers(dict(model.named_modules())).items()
    matrices = stacked + sum(m.in_features * m.out_features for n, m in linears if part_of(n, parts) == "language")
    found = f"{len(experts)} stacked experts in 16 bit ({stacked / matrices:.1%} of the language model's matrices"
    return f"{found}, {2 * stacked / 2**30:.2f} GiB)"


def _unlike(layer: Any, config: BitsAndBytesConfig) -> str:
    """How a packed layer differs from the config it was loaded with; empty where it does not."""
    packing: Any = getattr(layer.weight, "quant_state", None)
    if config.load_in_8bit or packing is None:
        found = {"dtype": (layer.weight.dtype, torch.int8 if config.load_in_8bit else "packed")}
    else:
        found = {
            "type": (packing.quant_type, config.bnb_4bit_quant_type),
            "double quantization": (packing.nested, config.bnb_4bit_use_double_quant),
            "compute dtype": (layer.compute_dtype, config.bnb_4bit_compute_dtype),
            "storage dtype": (layer.weight.dtype, config.bnb_4bit_quant_storage),
        }
    return ", ".join(f"{what} {is_} instead of {should}" for what, (is_, should) in found.items() if is_ != should)


def _kind(config: BitsAndBytesConfig) -> str:
    if config.load_in_8bit:
        return "int8"
    held = f"compute {dtype_name(config.bnb_4bit_compute_dtype)}, storage {dtype_name(config.bnb_4bit_quant_storage)}"
    double = "with" if config.bnb_4bit_use_double_quant else "without"
    return f"{config.bnb_4bit_quant_type} {double} double quantization ({held})"
