"""The tables of docs/scaling.md: what methods take on 1 and 8 GPUs, and which recipe runs on how much.

    python benchmarks/memory.py

By `vlm_sft.tools.memory` alone, from the published shapes of the models; nothing is downloaded, nothing measured.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import LlavaConfig

from vlm_sft.common import on_meta
from vlm_sft.tools.memory import GIB, estimate

# Of the language model: width, layers, inner width, heads, key-value heads, width of a head, words, tied head; of the
# tower: width, layers, inner width, pixels of an edge, and of a patch.
SHAPES: dict[str, tuple[tuple[Any, ...], tuple[int, ...]]] = {
    "Qwen2-VL-2B": ((1536, 28, 8960, 12, 2, 128, 151936, True), (1280, 32, 5120, 896, 14)),
    "LLaVA-1.5-7B": ((4096, 32, 11008, 32, 32, 128, 32064, False), (1024, 24, 4096, 336, 14)),
    "LLaVA-1.5-13B": ((5120, 40, 13824, 40, 40, 128, 32064, False), (1024, 24, 4096, 336, 14)),
    "Qwen2-VL-72B": ((8192, 80, 29568, 64, 8, 128, 152064, False), (1280, 32, 5120, 896, 14)),
    "LLaVA-v1.6-Mistral-7B": ((4096, 32, 14336, 32, 8, 128, 32064, False), (1024, 24, 4096, 336, 14)),
    "Qwen2.5-VL-7B": ((3584, 28, 18944, 28, 4, 128, 152064, False), (1280, 32, 3420, 896, 14)),
    "Qwen2.5-VL-3B": ((2048, 36, 11008, 16, 2, 128, 151936, True), (1280, 32, 3420, 896, 14)),
    "SmolVLM2-2.2B": ((2048, 24, 8192, 32, 32, 64, 49280, False), (1152, 27, 4304, 384, 14)),
    "InternVL3-8B": ((3584, 28, 18944, 28, 4, 128, 151674, False), (1024, 24, 4096, 448, 14)),
}
WAYS: dict[str, dict[str, Any]] = {
    "QLoRA, 1 GPU": {"method": "qlora"},
    "QLoRA, 8 FSDP2": {"method": "qlora", "gpus": 8, "strategy": "fsdp2"},
    "LoRA, 1 GPU": {"method": "lora"},
    "LoRA, 8 FSDP2": {"method": "lora", "gpus": 8, "strategy": "fsdp2"},
    "full, 1 GPU": {"method": "full"},
    "full, 8 DDP": {"method": "full", "gpus": 8},
    "full, 8 FSDP2 or ZeRO-3": {"method": "full", "gpus": 8, "strategy": "fsdp2"},
}
# Recipe -> its model, and what differs from the defaults, which are read from the recipe. Not here: Qwen3.5's linear
# attention and Gemma 4's embeddings of each layer, which the estimate does not know.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llava15_sft": ("LLaVA-1.5-7B", {}),
    "llava_pretrain": ("LLaVA-1.5-7B", {"tokens": 704}),  # a caption of 128 tokens at most after its image
    "llava_finetune_full": ("LLaVA-1.5-7B", {"gpus": 8, "strategy": "fsdp2"}),
    "llava_next_sft": ("LLaVA-v1.6-Mistral-7B", {}),
    "qwen2_5_vl_sft": ("Qwen2.5-VL-7B", {}),
    "smolvlm_sft": ("SmolVLM2-2.2B", {}),
    "internvl_sft": ("InternVL3-8B", {}),
    "table_to_markdown_sft": ("Qwen2.5-VL-3B", {}),
}
FOLDER = Path(__file__).parents[1] / "recipes"
CARDS = (8, 12, 16, 24, 40, 80)


def model(name: str) -> Any:
    language, tower = SHAPES[name]
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    more = ("num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings")
    text = dict(zip((*names, *more), language, strict=True))
    vision = dict(zip((*names[:3], "image_size", "patch_size"), tower, strict=True))
    heads = {"num_attention_heads": 16, "model_type": "clip_vision_model"}
    return on_meta(LlavaConfig(text_config={"model_type": "llama", **text}, vision_config={**vision, **heads}))


def methods() -> str:
    """GiB on each GPU, four rows of 2,048 tokens at a time on each."""
    lines = [f"| model | parameters | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 2) + "|"]
    for name in [*SHAPES][:4]:
        made = model(name)
        peaks = [estimate(made, **way)["peak"] / GIB for way in WAYS.values()]
        billions = sum(weight.numel() for weight in made.parameters()) / 1e9
        lines.append(f"| {name} | {billions:.2f} B | {' | '.join(f'{peak:,.1f}' for peak in peaks)} |")
    return "\n".join(lines)


def defaults_of(recipe: str) -> tuple[dict[str, Any], set[str]]:
    """The keywords of `estimate` that say what this recipe does by default, and the flags it has."""
    spec: Any = importlib.util.spec_from_file_location(recipe, FOLDER / f"{recipe}.py")
    module = sys.modules[recipe] = importlib.util.module_from_spec(spec)  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    given = {f.name: f.default for kind in (module.RecipeArguments, module.RecipeConfig) for f in fields(kind)}
    found = {"rows": given["per_device_train_batch_size"], "tokens": given["max_length"]}
    if "full" in module.TRAINS.values():
        return {**found, "method": "full" if "language" in module.TRAINS else "projector"}, set(given)
    adapters = {"lora_dropout": 0.05}  # lora_config's
    adapters |= {name: given[name] for name in ("lora_r", "lora_dropout", "use_dora") if name in given}
    return {**found, **adapters, "method": "qlora" if given.get("load_in_4bit") else "lora"}, set(given)


def cards() -> str:
    """For each recipe its estimate at its defaults, and what to set so that it fits a card: `b`, the rows of
    --per_device_train_batch_size."""
    lines = [f"| recipe | its defaults, GiB | {' | '.join(f'{size} GB' for size in CARDS)} |"]
    lines.append("|---" * (len(CARDS) + 2) + "|")
    for name, (of, other) in RECIPES.items():
        (defaults, has), made, peaks = defaults_of(name), model(of), {}
        defaults |= other
        for flags, changed in changes(defaults, has):
            peaks[flags] = estimate(made, **{**defaults, **changed})["peak"] / GIB
        cells = [next((flags for flags, peak in peaks.items() if peak <= 0.9 * size), "no") for size in CARDS]
        lines.append(f"| {name} | {peaks['as it is']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def changes(defaults: dict[str, Any], has: set[str]) -> list[tuple[str, dict[str, Any]]]:
    """Flags and settings, the one that changes least first: smaller batches, then plain LoRA (`--no_use_dora`), a 4-bit
    base (`--load_in_4bit`), and rows half as long (`--max_length`)."""
    tried: list[tuple[str, dict[str, Any]]] = [("as it is", {})]
    rows, last = defaults["rows"], {"rows": 1}
    while rows > 1:
        rows //= 2
        tried.append((f"b {rows}", {"rows": rows}))
    for said, differs in (("LoRA", {"use_dora": False}), ("4 bit", {"method": "qlora"})):
        needed = defaults.get("use_dora") if said == "LoRA" else "load_in_4bit" in has and defaults["method"] == "lora"
        if needed:
            tried.append((f"{tried[-1][0]}, {said}", last := {**last, **differs}))
    tried.append((f"{tried[-1][0]}, {defaults['tokens'] // 2:,} tokens", {**last, "tokens": defaults["tokens"] // 2}))
    return tried


if __name__ == "__main__":
    print(methods(), cards(), sep="\n\n")
