"""Processor and model in the precision and attention of this machine, at one revision, with no weight missing; an
adapter on the very base it was trained on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils.hub import resolve_revision
from transformers.utils.peft_utils import find_adapter_config_file

from vlm_sft.common import base_of, listed
from vlm_sft.distributed import print_main
from vlm_sft.models.fingerprints import place_of_base, read_training_base, stored_weights, weight_differences
from vlm_sft.models.freezing import detach_frozen_tower
from vlm_sft.models.hardware import best_dtype, own_device
from vlm_sft.models.manifest import MANIFEST, verify_checkpoint
from vlm_sft.models.parts import parts_of, root_of
from vlm_sft.models.quantization import nf4_config
from vlm_sft.upstream import (
    fit_to_shards,
    flash_attentions,
    is_sharded,
    keep_packing,
    limit_pixels,
    number_images_by_row,
    restore_adapter,
    sees_both_ways,
    set_commit,
)

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
    revision = reachable(name, revision)
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
    experts_in_16bit: bool = False,
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
    - `load_in_4bit=True` quantizes the language model alone, by `nf4_config`, which also explains `experts_in_16bit`.
    - `attn_implementation=None` is FlashAttention where GPU and model take it: a build that is installed, or that of
      kernels-community by `pip install kernels`; else what transformers chooses, PyTorch's SDPA.
    - It is read onto the GPU of this process, and takes no room of the CPU; under FSDP and DeepSpeed ZeRO-3, which
      shard it from there, onto the CPU.
    - `revision` is resolved to its commit once, and recorded in the model's config.
    - For an adapter, `base_model` takes the place of the base that it names; `is_trainable` leaves it trainable.
    - Only safetensors are read. A weight that is missing, left over or of another shape is an error.

    A frozen tower stays out of autograd and in evaluation mode (`detach_frozen_tower`).

    Raises ValueError for a path that does not exist, a model that is text-only or whose parts cannot be told, an
    adapter whose base is missing or another one, weights that do not fit, and an attention that the model cannot run.
    """
    name = existing(name_or_path)
    revision = reachable(name, revision)
    if load_in_4bit:
        config = read_config(name, revision=revision, trust_remote_code=trust_remote_code)
        quantization_config = nf4_config(config, experts_in_16bit=experts_in_16bit)
    options: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    options |= {"device_map": device_map, "dtype": dtype, "quantization_config": quantization_config}
    if find_adapter_config_file(name, revision=revision) is None:
        options["quantization_config"] = None if quantization_config == "auto" else quantization_config
        options["dtype"] = best_dtype() if dtype == "auto" else dtype
        model = base = _read_model(name, revision, **options)
    else:
        model = _read_adapted(name, revision, base_model, is_trainable, **options)
        base = base_of(model)
    detach_frozen_tower(base)
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
    except (OSError, ValueError, KeyError) as error:  # no file, or a family that transformers does not know
        how = "Give the folder or Hub name of one"
        if "custom code" in str(error):
            how = "Where you trust it, load it with trust_remote_code=True; else choose one that transformers knows"
        raise ValueError(f"No model in {at}: {first_line(error)}. {how}.") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not trust_remote_code:
        raise ValueError(
            f"{at} is a {config.model_type!r} model, which takes no images; give a vision-language model such as "
            "llava-hf/llava-1.5-7b-hf."
        )
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise ValueError(
            f"{at} is a {config.model_type!r} model, an encoder-decoder: its encoder would read the answers that its "
            "decoder is to learn. Choose a family with a decoder alone, such as Qwen-VL, Gemma 3 or SmolVLM."
        )
    return config


def existing(name_or_path: str | Path | None) -> str:
    """The folder or Hub name as given; ValueError where it can be neither."""
    name = str(name_or_path)
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"No folder {name!r} (from {Path.cwd()}){_meant(name)}, and no Hub name is written so.")
    return name


def reachable(name: str, revision: str | None) -> str | None:
    """The revision, resolved to its commit. Raises ValueError where the Hub would be asked for the model and cannot be:
    from_pretrained (transformers 5.23) tries again for each file, for minutes."""
    found: str | None = resolve_revision(name, revision)
    if not (Path(name).is_dir() or hasattr(found, "resolved") or is_offline_mode()):
        try:
            HfApi().model_info(name, timeout=10)
        except HfHubHTTPError:  # it answers: from_pretrained will say what is wrong
            pass
        except Exception as error:  # no network, by the classes of the HTTP client
            raise ValueError(f"No model in {place(name, revision)}: the Hub is out of reach ({error})") from error
    return found


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def place(name: str, revision: str | None) -> str:
    """The name for an error, and what it was taken for: a slip in a folder's name makes a Hub name of it."""
    if Path(name).is_dir():
        return repr(name)
    return f"{name!r} (no such folder{_meant(name)}; treated as a Hub name, revision {revision or 'main'})"


def _meant(name: str) -> str:
    """The folder that has nearly this name, as a question."""
    folders = [str(path) for path in Path(name).parent.glob("*/")]
    return "".join(f", did you mean {near!r}?" for near in get_close_matches(name, folders, n=1, cutoff=0.8))


def _read_model(name: str, revision: str | None, *, attn_implementation: str | None, **options: Any) -> Any:
    config: Any = read_config(name, revision=revision, trust_remote_code=options["trust_remote_code"])
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:  # what cannot train, before the weights are read
        parts_of(empty := root_of(config))
        if empty.base_model is empty:
            raise ValueError(
                f"{type(empty).__name__} ({config.model_type}) has no inner model, from whose hidden states TRL "
                f"{version('trl')} takes the loss: SFTTrainer would fail at its first step. Choose another family."
            )
        if "flash" in (attn_implementation or "") and sees_both_ways(empty):
            raise ValueError(
                f"attn_implementation={attn_implementation!r}: in {config.model_type} the tokens of an image see each "
                "other in both directions, and FlashAttention would hide half of them; use 'sdpa'."
            )
    zero3 = bool(is_deepspeed_zero3_enabled())  # type: ignore[no-untyped-call]
    if zero3 and (options["quantization_config"] or getattr(config, "quantization_config", None)):
        raise ValueError(
            f"{place(name, revision)} in 4 or 8 bit under DeepSpeed ZeRO-3, which shards no such weights: launch with "
            "accelerate_configs/fsdp2_qlora.yaml, or load in 16 bit (--no_load_in_4bit)"
        )
    if options["device_map"] is None and not zero3:
        # Without a map, transformers would put a quantized model onto the GPU, whole, also where it is to be sharded.
        options["device_map"] = {"": torch.device("cpu") if is_sharded() else own_device()}
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
        for name in flash_attentions(model):
            with contextlib.suppress(ValueError, ImportError):  # a part without FlashAttention, or nothing to fetch it
                model.set_attn_implementation(name)
                break
    set_commit(model.config, revision)
    keep_packing(model)
    number_images_by_row(model)
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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # `restore_adapter` fills or names them
            model = PeftModel.from_pretrained(base, folder, is_trainable=is_trainable)
        missing, left = restore_adapter(model, Path(folder, ADAPTER_WEIGHTS))
    except RuntimeError as error:
        some = "\n".join(str(error).splitlines()[:3])
        raise ValueError(f"The adapter in {folder!r} does not fit {base.name_or_path!r}: {some}") from error
    if missing or left:
        raise ValueError(
            f"The adapter in {folder!r} does not fit {base.name_or_path!r}: {len(missing)} weights are missing "
            f"({listed(missing)}) and {len(left)} left over ({listed(left)})."
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
    return model.dtype in (torch.float16, torch.bfloat16) and not sees_both_ways(model)
