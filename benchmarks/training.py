"""One training run of each path, over the same rows: TRL's own, the 2024 note's, and a recipe's.

`run(path, ...)` sets up the path the way its users do and trains for whole epochs; what it measures is in `Run`. On a
GPU where there is one, in bfloat16.

- `"trl"`: as `examples/scripts/sft_vlm.py` of TRL 1.16, with SFTTrainer's default collator.
- `"note"`: the same with the collate function that notebooks of 2024 pass round, images flattened so that it takes
  rows with several pictures or none.
- `"recipe"`: as the recipes: lengths, grouped batches, `ChatCollator`, data workers, a frozen tower out of autograd.
- `"drawn"`, `"in autograd"`, `"all scored"`: the recipe with rows in a drawn order; with the tower in autograd besides;
  and with TRL's head over all positions besides. What is left between that and TRL are data workers and collation.
- `"packed"`: the recipe with packs of whole conversations in rows without padding.

All have the same LoRA adapters on the language model, optimizer, seed, and rows (or tokens) of a batch.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

import vlm_sft
from vlm_sft.chat.packing import check_padding_free
from vlm_sft.models.freezing import detach_frozen_tower
from vlm_sft.models.hardware import best_worker_count
from vlm_sft.training.batches import GroupByLength
from vlm_sft.upstream import score_labelled_positions

BATCH = 8
GIVEN_UP = ("recipe", "drawn", "in autograd", "all scored")  # one thing more by each


@dataclass
class Run:
    """Of one run: seconds of each epoch, and from set-up to the end of the first step; tokens, padding included and
    without it, and patches of pictures; MiB by which this process grew, or the peak on the GPU."""

    epochs: list[float] = field(default_factory=list)
    first_step: float = 0.0
    computed: int = 0
    real: int = 0
    patches: int = 0
    peak: int = 0


class Clock(TrainerCallback):
    """Seconds of the epochs and to the first step."""

    def __init__(self, run: Run, start: float) -> None:
        self.run, self.start, self.began = run, start, start

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.run.first_step = time.perf_counter() - self.start

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.epochs.append(time.perf_counter() - self.began)


def note_collate(processor: Any, examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Renders each example, pads them all, and masks padding and image tokens by their ids."""
    texts = [processor.apply_chat_template(example["messages"], tokenize=False) for example in examples]
    images = [image for example in examples for image in example["images"]]
    batch = processor(text=texts, images=images or None, return_tensors="pt", padding=True)
    labels = batch["input_ids"].clone()
    labels[labels == processor.tokenizer.pad_token_id] = -100
    labels[labels == processor.tokenizer.convert_tokens_to_ids(processor.image_token)] = -100
    batch["labels"] = labels
    return batch


def run(path: str, build: Callable[[], tuple[Any, Any]], folder: Path, *, epochs: int = 1) -> Run:
    """One run in this process of the model and processor that `build` makes; `folder` holds the rows
    (`mix.rows(...).save_to_disk`)."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    measured = Run()
    held = resident(anew=True)
    start = time.perf_counter()
    model, processor = build()
    train = recipe_parts if path not in ("trl", "note") else stock_parts
    with tempfile.TemporaryDirectory() as output:
        options, parts = train(path, model, processor, folder, Path(output))
        args = SFTConfig(
            output_dir=output,
            max_length=None,
            num_train_epochs=epochs,
            learning_rate=1e-4,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            activation_checkpointing=True,  # TRL's default, under its new name
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=on_gpu,
            **{"per_device_train_batch_size": BATCH, **options},
        )
        trainer = SFTTrainer(
            model=model,
            args=args,
            processing_class=processor,
            peft_config=vlm_sft.lora_config(model, r=8, lora_dropout=0.0),
            **{**parts, "callbacks": [Clock(measured, start), *parts.get("callbacks", [])]},
        )
        trainer.model.register_forward_pre_hook(Count(measured), with_kwargs=True)
        trainer.train()
    measured.peak = (torch.cuda.max_memory_allocated() if on_gpu else resident() - held) >> 20
    return measured


def resident(*, anew: bool = False) -> int:
    """The most bytes of memory that this process held, since its start or, with `anew`, now. Linux only."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def stock_parts(path: str, model: Any, processor: Any, folder: Path, output: Path) -> tuple[dict[str, Any], Any]:
    parts: dict[str, Any] = {"train_dataset": load_from_disk(str(folder))}
    if path == "trl":
        return {}, parts
    parts["data_collator"] = lambda examples: note_collate(processor, examples)
    return {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}, parts


def recipe_parts(path: str, model: Any, processor: Any, folder: Path, output: Path) -> tuple[dict[str, Any], Any]:
    data = vlm_sft.load_conversations(folder, eval_fraction=0)
    flat = path == "packed"
    given_up = 0 if flat else GIVEN_UP.index(path)
    if given_up < 2:
        detach_frozen_tower(model)  # as load_model does
    score_labelled_positions(given_up < 3)  # as prove does
    collator = vlm_sft.ChatCollator(processor, padding_free=flat, name_rows=False)
    data = vlm_sft.check_rows(data, collator, num_proc=0)
    options = {
        "remove_unused_columns": False,
        "train_sampling_strategy": "group_by_length",
        "dataloader_num_workers": best_worker_count(),
    }
    callbacks: list[Any] = [GroupByLength()]
    if given_up:
        options |= {"train_sampling_strategy": "random"}
        callbacks = []
    if flat:
        vlm_sft.enable_padding_free(model)
        lengths = data["train"].with_format(None)["length"][:]
        budget = max(max(lengths), round(BATCH * sum(lengths) / len(lengths)))
        data["train"] = vlm_sft.pack(data["train"], max_length=budget)
        options |= {"per_device_train_batch_size": 1, "train_sampling_strategy": "random"}
        check_padding_free(model, collator, [data["train"][0]])
        callbacks = []
    return options, {"train_dataset": data["train"], "data_collator": collator, "callbacks": callbacks}


class Count:
    """Tokens and patches that reach the model in training."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training:
            self.run.computed += kwargs["input_ids"].numel()
            mask = kwargs.get("attention_mask")
            self.run.real += int(mask.sum()) if mask is not None else kwargs["input_ids"].numel()
            pixels = kwargs.get("pixel_values")
            if pixels is not None:  # patches [N, D] of Qwen-VL, or pictures [N, 3, H, W]
                patch = 1 if pixels.ndim == 2 else model.config.vision_config.patch_size
                self.run.patches += len(pixels) * (pixels[0, 0].numel() // patch**2 if pixels.ndim == 4 else 1)
