"""A stored row becomes a conversation when it is read: columns to messages, file names to opened images.

Rows stay as their source stores them, so nothing is copied, and an edited `to_conversation` acts at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, Features, Value

from vlm_sft.chat.images import open_image
from vlm_sft.data.formats import FLAGS, Layout, closest, to_images, to_messages

COLUMNS = ("length", "image_tokens", "trained_tokens")
"""What `check_rows` adds to a row."""

LINES = Features({"json": Value("string"), "fault": Value("string"), "folder": Value("string"), "row": Value("int64")})
"""A row of a text file: its JSON or what is wrong with the line, and the folder its file names start in."""

Change = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""A stored row in, `messages` and `images` out: the `to_conversation` of a recipe."""


class ImageFolder(NamedTuple):
    """Where file names in rows start, and whether they may lead out of it."""

    path: Path
    allow_outside: bool = False


@dataclass(frozen=True)
class RowReader:
    """Stored rows in, `{"messages", "images", "row"}` and the columns of `check_rows` out; a single column
    (`dataset["row"]`) is read as it is. `change` or else `layout` says where the conversation is; `seed` is the one by
    which rows were held out."""

    folder: ImageFolder
    change: Change | None = None
    layout: Layout | None = None
    seed: int | None = None

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        if len(batch) == 1:
            return dict(batch)
        rows = [self.read(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        return {name: [row[name] for row in rows] for name in rows[0]} if rows else {name: [] for name in batch}

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row as a conversation, images opened by their headers. Raises `ValueError` naming row and field."""
        return self.open(self.convert(row))

    def convert(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """`read` with the images as they are stored: encoded bytes, file names, or what `change` made."""
        numbers = {name: row[name] for name in ("row", *COLUMNS) if name in row}
        with named(_name(row)):
            found, folder = (_parse(row), row["folder"]) if row.keys() >= LINES.keys() else (row, "")
            layout = self.layout or CONVERSATION
            if self.change is not None:
                found, layout = _changed(found, self.change), CONVERSATION
            images = [_within(folder, image) for image in to_images(found, layout)]
            return {"messages": to_messages(found, layout), "images": images, **numbers}

    def open(self, converted: Mapping[str, Any]) -> dict[str, Any]:
        """What `convert` returned with its images opened, those inside of message parts too."""
        with named(_name(converted)):
            images = [open_at(image, f"images[{n}]", self.folder) for n, image in enumerate(converted["images"])]
            return {**converted, "messages": _open_parts(converted["messages"], self.folder), "images": images}


CONVERSATION: Layout = {"messages": ("messages",), "images": ("images",)}


def _transform_of(dataset: Any) -> Any:
    return dataset.format["format_kwargs"].get("transform") if isinstance(dataset, Dataset) else None


def unpacked(dataset: Any) -> Any:
    """The dataset of conversations inside of one that `pack` made; any other as it is."""
    transform = _transform_of(dataset)
    return transform.keywords.get("dataset", dataset) if isinstance(transform, partial) else dataset


def reader_of(dataset: Any) -> RowReader | None:
    """The reader of a dataset that `load_conversations` returned, None for any other."""
    transform = _transform_of(dataset)
    return transform if isinstance(transform, RowReader) else None


def drawn_seed(dataset: Any) -> int | None:
    """The seed by which rows of this dataset were held out; None where the source has its own splits, or streams."""
    return getattr(reader_of(unpacked(dataset)), "seed", None)


def _parse(row: Mapping[str, Any]) -> Mapping[str, Any]:
    if row["fault"]:
        raise ValueError(row["fault"])
    found = json.loads(row["json"])
    if not isinstance(found, dict):
        raise ValueError(f"the row is a {type(found).__name__}; expected an object with columns")
    return found


def _name(row: Mapping[str, Any]) -> str:
    return f"row {row.get('row', 'without a number')}"


@contextmanager
def named(what: str) -> Iterator[None]:
    """Puts the name in front of a `ValueError`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _within(folder: str, image: Any) -> Any:
    """The image, its file name put after the folder."""
    if folder and isinstance(image, str):
        return str(Path(folder, image))
    if folder and isinstance(image, Mapping) and isinstance(image.get("path"), str) and image.get("bytes") is None:
        return {**image, "path": str(Path(folder, image["path"]))}
    return image


def _changed(row: Mapping[str, Any], change: Change) -> Mapping[str, Any]:
    try:
        changed = change(row)
    except Exception as error:  # a user's own function
        near = closest(str(error.args[0]), [*row]) if isinstance(error, KeyError) and error.args else ""
        raise ValueError(
            f"to_conversation failed with {type(error).__name__}: {error}{near}; this row has the columns "
            f"{', '.join(map(repr, row))}. Edit to_conversation, or name the columns: {FLAGS}"
        ) from error
    if not isinstance(changed, Mapping) or "messages" not in changed or not changed.keys() <= {"messages", "images"}:
        found = ", ".join(map(repr, changed)) if isinstance(changed, Mapping) else f"a {type(changed).__name__}"
        raise ValueError(f"to_conversation returned {found}; expected a dict of 'messages' and 'images'")
    return changed


def _open_parts(messages: Any, folder: ImageFolder) -> Any:
    """The messages with the images opened that stand in the parts themselves."""
    if not isinstance(messages, list):
        return messages
    opened = []
    for n, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list):
            parts = [
                {**part, "image": open_at(part["image"], f"messages[{n}].content[{i}]", folder)}
                if isinstance(part, Mapping) and part.get("image") is not None
                else part
                for i, part in enumerate(content)
            ]
            message = {**message, "content": parts}
        opened.append(message)
    return opened


def open_at(image: Any, where: str, folder: ImageFolder) -> Any:
    """The image with its header read. Raises `ValueError` that names where in the row it stands."""
    with named(where):
        try:
            return open_image(image, folder=folder.path, allow_outside=folder.allow_outside)
        except UnicodeEncodeError:
            raise ValueError(f"the file name {image!r}, which is not Unicode; rename the file") from None
