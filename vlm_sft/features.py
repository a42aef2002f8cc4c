"""Features of a frozen tower, computed once and read from disk in later epochs.

The model's own argument for it, `mm_encoder_outputs` (transformers 5.23), takes the place of the pixels, so losses and
gradients are what they would be. It pays from the second epoch on, the more the larger the tower is beside the
language model, and costs disk: 4.7 MB a picture for LLaVA-1.5-7B in 16 bit, 1 MB for SmolVLM.

    collator = ChatCollator(processor, key_pictures=True)
    SFTTrainer(..., data_collator=collator, callbacks=[FeatureCache("features", max_gb=100)])
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_sft.families import part_of, parts_of
from vlm_sft.ranks import say


class FeatureCache(TrainerCallback):
    """Keeps what tower and projector make of each row's pictures in `folder`, at most `max_gb` (10**9 bytes) of it.

    The key of a row is a hash of its pictures' pixels (the collator's `key_pictures=True`); that of the folder, of the
    image processor, the model's configuration, the weights of tower and projector, and the precision. Where one of
    these differs, features are computed anew. A full cache stays as it is; other pictures go through the tower.

    Raises `ValueError` before the first step for a model that takes no features or whose features are of several layers
    (Qwen3-VL), is sharded, or trains tower or projector, and in it where two passes of a picture differ (dropout).
    """

    def __init__(self, folder: str | Path, *, max_gb: float) -> None:
        self.folder, self.max_bytes = Path(folder), max_gb * 1e9
        self.read = self.stored = 0  # rows
        self._bytes = 0
        self._place: Path | None = None
        self._keys: list[str] | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        base: Any = getattr(model, "get_base_model", lambda: model)()
        takes = inspect.signature(base.model.forward).parameters
        if "mm_encoder_outputs" not in takes or "deepstack_visual_indexes" in base.config.vision_config.to_dict():
            raise ValueError(f"FeatureCache: {type(base).__name__} takes no features of one layer; leave the cache out")
        self._processor = kwargs["processing_class"].image_processor
        self._base, self.max_bytes = base, self.max_bytes / args.world_size
        # Taken out of what is passed to the outer model, as by StopOnNaN; used where the pixels arrive.
        model.register_forward_pre_hook(self._take_keys, with_kwargs=True)
        base.model.register_forward_pre_hook(self._replace_pixels, with_kwargs=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._frozen()

    def _frozen(self) -> dict[str, Tensor]:
        """The weights that features come from. Raises `ValueError` unless they are whole and none of them trains."""
        parts = parts_of(self._base)
        weights = {n: w for n, w in self._base.named_parameters() if part_of(n, parts) in ("vision", "projector")}
        if moving := [name for name, weight in weights.items() if weight.requires_grad]:
            raise ValueError(
                f"FeatureCache: {len(moving)} weights of tower or projector train ({moving[0]}); freeze them"
            )
        if any(isinstance(weight, DTensor) for weight in weights.values()):
            raise ValueError("FeatureCache: tower and projector are sharded (FSDP); leave the cache out")
        return weights

    def _take_keys(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        keys: Tensor | None = kwargs.pop("pictures", None)
        self._keys = None if keys is None else [key.numpy().tobytes().hex() for key in keys.cpu()]
        return args, kwargs

    def _replace_pixels(
        self, core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        keys, self._keys = self._keys, None
        if keys is None or kwargs.get("pixel_values") is None:
            return None
        place = self._place or self._open(kwargs["pixel_values"].device.type)
        counts = _image_tokens(kwargs, core.config.image_token_id)
        rows = [(place / f"{key}.safetensors", count) for key, count in zip(keys, counts, strict=True) if count]
        if all(file.is_file() for file, _ in rows):
            parts = [load_file(file)["features"] for file, _ in rows]
            features = torch.cat(parts).to(kwargs["pixel_values"].device, non_blocking=True)
            self.read += len(rows)
        else:
            features = self._compute(core, kwargs)
            self._store(rows, features)
        # A list where the tower gives one for each picture, in two dimensions; else one tensor of blocks.
        pooled: Any = [features] if features.ndim == 2 else features
        outputs = {"image": BaseModelOutputWithPooling(pooler_output=pooled)}
        return args, {**kwargs, "pixel_values": None, "mm_encoder_outputs": outputs}

    def _compute(self, core: Any, kwargs: Mapping[str, Any]) -> Tensor:
        names = inspect.signature(core.get_image_features).parameters
        inputs = {name: value for name, value in kwargs.items() if name in names}
        with torch.no_grad():
            pooled: Any = core.get_image_features(**inputs, return_dict=True).pooler_output
            if not self.stored:
                again: Any = core.get_image_features(**inputs, return_dict=True).pooler_output
                if not torch.equal(_joined(pooled), _joined(again)):
                    raise ValueError("FeatureCache: the tower gives other features each time (dropout?); leave it out")
        return _joined(pooled)

    def _store(self, rows: Sequence[tuple[Path, int]], features: Tensor) -> None:
        block = features.shape[1] if features.ndim == 3 else 1
        sizes = [count // block for _, count in rows]
        if sum(sizes) != len(features):
            raise ValueError(f"FeatureCache: {len(features)} features for {sum(sizes)} image tokens; leave it out")
        for (file, _), part in zip(rows, torch.split(features, sizes), strict=True):
            data = save({"features": part.cpu().contiguous()})
            if file.is_file() or self._bytes + len(data) > self.max_bytes:
                continue
            whole = file.with_suffix(f".{os.getpid()}")
            whole.write_bytes(data)
            whole.replace(file)
            self._bytes += len(data)
            self.stored += 1

    def _open(self, device: str) -> Path:
        """The folder for features of this processor, model and precision."""
        digest = hashlib.sha256(transformers.__version__.encode())
        config = {name: value for name, value in self._base.config.to_dict().items() if name != "_name_or_path"}
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        digest.update(json.dumps([self._processor.to_dict(), config, str(cast)], sort_keys=True, default=str).encode())
        for name, weight in self._frozen().items():
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self._place = self.folder / digest.hexdigest()[:32]
        self._place.mkdir(parents=True, exist_ok=True)
        self._bytes = sum(file.stat().st_size for file in self.folder.rglob("*.safetensors"))
        say(f"Features: {self._place}, {self._bytes / 1e9:.1f} of {self.max_bytes / 1e9:.1f} GB used")
        return self._place


def _joined(pooled: Any) -> Tensor:
    return pooled if isinstance(pooled, Tensor) else torch.cat(list(pooled))


def _image_tokens(kwargs: Mapping[str, Any], image_token_id: int) -> list[int]:
    """How many tokens of each conversation stand for features, also where all are in one row."""
    marked = kwargs["input_ids"] == image_token_id
    positions = kwargs.get("position_ids")
    if kwargs.get("attention_mask") is not None or positions is None:
        return [int(count) for count in marked.sum(dim=1)]
    # Rows without padding: text positions, the first ones of Qwen-VL's, begin again with each conversation.
    starts = (positions.reshape(-1, positions.shape[-1])[0] == 0).nonzero().flatten().tolist()
    return [int(part.sum()) for part in marked[0].tensor_split(starts[1:])]
