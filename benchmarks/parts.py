"""What single switches cost in one training step: a frozen tower in autograd or out of it, DoRA beside LoRA.

    python benchmarks/parts.py

Two ways take turns on the same batch; medians. Memory is what the graph holds for the backward pass.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import mix
import torch
from peft import get_peft_model

from vlm_sft import ChatCollator, load_model, lora_config
from vlm_sft.models.freezing import detach_frozen_tower
from vlm_sft.tools import tiny


def batch_for(processor: Any, *, rows: int = 8) -> dict[str, torch.Tensor]:
    return ChatCollator(processor)(list(mix.rows(rows)))


def step(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """CPU seconds of forward and backward, of one thread: what else runs on the machine counts little."""
    start = time.process_time()
    model(**batch, use_cache=False).loss.backward()
    model.zero_grad()
    return time.process_time() - start


def held_bytes(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of the tensors that the forward pass saves for the backward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch, use_cache=False).loss
    del loss
    return sum(saved.values())


def compare(ways: dict[str, Any], batch: dict[str, torch.Tensor], *, repeats: int = 7) -> list[list[str]]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for model in ways.values():
        step(model, batch)
    for _ in range(repeats):
        for name, model in ways.items():
            times[name].append(step(model, batch))
    first = statistics.median(next(iter(times.values())))
    table = [["", "step, ms", "x", "held for backward, MiB"]]
    for name, model in ways.items():
        middle = statistics.median(times[name])
        held = f"{held_bytes(model, batch) / 2**20:.1f}"
        table.append([name, f"{middle * 1e3:.0f}", f"{middle / first:.2f}", held])
    return table


def frozen_tower() -> list[list[str]]:
    """Adapters on the language model, with checkpointing and without."""

    def built(checkpointing: bool, change: Callable[[Any], None]) -> Any:
        model, _ = mix.llava("vision-heavy")
        change(model)
        adapted = get_peft_model(model, lora_config(model, r=8, lora_dropout=0.0)).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model.enable_input_require_grads()  # as TRL and the Trainer do
        return adapted

    ways = {
        "tower in autograd": built(False, lambda model: None),
        "tower out of autograd": built(False, detach_frozen_tower),
        "tower in autograd, checkpointing": built(True, lambda model: None),
        "tower out of autograd, checkpointing": built(True, detach_frozen_tower),
    }
    return compare(ways, batch_for(mix.llava("vision-heavy")[1]))


def dora(*, width: int = 768) -> list[list[str]]:
    """On a 4-bit base, as in the recipes, two layers. PEFT 0.21 has a way of its own
    for DoRA without dropout; with it, the base's own product is made a second time."""
    model, processor = tiny.build(
        "llava15", hidden_size=width, corpus=[" ".join(mix.WORDS)], image_size=112, patch_size=14
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)

        def built(use_dora: bool, dropout: float) -> Any:
            base = load_model(folder, load_in_4bit=True)
            adapted = get_peft_model(base, lora_config(base, r=16, lora_dropout=dropout, use_dora=use_dora)).train()
            adapted.activation_checkpointing_enable()
            adapted.enable_input_require_grads()
            return adapted

        ways = {
            f"{'DoRA' if use_dora else 'LoRA'}, dropout {dropout:g}": built(use_dora, dropout)
            for dropout in (0.0, 0.05)
            for use_dora in (False, True)
        }
    return compare(ways, batch_for(processor, rows=4))


def main() -> None:
    torch.set_num_threads(1)
    for table in (frozen_tower(), dora()):
        print("\n".join("  ".join(row) for row in table))


if __name__ == "__main__":
    main()
