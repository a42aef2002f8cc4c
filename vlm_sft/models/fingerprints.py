"""What a run or an adapter was made of, as JSON: its base, data and adapter. Recorded at a save, compared later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import snapshot_download
from safetensors import safe_open

from vlm_sft.common import base_of
from vlm_sft.models.hardware import dtype_name

TRAINING_BASE = "training_base.json"
_PLACE = Path(".cache/huggingface/base_model")  # huggingface_hub uploads nothing of this folder
_SAMPLES = 16
_SOURCE = "_vlm_sft_source"  # where a model or processor keeps what `loaded_from` returns; saved by neither


def loaded_from(model_or_processor: Any) -> tuple[str, str | None]:
    """The name or folder given to `load_model` or `load_processor`, and its commit; else the name known, and None."""
    named = getattr(model_or_processor, "config", None) or getattr(model_or_processor, "tokenizer", None)
    return getattr(model_or_processor, _SOURCE, (str(getattr(named, "name_or_path", "")), None))


def record_source(model_or_processor: Any, name: str, revision: str | None) -> None:
    """Keeps what `loaded_from` returns."""
    setattr(model_or_processor, _SOURCE, (name, getattr(revision, "resolved", revision)))


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping as it reads back from JSON: sets sorted to lists, enums and dtypes as text."""
    text = json.dumps(value, default=lambda item: sorted(item) if isinstance(item, set) else str(item))
    return json.loads(text)  # type: ignore[no-any-return]


def differences(recorded: Any, found: Any, *, path: str = "") -> list[str]:
    """One line for each leaf that differs or is absent on one side: `path: recorded ..., now ...`."""
    if isinstance(recorded, Mapping) and isinstance(found, Mapping):
        return [
            line
            for key in sorted({*recorded, *found})
            for line in differences(recorded.get(key), found.get(key), path=f"{path}.{key}" if path else str(key))
        ]
    return [] if recorded == found else [f"{path}: recorded {recorded!r}, now {found!r}"]


def shareable(name: str) -> str:
    """The name as others may see it: a Hub id or a relative path as it is, an absolute path relative to the working
    directory or, outside of it, as `.../` and its last part."""
    path = Path(name).expanduser()
    if not path.is_absolute():
        return name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else f".../{path.name}"


def base_settings(model: Any) -> dict[str, Any]:
    """Where the (PEFT-wrapped) model's base came from and how it was loaded."""
    config = base_of(model).config
    quantization: Any = getattr(config, "quantization_config", None)
    settings = {
        "base_model_name_or_path": shareable(config.name_or_path),
        "revision": loaded_from(base_of(model))[1],
        "model_type": config.model_type,
        "dtype": dtype_name(config.dtype or base_of(model).dtype),
        "quantization_config": quantization.to_dict() if hasattr(quantization, "to_dict") else quantization,
    }
    return plain(settings)


def training_base(model: Any) -> dict[str, Any]:
    """`base_settings`, and the `stored_weights` of the base."""
    config = base_of(model).config
    return base_settings(model) | {"weights": stored_weights(config.name_or_path, loaded_from(base_of(model))[1])}


def stored_weights(name_or_path: str, revision: str | None = None) -> dict[str, str]:
    """A line `shape dtype values` for each tensor in the safetensors of a model: 16 values, as hex. Read from the
    files, it is the same however the model is loaded. Empty for a model that was made in memory."""
    weights: dict[str, str] = {}
    folder = Path(name_or_path)
    if not folder.is_dir():
        try:
            local: dict[str, Any] = {"local_files_only": True, "allow_patterns": "*.safetensors*"}
            folder = Path(snapshot_download(name_or_path, revision=revision, **local))
        except (OSError, ValueError):  # nowhere, or no name at all
            return weights
    for file in sorted(folder.glob("model*.safetensors")) if name_or_path else ():
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)  # mapped: only what is looked at is read
                count = min(_SAMPLES, tensor.numel())
                spread = torch.linspace(0, tensor.numel() - 1, count, dtype=torch.float64).long()
                values = tensor.flatten()[spread].view(torch.uint8).numpy().tobytes().hex()
                shape = "x".join(map(str, tensor.shape)) or "1"
                weights[name] = f"{shape} {dtype_name(tensor.dtype)} {values or '-'}"
    return weights


def weight_differences(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """One line for each recorded weight that is not found, has another shape, or other values: after rounding, where
    one is a copy in another dtype. A weight may have another name, as copies of other versions of transformers have."""
    faults, lines = [], {*found.values()}
    for name, was in recorded.items():
        if (its := found.get(name)) is None:
            faults += [f"{name}: absent"] * (was not in lines)
        elif not (its == was or _equal_when_rounded(was, its)):
            (*before, _), (*now, _) = was.split(), its.split()
            faults.append(f"{name}: recorded {' '.join(before)}, now {' '.join(now)} of other values")
    return faults


def _equal_when_rounded(was: str, its: str) -> bool:
    (shape, *first), (its_shape, *second) = was.split(), its.split()
    if shape != its_shape or first[0] == second[0]:
        return False
    a, b = (torch.frombuffer(bytearray.fromhex(values), dtype=getattr(torch, kind)) for kind, values in (first, second))
    rounded = torch.equal(a.to(b.dtype), b) or torch.equal(b.to(a.dtype), a)
    return a.is_floating_point() and b.is_floating_point() and rounded


def write_training_base(folder: Path, base: Mapping[str, Any], place: str) -> None:
    """Writes into an adapter's folder which base it was trained on, and, where no upload takes it along, the place of
    the base on this machine; paths of this machine leave what PEFT has written."""
    (folder / TRAINING_BASE).write_text(json.dumps(base, indent=1) + "\n", encoding="utf-8")
    if place != base["base_model_name_or_path"]:
        (folder / _PLACE).parent.mkdir(parents=True, exist_ok=True)
        (folder / _PLACE).write_text(place, encoding="utf-8")
        for file in filter(Path.is_file, (folder / "adapter_config.json", folder / "README.md")):
            names = [place, str(base["base_model_name_or_path"])]
            was, told = [json.dumps(name)[1:-1] for name in names] if file.suffix == ".json" else names
            file.write_bytes(file.read_bytes().replace(was.encode(), told.encode()))  # even where it is damaged


def read_training_base(folder: Path) -> Any:
    """What `training_base` recorded next to an adapter; None where nothing is. Raises ValueError for a damaged file."""
    file = folder / TRAINING_BASE
    try:
        return dict(json.loads(file.read_text("utf-8"))) if file.is_file() else None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); take it from a checkpoint of the same run") from error


def place_of_base(folder: Path, named: str | None) -> str | None:
    """Where the base that an adapter names lies on the machine that trained it, if it still does; else the name."""
    place = (folder / _PLACE).read_text("utf-8") if (folder / _PLACE).is_file() else ""
    there = place and Path(place).is_dir() and Path(named or "").name == Path(place).name
    return place if there else named


def model_settings(model: Any) -> dict[str, Any]:
    """The base, the adapters' settings, and a digest of the names of what is trained."""
    trained = sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    aside = {"inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"}
    adapters = {
        name: {key: value for key, value in config.to_dict().items() if key not in aside}
        for name, config in getattr(model, "peft_config", {}).items()
    }
    names = hashlib.sha256("\n".join(trained).encode()).hexdigest()[:12]
    trains = {"tensors": len(trained), "names": names}
    return plain({"base": base_settings(model), "adapters": adapters, "trained": trains})


def data_settings(dataset: Any) -> dict[str, Any]:
    """The number of rows (None for a stream), and for each column of a `datasets.Dataset` a digest of 16 of them."""
    columns = {}
    if isinstance(dataset, Dataset) and len(dataset):
        spread = sorted({len(dataset) * n // _SAMPLES for n in range(_SAMPLES)})
        table = dataset.with_format("arrow")[spread]
        for name in [name for name in table.column_names if not name.startswith("_")]:  # which reader, in this process
            columns[name] = hashlib.sha256(repr(table[name].to_pylist()).encode()).hexdigest()[:12]
    return {"rows": len(dataset) if isinstance(dataset, Sized) else None, "columns": columns}
