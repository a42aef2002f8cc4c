"""Ids, offsets and spans in, labels out. One row at a time, without padding.

`T` tokens of the row. Characters are those of the text that the tokenizer saw, image placeholders expanded.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100

Span = tuple[int, int]
Replacements = Sequence[Mapping[str, Any]]
"""What a processor put in the place of each image placeholder, as `return_text_replacement_offsets=True` returns it:
`span` in the rendered text, `new_span` and `replacement` in the expanded one."""


def expand(text: str, replacements: Replacements) -> str:
    """The text that the tokenizer saw: each placeholder replaced by what its image brings."""
    pieces, copied = [], 0
    for replaced in replacements:
        start, end = replaced["span"]
        pieces += [text[copied:start], replaced["replacement"]]
        copied = end
    return "".join([*pieces, text[copied:]])


def moved(position: int, replacements: Replacements) -> int:
    """Where a character of the rendered text stands in the expanded one."""
    before = bisect_right([replaced["span"][1] for replaced in replacements], position)
    if not before:
        return position
    last = replacements[before - 1]
    return position + int(last["new_span"][1]) - int(last["span"][1])


def tokens_in(offsets: Tensor, spans: Sequence[Span]) -> Tensor:
    """Which tokens overlap one of the character spans: bool [T], from offsets [T, 2]. Tokens without characters
    (those that the tokenizer adds) overlap none."""
    start, end = offsets.unbind(-1)
    inside = torch.zeros(len(offsets), dtype=torch.bool)
    for span_start, span_end in spans:
        inside |= (start < span_end) & (end > span_start)
    return inside & (start < end)


def straddled(offsets: Tensor, starts: Sequence[int]) -> list[int]:
    """Those starts of turns that lie inside a token, where inference would have a token boundary."""
    start, end = offsets.unbind(-1)
    return [position for position in starts if bool(((start < position) & (end > position)).any())]


def make_labels(input_ids: Tensor, trained: Tensor, image: Tensor) -> Tensor:
    """Labels [T]: the ids of trained tokens, `IGNORE_INDEX` elsewhere and on every token that an image brings."""
    return input_ids.where(trained & ~image, IGNORE_INDEX)
