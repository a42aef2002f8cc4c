"""Rows without padding: several conversations in one row, each with positions of its own.

Attention tells the conversations apart by their positions (transformers 5.23, `masking_utils`), which not every model
does. With SDPA a row of T tokens costs T squared, so there group by length instead."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.generic import is_flash_attention_requested

from vlm_sft.chat.collator import IGNORE_INDEX, ChatCollator
from vlm_sft.chat.messages import normalise
from vlm_sft.common import base_of, evaluating


def pack(dataset: Dataset, *, max_length: int) -> Dataset:
    """Rows `{"packed", "length"}`, each of whole conversations of `dataset` with at most `max_length` tokens together.

    Best fit, longest first (Krell et al., arXiv 2107.02027). Every row is in one pack, and is read when its pack is.
    Raises `ValueError` naming the rows that are longer than `max_length`, and without the column `length`."""
    if "length" not in dataset.column_names:
        raise ValueError("no column `length` of each row's tokens; check_rows adds it")
    lengths = dataset.with_format(None)["length"][:]
    if too_long := [n for n, length in enumerate(lengths) if length > max_length]:
        found = f"{len(too_long)} rows are longer than max_length={max_length} (the first at {too_long[:5]})"
        raise ValueError(f"{found}; raise it, or leave them out")
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


def enable_padding_free(model: nn.Module) -> bool:
    """Whether rows without padding pay: with FlashAttention, of whatever source, and no other attention. A model with
    three-dimensional positions (Qwen-VL) is made to take them: its own `get_rope_index` numbers each conversation,
    which is told by where `position_ids` [1, T] begins again."""
    base = base_of(model)
    if hasattr(base.model, "get_rope_index"):
        # On the inner model: PEFT and TRL call the outer one in ways of their own.
        base.model.register_forward_pre_hook(_number_positions, with_kwargs=True)
    return bool(is_flash_attention_requested(base.config.get_text_config()))


def check_padding_free(model: Any, collator: ChatCollator, rows: Sequence[Mapping[str, Any]]) -> float:
    """The largest difference of a trained token's loss between a padded batch and one row, both of one row of each kind
    there is (of packs, of the rows in them): text alone, an image, several, an image after text.

    Raises `ValueError` where it is more than the rounding of this precision: the model then mixes the conversations of
    a row, or attends to images in both directions (Gemma)."""
    every = [row for example in rows for row in example.get("packed", [example])]
    kinds = {kind_of(row): row for row in reversed(every)}  # the first of each
    rows = [*kinds.values(), *every[: max(0, 2 - len(kinds))]]
    padded = collator.with_settings(padding_free=False, pad_to_multiple_of=None, name_rows=False)
    flat = padded.with_settings(padding_free=True)
    with evaluating(model):
        expected, found = (_token_losses(model, collate(rows)) for collate in (padded, flat))
        alone = torch.cat([_token_losses(model, padded([row])) for row in rows])
    difference, rounding = (float((losses - expected).abs().max()) for losses in (found, alone))
    if difference > max(1e-4, 4 * rounding):
        fault = f"{type(model).__name__}: rows without padding change the loss of a token by up to {difference:.2g}"
        why = f"(rounding: {rounding:.1g}), so its attention does not keep the conversations of a row apart"
        raise ValueError(f"{fault} {why}; set padding_free=False and group by length")
    return difference


def kind_of(row: Mapping[str, Any]) -> tuple[int, bool]:
    """No image, one or several, and whether text stands before the first."""
    messages = normalise(row["messages"], row.get("images")).messages
    types = [part["type"] for message in messages if message["role"] == "user" for part in message["content"]]
    return min(2, types.count("image")), "image" in types and types[0] == "text"


def _read_packs(batch: Mapping[str, Any], dataset: Dataset) -> dict[str, Any]:
    read = dict(batch)
    if "packed" in batch:
        read["packed"] = [[dataset[n] for n in pack] for pack in batch["packed"]]
        read["images"] = [None] * len(batch["packed"])  # by this name TRL 1.16 sees that it is not to tokenize
    return read


def _number_positions(core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    positions = kwargs.get("position_ids")
    if positions is None or positions.ndim != 2 or len(positions) != 1 or kwargs.get("attention_mask") is not None:
        return None
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], positions.shape[1]], strict=True)]
    whole = kwargs["input_ids"], kwargs["mm_token_type_ids"], torch.ones_like(positions)
    ids, types, mask = (pad_sequence(list(each[0].split(lengths)), batch_first=True) for each in whole)
    grid = kwargs.get("image_grid_thw")
    index, _ = core.get_rope_index(input_ids=ids, mm_token_type_ids=types, image_grid_thw=grid, attention_mask=mask)
    return args, {**kwargs, "position_ids": torch.cat([positions[None], index[:, mask.bool()][:, None]])}


def _token_losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of each trained token, row by row."""
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:].to(logits.device)
    trained = labels != IGNORE_INDEX
    return torch.nn.functional.cross_entropy(logits[trained].float(), labels[trained], reduction="none")
