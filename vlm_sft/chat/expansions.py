"""What a processor writes in the place of an image, and where the tokens of it stand in the text."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import cache, partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding

from vlm_sft.chat.places import Edit, edited
from vlm_sft.chat.template import ChatTemplate


class _Encoded(BatchEncoding):
    def char_to_token(self, batch: int, char: int) -> int:  # type: ignore[override]  # Idefics3 asks
        start, end = self["offset_mapping"][batch].T
        return int(((start <= char) & (char < end)).argmax())


class _ReadsRunsOnce:
    """A tokenizer that reads one image token of each run of them, and repeats what came of it: to read all 576 of an
    image takes a millisecond. The result is the same, as a text is split at its added tokens before all else."""

    run: re.Pattern[str]
    run_ids: list[int]

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        read: Any = super().__call__  # type: ignore[misc]
        if isinstance(text, str) or not kwargs.get("return_offsets_mapping"):
            return read(text, *args, **kwargs)
        found: list[list[tuple[int, int]]] = [[] for _ in text]

        def one_of(run: re.Match[str], runs: list[tuple[int, int]]) -> str:
            runs.append((len(run[1]), len(run[0]) // len(run[1])))
            return run[1]

        once = [self.run.sub(partial(one_of, runs=runs), whole) for whole, runs in zip(text, found, strict=True)]
        short = read(once, *args, **kwargs | {"padding": False, "return_tensors": None})
        rows = []
        for b, runs in enumerate(found):
            row = {key: np.array(values[b]) for key, values in short.items()}
            at = (row["input_ids"][:, None] == self.run_ids).any(-1)
            if at.sum() != len(runs):  # of other words, as where it is the unknown token as well
                return read(text, *args, **kwargs)
            rows.append(_repeated(row, at, runs) if runs else row)
        fill = {"input_ids": self.pad_token_id}  # type: ignore[attr-defined]
        columns = {key: [torch.from_numpy(row[key]) for row in rows] for key in short}
        padded = {key: pad_sequence(rows, True, fill.get(key, 0)).numpy() for key, rows in columns.items()}
        return _Encoded(padded, tensor_type=kwargs.get("return_tensors"))


def _repeated(row: dict[str, np.ndarray], at: np.ndarray, runs: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """The encoding [T, ...] of one row, in which the tokens `at` [T] stand for runs of so many characters and times."""
    width, times = np.zeros(len(at), int), np.ones(len(at), int)
    width[at], times[at] = np.transpose(runs)
    place = np.repeat(np.arange(len(at)), times)
    nth = np.arange(len(place)) - (np.cumsum(times) - times)[place]
    more = (times - 1) * width
    shift = (np.cumsum(more) - more)[place] + nth * width[place]
    row = {key: values[place] for key, values in row.items()}
    row["offset_mapping"] += (shift * (row["offset_mapping"][:, 1] > 0))[:, None]  # (0, 0) is what the tokenizer adds
    return row


@cache
def _reading_runs_once(kind: Any) -> type:
    return type(kind.__name__, (_ReadsRunsOnce, kind), {})


def reading_runs_once(template: ChatTemplate) -> Any:
    """The template's processor, as it is set now, with a tokenizer that reads runs of an image token once."""
    processor = copy.copy(template.processor)
    processor.tokenizer = tokenizer = copy.copy(processor.tokenizer)
    kind: Any = type(tokenizer)
    tokenizer.__class__ = _reading_runs_once(kind)
    tokenizer.run, tokenizer.run_ids = template.image_run
    return processor


def find_images(template: ChatTemplate, text: str, ids: Tensor, *, name: str) -> tuple[list[Edit], Tensor]:
    """What a processor that does not report it wrote in the place of each image of a rendered text, and the offsets of
    the tokens [T, 2]: runs of the tokens `ids` [T] that only images bring, one for each placeholder or row of them. The
    proof: the text with these in their places, tokenized again, must give the very same tokens, else `ValueError`."""
    added = {i: template.added_tokens[i].content for i in template.image_ids}
    groups = groupby(ids.tolist(), key=added.__contains__)
    runs = ["".join(added[i] for i in run) for brought, run in groups if brought]
    # The template may write some of these tokens itself, next to the placeholder.
    written = "|".join(map(re.escape, {template.placeholder, *added.values()}))
    spans = [place.span() for place in re.finditer(f"(?:{written})+", text)]
    for gap in ("", " ") * (len(runs) == len(spans)):  # some part an image from the word after it
        edits = [
            (start, end, run + gap * bool(re.match(r"[^\s<]", text[end:])))
            for (start, end), run in zip(spans, runs, strict=True)
        ]
        options = {"add_special_tokens": template.add_special_tokens(text), "return_offsets_mapping": True}
        again = template.processor.tokenizer(edited(text, edits), **options)
        if again["input_ids"] == ids.tolist():
            return edits, torch.tensor(again["offset_mapping"])
    found = f"{name}: {type(template.processor).__name__} does not report what it writes in the place of an image"
    why = "and it cannot be told from the tokens, so labels cannot be proven; use a model whose processor reports it"
    raise ValueError(f"{found} (return_text_replacement_offsets), {why}")


def tokens_in(offsets: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Which tokens overlap one of the character spans: bool [T], from offsets [T, 2]. Tokens without characters
    (those that the tokenizer adds) overlap none."""
    start, end = offsets.numpy().T  # for so few, NumPy takes less time than torch
    inside = np.zeros(len(offsets), bool)
    for span_start, span_end in spans:
        inside |= (start < span_end) & (end > span_start)
    return torch.from_numpy(inside & (start < end))
