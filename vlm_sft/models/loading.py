"""Processor and model as the recipes want them: precision and attention of this machine, one pinned revision, nothing
missing; and the tower kept out of autograd while it is frozen.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    ProcessorMixin,
)
from transformers.utils.hub import resolve_revision
from transformers.utils.peft_utils import find_adapter_config_file

from vlm_sft.models.hardware import best_dtype
from vlm_sft.models.parts import MODEL_PARTS, ModelParts
from vlm_sft.models.towers import keep_frozen_out_of_autograd
from vlm_sft.models.weights import existing, first_line, place, read_adapted, read_model

AutoModelForVision2Seq = AutoModelForImageTextToText
"""The name that transformers 5 dropped, for code that was written with it."""


def load_processor(name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The processor of a vision-language model, its tokenizer with a pad token.

    A tokenizer without one pads with its unknown token, else with its end token: both are in the embedding already,
    and padding is masked by position, never by id.

    Raises ValueError for a folder that does not exist and for a text-only model, ImportError that names the missing
    package (torchvision for Qwen-VL, SmolVLM, InternVL and LLaVA-OneVision, num2words for SmolVLM).
    """
    name = existing(name_or_path)
    try:
        processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            name, revision=resolve_revision(name, revision), trust_remote_code=trust_remote_code
        )
    except (AttributeError, ImportError) as error:
        missing = [package for package in ("torchvision", "num2words") if importlib.util.find_spec(package) is None]
        if not missing:
            raise
        raise ImportError(
            f"The processor of {name!r} did not load, and {' and '.join(missing)} is not installed: pip install "
            "'vlm_sft[torchvision]' brings it. torchvision must be of torch's own build, CPU or CUDA."
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No processor in {place(name, revision)}: {first_line(error)}. Give the folder or Hub name of a "
            "vision-language model; a text-only model has no image processor."
        ) from error
    if not isinstance(processor, ProcessorMixin) or getattr(processor, "image_processor", None) is None:
        raise ValueError(
            f"{name!r} holds a {type(processor).__name__} and no image processor: a text-only model? Give a "
            "vision-language model such as llava-hf/llava-1.5-7b-hf."
        )
    tokenizer: Any = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return processor


def load_model(
    name_or_path: str | Path,
    *,
    quantization_config: BitsAndBytesConfig | str | None = "auto",
    dtype: torch.dtype | str = "auto",
    attn_implementation: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    base_model: str | Path | None = None,
    is_trainable: bool = False,
    ignore_keys: Sequence[str] = (),
    model_parts: ModelParts | None = None,
) -> Any:
    """A vision-language model, or from an adapter's folder its base with the adapter on it (a PeftModel).

    - `dtype="auto"` is `best_dtype()`, or for an adapter the dtype its base had in training (where nothing
      records it, the base's own).
    - `quantization_config="auto"` is none, or for an adapter the one its base had in training.
    - `attn_implementation="auto"` is FlashAttention 2 where it is installed, the GPU (Ampere or newer) and the model
      take it; else PyTorch's SDPA.
    - A quantized model goes to the GPU of this process (LOCAL_RANK); any other stays on the CPU for the Trainer.
    - `revision` is resolved to its commit once, and recorded in the model's config.
    - `base_model` takes the place of the base that the adapter names; `is_trainable` leaves the adapter trainable.
    - Only safetensors are read. A weight that is missing, left over or of another shape is an error, unless its name
      matches one of the patterns `ignore_keys`.

    A frozen tower stays out of autograd (`keep_frozen_out_of_autograd`), in a known family or with `model_parts`.

    Raises ValueError for a path that does not exist, a text-only model, an adapter whose base is missing or another
    one, weights that do not fit, and an attention that the model cannot run.
    """
    name = existing(name_or_path)
    revision = resolve_revision(name, revision)
    options: dict[str, Any] = {
        "revision": revision,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "ignore_keys": ignore_keys,
    }
    if find_adapter_config_file(name, revision=revision) is None:
        quantization = None if quantization_config == "auto" else quantization_config
        dtype = best_dtype() if dtype == "auto" else dtype
        model = base = read_model(name, quantization_config=quantization, dtype=dtype, **options)
    else:
        model = read_adapted(
            name,
            base_model=base_model,
            quantization_config=quantization_config,
            dtype=dtype,
            is_trainable=is_trainable,
            **options,
        )
        base = model.get_base_model()
    if model_parts or base.config.model_type in MODEL_PARTS:
        keep_frozen_out_of_autograd(base, model_parts=model_parts)
    return model
