"""Processor and model in the precision and attention of this machine, at one revision, with no weight missing; an
adapter on the very base it was trained on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.utils.hub import resolve_revision
from transformers.utils.import_utils import is_flash_attn_2_available
from transformers.utils.peft_utils import find_adapter_config_file

from vlm_sft.common import base_of, listed
from vlm_sft.distributed import print_main
from vlm_sft.models.fingerprints import place_of_base, read_training_base, stored_weights, weight_differences
from vlm_sft.models.freezing import detach_frozen_tower
from vlm_sft.models.hardware import best_dtype
from vlm_sft.models.manifest import MANIFEST, verify_checkpoint
from vlm_sft.models.quantization import nf4_config
from vlm_sft.upstream import TWO_WAY_IMAGES, fit_to_shards, keep_packing, limit_pixels, set_commit

AutoModelForVision2Seq = AutoModelForImageTextToText
"""The name that transformers 5 dropped, for code that was written with it."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_SOURCE = "_vlm_sft_source"  # where a model or processor keeps what `loaded_from` returns; saved by neither


def load_processor(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_pixels: int | None = None,
) -> Any:
    """The processor of a vision-language model, its tokenizer with a pad token.

    A tokenizer without one pads with its unknown token, else with its end token: both are in the embedding already,
    and padding is masked by position, never by id. `max_pixels` shrinks larger images to so many pixels, in families
    that resize by their number (Qwen-VL).

    Raises ValueError for a folder that does not exist, a text-only model, and `max_pixels` where the family has no such
    limit; ImportError that names the missing package, torchvision or num2words.
    """
    name = existing(name_or_path)
    revision = resolve_revision(name, revision)
    try:
        processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            name, revision=revision, trust_remote_code=trust_remote_code
        )
        if getattr(processor, "image_processor", None) is None:
            raise ValueError(f"it is a {type(processor).__name__} without an image processor")
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
            f"No processor for images in {place(name, revision)}: {first_line(error)}. Give the folder or Hub name of "
            "a vision-language model, not of a text-only model."
        ) from error
    tokenizer: Any = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if max_pixels is not None:
        limit_pixels(processor.image_processor, max_pixels)
    record_source(processor, name, revision)
    return processor


def load_model(
    name_or_path: str | Path,
    *,
    load_in_4bit: bool = False,
    quantization_config: BitsAndBytesConfig | str | None = "auto",
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    base_model: str | Path | None = None,
    is_trainable: bool = False,
    device_map: Any = None,
) -> Any:
    """A vision-language model, or from an adapter's folder its base with the adapter on it (a PeftModel).

    - `dtype="auto"` is `best_dtype()`, and `quantization_config="auto"` none; for an adapter both are those of its base
      in training (where nothing records them, the base's own dtype and none).
    - `load_in_4bit=True` quantizes the language model alone, by `nf4_config`.
    - `attn_implementation` is by default FlashAttention 2 where it is installed and the GPU (Ampere or newer) and the
      model take it; else what transformers chooses, PyTorch's SDPA.
    - A quantized model goes to the GPU of this process (LOCAL_RANK); any other stays on the CPU for the Trainer.
    - `revision` is resolved to its commit once, and recorded in the model's config.
    - For an adapter, `base_model` takes the place of the base that it names; `is_trainable` leaves it trainable.
    - Only safetensors are read. A weight that is missing, left over or of another shape is an error.

    A frozen tower stays out of autograd (`detach_frozen_tower`), or a line says that the parts cannot be told.

    Raises ValueError for a path that does not exist, a text-only model, an adapter whose base is missing or another
    one, weights that do not fit, and an attention that the model cannot run.
    """
    name = existing(name_or_path)
    revision = resolve_revision(name, revision)
    if load_in_4bit:
        quantization_config = nf4_config(read_config(name, revision=revision, trust_remote_code=trust_remote_code))
    options: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    options |= {"device_map": device_map, "dtype": dtype, "quantization_config": quantization_config}
    if find_adapter_config_file(name, revision=revision) is None:
        options["quantization_config"] = None if quantization_config == "auto" else quantization_config
        options["dtype"] = best_dtype() if dtype == "auto" else dtype
        model = base = _read_model(name, revision, **options)
    else:
        model = _read_adapted(name, revision, base_model, is_trainable, **options)
        base = base_of(model)
    try:
        detach_frozen_tower(base)
    except ValueError as error:
        print_main(f"{name!r}: a frozen vision tower stays in autograd, which costs time and memory. {error}")
    record_source(model, name, revision)
    return model


def check_weights(model: Any, info: Mapping[str, Any], at: str) -> None:
    """Raises ValueError for weights that from_pretrained found missing, left over or of another shape."""
    if unfit := [f"{len(keys)} {kind} ({listed([*map(str, keys)])})" for kind, keys in info.items() if keys]:
        raise ValueError(
            f"The weights in {at} do not fit {type(model).__name__}: {'; '.join(unfit)}. Give the complete checkpoint "
            "of this very model."
        )


def loaded_from(model_or_processor: Any) -> tuple[str, str | None]:
    """The name or folder that `load_model` or `load_processor` was given, and the commit; else what transformers knows,
    and None."""
    named = getattr(model_or_processor, "config", None) or getattr(model_or_processor, "tokenizer", None)
    known = (str(getattr(named, "name_or_path", "")), None)
    return getattr(model_or_processor, _SOURCE, known)


def record_source(model_or_processor: Any, name: str, revision: str | None) -> None:
    """Keeps what `loaded_from` returns."""
    setattr(model_or_processor, _SOURCE, (name, getattr(revision, "resolved", revision)))


def read_config(name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of a vision-language model. Raises ValueError where there is none, and for a text-only model."""
    name = existing(name_or_path)
    at = place(name, revision)
    try:
        config: Any = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(f"No model in {at}: {first_line(error)}. Give its folder or Hub name.") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not trust_remote_code:
        raise ValueError(
            f"{at} is a {config.model_type!r} model, which takes no images; give a vision-language model such as "
            "llava-hf/llava-1.5-7b-hf."
        )
    return config


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
    return f"{name!r} (no such folder; treated as a Hub name, revision {revision or 'main'})"


def _read_model(name: str, revision: str | None, *, attn_implementation: str | None, **options: Any) -> Any:
    config: Any = read_config(name, revision=revision, trust_remote_code=options["trust_remote_code"])
    if attn_implementation == "flash_attention_2" and config.model_type in TWO_WAY_IMAGES:
        raise ValueError(
            f"attn_implementation='flash_attention_2': in {config.model_type} the tokens of an image see each other in "
            "both directions, and FlashAttention would hide half of them; use 'sdpa'."
        )
    quantized = options["quantization_config"] or getattr(config, "quantization_config", None)
    if quantized and options["device_map"] is None and torch.cuda.is_available():
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}  # it must not move later
    check_files(name)
    from_pretrained: Any = AutoModelForImageTextToText.from_pretrained
    try:
        model, info = from_pretrained(
            name,
            revision=revision,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # `check_weights` names them
            output_loading_info=True,
            **options,
        )
    except OSError as error:
        raise ValueError(
            f"No safetensors in {place(name, revision)}: {first_line(error)}. Other formats can run code when they are "
            "read; save the model again with save_pretrained."
        ) from error
    check_weights(model, info, place(name, revision))
    if attn_implementation is None and _flash_attention_runs(model):
        with contextlib.suppress(ValueError):  # this model has no FlashAttention
            model.set_attn_implementation("flash_attention_2")
    set_commit(model.config, revision)
    keep_packing(model)
    fit_to_shards(model)
    return model


def _read_adapted(name: str, revision: str | None, base_model: Any, is_trainable: bool, **options: Any) -> PeftModel:
    folder = name if Path(name).is_dir() else snapshot_download(name, revision=revision)
    check_files(folder)
    adapter = read_adapter_config(folder)
    if not Path(folder, ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{folder!r} holds an adapter_config.json but no {ADAPTER_WEIGHTS}; save the adapter again.")
    trained_on = read_training_base(Path(folder)) or {}
    named = base_model or place_of_base(Path(folder), adapter.base_model_name_or_path)
    if options["quantization_config"] == "auto":
        recorded = trained_on.get("quantization_config")
        options["quantization_config"] = BitsAndBytesConfig(**recorded) if recorded else None  # type: ignore[no-untyped-call]
    if options["dtype"] == "auto":
        options["dtype"] = trained_on.get("dtype", "auto")
    at_revision = None if base_model else adapter.revision or trained_on.get("revision")
    try:
        base = _read_model(existing(named), at_revision, **options)
    except ValueError as error:
        raise ValueError(
            f"The adapter in {name!r} was trained on {adapter.base_model_name_or_path!r}, which did not load from "
            f"{named!r}: {error} Pass base_model= the folder or Hub name of that base."
        ) from error
    recorded = trained_on.get("weights")
    if not recorded:
        print_main(f"{name!r} does not say what the weights of its base were, so {named!r} is taken as it is")
    elif other := weight_differences(recorded, stored_weights(base.name_or_path, at_revision)):
        raise ValueError(
            f"{base.name_or_path!r} is not the base that the adapter in {folder!r} was trained on; {len(other)} of "
            f"{len(recorded)} weights differ: {'; '.join(other[:3])}. Pass base_model= the right one."
        )
    if Path(folder, "generation_config.json").is_file():
        base.generation_config = GenerationConfig.from_pretrained(folder)
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


def check_files(folder: str | Path) -> None:
    """Raises ValueError for a folder whose safetensors do not open, or differ from its manifest."""
    faults = verify_checkpoint(folder) if Path(folder, MANIFEST).is_file() else []
    for file in [] if faults else sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            faults.append(f"{file.name} is damaged ({error})")
    if faults:
        raise ValueError(
            f"{folder}: {'; '.join(faults)}. Take the folder of a checkpoint, or train or download it again; where "
            f"weights were changed on purpose, delete {MANIFEST}."
        )


def read_adapter_config(folder: str | Path) -> Any:
    """PEFT's config of an adapter. Raises ValueError for one that cannot be read, such as of another version."""
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{Path(folder, 'adapter_config.json')} cannot be read ({type(error).__name__}: {first_line(error)}); save "
            "the adapter again, or install the PEFT that wrote it"
        ) from error


def _flash_attention_runs(model: Any) -> bool:
    return (
        is_flash_attn_2_available()
        and torch.cuda.get_device_capability() >= (8, 0)
        and model.dtype in (torch.float16, torch.bfloat16)
        and model.config.model_type not in TWO_WAY_IMAGES
    )
