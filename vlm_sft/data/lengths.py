"""Tokens of each row, image tokens included, from its text and the headers of its pictures: no pixel is decoded.

Nothing is known of model families. The collator encodes one row for each shape of conversation, which shows what the
chat template writes round the texts, and one for each picture size, or fewer where a rule fits; between these, only
text is tokenized.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from datasets import Dataset, DatasetDict
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from vlm_sft.chat.images import Size, size_of
from vlm_sft.chat.messages import Conversation, normalise
from vlm_sft.data.picture_tokens import PictureTokens
from vlm_sft.distributed import on_main

logger = logging.getLogger(__name__)

BLANK: Size = (64, 64)  # the picture that stands for others while text is measured
CHECKED_ROWS = 8  # compared with the collator's own count in the end
_FIRST_MARK = 0xE000  # private-use characters mark the places of texts; transformers 5.23 uses some of plane 15

Shape = tuple[tuple[str, bool, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Lengths:
    """`tokens` and, of those, `image_tokens` of each row, int64 [N]. `exact` where the rows that were compared had just
    these counts in the collator; else they are estimates."""

    tokens: NDArray[np.int64]
    image_tokens: NDArray[np.int64]
    exact: bool

    def __str__(self) -> str:
        shares = (50, 90, 99, 100)
        limits = np.percentile(self.tokens, shares, method="higher")
        text = ", ".join(f"{share}% up to {limit:,}" for share, limit in zip(shares, limits, strict=True))
        images = self.image_tokens.sum() / self.tokens.sum()
        estimated = "" if self.exact else " (estimated)"
        return f"tokens per row{estimated}: {text} (row {self.tokens.argmax()}); {images:.0%} of all are of images"


def measure_lengths(dataset: Any, collator: Any, *, num_proc: int | None = None) -> Lengths:
    """The tokens that `collator` makes of each row, were it not for its `max_length`; in `num_proc` processes.

    Raises `ValueError` naming the first row that cannot be read or encoded; `scan` finds them all.
    """
    collator = replace(collator, max_length=None, generation_config=None)
    processes = min(len(dataset) // 2048, len(os.sched_getaffinity(0))) if num_proc is None else num_proc
    texts: Any = _Texts(dataset, collator)
    batches: Any = DataLoader(texts, batch_size=32, collate_fn=list, num_workers=processes)
    blank_lengths: list[int] = []
    sizes: list[list[Size]] = []
    with tqdm(total=len(dataset), desc="Measuring", unit=" rows") as progress:
        for batch in batches:
            blank_lengths += [length for length, _ in batch]
            sizes += [row_sizes for _, row_sizes in batch]
            progress.update(len(batch))
    pictures = {count: PictureTokens(collator, count) for count in (1, 2)}
    for row in sizes:
        pictures[min(len(row), 2) or 1].seen.update(row)
    image_tokens, tokens = np.zeros((2, len(sizes)), dtype=np.int64)
    for index, (blank_length, row) in enumerate(zip(blank_lengths, sizes, strict=True)):
        tokens_of = pictures[min(len(row), 2) or 1].tokens_of
        image_tokens[index] = sum(map(tokens_of, row))
        tokens[index] = blank_length + image_tokens[index] - sum(tokens_of(BLANK) for _ in row)
    checked = np.linspace(0, len(sizes) - 1, min(CHECKED_ROWS, len(sizes)), dtype=int).tolist()
    wrong = [index for index in checked if len(collator.encode([dataset[index]])[0][0]) != tokens[index]]
    if wrong:
        logger.warning("Lengths are estimates: of %d rows compared with the collator, %s differ.", len(checked), wrong)
    return Lengths(tokens, image_tokens, exact=not wrong)


Data = TypeVar("Data", Dataset, DatasetDict)


def with_lengths(data: Data, collator: Any, *, num_proc: int | None = None) -> Data:
    """The dataset, or each of its splits, with the column `length`: the tokens that `collator` makes of each row.

    The main process measures (see `measure_lengths`). transformers then batches rows of one length by
    `train_sampling_strategy="group_by_length"`, or balances them between processes by `"batch_rebalance"`, if
    `remove_unused_columns=False` keeps the column; `OrderByLength` makes their order sure.
    """
    if isinstance(data, DatasetDict):
        return DatasetDict({name: with_lengths(rows, collator, num_proc=num_proc) for name, rows in data.items()})
    lengths: Lengths = on_main(lambda: measure_lengths(data, collator, num_proc=num_proc))
    # As stored: with a transform, `add_column` may write what that makes.
    stored, how = data.with_format(None), data.format
    rows = _with_column(stored.remove_columns(["length"] if "length" in data.column_names else []), lengths.tokens)
    return rows.with_format(how["type"], **how["format_kwargs"])


def _with_column(rows: Dataset, lengths: NDArray[np.int64]) -> Dataset:
    """The rows with the column `length`. Selected rows `add_column` (datasets 5.2) would first write anew, pictures and
    all; where their numbers tell the place of each, the column goes to the whole, and they are selected again."""
    whole = Dataset(rows.data, info=rows.info)
    if "row" in rows.column_names:
        place = {number: n for n, number in enumerate(whole["row"][:])}
        chosen = [place[number] for number in rows["row"][:]]
        if len(place) == len(whole):
            column = np.zeros(len(whole), dtype=np.int64)
            column[chosen] = lengths
            return whole.add_column("length", column.tolist()).select(chosen)
    return rows.add_column("length", lengths.tolist())


class _Frame(NamedTuple):
    """What stands round the texts of a conversation: strings, and between them the numbers of the texts.

    `strips` says of each text whether the template strips its left and its right end. An answer that is trained on
    begins at each piece of `cuts`. `saved` tokens are left out of the strings, where a token repeats itself.
    """

    pieces: tuple[str | int, ...]
    strips: tuple[tuple[bool, bool], ...]
    cuts: frozenset[int]
    saved: int

    def fill(self, texts: Sequence[str]) -> tuple[str, list[int]]:
        """The whole text, and the characters at which answers begin."""
        out: list[str] = []
        starts, length = [], 0
        for number, piece in enumerate(self.pieces):
            if number in self.cuts:
                starts.append(length)
            if isinstance(piece, int):
                left, right = self.strips[piece]
                text = texts[piece].lstrip() if left else texts[piece]
                piece = text.rstrip() if right else text
            out.append(piece)
            length += len(piece)
        return "".join(out), starts


class _Texts:
    """A map-style dataset of (tokens of the row if each of its pictures were `BLANK`, sizes of its pictures)."""

    def __init__(self, dataset: Any, collator: Any) -> None:
        self.dataset, self.collator, self.tokenizer = dataset, collator, collator.processor.tokenizer
        self.placeholder: str = collator.processor.image_token
        added = self.tokenizer.added_tokens_decoder.values()
        self.runs = re.compile(rf"({_any_of(token.content for token in added)})\1+")
        # Texts that the collator refuses or escapes, and those that templates are known to take apart.
        special = {token.content for token in added if token.special} | {self.placeholder}
        self.unusual = re.compile(rf"{_any_of(special)}|think>")
        self.frames: dict[Shape, _Frame | None] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[tuple[int, list[Size]]]:
        measured: list[tuple[int, list[Size]]] = []
        waiting: list[tuple[int, _Frame, str, list[int]]] = []
        fetch = getattr(self.dataset, "__getitems__", lambda wanted: [self.dataset[index] for index in wanted])
        for place, (index, row) in enumerate(zip(indices, fetch(indices), strict=True)):
            name = row.get("row", index)
            try:
                conversation = normalise(row.get("messages"), row.get("images"))
                sizes = [size_of(image) for image in conversation.images]
            except ValueError as error:
                raise ValueError(f"row {name}: {error}") from None
            texts = _texts_of(conversation)
            frame = self._frame(conversation, name)
            if frame and all(text.strip() and not self.unusual.search(text) for text in texts):
                waiting.append((place, frame, *frame.fill(texts)))
                measured.append((0, sizes))
            else:
                measured.append((len(self._encode(conversation, texts, name)), sizes))
        for (place, *_), length in zip(waiting, self._count(waiting), strict=True):
            measured[place] = (length, measured[place][1])
        return measured

    def _count(self, waiting: Sequence[tuple[int, _Frame, str, list[int]]]) -> list[int]:
        """Tokens of each text, cut as the collator does it where an answer begins inside of a token."""
        if not waiting:
            return []
        add_special = not waiting[0][2].startswith(self.tokenizer.bos_token or "\0")
        encoded = self.tokenizer([text for _, _, text, _ in waiting], add_special_tokens=add_special)
        counts = []
        for n, (_, frame, text, starts) in enumerate(waiting):
            count = len(encoded["input_ids"][n])
            if cuts := [start for start in starts if _straddles(encoded, n, start)]:
                pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
                count = sum(map(len, self.tokenizer(pieces, add_special_tokens=False)["input_ids"]))
                count += self.tokenizer.num_special_tokens_to_add() if add_special else 0
            counts.append(count + frame.saved)
        return counts

    def _encode(self, conversation: Conversation, texts: Sequence[str], name: Any) -> Any:
        """The collator's row with these texts and blank pictures."""
        left = iter(texts)
        messages = [
            {**m, "content": [{**p, "text": next(left)} if p["type"] == "text" else p for p in m["content"]]}
            for m in conversation.messages
        ]
        blanks = [Image.new("RGB", BLANK) for _ in conversation.images]
        return self.collator.encode([{"row": name, "messages": messages, "images": blanks}])[0][0]

    def _frame(self, conversation: Conversation, name: Any) -> _Frame | None:
        """The frame of conversations of this shape; None where the template does more than to copy the texts."""
        shape = tuple(
            (message["role"], message.get("train", True), tuple(part["type"] for part in message["content"]))
            for message in conversation.messages
        )
        if shape not in self.frames:
            self.frames[shape] = self._learn_frame(conversation, name)
        return self.frames[shape]

    def _learn_frame(self, conversation: Conversation, name: Any) -> _Frame | None:
        marks = [chr(_FIRST_MARK + n) for n in range(len(_texts_of(conversation)))]
        spaced = [f" {mark} " for mark in marks]
        row, other = (self._encode(conversation, texts, name) for texts in (marks, spaced))
        text, picture = row.source.rendered.text, _picture_text(row, self.placeholder)
        if any(source.rendered.text.count(mark) != 1 for source in (row.source, other.source) for mark in marks):
            return None
        short = self.runs.sub(r"\1", picture)
        saved = sum(len(run[0]) // len(run[1]) - 1 for run in self.runs.finditer(picture))
        starts = {turn.start for turn in row.source.trained}
        slots = {mark: n for n, mark in enumerate(marks)}
        matches = re.finditer("|".join(map(re.escape, [self.placeholder, *marks])), text)
        edges = sorted({0, len(text), *starts, *(edge for match in matches for edge in match.span())})
        segments = [text[a:b] for a, b in itertools.pairwise(edges)]
        frame = _Frame(
            pieces=tuple(short if segment == self.placeholder else slots.get(segment, segment) for segment in segments),
            strips=tuple(_stripped(mark, text, other.source.rendered.text) for mark in marks),
            cuts=frozenset(n for n, edge in enumerate(edges[:-1]) if edge in starts),
            saved=saved * len(conversation.images),
        )
        expected = other.source.rendered.text.replace(self.placeholder, short)
        return frame if frame.fill(spaced)[0] == expected else None


def _texts_of(conversation: Conversation) -> list[str]:
    return [part["text"] for message in conversation.messages for part in message["content"] if part["type"] == "text"]


def _picture_text(row: Any, placeholder: str) -> str:
    """What took the place of each placeholder in a row whose pictures are all alike."""
    text, count = row.source.rendered.text, len(row.source.conversation.images)
    start = text.find(placeholder)
    return row.text[start : start + len(placeholder) + (len(row.text) - len(text)) // count] if count else ""


def _stripped(mark: str, text: str, spaced: str) -> tuple[bool, bool]:
    """Whether the template stripped the space before the mark, and the one behind it, when it was written with both."""
    ends = []
    for whole in (text, spaced):
        before, behind = whole.split(mark)
        ends.append((len(before) - len(before.rstrip(" ")), len(behind) - len(behind.lstrip(" "))))
    return ends[0][0] == ends[1][0], ends[0][1] == ends[1][1]


def _straddles(encoded: Any, row: int, start: int) -> bool:
    """Whether a token begins before this character and ends behind it."""
    token = encoded.char_to_token(row, start)
    if token is None:
        return False
    characters = encoded.token_to_chars(row, token)
    return bool(characters.start < start < characters.end)


def _any_of(tokens: Iterable[str]) -> str:
    """A pattern for the longest of the tokens; white space is text, not a token."""
    spelled = sorted({token for token in tokens if token.strip()}, key=len, reverse=True)
    return "|".join(map(re.escape, spelled)) or r"(?!)"
