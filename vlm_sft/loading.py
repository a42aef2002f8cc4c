"""Processor and model as the recipes want them: precision and attention of this machine, one pinned revision, nothing
missing; and the tower kept out of autograd while it is frozen.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils.hub import resolve_revision
from transformers.utils.import_utils import is_flash_attn_2_available
from transformers.utils.peft_utils import find_adapter_config_file

from vlm_sft.families import MODEL_PARTS, ModelParts, part_of, parts_of
from vlm_sft.hardware import best_dtype, keep_packing
from vlm_sft.provenance import differences, read_training_base, training_base

AutoModelForVision2Seq = AutoModelForImageTextToText
"""The name that transformers 5 dropped, for code that was written with it."""

# Their image tokens see each other in both directions. FlashAttention takes no such mask and transformers 5.23 drops
# it without a word (masking_utils.flash_attention_mask).
_NOT_FOR_FLASH_ATTENTION = ("gemma3",)


def load_processor(name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The processor of a vision-language model, its tokenizer with a pad token.

    A tokenizer without one pads with its unknown token, else with its end token: both are in the embedding already,
    and padding is masked by position, never by id.

    Raises ValueError for a folder that does not exist and for a text-only model, ImportError that names the missing
    package (torchvision for Qwen-VL, SmolVLM, InternVL and LLaVA-OneVision, num2words for SmolVLM).
    """
    name = _existing(name_or_path)
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
            f"No processor in {name!r} (revision {revision or 'main'}): {_first_line(error)}. Give the folder or Hub "
            "name of a vision-language model; a text-only model has no image processor."
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

    - `dtype="auto"` is `best_dtype()`, or for an adapter the dtype its base had in training.
    - `quantization_config="auto"` is none, or for an adapter the one its base had in training.
    - `attn_implementation="auto"` is FlashAttention 2 where it is installed, the GPU (Ampere or newer) and the model
      take it; else PyTorch's SDPA.
    - A quantized model goes to the GPU of this process (LOCAL_RANK); any other stays on the CPU for the Trainer.
    - `revision` is resolved to its commit once, and recorded in the model's config.
    - `base_model` takes the place of the base that the adapter names; `is_trainable` leaves the adapter trainable.
    - Only safetensors are read. A weight that is missing, left over or of another shape is an error, unless its name
      matches one of the patterns `ignore_keys`.

    A frozen tower stays out of autograd (`keep_frozen_out_of_autograd`).

    Raises ValueError for a path that does not exist, a text-only model, an adapter whose base is missing or another
    one, weights that do not fit, and an attention that the model cannot run.
    """
    name = _existing(name_or_path)
    revision = resolve_revision(name, revision)
    options: dict[str, Any] = {
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "ignore_keys": ignore_keys,
        "model_parts": model_parts,
    }
    if find_adapter_config_file(name, revision=revision) is None:
        quantization = None if quantization_config == "auto" else quantization_config
        return _load_base(name, revision, quantization, dtype, **options)

    folder = name if Path(name).is_dir() else snapshot_download(name, revision=revision)
    adapter = PeftConfig.from_pretrained(folder)
    trained_on = read_training_base(Path(folder)) or {}
    named = base_model or adapter.base_model_name_or_path
    if quantization_config == "auto":
        recorded = trained_on.get("quantization_config")
        quantization_config = BitsAndBytesConfig(**recorded) if recorded else None  # type: ignore[no-untyped-call]
    if dtype == "auto":
        dtype = trained_on.get("dtype", "auto")
    pinned = None if base_model else adapter.revision or trained_on.get("revision")
    try:
        base = _load_base(_existing(named), pinned, quantization_config, dtype, **options)
    except ValueError as error:
        raise ValueError(
            f"The adapter in {name!r} was trained on {adapter.base_model_name_or_path!r}, which did not load from "
            f"{named!r}: {error} Pass base_model= the folder or Hub name of that base."
        ) from error
    return _with_adapter(base, folder, trained_on, is_trainable)


def keep_frozen_out_of_autograd(model: PreTrainedModel, *, model_parts: ModelParts | None = None) -> None:
    """Leaves a tower without trainable parameters out of the graph, and so out of gradient checkpointing's recompute.

    With checkpointing, TRL and the Trainer (again, at the start of `train()`) call `enable_input_require_grads()`,
    which marks the tower's patch embeddings as well: a frozen tower is then recomputed and back-propagated for
    nothing (transformers 5.23). This model's own method now marks the language model's embeddings only, as long as no
    tower parameter trains at the time of the call. Gradients are the same. `load_model` does this to each model.
    """
    parts = parts_of(model, model_parts=model_parts)
    # Bound to this instance, and in a way that a deep copy of the model binds to the copy.
    enable = MethodType(partial(_mark_embeddings, parts=parts), model)
    disable = MethodType(partial(_unmark_embeddings, parts=parts), model)
    model.enable_input_require_grads, model.disable_input_require_grads = enable, disable  # type: ignore[method-assign]


def _mark_embeddings(model: Any, *, parts: ModelParts) -> None:
    _unmark_embeddings(model, parts=parts)
    if any(weight.requires_grad and part_of(name, parts) == "vision" for name, weight in model.named_parameters()):
        type(model).enable_input_require_grads(model)
    else:
        for path in parts.language:
            model.get_submodule(path).enable_input_require_grads()


def _unmark_embeddings(model: Any, *, parts: ModelParts) -> None:
    type(model).disable_input_require_grads(model)
    for path in parts.language:
        model.get_submodule(path).disable_input_require_grads()


def _load_base(
    name: str,
    revision: str | None,
    quantization_config: Any,
    dtype: torch.dtype | str,
    *,
    attn_implementation: str,
    trust_remote_code: bool,
    ignore_keys: Sequence[str],
    model_parts: ModelParts | None,
) -> Any:
    dtype = best_dtype() if dtype == "auto" else dtype
    shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    at = f"{name!r} (revision {revision or 'main'})"
    try:
        config = AutoConfig.from_pretrained(name, **shared)
    except OSError as error:
        raise ValueError(f"No model in {at}: {_first_line(error)}. Give its folder or Hub name.") from error
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
            device_map=_device_map(quantization_config or getattr(config, "quantization_config", None)),
            attn_implementation=None if attn_implementation == "auto" else attn_implementation,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
            **shared,
        )
    except OSError as error:
        raise ValueError(
            f"No safetensors in {at}: {_first_line(error)}. Other formats can run code when they are read; save the "
            "model anew with save_pretrained."
        ) from error
    unfit = {
        kind: sorted(str(key) for key in keys if not any(re.search(pattern, str(key)) for pattern in ignore_keys))
        for kind, keys in info.items()
    }
    if any(unfit.values()):
        listed = "; ".join(f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in unfit.items() if keys)
        raise ValueError(
            f"The weights in {at} do not fit {type(model).__name__}: {listed}. Give the checkpoint of this very model, "
            "or name in ignore_keys what may differ."
        )
    if attn_implementation == "auto" and _flash_attention_runs(dtype, config):
        with contextlib.suppress(ValueError):  # this model has no FlashAttention
            model.set_attn_implementation("flash_attention_2")
    # Where transformers kept the commit until it stopped to (5.23); never written to config.json.
    model.config._commit_hash = getattr(revision, "resolved", revision)
    if model_parts or config.model_type in MODEL_PARTS:
        keep_frozen_out_of_autograd(model, model_parts=model_parts)
    keep_packing(model)
    _name_own_layers(model)
    return model


def _name_own_layers(model: PreTrainedModel) -> None:
    """accelerate 1.15 shards by the layers a model names, and refuses names of CLIP's and SigLIP's text parts, which
    no vision-language model has."""
    own = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = {name for name in model._no_split_modules or () if name in own}


def _with_adapter(base: Any, folder: str, trained_on: Mapping[str, Any], is_trainable: bool) -> PeftModel:
    """The adapter on its base, once base and weights are proven to belong together."""
    held = training_base(base)
    if trained_on and held["dtype"] == trained_on["dtype"]:
        # Those held in both: which ones a quantized base packs is the reader's choice.
        names = trained_on["weights"].keys() & held["weights"].keys()
        if other := differences(*({name: of["weights"][name] for name in names} for of in (trained_on, held))):
            raise ValueError(
                f"{base.name_or_path!r} is not the base that the adapter in {folder!r} was trained on; {len(other)} "
                f"weights differ: {'; '.join(other[:3])}. Pass base_model= the right one."
            )
    if Path(folder, "generation_config.json").is_file():
        base.generation_config = GenerationConfig.from_pretrained(folder)
    weights = Path(folder, "adapter_model.safetensors")
    if not weights.is_file():
        raise ValueError(f"{folder!r} holds an adapter_config.json but no {weights.name}; save the adapter again.")
    try:
        model = PeftModel.from_pretrained(base, folder, is_trainable=is_trainable)
    except RuntimeError as error:
        raise ValueError(f"The adapter in {folder!r} does not fit {base.name_or_path!r}: {error}") from error
    with safe_open(weights, framework="pt") as file:
        saved = set(file.keys())
    needed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if saved != needed:
        raise ValueError(
            f"The adapter in {folder!r} does not fit {base.name_or_path!r}: {len(needed - saved)} weights are missing "
            f"({_some(needed - saved)}) and {len(saved - needed)} left over ({_some(saved - needed)})."
        )
    return model


def _existing(name_or_path: str | Path | None) -> str:
    """The folder or Hub name as given; ValueError where it can be neither."""
    name = str(name_or_path)
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"No folder {name!r} (from {Path.cwd()}), and no Hub name is written so.")
    return name


def _device_map(quantization_config: Any) -> dict[str, int] | None:
    """The GPU of this process for a quantized model, which must not move later; None leaves placing to the Trainer."""
    if quantization_config is None or not torch.cuda.is_available():
        return None
    return {"": int(os.environ.get("LOCAL_RANK", 0))}


def _flash_attention_runs(dtype: torch.dtype | str, config: PreTrainedConfig) -> bool:
    return (
        is_flash_attn_2_available()
        and torch.cuda.get_device_capability() >= (8, 0)
        and dtype in (torch.float16, torch.bfloat16, "float16", "bfloat16")
        and config.model_type not in _NOT_FOR_FLASH_ATTENTION
    )


def _some(keys: set[str]) -> str:
    return ", ".join(sorted(keys)[:3]) or "none"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
