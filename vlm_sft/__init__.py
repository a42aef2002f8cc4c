"""Thin, checked building blocks for fine-tuning vision-language models on TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlm_sft.chat.audit import audit
from vlm_sft.chat.collator import IGNORE_INDEX, ChatCollator
from vlm_sft.chat.packing import enable_padding_free, pack
from vlm_sft.chat.template import ChatTemplate
from vlm_sft.data.datasets import load_conversations, mix
from vlm_sft.data.lengths import with_lengths
from vlm_sft.distributed import print_main
from vlm_sft.evaluation.callback import evaluate_answers
from vlm_sft.evaluation.generate import generate, split_reference
from vlm_sft.evaluation.pages import Sample, write_audit_html, write_samples_html
from vlm_sft.models.adapters import check_adapters, lora_config
from vlm_sft.models.freezing import check_precision, check_trainable, freeze, parameter_table, upcast_trainable
from vlm_sft.models.hardware import best_dtype, best_optimizer, best_worker_count, fit_to_hardware
from vlm_sft.models.loading import AutoModelForVision2Seq, load_model, load_processor
from vlm_sft.models.parts import register_parts
from vlm_sft.models.quantization import check_quantized, nf4_config
from vlm_sft.training.batches import OrderByLength
from vlm_sft.training.checkpoints import SafeCheckpoints, latest_checkpoint
from vlm_sft.training.generation import KeepGeneration
from vlm_sft.training.guards import StopOnNaN, explain_out_of_memory
from vlm_sft.training.manifests import verify_checkpoint
from vlm_sft.training.optim import rates_by_part
from vlm_sft.training.plots import plot_loss
from vlm_sft.training.reports import write_reports, write_run_json

if TYPE_CHECKING:
    from vlm_sft.data.scan import sound_rows

# Modules that are commands as well: imported here, `python -m` would warn of them.
_IN_COMMANDS = {"sound_rows": "data.scan"}

__all__ = [
    "IGNORE_INDEX",
    "AutoModelForVision2Seq",
    "ChatCollator",
    "ChatTemplate",
    "KeepGeneration",
    "OrderByLength",
    "SafeCheckpoints",
    "Sample",
    "StopOnNaN",
    "audit",
    "best_dtype",
    "best_worker_count",
    "cast_trainable_to_fp32",
    "check_precision",
    "check_quantized",
    "check_trainable",
    "enable_padding_free",
    "evaluate_answers",
    "explain_out_of_memory",
    "generate",
    "latest_checkpoint",
    "load_conversations",
    "load_model",
    "load_processor",
    "lora_config",
    "lr_by_part",
    "merge",
    "mix",
    "nf4_config",
    "pack",
    "parameter_table",
    "plot_loss",
    "print_main",
    "rates_by_part",
    "register_parts",
    "set_hardware_defaults",
    "sound_rows",
    "split_reference",
    "upcast_trainable",
    "verify_checkpoint",
    "with_lengths",
    "write_audit_html",
    "write_reports",
    "write_run_json",
    "write_samples_html",
]


def __getattr__(name: str) -> Any:
    if name in _IN_COMMANDS:
        return getattr(import_module(f"vlm_sft.{_IN_COMMANDS[name]}"), name)
    raise AttributeError(f"module 'vlm_sft' has no attribute {name!r}")
