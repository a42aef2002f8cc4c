"""How many tokens a picture brings, by its size alone.

Families count by tiles, by patches, by nothing at all. No formula of theirs is written down here: pictures are measured
with the collator, and what their processor says of sizes is used for the rest where the measured ones bear it out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from PIL import Image

from vlm_sft.chat.images import Size

FEW_SIZES = 48  # so many are all measured; of more, so many must obey a rule before it is used


class PictureTokens:
    """How many tokens a picture brings by its size, in rows of one picture or (`count` 2) of several."""

    def __init__(self, collator: Any, count: int) -> None:
        self.collator, self.count = collator, count
        self.seen: set[Size] = set()
        self.measured: dict[Size, int] = {}
        self.rule: Callable[[Size], int] | None = None

    def tokens_of(self, size: Size) -> int:
        if size in self.measured:
            return self.measured[size]
        if self.rule is None:
            self.rule = functools.cache(self._find_rule())  # a processor's own answer takes it 0.2 ms
        return self.rule(size)

    def measure(self, size: Size) -> int:
        if size not in self.measured:
            parts = [*({"type": "image"} for _ in range(self.count)), {"type": "text", "text": "x"}]
            messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "y"}]
            row = self.collator.encode([{"messages": messages, "images": [Image.new("RGB", size)] * self.count}])[0][0]
            self.measured[size] = int(row.image.sum()) // self.count
        return self.measured[size]

    def _find_rule(self) -> Callable[[Size], int]:
        """The first way to tell tokens from a size that is right for all sizes that are tried; else to measure."""
        if len(self.seen) <= FEW_SIZES:
            return self.measure
        tried: set[Size] = set()
        for order in (lambda size: size[0] * size[1], lambda size: size[0] / size[1]):
            ordered = sorted(self.seen, key=order)
            tried |= {ordered[n * (len(ordered) - 1) // (FEW_SIZES // 2 - 1)] for n in range(FEW_SIZES // 2)}
        measured = {size: self.measure(size) for size in tried}
        for hint in (self._patches, self._placeholders, lambda _: 0):
            if rule := self._rule_from(hint, measured):
                return rule
        return self.measure

    def _rule_from(self, hint: Callable[[Size], Any], measured: Mapping[Size, int]) -> Callable[[Size], int] | None:
        """Tokens as a linear function of a number, or as a table where the hint is a tuple (a tiling)."""
        try:
            hints = {size: hint(size) for size in measured}
        except Exception:  # this processor gives no such hint
            return None
        table: dict[Any, int] = {}
        if any(table.setdefault(hints[size], tokens) != tokens for size, tokens in measured.items()):
            return None
        if isinstance(next(iter(table)), tuple):
            return lambda size: (
                table[key] if (key := hint(size)) in table else table.setdefault(key, self.measure(size))
            )
        low, high = min(table), max(table)
        slope = Fraction(table[high] - table[low], (high - low) or 1)
        if any(table[low] + slope * (number - low) != tokens for number, tokens in table.items()):
            return None
        return lambda size: int(table[low] + slope * (hint(size) - low))

    def _patches(self, size: Size) -> Any:
        return self.collator.processor.image_processor.get_number_of_image_patches(size[1], size[0], {})

    def _placeholders(self, size: Size) -> Any:
        # Private, for want of a public name in LLaVA-NeXT and LLaVA-OneVision (transformers 5.23); it is believed only
        # where the sizes that were measured bear it out, and missed only for speed.
        counted = self.collator.processor._get_num_multimodal_tokens(image_sizes=[(size[1], size[0])])
        return counted.num_image_tokens[0]
