"""Thin, checked building blocks for fine-tuning vision-language models on TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlm_sft.chat.audit import audit
from vlm_sft.chat.collator import IGNORE_INDEX, ChatCollator
from vlm_sft.chat.packing import enable_padding_free, pack
from vlm_sft.chat.template import ChatTemplate
from vlm_sft.data.check_rows import check_rows, rows_checked
from vlm_sft.data.datasets import load_conversations
from vlm_sft.distributed import print_main
from vlm_sft.evaluation.callback import evaluate_answers
from vlm_sft.evaluation.generate import generate, split_reference
from vlm_sft.evaluation.pages import Sample, write_audit_html, write_samples_html
from vlm_sft.models.adapters import check_adapters, lora_config
from vlm_sft.models.freezing import check_precision, check_trainable, freeze, parameter_table, upcast_trainable
from vlm_sft.models.hardware import best_dtype, best_optimizer, best_worker_count, fit_to_hardware
from vlm_sft.models.loading import AutoModelForVision2Seq, load_model, load_processor
from vlm_sft.models.parts import ModelParts
from vlm_sft.models.quantization import check_quantized, fp4_config, int8_config, nf4_config
from vlm_sft.models.towers import keep_frozen_out_of_autograd
from vlm_sft.training.batches import OrderByLength
from vlm_sft.training.checkpoints import SafeCheckpoints, latest_checkpoint
from vlm_sft.training.generation import KeepGeneration
from vlm_sft.training.guards import StopOnNaN, explain_out_of_memory
from vlm_sft.training.manifests import verify_checkpoint
from vlm_sft.training.optim import rates_by_part
from vlm_sft.training.plots import plot_loss
from vlm_sft.training.reports import write_reports, write_run_json

if TYPE_CHECKING:
    from vlm_sft.tools.merging import merge

# Modules that are commands as well: imported here, `python -m` would warn of them.
_IN_COMMANDS = {"merge": "tools.merging"}

__all__ = [
    "IGNORE_INDEX",
    "AutoModelForVision2Seq",
    "ChatCollator",
    "ChatTemplate",
    "KeepGeneration",
    "ModelParts",
    "OrderByLength",
    "SafeCheckpoints",
    "Sample",
    "StopOnNaN",
    "audit",
    "best_dtype",
    "best_optimizer",
    "best_worker_count",
    "check_adapters",
    "check_precision",
    "check_quantized",
    "check_rows",
    "check_trainable",
    "enable_padding_free",
    "evaluate_answers",
    "explain_out_of_memory",
    "fit_to_hardware",
    "fp4_config",
    "freeze",
    "generate",
    "int8_config",
    "keep_frozen_out_of_autograd",
    "latest_checkpoint",
    "load_conversations",
    "load_model",
    "load_processor",
    "lora_config",
    "merge",
    "nf4_config",
    "pack",
    "parameter_table",
    "plot_loss",
    "print_main",
    "rates_by_part",
    "rows_checked",
    "split_reference",
    "upcast_trainable",
    "verify_checkpoint",
    "write_audit_html",
    "write_reports",
    "write_run_json",
    "write_samples_html",
]


def __getattr__(name: str) -> Any:
    if name in _IN_COMMANDS:
        return getattr(import_module(f"vlm_sft.{_IN_COMMANDS[name]}"), name)
    raise AttributeError(f"module 'vlm_sft' has no attribute {name!r}")
