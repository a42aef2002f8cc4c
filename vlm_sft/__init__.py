"""Thin, checked building blocks for fine-tuning vision-language models on TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlm_sft.adapters import check_adapters, lora_config
from vlm_sft.answers import generate, question_of
from vlm_sft.batches import OrderByLength
from vlm_sft.checkpoints import SafeCheckpoints, latest_checkpoint
from vlm_sft.collators import ChatCollator
from vlm_sft.datasets import load_conversations, mix
from vlm_sft.evaluation import GenerationEvaluation
from vlm_sft.families import ModelParts
from vlm_sft.features import FeatureCache
from vlm_sft.freezing import check_precision, check_trainable, freeze, parameter_table, upcast_trainable
from vlm_sft.generation import KeepGeneration
from vlm_sft.guards import StopOnNaN, explain_out_of_memory
from vlm_sft.hardware import best_dtype, best_optimizer, best_worker_count, fit_to_hardware
from vlm_sft.labels import IGNORE_INDEX
from vlm_sft.lengths import with_lengths
from vlm_sft.loading import AutoModelForVision2Seq, load_model, load_processor
from vlm_sft.manifests import verify_checkpoint
from vlm_sft.optim import rates_by_part
from vlm_sft.packing import CheckFlatRows, accept_flat_rows, pack
from vlm_sft.plots import plot_loss
from vlm_sft.quantization import check_quantized, fp4_config, int8_config, nf4_config
from vlm_sft.ranks import say
from vlm_sft.reports import write_reports, write_run_json
from vlm_sft.samples import Sample, write_samples_html
from vlm_sft.towers import keep_frozen_out_of_autograd

if TYPE_CHECKING:
    from vlm_sft.merging import merge
    from vlm_sft.scan import sound_rows

# Modules that are commands as well: imported here, `python -m` would warn of them.
_IN_COMMANDS = {"merge": "merging", "sound_rows": "scan"}

__all__ = [
    "IGNORE_INDEX",
    "AutoModelForVision2Seq",
    "ChatCollator",
    "CheckFlatRows",
    "FeatureCache",
    "GenerationEvaluation",
    "KeepGeneration",
    "ModelParts",
    "OrderByLength",
    "SafeCheckpoints",
    "Sample",
    "StopOnNaN",
    "accept_flat_rows",
    "best_dtype",
    "best_optimizer",
    "best_worker_count",
    "check_adapters",
    "check_precision",
    "check_quantized",
    "check_trainable",
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
    "mix",
    "nf4_config",
    "pack",
    "parameter_table",
    "plot_loss",
    "question_of",
    "rates_by_part",
    "say",
    "sound_rows",
    "upcast_trainable",
    "verify_checkpoint",
    "with_lengths",
    "write_reports",
    "write_run_json",
    "write_samples_html",
]


def __getattr__(name: str) -> Any:
    if name in _IN_COMMANDS:
        return getattr(import_module(f"vlm_sft.{_IN_COMMANDS[name]}"), name)
    raise AttributeError(f"module 'vlm_sft' has no attribute {name!r}")
