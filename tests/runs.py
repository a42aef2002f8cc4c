"""Short training runs of tiny models, for the tests of what surrounds training."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer


def rows(count: int = 8, *, seed: int = 0) -> Dataset:
    """Pictures of noise, each with a question and an answer; `row` numbers them from 100."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    question = [{"type": "image"}, {"type": "text", "text": "How many are there?"}]
    return Dataset.from_list(
        [
            {
                "row": 100 + n,
                "images": [Image.fromarray(noise[n])],
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": [{"type": "text", "text": f"There are {n}."}]},
                ],
            }
            for n in range(count)
        ]
    )


class Collate:
    """Every token but padding is trained on; `rows` go along where the examples have a `row`."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        talks = [
            [
                {"role": turn["role"], "content": [{k: v for k, v in part.items() if v} for part in turn["content"]]}
                for turn in example["messages"]
            ]
            for example in examples
        ]
        texts = [self.processor.apply_chat_template(talk) for talk in talks]
        images = [example["images"] for example in examples]
        batch = dict(self.processor(text=texts, images=images, padding=True, return_tensors="pt"))
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if "row" in examples[0]:
            batch["rows"] = torch.tensor([example["row"] for example in examples])
        return batch


def trainer(base: Path, output_dir: Path, *, callbacks: Sequence[Any], **options: Any) -> SFTTrainer:
    """Four steps of two rows, saved every two; `model`, `dataset`, `collator`, `peft_config` and arguments at will."""
    processor = AutoProcessor.from_pretrained(base)
    model = options.pop("model", None) or AutoModelForImageTextToText.from_pretrained(base)
    dataset, peft_config = options.pop("dataset", None), options.pop("peft_config", None)
    evaluated = options.pop("eval_dataset", None)
    collator = options.pop("collator", None) or Collate(processor)
    settings = {
        "output_dir": str(output_dir),
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_length": None,
        "remove_unused_columns": False,
        "activation_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings | options),
        train_dataset=rows() if dataset is None else dataset,
        eval_dataset=evaluated,
        processing_class=processor,
        data_collator=collator,
        peft_config=peft_config,
        callbacks=list(callbacks),
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def half(path: Any) -> None:
    """The process dies while it writes this file."""
    Path(path).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
