"""Rows without padding: several conversations in one row, each with positions of its own.

A collator with `padding_free=True` makes the row; attention then tells the conversations apart by their positions
(transformers 5.23, `masking_utils`), which not every model does. So: `accept_flat_rows` prepares the model, and
`check_flat_rows` proves on real rows that nothing changes. It pays with an attention kernel for variable lengths
(FlashAttention); with SDPA a row of T tokens costs T squared, so there group by length instead.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vlm_sft.labels import IGNORE_INDEX


def pack(dataset: Dataset, lengths: Sequence[int], *, max_length: int) -> Dataset:
    """Rows `{"packed", "length"}`, each of whole conversations of `dataset` with at most `max_length` tokens together.

    Best fit, longest first: each conversation goes where the least room is left (Krell et al., arXiv 2107.02027). Every
    row of the dataset is in exactly one pack, and is read, pictures and all, when its pack is. `lengths` holds the
    tokens of each row, images included. SFTTrainer wants `dataset_kwargs={"skip_prepare_dataset": True}` for packs.

    Raises `ValueError` naming the rows that are longer than `max_length`, and for lengths that do not fit the dataset.
    """
    if len(lengths) != len(dataset):
        raise ValueError(f"{len(lengths)} lengths for {len(dataset)} rows; give one for each row")
    if too_long := [n for n, length in enumerate(lengths) if length > max_length]:
        raise ValueError(
            f"{len(too_long)} rows are longer than max_length={max_length} (the first at {too_long[:5]}); raise it, or "
            "leave them out"
        )
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left in each pack, and its number, in order
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        place = bisect_left(room, (lengths[n], -1))
        left, number = room.pop(place) if place < len(room) else (max_length, len(packs))
        if number == len(packs):
            packs.append([])
        packs[number].append(n)
        insort(room, (left - lengths[n], number))
    table = Dataset.from_dict({"packed": packs, "length": [sum(lengths[n] for n in pack) for pack in packs]})
    return table.with_transform(partial(_read_packs, dataset=dataset))


def accept_flat_rows(model: nn.Module) -> None:
    """Lets a model with three-dimensional positions (Qwen-VL) take rows without padding: its own `get_rope_index`
    numbers each conversation, which is told by where `position_ids` [1, T] begins again. Other models are left alone.
    """
    core: Any = getattr(model, "get_base_model", lambda: model)().model
    if hasattr(core, "get_rope_index"):
        # On the inner model: PEFT and TRL call the outer one in ways of their own.
        core.register_forward_pre_hook(_number_positions, with_kwargs=True)


def check_flat_rows(model: Any, padded: Mapping[str, Tensor], flat: Mapping[str, Tensor]) -> float:
    """The largest difference of a trained token's loss between a padded batch and the same rows without padding.

    Raises `ValueError` where it is more than rounding: the model then mixes the conversations of a row, or attends to
    pictures in both directions (Gemma).
    """
    with torch.no_grad():
        losses = [_token_losses(model, batch) for batch in (padded, flat)]
    difference = float((losses[0] - losses[1]).abs().max())
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.1
    if difference > tolerance:
        raise ValueError(
            f"{type(model).__name__}: rows without padding change the loss of a token by up to {difference:.2g}, so "
            "its attention does not keep the conversations of a row apart; set padding_free=False and group by length"
        )
    return difference


def _read_packs(batch: Mapping[str, Any], dataset: Dataset) -> dict[str, Any]:
    read = dict(batch)
    if "packed" in batch:
        read["packed"] = [[dataset[n] for n in pack] for pack in batch["packed"]]
    return read


def _number_positions(core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    positions = kwargs.get("position_ids")
    if positions is None or positions.ndim != 2 or len(positions) != 1 or kwargs.get("attention_mask") is not None:
        return None
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], positions.shape[1]], strict=True)]
    mask = pad_sequence([torch.ones_like(part) for part in positions[0].split(lengths)], batch_first=True)
    apart = {
        name: pad_sequence(list(kwargs[name][0].split(lengths)), batch_first=True)
        for name in ("input_ids", "mm_token_type_ids")
    }
    index, _ = core.get_rope_index(image_grid_thw=kwargs.get("image_grid_thw"), attention_mask=mask, **apart)
    return args, {**kwargs, "position_ids": torch.cat([positions[None], index[:, mask.bool()][:, None]])}


def _token_losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of each trained token, row by row."""
    inputs = {name: value.to(model.device) for name, value in batch.items() if name not in ("labels", "rows")}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    labels = batch["labels"][:, 1:].to(logits.device)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return losses[labels != IGNORE_INDEX]
