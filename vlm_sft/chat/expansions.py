"""What a processor writes in the place of an image, and where the tokens of it stand in the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from vlm_sft.chat.template import ChatTemplate, Edit, Rendered, edited


def find_images(
    template: ChatTemplate, rendered: Rendered, ids: Tensor, add_special_tokens: bool, *, name: str
) -> tuple[list[Edit], Tensor]:
    """What a processor that does not report it wrote in the place of each image, and the offsets of the tokens [T, 2]:
    runs of the tokens `ids` [T] that only images bring, one for each placeholder or row of them. The proof: the text
    with these in their places, tokenized again, must give the very same tokens, else `ValueError`."""
    tokenizer = template.processor.tokenizer
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    groups = groupby(ids.tolist(), key=template.image_ids.__contains__)
    runs = ["".join(added[i] for i in run) for brought, run in groups if brought]
    # The template may write some of these tokens itself, next to the placeholder.
    written = "|".join(map(re.escape, {template.placeholder, *(added[i] for i in template.image_ids)}))
    spans = [place.span() for place in re.finditer(f"(?:{written})+", rendered.text)]
    for gap in ("", " ") * (len(runs) == len(spans)):  # some part an image from the word after it
        edits = [
            (start, end, run + gap * bool(re.match(r"[^\s<]", rendered.text[end:])))
            for (start, end), run in zip(spans, runs, strict=True)
        ]
        options = {"add_special_tokens": add_special_tokens, "return_offsets_mapping": True}
        again = tokenizer(edited(rendered.text, edits), **options)
        if again["input_ids"] == ids.tolist():
            return edits, torch.tensor(again["offset_mapping"])
    found = f"{name}: {type(template.processor).__name__} does not report what it writes in the place of an image"
    why = "and it cannot be told from the tokens, so labels cannot be proven; use a model whose processor reports it"
    raise ValueError(f"{found} (return_text_replacement_offsets), {why}")


def tokens_in(offsets: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Which tokens overlap one of the character spans: bool [T], from offsets [T, 2]. Tokens without characters
    (those that the tokenizer adds) overlap none."""
    start, end = offsets.unbind(-1)
    inside = torch.zeros(len(offsets), dtype=torch.bool)
    for span_start, span_end in spans:
        inside |= (start < span_end) & (end > span_start)
    return inside & (start < end)
