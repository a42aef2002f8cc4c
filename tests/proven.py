"""The pieces of a small run, made as recipes make them, so that a test can change one and see what `prove` says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe_data import chats
from trl import SFTTrainer

import vlm_sft
from vlm_sft.evaluation.metrics import anls, cer

TRAINS = {"language": "lora"}
METRICS = {"anls": anls, "cer": cer}


@dataclass
class RecipeArguments(vlm_sft.Arguments):
    lora_r: int = field(default=4)


@dataclass
class RecipeConfig(vlm_sft.RecipeDefaults):
    max_length: int | None = 512
    max_steps: int = 4
    per_device_train_batch_size: int = 2
    train_sampling_strategy: str = "group_by_length"
    learning_rate: float = 0.01
    eval_steps: float | None = 2
    logging_steps: float = 1
    load_best_model_at_end: bool = True
    dataloader_num_workers: int = 0
    disable_tqdm: bool | None = True


@dataclass
class Pieces:
    """What a recipe's `main` has in its hands before it calls `prove`."""

    model: Any
    processor: Any
    data: Any
    collator: Any
    args: RecipeArguments
    trainer: Any

    def prove(self, trains: Any = None, **options: Any) -> Any:
        return vlm_sft.prove(self.trainer, TRAINS if trains is None else trains, self.args, **options)


def pieces(
    base: Path,
    folder: Path,
    *,
    data: Any = None,
    trains: Any = None,
    answers: bool = True,
    checked: bool = True,
    on_bad_rows: str = "error",
    load: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    collator: dict[str, Any] | None = None,
    given: dict[str, Any] | None = None,
    config: type[RecipeConfig] = RecipeConfig,
    **settings: Any,
) -> Pieces:
    """Pieces on the twin `base`, writing to `folder`. `given` replaces or (by None) leaves out what SFTTrainer gets."""
    processor, args = vlm_sft.load_processor(base), RecipeArguments()
    model = vlm_sft.load_model(base, **(load or {}))
    training_args = config(output_dir=str(folder / "output"), **settings)
    peft_config = vlm_sft.lora_config(model, TRAINS if trains is None else trains, r=args.lora_r, **(lora or {}))
    made = vlm_sft.ChatCollator(processor, **{"max_length": training_args.max_length, **(collator or {})})
    if data is None:
        data = vlm_sft.load_conversations(chats(folder / "rows"))
    if checked:
        data = vlm_sft.check_rows(data, made, on_bad_rows=on_bad_rows)
    options = {
        "model": model,
        "args": training_args,
        "train_dataset": data["train"],
        "eval_dataset": data.get("test"),
        "processing_class": processor,
        "data_collator": made,
        "peft_config": peft_config,
        "callbacks": vlm_sft.guards(model),
    }
    options |= given or {}
    trainer = SFTTrainer(**{name: value for name, value in options.items() if value is not None})
    if answers:
        vlm_sft.evaluate_answers(trainer, data["test"], METRICS, max_new_tokens=4)
    return Pieces(model, processor, data, made, args, trainer)
