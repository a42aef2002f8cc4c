"""Thin, checked building blocks for fine-tuning vision-language models on TRL's SFTTrainer."""

import gc

_collecting = gc.isenabled()
gc.disable()  # what imports make stays: to look for garbage in it takes a seventh of their time
try:
    from vlm_sft.chat.boxes import scale_boxes
    from vlm_sft.chat.collator import IGNORE_INDEX, ChatCollator
    from vlm_sft.chat.packing import enable_padding_free, pack
    from vlm_sft.chat.template import ChatTemplate
    from vlm_sft.command_line import run
    from vlm_sft.data.check_rows import check_rows
    from vlm_sft.data.datasets import load_conversations
    from vlm_sft.evaluation.callback import evaluate_answers
    from vlm_sft.evaluation.generate import generate, split_reference
    from vlm_sft.evaluation.pages import Sample, write_samples_html
    from vlm_sft.models.adapters import lora_config
    from vlm_sft.models.hardware import best_dtype
    from vlm_sft.models.loading import AutoModelForVision2Seq, load_model, load_processor
    from vlm_sft.models.parts import register_parts
    from vlm_sft.models.quantization import nf4_config
    from vlm_sft.proof import finish, guards, prove
    from vlm_sft.tools.merging import merge
    from vlm_sft.training.checkpoints import latest_checkpoint
    from vlm_sft.training.config import Arguments, DataArguments, ReadingArguments, RecipeDefaults
    from vlm_sft.training.optim import lr_by_part
finally:
    gc.freeze()
    gc.unfreeze()  # into the oldest generation, which is seldom gone through
    if _collecting:
        gc.enable()

__all__ = [
    "IGNORE_INDEX",
    "Arguments",
    "AutoModelForVision2Seq",
    "ChatCollator",
    "ChatTemplate",
    "DataArguments",
    "ReadingArguments",
    "RecipeDefaults",
    "Sample",
    "best_dtype",
    "check_rows",
    "enable_padding_free",
    "evaluate_answers",
    "finish",
    "generate",
    "guards",
    "latest_checkpoint",
    "load_conversations",
    "load_model",
    "load_processor",
    "lora_config",
    "lr_by_part",
    "merge",
    "nf4_config",
    "pack",
    "prove",
    "register_parts",
    "run",
    "scale_boxes",
    "split_reference",
    "write_samples_html",
]
