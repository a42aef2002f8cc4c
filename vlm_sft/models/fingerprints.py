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
from torch import Tensor

from vlm_sft.common import base_of
from vlm_sft.models.hardware import dtype_name
from vlm_sft.upstream import commit_of

TRAINING_BASE = "training_base.json"
_PLACE = Path(".cache/huggingface/base_model")  # huggingface_hub uploads nothing of this folder
_WEIGHTS = "model.safetensors"
_SAMPLES = 16


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
    base = base_of(model)
    config = base.config
    quantization: Any = getattr(config, "quantization_config", None)
    return plain(
        {
            "base_model_name_or_path": shareable(config.name_or_path),
            "revision": commit_of(config),
            "model_type": config.model_type,
            "dtype": dtype_name(config.dtype or base.dtype),
            "quantization_config": quantization.to_dict() if hasattr(quantization, "to_dict") else quantization,
        }
    )


def training_base(model: Any) -> dict[str, Any]:
    """`base_settings`, and the `stored_weights` of the base."""
    config = base_of(model).config
    return {**base_settings(model), "weights": stored_weights(config.name_or_path, commit_of(config))}


def stored_weights(name_or_path: str, revision: str | None = None) -> dict[str, str]:
    """A line `shape dtype values` for each tensor in the safetensors of a model: 16 of its values, as hex.

    They are read from the files, so they are the same however the model is loaded: quantized, in another dtype, on a
    GPU, sharded. Empty for a model that was made in memory.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        try:
            local: dict[str, Any] = {"local_files_only": True, "allow_patterns": "*.safetensors*"}
            folder = Path(snapshot_download(name_or_path, revision=revision, **local))
        except (OSError, ValueError):  # nowhere, or no name at all
            return {}
    index = folder / "model.safetensors.index.json"
    files = {*json.loads(index.read_text("utf-8"))["weight_map"].values()} if index.is_file() else {_WEIGHTS}
    weights = {}
    for file in sorted(folder / name for name in files if name_or_path and (folder / name).is_file()):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                weights[name] = _line(tensors.get_tensor(name))  # mapped: only what is looked at is read
    return weights


def _line(tensor: Tensor) -> str:
    spread = torch.linspace(0, tensor.numel() - 1, min(_SAMPLES, tensor.numel()), dtype=torch.float64).long()
    values = tensor.flatten()[spread].view(torch.uint8).numpy().tobytes().hex()
    return f"{'x'.join(map(str, tensor.shape)) or '1'} {dtype_name(tensor.dtype)} {values or '-'}"


def weight_differences(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """One line for each recorded weight that is not found, has another shape, or other values: after rounding, where
    one is a copy in another dtype. A weight may have another name, as copies of other versions of transformers have."""
    faults, lines = [], {*found.values()}
    for name, was in recorded.items():
        its = found.get(name)
        if its == was or (its is None and was in lines) or (its is not None and _equal_when_rounded(was, its)):
            continue
        told = ("absent" if line is None else " ".join(line.split()[:2]) for line in (was, its))
        faults.append(f"{name}: recorded {next(told)}, now {next(told)} of other values" if its else f"{name}: absent")
    return faults


def _equal_when_rounded(was: str, its: str) -> bool:
    (shape, *first), (its_shape, *second) = was.split(), its.split()
    if shape != its_shape or first[0] == second[0]:
        return False
    a, b = (torch.frombuffer(bytearray.fromhex(values), dtype=getattr(torch, kind)) for kind, values in (first, second))
    return (
        a.is_floating_point()
        and b.is_floating_point()
        and (torch.equal(a.to(b.dtype), b) or torch.equal(b.to(a.dtype), a))
    )


def write_training_base(folder: Path, base: Mapping[str, Any], place: str) -> None:
    """Writes into an adapter's folder which base it was trained on, and, where no upload takes it along, the place of
    the base on this machine; paths of this machine leave what PEFT has written."""
    (folder / TRAINING_BASE).write_text(json.dumps(base, indent=1) + "\n", encoding="utf-8")
    if place != base["base_model_name_or_path"]:
        (folder / _PLACE).parent.mkdir(parents=True, exist_ok=True)
        (folder / _PLACE).write_text(place, encoding="utf-8")
        for file in filter(Path.is_file, (folder / "adapter_config.json", folder / "README.md")):
            names = (place, str(base["base_model_name_or_path"]))
            was, told = (json.dumps(name)[1:-1] if file.suffix == ".json" else name for name in names)
            file.write_text(file.read_text("utf-8").replace(was, told), encoding="utf-8")


def read_training_base(folder: Path) -> Any:
    """What `training_base` recorded next to an adapter; None where nothing is. Raises ValueError for a damaged file."""
    file = folder / TRAINING_BASE
    try:
        return dict(json.loads(file.read_text("utf-8"))) if file.is_file() else None
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); take it from a checkpoint of the same run") from error


def place_of_base(folder: Path, named: str | None) -> str | None:
    """Where the base that an adapter names lies on the machine that trained it, if it still does; else the name."""
    place = (folder / _PLACE).read_text("utf-8") if (folder / _PLACE).is_file() else ""
    there = place and Path(place).is_dir() and Path(named or "").name == Path(place).name
    return place if there else named


def model_settings(model: Any) -> dict[str, Any]:
    """The base, the adapters' settings, and a digest of the names of what is trained."""
    trained = sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    adapters = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    for config in adapters.values():
        for key in ("inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"):
            config.pop(key, None)
    return plain(
        {
            "base": base_settings(model),
            "adapters": adapters,
            "trained": {"tensors": len(trained), "names": hashlib.sha256("\n".join(trained).encode()).hexdigest()[:12]},
        }
    )


def data_settings(dataset: Any) -> dict[str, Any]:
    """The number of rows (None for a stream), and for each column of a `datasets.Dataset` a digest of 16 of them."""
    columns = {}
    if isinstance(dataset, Dataset) and len(dataset):
        spread = sorted({len(dataset) * n // _SAMPLES for n in range(_SAMPLES)})
        table = dataset.with_format("arrow")[spread]
        for name in [name for name in table.column_names if not name.startswith("_")]:  # which reader, in this process
            columns[name] = hashlib.sha256(repr(table[name].to_pylist()).encode()).hexdigest()[:12]
    return {"rows": len(dataset) if isinstance(dataset, Sized) else None, "columns": columns}
