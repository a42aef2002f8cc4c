"""What a processor writes in the place of an image, and where the tokens of it stand in the text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vlm_sft.chat.template import ChatTemplate, Rendered, Turn

Replacements = Sequence[Mapping[str, Any]]
"""What a processor put in the place of each image placeholder (`return_text_replacement_offsets`): `span` in the
rendered text, `new_span` and `replacement` in the expanded one."""


def find_images(
    template: ChatTemplate, rendered: Rendered, ids: Tensor, add_special_tokens: bool, *, name: str
) -> tuple[Replacements, Tensor]:
    """What a processor that does not report it wrote in the place of each image, and the offsets of the tokens [T, 2].

    Runs of the tokens `ids` [T] that only images bring, one for each placeholder or row of them. The proof: the text
    with these in their places, tokenized again, must give the very same tokens. Raises `ValueError` where it does not.
    """
    added = {i: token.content for i, token in template.processor.tokenizer.added_tokens_decoder.items()}
    groups = groupby(ids.tolist(), key=template.image_ids.__contains__)
    runs = ["".join(added[i] for i in run) for brought, run in groups if brought]
    # The template may write some of these tokens itself, next to the placeholder.
    written = "|".join(map(re.escape, {template.placeholder, *(added[i] for i in template.image_ids)}))
    places = list(re.finditer(f"(?:{written})+", rendered.text))
    for gap in ("", " ") * (len(runs) == len(places)):  # some part an image from the word after it
        replaced: list[dict[str, Any]] = []
        shift = 0
        for place, run in zip(places, runs, strict=True):
            start, end = place.span()
            text = run + gap * bool(re.match(r"[^\s<]", rendered.text[end:]))
            new_span = (start + shift, start + shift + len(text))
            replaced.append({"span": (start, end), "new_span": new_span, "replacement": text})
            shift += len(text) - (end - start)
        again = template.processor.tokenizer(
            expand(rendered, replaced)[0], add_special_tokens=add_special_tokens, return_offsets_mapping=True
        )
        if again["input_ids"] == ids.tolist():
            return replaced, torch.tensor(again["offset_mapping"])
    raise ValueError(
        f"{name}: {type(template.processor).__name__} does not report what it writes in the place of an image "
        "(return_text_replacement_offsets), and it cannot be told from the tokens, so labels cannot be proven; use a "
        "model whose processor does"
    )


def expand(rendered: Rendered, replacements: Replacements) -> tuple[str, list[Turn]]:
    """The text that the tokenizer saw, each placeholder replaced by what its image brings, and the turns in it."""
    text = rendered.text
    for replaced in reversed(replacements):
        start, end = replaced["span"]
        text = text[:start] + replaced["replacement"] + text[end:]

    def shift(position: int) -> int:
        before = [replaced for replaced in replacements if replaced["span"][1] <= position]
        return position + int(before[-1]["new_span"][1] - before[-1]["span"][1]) if before else position

    return text, [turn._replace(start=shift(turn.start), end=shift(turn.end)) for turn in rendered.turns]


def tokens_in(offsets: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Which tokens overlap one of the character spans: bool [T], from offsets [T, 2]. Tokens without characters
    (those that the tokenizer adds) overlap none."""
    start, end = offsets.unbind(-1)
    inside = torch.zeros(len(offsets), dtype=torch.bool)
    for span_start, span_end in spans:
        inside |= (start < span_end) & (end > span_start)
    return inside & (start < end)
