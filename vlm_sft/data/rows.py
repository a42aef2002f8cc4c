"""A stored row becomes a conversation when it is read: columns to messages, file names to opened images.

Rows stay as their source stores them, so nothing is copied, and an edited `to_conversation` acts at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Value
from PIL.Image import Image as PILImage

from vlm_sft.chat.images import open_image, source_of
from vlm_sft.chat.messages import normalise, one_answer
from vlm_sft.data.formats import IMAGES, Layout, closest, flags, layout_of, to_images, to_messages, unused_columns

COLUMNS = ("length", "image_tokens", "trained_tokens")
"""What `check_rows` adds to a row."""

LINES = Features({name: Value("string") for name in ("json", "fault", "file", "columns")} | {"row": Value("int64")})
"""A row of a text file: its JSON or what is wrong with the line; the file; the names of the columns that it fills."""

Change = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""A stored row in, one of a known format out, such as `messages` and `images`: the `to_conversation` of a recipe."""


class ImageFolder(NamedTuple):
    """Where file names in rows start, and whether they may lead out of it."""

    path: Path
    allow_outside: bool = False


Opened = dict[int, tuple[PILImage, Any]]
"""Images opened for `to_conversation`, by id, each with what stores it."""


@dataclass(frozen=True)
class RowReader:
    """Stored rows in, `{"messages", "images", "row"}` and the columns of `check_rows` out. `change` makes rows of a
    known format of others; `columns`, `prompt` and `system_prompt` are those of `load_conversations`; `seed` is the one
    by which rows were held out."""

    folder: ImageFolder
    change: Change | None = None
    columns: tuple[str, ...] = ()
    prompt: str | None = None
    system_prompt: str | None = None
    seed: int | None = None

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row as a conversation, images opened by their headers. Raises `ValueError` naming row and field."""
        return self.open(self.convert(row))

    def convert(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """`read` with the images as they are stored: encoded bytes, file names, or what `change` made. Raises
        `ValueError` for a column that looks like images and is not read."""
        numbers = {name: row[name] for name in ("row", *COLUMNS) if name in row}
        with named(_name(row)):
            found, layout, opened = self._judged(row)
            unused_columns(found, layout)
            file = Path(str(row.get("file")))
            folder = file.parent if row.keys() >= LINES.keys() and file.stem == "metadata" else None

            def kept(image: Any, where: str = "") -> Any:
                image = _unchanged(image, opened)
                name = source_of(image) if folder else None
                return str(Path(folder, name)) if folder and isinstance(name, str) else image

            messages = _with_images(to_messages(found, layout, self.prompt, self.system_prompt), kept)
            return {"messages": messages, "images": [*map(kept, to_images(found, layout))], **numbers}

    def open(self, converted: Mapping[str, Any]) -> dict[str, Any]:
        """What `convert` returned with its images opened, those inside of message parts too."""
        with named(_name(converted)):
            images = [open_at(image, f"images[{n}]", self.folder) for n, image in enumerate(converted["images"])]
            messages = _with_images(converted["messages"], partial(open_at, folder=self.folder))
            return {**converted, "messages": messages, "images": images}

    def unused(self, row: Mapping[str, Any]) -> list[str]:
        """Names of the row's columns, or of those that `change` returned, that are not read."""
        found, layout, _ = self._judged(row)
        return unused_columns(found, layout)

    def _judged(self, row: Mapping[str, Any]) -> tuple[Mapping[str, Any], Layout, Opened]:
        """The row's columns, or what `change` makes of them, and where its conversation is; and the images that were
        opened for `change`, by their ids."""
        found, opened = columns_of(row), Opened()
        if self.change is not None:
            found = _changed({name: self._openable(value, opened, name) for name, value in found.items()}, self.change)
        return found, layout_of(found, self.columns, prompt=self.prompt is not None), opened

    def _openable(self, value: Any, opened: Opened, column: str = "") -> Any:
        """The value as `change` gets it: stored images opened by their headers, and file names in the usual columns of
        images such that they may be opened."""
        if isinstance(value, list):
            return [self._openable(each, opened, column) for each in value]
        with suppress(ValueError):  # it is named where it is read
            is_image = isinstance(value, Mapping) and value.keys() == {"bytes", "path"}
            if is_image or (isinstance(value, str) and value.startswith("data:image/")):
                image = open_image(value, folder=self.folder.path, allow_outside=self.folder.allow_outside)
                opened[id(image)] = (image, value)
                return image
        if isinstance(value, Mapping):
            return {name: self._openable(each, opened) for name, each in value.items()}
        path = os.path.join(self.folder.path, value) if column in IMAGES and isinstance(value, str) else ""
        return os.path.abspath(path) if os.path.isfile(path) else value


class Readers(dict[int, RowReader]):
    """The transform of every dataset that `load_conversations` returns, one object, so that `interleave_datasets` and
    `concatenate_datasets` keep it: each row names its reader. A single column (`dataset["row"]`) is read as it is."""

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        if len(batch) == 1:
            return dict(batch)
        stored = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        rows = [self[row[READER]].read(row) for row in stored]
        return {name: [row[name] for row in rows] for name in rows[0]} if rows else {name: [] for name in batch}


READER = "_reader"  # the column that says which of these reads a row
READERS = Readers()


def columns_of(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns of a stored row. Raises `ValueError` for a line of a file that holds none."""
    if not row.keys() >= LINES.keys():
        return {name: value for name, value in row.items() if name not in ("row", READER, *COLUMNS)}
    if row["fault"]:
        raise ValueError(row["fault"])
    found = json.loads(row["json"])
    found = {"messages": found} if isinstance(found, list) else found
    if not isinstance(found, dict):
        raise ValueError(f"the row is a {type(found).__name__}; expected an object with columns")
    return found


def _transform_of(dataset: Any) -> Any:
    return dataset.format["format_kwargs"].get("transform") if isinstance(dataset, Dataset) else None


def unpacked(dataset: Any) -> Any:
    """The dataset of conversations inside of one that `pack` made; any other as it is."""
    transform = _transform_of(dataset)
    return transform.keywords.get("dataset", dataset) if isinstance(transform, partial) else dataset


def one_answer_rows(rows: Dataset, sources: Any, answers: Any, columns: Mapping[str, Any]) -> Dataset:
    """Rows of one trained answer each, with these columns: of row `sources[n]` up to the answer in its message
    `answers[n]`, or all of it where that is -1. They are read when they are asked for, and nothing is copied."""
    numbers = np.array(rows.with_format(None)["row"][:]) if "row" in rows.column_names else np.arange(len(rows))
    table = Dataset.from_dict({"row": numbers[sources], "source": sources, "answer": answers, **columns})
    return table.with_transform(partial(_read_answers, rows=rows))


def _read_answers(batch: Mapping[str, list[Any]], rows: Dataset) -> dict[str, list[Any]]:
    read = dict(batch)
    if "answer" in batch and "source" in batch:
        found = []
        for source, answer in zip(batch["source"], batch["answer"], strict=True):
            row = rows[source]
            conversation = normalise(row["messages"], row.get("images"))
            found.append(conversation if answer < 0 else one_answer(conversation, answer))
        read |= {"messages": [each.messages for each in found], "images": [each.images for each in found]}
    return read


def stored_rows(dataset: Any) -> Any:
    """The dataset of stored rows inside of one that `pack` or `one_answer_rows` made; any other as it is."""
    transform = _transform_of(dataset := unpacked(dataset))
    return transform.keywords.get("rows", dataset) if isinstance(transform, partial) else dataset


def readers_of(dataset: Any) -> Readers | None:
    """The readers of a dataset that `load_conversations` returned, or several mixed; None for any other."""
    transform = _transform_of(dataset)
    return transform if isinstance(transform, Readers) else None


def drawn_seed(dataset: Any) -> int | None:
    """The seed by which rows of this dataset were held out; None where the source has its own splits, or streams."""
    readers = readers_of(dataset := stored_rows(dataset)) or Readers()
    numbers = pc.unique(dataset.data[READER]).to_pylist() if readers else []
    return next((readers[n].seed for n in numbers if readers[n].seed is not None), None)


def held_out_record(rows: Any) -> dict[str, Any]:
    """What `run.json` keeps for `recorded_rows` to find these rows by: their numbers in the source, and a digest."""
    rows = stored_rows(rows)
    return {"rows": rows.with_format(None)["row"][:] if "row" in rows.column_names else [], "digest": row_digest(rows)}


def recorded_rows(rows: Dataset, run: Path) -> Dataset:
    """Those of the source's rows that a run held out, as the `run.json` in its folder, or the one above it, says.

    Raises `ValueError` where there is none, and where the source has other rows now."""
    files = [file for file in (run / "run.json", run.parent / "run.json") if file.is_file()]
    record = json.loads(files[0].read_text(encoding="utf-8")).get("held_out") if files else None
    if record and record["rows"]:
        places = {number: place for place, number in enumerate(rows.with_format(None)["row"][:])}
        if places.keys() >= set(record["rows"]):
            found = rows.select([places[number] for number in record["rows"]])
            if row_digest(found) == record["digest"]:
                return found
    told = f"{files[0]} tells of no such rows" if files else f"{run} has no run.json that tells which were held out"
    raise ValueError(
        f"the data has no test split, and {told}: name the folder of the run by --run, or score all rows by --split "
        "train, those that were trained on among them"
    )


def row_digest(rows: Any) -> str:
    """The same for the same rows as they are stored, in every process: of a stream its first 16, of encoded images one
    in a thousand. Another name, place or time of a file changes nothing."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(rows, IterableDataset):
        stored, _ = getattr(rows, "stored", (rows.take(0), None))
        batches: Any = [{"": [*stored.take(16)]}]
    else:
        left_out = (*COLUMNS, "file", READER)
        tables = rows.with_format("arrow").iter(1000) if isinstance(rows, Dataset) else ()
        batches = (
            {name: _told(table[name]) for name in table.column_names if name not in left_out} for table in tables
        )
    for batch in batches:
        digest.update(repr(sorted(batch.items())).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _told(column: Any) -> list[Any]:
    return column[:1].to_pylist() if "binary" in str(column.type) else column.to_pylist()  # type: ignore[no-any-return]


def _name(row: Mapping[str, Any]) -> str:
    return f"row {row.get('row', 'without a number')}"


@contextmanager
def named(what: str) -> Iterator[None]:
    """Puts the name in front of a `ValueError`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _unchanged(image: Any, opened: Opened) -> Any:
    """The image as it is stored, where it was opened for `change`, which only looked at it: so it is not decoded to be
    known again. PIL empties `tile` when it loads the pixels."""
    given, stored = opened.get(id(image), (None, None))
    return stored if given is not None and given is image and getattr(image, "tile", None) else image


def _changed(row: Mapping[str, Any], change: Change) -> Mapping[str, Any]:
    try:
        changed = change(row)
    except Exception as error:  # a user's own function
        near = closest(str(error.args[0]), [*row]) if isinstance(error, KeyError) and error.args else ""
        raise ValueError(
            f"to_conversation failed with {type(error).__name__}: {error}{near}; this row has the columns "
            f"{', '.join(map(repr, row))}. Edit to_conversation, or name the columns: {flags(row)}"
        ) from error
    if not isinstance(changed, Mapping):
        raise ValueError(f"to_conversation returned a {type(changed).__name__}; expected a dict of messages and images")
    return changed


def _with_images(messages: Any, change: Callable[[Any, str], Any]) -> Any:
    """The messages with `change(image, where)` in the place of each image that stands in a part itself."""
    if not isinstance(messages, list):
        return messages
    changed = []
    for n, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list):
            parts = [
                {**part, "image": change(part["image"], f"messages[{n}].content[{i}]")}
                if isinstance(part, Mapping) and part.get("image") is not None
                else part
                for i, part in enumerate(content)
            ]
            message = {**message, "content": parts}
        changed.append(message)
    return changed


def open_at(image: Any, where: str, folder: ImageFolder) -> Any:
    """The image with its header read. Raises `ValueError` that names where in the row it stands."""
    with named(where):
        try:
            return open_image(image, folder=folder.path, allow_outside=folder.allow_outside)
        except UnicodeEncodeError:
            raise ValueError(f"the file name {image!r}, which is not Unicode; rename the file") from None
