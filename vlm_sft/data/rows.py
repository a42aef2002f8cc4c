"""A row as it is stored (`FEATURES`: text as JSON, pictures encoded or by name) and as it is read (a conversation)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import Features, List, Value

from vlm_sft.chat.images import open_image, pad_to_square, to_rgb
from vlm_sft.data.formats import Layout, closest, layout_of, to_messages, to_pictures

IMAGES = List(datasets.Image(decode=False))
FEATURES = Features({"messages": Value("string"), "images": IMAGES, "row": Value("int64")})


Change = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""A stored row in, `messages` and `images` out: the `to_conversation` of a recipe."""


class ImageFolder(NamedTuple):
    """What file names in rows are relative to, whether they may lead out of it, and how its pictures are shown: made
    smaller until they have at most `max_pixels`, and laid on a square of the colour `pad_to_square` (LLaVA-1.5)."""

    path: Path
    allow_outside: bool = False
    max_pixels: int | None = None
    pad_to_square: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class RowReader:
    """Turns stored rows into conversations: JSON parsed, pictures opened by their header and not decoded yet.

    `folders` holds one entry for each source of a mixture, or one named "" where there is a single source. `change`
    comes first, on whole rows; a single column (`dataset["row"]`) is read as it is.
    """

    folders: Mapping[str, ImageFolder]
    change: Change | None = None

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [self.read(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        return {name: [row[name] for row in rows] for name in rows[0]} if rows else {name: [] for name in batch}

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row as a conversation. Raises `ValueError` naming row and field."""
        source = "" if "" in self.folders else row.get("source", "")
        if source not in self.folders and row.keys() & {"messages", "images"}:
            raise ValueError("a row of a mixture is read with its column 'source', which says where its pictures lie")
        folder = self.folders.get(source, ImageFolder(Path()))
        read = dict(row)
        try:
            if self.change is not None and len(row) > 1:
                row = read = {
                    **_changed(row, self.change),
                    **{name: row[name] for name in ("row", "length") if name in row},
                }
            if "messages" in row:
                messages = to_messages(row, {"messages": ("messages",)})
                if isinstance(messages, Mapping) and "fault" in messages:
                    raise ValueError(messages["fault"])
                read["messages"] = _open_parts(messages, folder)
            if "images" in row:
                images = to_pictures(row, {"images": ("images",)})
                read["images"] = [_open(image, f"images[{n}]", folder) for n, image in enumerate(images)]
        except ValueError as error:
            raise ValueError(f"{source} row {row.get('row', 'without a number')}: {error}".lstrip()) from None
        return read


def convert(row: Any, number: int, *, layout: Layout, folder: str = "", change: Change | None = None) -> dict[str, Any]:
    """`messages`, `images` and `row` of a row as people write them (after `change`), file names put behind `folder`.
    One that cannot be read keeps its fault in the place of its messages, to be raised when it is."""
    try:
        if isinstance(row, ValueError):
            raise row
        if not isinstance(row, Mapping):
            raise ValueError(f"the row is a {type(row).__name__}; expected an object with columns")
        if change is not None:
            row = _changed(row, change)
        images = [store_image(image, n, folder=folder) for n, image in enumerate(to_pictures(row, layout))]
        messages = to_messages(row, layout)
    except ValueError as error:
        messages, images = {"fault": str(error)}, []
    return {"messages": messages, "images": images, "row": number}


def store(row: Any, number: int, **how: Any) -> dict[str, Any]:
    """The row converted as `convert` does, as `FEATURES`."""
    converted = convert(row, number, **how)
    return {**converted, "messages": json.dumps(converted["messages"])}


def store_image(image: Any, number: int, *, folder: str = "") -> Any:
    """The `{"bytes", "path"}` of a file name or of encoded bytes; None stays None. Raises `ValueError` for the rest."""
    path, data = (image.get("path"), image.get("bytes")) if isinstance(image, Mapping) else (image, None)
    if image is None:
        return None
    if isinstance(path, bytes):
        path, data = None, path
    if isinstance(data, bytes):
        return {"bytes": data, "path": path if isinstance(path, str) else None}
    if not isinstance(path, str) or data is not None:
        raise ValueError(f"images[{number}] is a {type(image).__name__}; expected a file name")
    if not path.isascii() and path.encode(errors="replace").decode() != path:
        raise ValueError(f"images[{number}] is the file name {path!r}, which is no Unicode; rename the file")
    return {"bytes": None, "path": os.path.join(folder, path)}  # which leaves an absolute path as it is


def _flags(found: list[str]) -> str:
    """What `--columns` takes for these columns, where their names are those of a common format."""
    try:
        return " ".join(f"{field}={name}" for field, names in layout_of(found).items() for name in names)
    except ValueError:
        return "messages=... images=..., or prompt=... response=... images=..."


def _changed(row: Mapping[str, Any], change: Change) -> Mapping[str, Any]:
    try:
        changed = change(row)
    except Exception as error:  # a user's own function
        near = closest(str(error.args[0]), [*row]) if isinstance(error, KeyError) and error.args else ""
        columns = ", ".join(map(repr, row))
        raise ValueError(
            f"to_conversation failed with {type(error).__name__}: {error}{near}; this row has the columns {columns}. "
            f"Edit to_conversation, or name the columns: --columns {_flags(list(row))}"
        ) from error
    if not isinstance(changed, Mapping) or "messages" not in changed or not changed.keys() <= {"messages", "images"}:
        found = ", ".join(map(repr, changed)) if isinstance(changed, Mapping) else f"a {type(changed).__name__}"
        raise ValueError(f"to_conversation returned {found}; expected a dict of 'messages' and 'images'")
    return {"images": None, **changed}


def _open_parts(messages: Any, folder: ImageFolder) -> Any:
    """The messages with the pictures opened that stand in the parts themselves."""

    def opened(part: Any, where: str) -> Any:
        if isinstance(part, Mapping) and part.get("image") is not None:
            return {**part, "image": _open(part["image"], where, folder)}
        return part

    def with_pictures(message: Any, where: str) -> Any:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
            return message
        parts = [opened(part, f"{where}.content[{n}]") for n, part in enumerate(message["content"])]
        return {**message, "content": parts}

    if not isinstance(messages, list):
        return messages
    return [with_pictures(message, f"messages[{n}]") for n, message in enumerate(messages)]


def _open(image: Any, where: str, folder: ImageFolder) -> Any:
    try:
        opened = open_image(image, folder=folder.path, allow_outside=folder.allow_outside)
        if folder.max_pixels is not None and math.prod(opened.size) > folder.max_pixels:
            opened = to_rgb(opened, max_pixels=folder.max_pixels)
        if folder.pad_to_square is not None:
            opened = pad_to_square(to_rgb(opened), background=folder.pad_to_square)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return opened
