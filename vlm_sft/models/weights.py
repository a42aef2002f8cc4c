"""Weights read into their model, and an adapter's onto its base: all of them, and of this very model."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from vlm_sft.models.fingerprints import read_training_base, training_base, weight_differences
from vlm_sft.models.hardware import keep_packing
from vlm_sft.models.parts import listed
from vlm_sft.models.sharding import fit_to_shards

ADAPTER_WEIGHTS = "adapter_model.safetensors"

# Their image tokens see each other in both directions. FlashAttention takes no such mask and transformers 5.23 drops
# it without a word (masking_utils.flash_attention_mask).
_NOT_FOR_FLASH_ATTENTION = ("gemma3",)


def read_model(
    name: str,
    *,
    revision: str | None = None,
    quantization_config: Any = None,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    ignore_keys: Sequence[str] = (),
) -> Any:
    """A vision-language model, options as `from_pretrained` takes them; `attn_implementation="auto"` as `load_model`.

    Raises ValueError for a text-only model, weights that are no safetensors, missing, left over or of another shape
    (unless a pattern of `ignore_keys` is found in the name), and an attention that the model cannot run.
    """
    shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    at = place(name, revision)
    try:
        config = AutoConfig.from_pretrained(name, **shared)
    except OSError as error:
        raise ValueError(f"No model in {at}: {first_line(error)}. Give its folder or Hub name.") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not trust_remote_code:
        raise ValueError(
            f"{at} is a {config.model_type!r} model, which takes no images; give a vision-language model such as "
            "llava-hf/llava-1.5-7b-hf."
        )
    if attn_implementation == "flash_attention_2" and config.model_type in _NOT_FOR_FLASH_ATTENTION:
        raise ValueError(
            f"attn_implementation='flash_attention_2': in {config.model_type} the tokens of an image see each other in "
            "both directions, and FlashAttention would hide half of them; use 'sdpa'."
        )
    from_pretrained: Any = AutoModelForImageTextToText.from_pretrained
    try:
        model, info = from_pretrained(
            name,
            dtype=dtype,
            quantization_config=quantization_config,
            device_map=device_map or _device_map(quantization_config or getattr(config, "quantization_config", None)),
            attn_implementation=None if attn_implementation == "auto" else attn_implementation,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
            **shared,
        )
    except OSError as error:
        raise ValueError(
            f"No safetensors in {at}: {first_line(error)}. Other formats can run code when they are read; save the "
            "model anew with save_pretrained."
        ) from error
    unfit = {
        kind: [str(key) for key in keys if not any(re.search(pattern, str(key)) for pattern in ignore_keys)]
        for kind, keys in info.items()
    }
    if any(unfit.values()):
        faults = "; ".join(f"{len(keys)} {kind} ({listed(keys)})" for kind, keys in unfit.items() if keys)
        raise ValueError(
            f"The weights in {at} do not fit {type(model).__name__}: {faults}. Give the checkpoint of this very model, "
            "or name in ignore_keys what may differ."
        )
    if attn_implementation == "auto" and _flash_attention_runs(model):
        with contextlib.suppress(ValueError):  # this model has no FlashAttention
            model.set_attn_implementation("flash_attention_2")
    # Where transformers kept the commit until it stopped to (5.23); never written to config.json.
    model.config._commit_hash = getattr(revision, "resolved", revision)
    keep_packing(model)
    fit_to_shards(model)
    return model


def read_adapted(
    name: str,
    *,
    revision: str | None = None,
    base_model: str | Path | None = None,
    quantization_config: BitsAndBytesConfig | str | None = "auto",
    dequantize: bool = False,
    dtype: torch.dtype | str = "auto",
    is_trainable: bool = False,
    **options: Any,
) -> PeftModel:
    """The adapter of this folder or Hub name on its base; further options are those of `read_model`.

    `quantization_config` and `dtype` are "auto" for what `training_base.json` records; `dequantize` puts the base
    back into 16 bit, with the values that training saw.

    Raises ValueError for a base that is missing, another one or does not load, and for weights of the adapter that are
    no safetensors, missing or left over.
    """
    folder = name if Path(name).is_dir() else snapshot_download(name, revision=revision)
    adapter = PeftConfig.from_pretrained(folder)
    if not Path(folder, ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{folder!r} holds an adapter_config.json but no {ADAPTER_WEIGHTS}; save the adapter again.")
    trained_on = read_training_base(Path(folder)) or {}
    named = base_model or adapter.base_model_name_or_path
    if quantization_config == "auto":
        recorded = trained_on.get("quantization_config")
        quantization_config = BitsAndBytesConfig(**recorded) if recorded else None  # type: ignore[no-untyped-call]
    try:
        base = read_model(
            existing(named),
            revision=None if base_model else adapter.revision or trained_on.get("revision"),
            quantization_config=quantization_config,
            dtype=trained_on.get("dtype", "auto") if dtype == "auto" else dtype,
            **options,
        )
    except ValueError as error:
        raise ValueError(
            f"The adapter in {name!r} was trained on {adapter.base_model_name_or_path!r}, which did not load from "
            f"{named!r}: {error} Pass base_model= the folder or Hub name of that base."
        ) from error
    _check_base(base, folder, trained_on)
    if dequantize:
        base = base.dequantize(dtype=base.dtype)
    if Path(folder, "generation_config.json").is_file():
        base.generation_config = GenerationConfig.from_pretrained(folder)
    return _put_on(base, folder, is_trainable)


def existing(name_or_path: str | Path | None) -> str:
    """The folder or Hub name as given; ValueError where it can be neither."""
    name = str(name_or_path)
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"No folder {name!r} (from {Path.cwd()}), and no Hub name is written so.")
    return name


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def place(name: str, revision: str | None) -> str:
    """The name for an error, and what it was taken for: a slip in a folder's name makes a Hub name of it."""
    if Path(name).is_dir():
        return repr(name)
    return f"{name!r} (no such folder, so taken for a Hub name; revision {revision or 'main'})"


def _check_base(base: Any, folder: str, trained_on: Mapping[str, Any]) -> None:
    """Raises ValueError for another base than the recorded one."""
    if other := weight_differences(trained_on.get("weights", {}), training_base(base)["weights"]):
        raise ValueError(
            f"{base.name_or_path!r} is not the base that the adapter in {folder!r} was trained on; {len(other)} of "
            f"{len(trained_on['weights'])} weights differ: {'; '.join(other[:3])}. Pass base_model= the right one."
        )


def _put_on(base: Any, folder: str, is_trainable: bool) -> PeftModel:
    """The adapter on its base, every weight of it in its place."""
    try:
        model = PeftModel.from_pretrained(base, folder, is_trainable=is_trainable)
    except RuntimeError as error:
        some = "\n".join(str(error).splitlines()[:3])
        raise ValueError(f"The adapter in {folder!r} does not fit {base.name_or_path!r}: {some}") from error
    with safe_open(Path(folder, ADAPTER_WEIGHTS), framework="pt") as file:
        saved = set(file.keys())
    needed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if saved != needed:
        raise ValueError(
            f"The adapter in {folder!r} does not fit {base.name_or_path!r}: {len(needed - saved)} weights are missing "
            f"({listed(needed - saved)}) and {len(saved - needed)} left over ({listed(saved - needed)})."
        )
    return model


def _device_map(quantization_config: Any) -> dict[str, int] | None:
    """The GPU of this process for a quantized model, which must not move later; None leaves placing to the Trainer."""
    if quantization_config is None or not torch.cuda.is_available():
        return None
    return {"": int(os.environ.get("LOCAL_RANK", 0))}


def _flash_attention_runs(model: PreTrainedModel) -> bool:
    return (
        is_flash_attn_2_available()
        and torch.cuda.get_device_capability() >= (8, 0)
        and model.dtype in (torch.float16, torch.bfloat16)
        and model.config.model_type not in _NOT_FOR_FLASH_ATTENTION
    )
