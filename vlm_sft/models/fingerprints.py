"""What a run or an adapter was made of, as JSON: its base, data and adapter. Recorded at a save, compared later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from vlm_sft.common import base_of, is_quantized
from vlm_sft.models.hardware import dtype_name
from vlm_sft.upstream import commit_of

TRAINING_BASE = "training_base.json"
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


def base_settings(model: Any) -> dict[str, Any]:
    """Where the (PEFT-wrapped) model's base came from and how it was loaded."""
    base = base_of(model)
    config = base.config
    quantization: Any = getattr(config, "quantization_config", None)
    return plain(
        {
            "base_model_name_or_path": config.name_or_path,
            "revision": commit_of(config),
            "model_type": config.model_type,
            "dtype": dtype_name(config.dtype or base.dtype),
            "quantization_config": quantization.to_dict() if hasattr(quantization, "to_dict") else quantization,
        }
    )


def training_base(model: nn.Module) -> dict[str, Any]:
    """`base_settings`, and of each parameter outside adapters a line `shape kind digest`.

    A digest covers 16 values of the parameter, so another base of the same shapes is told apart. The kind says how
    these are stored: a dtype, or how they were quantized and where. Takes the model before it is sharded.
    """
    settings, weights = base_settings(model), {}
    for name, parameter in model.named_parameters():
        if "lora_" in name or ".modules_to_save." in name or parameter.is_meta or not parameter.numel():
            continue
        # PEFT puts the adapted layer under `base_layer`, and a module that it trains whole under `original_module`.
        bare = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
        packing: Any = getattr(parameter, "quant_state", None)
        shape = "x".join(map(str, parameter.shape if packing is None else packing.shape))
        kind, values = dtype_name(parameter.dtype), parameter.detach().flatten()
        if packing is not None:
            kind, values = packing.quant_type, values.view(torch.uint8)  # whatever dtype they are stored in
        if is_quantized(parameter):
            # A GPU rounds differently from a CPU, and another dtype to other values.
            kind = f"{kind}/{settings['dtype']}/{parameter.device.type}"
        spread = torch.linspace(0, len(values) - 1, min(_SAMPLES, len(values)), dtype=torch.float64).long()
        sample = values[spread.to(values.device)].cpu().view(torch.uint8).numpy()
        weights[bare] = f"{shape} {kind} {hashlib.sha256(sample.tobytes()).hexdigest()[:12]}"
    return {**settings, "weights": weights}


def weight_differences(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """One line for each recorded weight that is not found, has another shape, or stored alike another digest."""
    faults = []
    for name, was in recorded.items():
        (shape, kind, _), (its_shape, its_kind, _) = was.split(), found.get(name, "none none none").split()
        if found.get(name) != was and (shape != its_shape or kind == its_kind):
            faults.append(f"{name}: recorded {was!r}, now {found.get(name)!r}")
    return faults


def read_training_base(folder: Path) -> Any:
    """What `training_base` recorded next to an adapter; None where nothing is."""
    file = folder / TRAINING_BASE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


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
