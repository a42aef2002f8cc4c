"""What a run takes of each GPU's memory, by arithmetic from the model's config: no weight is downloaded.

    python -m vlm_sft memory --model llava-hf/llava-1.5-7b-hf --method qlora --gpus 1
    python -m vlm_sft memory --table

What the CUDA context and fragmentation take is not in it: a run is said to fit where its estimate is at most nine
tenths of the memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, LlavaConfig, Qwen2VLConfig

from vlm_sft.common import on_meta
from vlm_sft.models.parts import part_of, parts_of

Method = Literal["qlora", "lora", "full"]
Strategy = Literal["ddp", "fsdp2", "zero2", "zero3"]

GIB = 2**30
# NF4 with double quantization: 4 bits, one 8-bit scale for 64 weights, one 32-bit scale for 256 of these (QLoRA,
# arXiv 2305.14314). A bfloat16 weight takes 2 bytes, a trained one 4: `cast_trainable_to_fp32`.
_NF4, _BF16, _TRAINED = (4 + 8 / 64 + 32 / (64 * 256)) / 8, 2, 4
_ADAM = {"adamw": 8, "adamw_8bit": 2}

# The four models in docs/scaling.md, as published: the shape of the language model, and whether its head is tied.
_SHAPE = ["hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads"]
_PUBLISHED = {
    "Qwen2-VL-2B": (True, 1536, 28, 8960, 12, 2, 151936),
    "LLaVA-1.5-7B": (False, 4096, 32, 11008, 32, 32, 32064),
    "LLaVA-1.5-13B": (False, 5120, 40, 13824, 40, 40, 32064),
    "Qwen2-VL-72B": (False, 8192, 80, 29568, 64, 8, 152064),
}


def estimate(
    model: Any,
    *,
    method: Method,
    gpus: int = 1,
    strategy: Strategy = "ddp",
    rows: int = 4,
    tokens: int = 2048,
    lora_r: int = 16,
    optimizer: str = "adamw",
    checkpointing: bool = True,
) -> dict[str, float]:
    """The bytes that one training step takes on each of the GPUs, by purpose; `rows` of `tokens` at a time on each.

    Trained in full are projector, language model and head; adapters sit on the language model's linear layers. 4-bit
    weights are sharded by FSDP2 alone.

    Raises ValueError for settings that do not go together.
    """
    if method == "qlora" and strategy == "zero3":
        raise ValueError("method='qlora' with strategy='zero3': DeepSpeed shards no 4-bit weights; take fsdp2")
    parts = parts_of(model)
    sizes = _sizes(model)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    language = [m for name, m in linears.items() if part_of(name, parts) == "language"]
    packed = sum(m.weight.numel() for m in language) if method == "qlora" else 0
    if method == "full":
        frozen, trained = sizes["vision"], sizes.total() - sizes["vision"]
    else:
        frozen, trained = sizes.total() - packed, sum(lora_r * (m.in_features + m.out_features) for m in language)
    held: float = frozen * _BF16 + packed * _NF4 + trained * _TRAINED
    gradients, states = float(trained * _TRAINED), float(trained * _ADAM[optimizer])
    lists = [m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and part_of(n, parts) == "language"]
    layers = [*max(lists, key=len)]
    gathered = 0.0
    if strategy == "zero2":
        held += trained * (_BF16 - _TRAINED + _TRAINED / gpus)  # 16-bit copies in each, 32-bit ones sharded
        gradients, states = gradients / gpus, states / gpus
    elif strategy in ("fsdp2", "zero3"):
        held, gradients, states = held / gpus, gradients / gpus, states / gpus
        # One layer at work and the next one on its way, the embedding, and the head as it is trained.
        layer = sum(p.numel() * (_NF4 if method == "qlora" else _BF16) for p in layers[0].parameters())
        ends = {*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()}
        gathered = 2 * layer + sum(p.numel() for p in ends) * _BF16 if gpus > 1 else 0.0
    elif gpus > 1:
        gathered = gradients  # the buckets in which DDP sums gradients up
    if method == "full" and gpus == 1:
        gathered = max((m.weight.numel() for m in linears.values()), default=0) * _BF16  # autocast's 16-bit copies
        gathered += sum(p.numel() for p in layers[0].parameters()) * _BF16
    return {
        "weights": held,
        "gradients": gradients,
        "optimizer": states,
        "activations": _activations(model, layers, rows * tokens, checkpointing),
        "gathered": gathered,
    }


def _sizes(model: nn.Module) -> Counter[str]:
    """Part -> number of parameters."""
    sizes, parts = Counter[str](), parts_of(model)
    for name, parameter in model.named_parameters():
        sizes[part_of(name, parts)] += parameter.numel()
    return sizes


def _activations(model: Any, layers: Sequence[nn.Module], tokens: int, checkpointing: bool) -> float:
    """What backward needs, in 16 bit: with checkpointing the input of each layer and all of one of them.

    A layer keeps the inputs and outputs of its linear layers and norms (attention by SDPA or FlashAttention keeps no
    scores). The head works in tiles, as TRL's does: only its hidden states and their gradient count.
    """
    hidden: int = model.config.get_text_config().hidden_size
    linears = [m for m in layers[0].modules() if isinstance(m, nn.Linear)]
    inside = sum(m.in_features + m.out_features for m in linears) + 4 * hidden
    kept = len(layers) * hidden + inside if checkpointing else len(layers) * inside
    return 2.0 * tokens * (kept + 2 * hidden)


def table() -> str:
    """The table of docs/scaling.md: GiB on each GPU, 4 rows of 2,048 tokens at a time on each."""
    ways: dict[str, tuple[Method, int, Strategy]] = {
        "QLoRA, 1 GPU": ("qlora", 1, "ddp"),
        "QLoRA, 8 FSDP2": ("qlora", 8, "fsdp2"),
        "LoRA, 1 GPU": ("lora", 1, "ddp"),
        "LoRA, 8 FSDP2": ("lora", 8, "fsdp2"),
        "full, 1 GPU": ("full", 1, "ddp"),
        "full, 8 DDP": ("full", 8, "ddp"),
        "full, 8 FSDP2 or ZeRO-3": ("full", 8, "fsdp2"),
    }
    lines = [f"| model | parameters | {' | '.join(ways)} |", "|---" * (len(ways) + 2) + "|"]
    for name, (tied, *shape) in _PUBLISHED.items():
        text: dict[str, Any] = dict(zip([*_SHAPE, "vocab_size"], shape, strict=True)) | {"tie_word_embeddings": tied}
        config: Any = LlavaConfig(text_config={"model_type": "llama", **text})
        if name.startswith("Qwen"):
            vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": text["hidden_size"]}
            config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
        model = on_meta(config)
        found = [sum(estimate(model, method=m, gpus=n, strategy=s).values()) / GIB for m, n, s in ways.values()]
        billions = f"{_sizes(model).total() / 1e9:.2f} B"
        lines.append(f"| {name} | {billions} | {' | '.join(f'{value:,.1f}' for value in found)} |")
    return "\n".join(lines)


def report(model_name_or_path: str, *, gpu_memory: float | None, gpus: int, **options: Any) -> tuple[str, bool]:
    """The estimate for the model of this name as text, and whether it fits a GPU of so many GiB (None: this one).

    `options` are those of `estimate`.
    """
    model = on_meta(AutoConfig.from_pretrained(model_name_or_path))
    found = estimate(model, gpus=gpus, **options)
    if gpu_memory is None:
        gpu_memory = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 80.0
    total = sum(found.values())
    fits = total <= 0.9 * gpu_memory * GIB
    sizes = ", ".join(f"{part} {size:,}" for part, size in _sizes(model).items())
    lines = [f"{name:12}{value / GIB:9.2f} GiB" for name, value in (found | {"total": total}).items()]
    verdict = f"{'fits' if fits else 'does not fit'} on {gpus} x {gpu_memory:g} GiB (a tenth kept free)"
    return "\n".join([f"parameters  {sizes}", *lines, verdict]), fits
