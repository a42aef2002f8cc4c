"""Processor and model in the precision and attention of this machine, whole; an adapter on its own base."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import resolve_revision
from transformers.utils.peft_utils import find_adapter_config_file

from vlm_sft import upstream
from vlm_sft.common import base_of, listed
from vlm_sft.distributed import print_main
from vlm_sft.models import fingerprints
from vlm_sft.models.fingerprints import read_training_base, record_source, stored_weights
from vlm_sft.models.freezing import detach_frozen_tower
from vlm_sft.models.hardware import best_dtype, own_device
from vlm_sft.models.manifest import MANIFEST, verify_checkpoint
from vlm_sft.models.parts import parts_of, root_of
from vlm_sft.models.quantization import nf4_config

AutoModelForVision2Seq = transformers.AutoModelForImageTextToText  # the name that transformers 5 dropped
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def load_processor(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_pixels: int | None = None,
) -> Any:
    """The processor of a vision-language model, its tokenizer with a pad token: its own, else the unknown or the end
    token, both in the embedding already (padding is masked by position, never by id). `max_pixels` shrinks larger
    images to so many pixels, in families that resize by their number (Qwen-VL).

    Raises ValueError for a folder that does not exist, a text-only model, and `max_pixels` where the family has no such
    limit; ImportError that names the missing package, torchvision or num2words."""
    name = existing(name_or_path)
    revision = reachable(name, revision)
    from_pretrained: Any = transformers.AutoProcessor.from_pretrained
    try:
        processor = from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        if getattr(processor, "image_processor", None) is None:
            raise ValueError(f"it is a {type(processor).__name__} without an image processor")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RecursionError) as error:
        missing = [package for package in ("torchvision", "num2words") if importlib.util.find_spec(package) is None]
        if isinstance(error, (AttributeError, ImportError)) and missing:
            found = f"The processor of {name!r} did not load, and {' and '.join(missing)} is not installed"
            how = f"pip install {' '.join(missing)} (torchvision in your torch's build; in a checkout, make install)"
            raise ImportError(f"{found}: {how}.") from error
        if isinstance(error, ImportError):
            raise
        found = f"No processor for images in {place(name, revision)}: {first_line(error)}"
        if isinstance(error, (TypeError, KeyError, AttributeError)):
            found += f" ({type(error).__name__}: its files are damaged, or of another version of transformers)"
        how = "Give the folder or Hub name of a vision-language model, not of a text-only model."
        raise ValueError(f"{found}. {how}") from error
    if (tokenizer := processor.tokenizer).pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if max_pixels is not None:
        upstream.limit_pixels(processor.image_processor, max_pixels)
    record_source(processor, name, revision)
    return processor


def load_model(
    name_or_path: str | Path,
    *,
    load_in_4bit: bool = False,
    experts_in_16bit: bool = False,
    quantization_config: transformers.BitsAndBytesConfig | str | None = "auto",
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
    - `revision` is resolved to its commit once, and recorded (`loaded_from`).
    - For an adapter, `base_model` takes the place of the base that it names; `is_trainable` leaves it trainable.
    - Only safetensors are read. A frozen tower stays out of autograd and in evaluation mode (`detach_frozen_tower`).

    Raises ValueError for a path that does not exist, a model that is text-only or whose parts cannot be told, an
    adapter whose base is missing or another one, weights that are missing, left over or do not fit, and an attention
    that the model cannot run."""
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
        model = _read_model(name, revision, **options)
    else:
        model = _read_adapted(name, revision, base_model, is_trainable, **options)
    detach_frozen_tower(base_of(model))
    record_source(model, name, revision)
    return model


def check_weights(model: Any, info: Mapping[str, Any], at: str) -> None:
    """Raises ValueError for weights that from_pretrained found missing, left over or of another shape."""
    if unfit := [f"{len(keys)} {kind} ({listed([*map(str, keys)])})" for kind, keys in info.items() if keys]:
        found = f"The weights in {at} do not fit {type(model).__name__}: {'; '.join(unfit)}"
        raise ValueError(f"{found}. Give the complete checkpoint of this very model.")


def read_config(name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of a vision-language model. Raises ValueError where there is none, and for a text-only model."""
    at = place(name := existing(name_or_path), revision)
    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:  # no file, or a family it does not know
        own_code = "Where you trust it, load it with trust_remote_code=True; else choose one that transformers knows"
        how = own_code if "custom code" in str(error) else "Give the folder or Hub name of one"
        raise ValueError(f"No model in {at}: {first_line(error)}. {how}.") from error
    if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not trust_remote_code:
        found = f"{at} is a {config.model_type!r} model, which takes no images"
        raise ValueError(f"{found}; give a vision-language model such as llava-hf/llava-1.5-7b-hf.")
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        found = f"{at} is a {config.model_type!r} model, an encoder-decoder: its encoder would read the answers"
        raise ValueError(f"{found}. Choose a family with a decoder alone, such as Qwen-VL, Gemma 3 or SmolVLM.")
    return config


def existing(name_or_path: str | Path | None) -> str:
    """The folder or Hub name as given; ValueError where it can be neither."""
    if not Path(name := str(name_or_path)).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"No folder {name!r} (from {Path.cwd()}){_meant(name)}, and no Hub name is written so.")
    return name


def reachable(name: str, revision: str | None) -> str | None:
    """The revision, resolved to its commit: without a network, that of the cache. Raises ValueError where the model is
    neither there nor to be had: from_pretrained (transformers 5.23) tries again for each file, for minutes."""
    found: str | None = resolve_revision(name, revision)
    if not (Path(name).is_dir() or hasattr(found, "resolved") or is_offline_mode()):
        try:
            HfApi().model_info(name, timeout=10)
        except HfHubHTTPError:  # it answers: from_pretrained will say what is wrong
            pass
        except Exception as error:  # no network, by the classes of the HTTP client
            found = resolve_revision(name, revision, local_files_only=True)
            if not hasattr(found, "resolved"):
                why = f"the Hub is out of reach ({error}), and the cache does not hold it. Give a folder, or connect"
                raise ValueError(f"No model in {place(name, revision)}: {why}.") from error
    return found


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def place(name: str, revision: str | None) -> str:
    """The name for an error, and what it was taken for: a slip in a folder's name makes a Hub name of it."""
    as_hub = f" (no such folder{_meant(name)}; treated as a Hub name, revision {revision or 'main'})"
    return repr(name) + ("" if Path(name).is_dir() else as_hub)


def _meant(name: str) -> str:
    """The folder that has nearly this name, as a question."""
    folders = [str(path) for path in Path(name).parent.glob("*/")]
    return "".join(f", did you mean {near!r}?" for near in get_close_matches(name, folders, n=1, cutoff=0.8))


def _read_model(name: str, revision: str | None, *, attn_implementation: str | None, **options: Any) -> Any:
    config: Any = read_config(name, revision=revision, trust_remote_code=options["trust_remote_code"])
    at = place(name, revision)
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:  # what cannot train, before weights are read
        parts_of(empty := root_of(config))
        if empty.base_model is empty:
            found = f"{type(empty).__name__} ({config.model_type}) has no inner model, from whose hidden states TRL"
            raise ValueError(f"{found} {version('trl')} takes the loss. Choose another family.")
        if "flash" in (attn_implementation or "") and upstream.sees_both_ways(empty):
            found = f"attn_implementation={attn_implementation!r}: {config.model_type}'s image tokens see each other"
            raise ValueError(f"{found} in both directions, and FlashAttention would hide half of them; use 'sdpa'.")
    zero3 = bool(is_deepspeed_zero3_enabled())  # type: ignore[no-untyped-call]
    if zero3 and (options["quantization_config"] or getattr(config, "quantization_config", None)):
        how = "launch with accelerate_configs/fsdp2_qlora.yaml, or load in 16 bit (--no_load_in_4bit)"
        raise ValueError(f"{at} in 4 or 8 bit under DeepSpeed ZeRO-3, which shards no such weights: {how}")
    if options["device_map"] is None and not zero3:
        # Without a map, transformers would put a quantized model onto the GPU, whole, also where it is to be sharded.
        options["device_map"] = {"": torch.device("cpu") if upstream.is_sharded() else own_device()}
    check_files(name)
    from_pretrained: Any = transformers.AutoModelForImageTextToText.from_pretrained
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
        found = f"No safetensors in {at}: {first_line(error)}. Other formats can run code when they are read"
        raise ValueError(f"{found}; save the model again with save_pretrained.") from error
    check_weights(model, info, at)
    in_16_bit = model.dtype in (torch.float16, torch.bfloat16)
    if attn_implementation is None and in_16_bit and not upstream.sees_both_ways(model):
        for kernel in upstream.flash_attentions(model):
            with contextlib.suppress(ValueError, ImportError):  # a part without FlashAttention, or nothing to fetch it
                model.set_attn_implementation(kernel)
                break
    record_source(model, name, revision)
    upstream.keep_packing(model)
    upstream.number_images_by_row(model)
    upstream.fit_to_shards(model)
    return model


def _read_adapted(name: str, revision: str | None, base_model: Any, is_trainable: bool, **options: Any) -> PeftModel:
    folder = name if Path(name).is_dir() else snapshot_download(name, revision=revision)
    check_files(folder)
    adapter = read_adapter_config(folder)
    if not Path(folder, ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{folder!r} holds an adapter_config.json but no {ADAPTER_WEIGHTS}; save the adapter again.")
    what, trained_on = f"adapter in {folder!r}", read_training_base(Path(folder)) or {}
    named = base_model or fingerprints.place_of_base(Path(folder), adapter.base_model_name_or_path)
    if options["quantization_config"] == "auto":
        packing = trained_on.get("quantization_config")
        options["quantization_config"] = transformers.BitsAndBytesConfig(**packing) if packing else None  # type: ignore[no-untyped-call]
    if options["dtype"] == "auto":
        options["dtype"] = trained_on.get("dtype", "auto")
    at_revision = None if base_model else adapter.revision or trained_on.get("revision")
    try:
        base = _read_model(existing(named), at_revision, **options)
    except ValueError as error:
        found = f"The adapter in {name!r} was trained on {adapter.base_model_name_or_path!r}, which did not load from"
        how = "Pass base_model= the folder or Hub name of that base."
        raise ValueError(f"{found} {named!r}: {error} {how}") from error
    recorded = trained_on.get("weights")
    if not recorded:
        print_main(f"{name!r} does not say what the weights of its base were, so {named!r} is taken as it is")
    elif other := fingerprints.weight_differences(recorded, stored_weights(base.name_or_path, at_revision)):
        found = f"{len(other)} of {len(recorded)} weights differ: {'; '.join(other[:3])}. Pass base_model= the right"
        raise ValueError(f"{base.name_or_path!r} is not the base that the {what} was trained on; {found} one.")
    if Path(folder, "generation_config.json").is_file():
        base.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # `restore_adapter` fills or names them
            model = PeftModel.from_pretrained(base, folder, is_trainable=is_trainable)
        missing, left = upstream.restore_adapter(model, Path(folder, ADAPTER_WEIGHTS))
    except (MemoryError, torch.OutOfMemoryError, ImportError, OSError):
        raise
    except Exception as error:  # PEFT asks little of a config before it uses it
        some = "\n".join(str(error).splitlines()[:3])
        found = f"The {what} does not fit {base.name_or_path!r}: {type(error).__name__}: {some}"
        raise ValueError(f"{found}. Save the adapter again, or pass base_model= its own base.") from error
    if missing or left:
        some = f"{len(missing)} weights are missing ({listed(missing)}) and {len(left)} left over ({listed(left)})"
        raise ValueError(f"The {what} does not fit {base.name_or_path!r}: {some}.")
    return model


def check_files(folder: str | Path) -> None:
    """Raises ValueError for a folder whose safetensors or their index do not open, or differ from its manifest."""
    faults = verify_checkpoint(folder) if Path(folder, MANIFEST).is_file() else []
    for file in [] if faults else sorted(Path(folder).glob("*.safetensors")):
        try:
            safe_open(file, framework="pt")  # reads its header
        except SafetensorError as error:
            faults.append(f"{file.name} is damaged ({error})")
    index = Path(folder, SAFE_WEIGHTS_INDEX_NAME)
    read = index.is_file() and not Path(folder, SAFE_WEIGHTS_NAME).is_file()  # which transformers prefers
    try:
        shards = json.loads(index.read_text("utf-8"))["weight_map"].values() if read else ()
        absent = sorted({*shards} - {*os.listdir(folder)}) if read else []
        faults += [f"{index.name} names {shard!r}, which is no file beside it" for shard in absent]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        faults.append(f"{index.name} is damaged ({error})")
    if faults:
        how = f"train or download it again; where weights were changed on purpose, delete {MANIFEST}."
        raise ValueError(f"{folder}: {'; '.join(faults)}. Take the folder of a checkpoint, or {how}")


def read_adapter_config(folder: str | Path) -> Any:
    """PEFT's config of an adapter. Raises ValueError for one that cannot be read, such as of another version."""
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        found = f"{Path(folder, 'adapter_config.json')} cannot be read ({type(error).__name__}: {first_line(error)})"
        raise ValueError(f"{found}; save the adapter again, or install the PEFT that wrote it") from error
