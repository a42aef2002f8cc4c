"""A stored row becomes a conversation when it is read, so nothing is copied and an edited `to_conversation` acts at
once. What knows rows as they are stored: which were held out, and whether all processes have the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Features, IterableDataset, Value
from PIL.Image import Image as PILImage

from vlm_sft.chat.images import open_image, source_of
from vlm_sft.chat.messages import normalise, one_answer
from vlm_sft.data.formats import IMAGES, Layout, closest, flags, layout_of, to_images, to_messages, unused_columns
from vlm_sft.distributed import print_main

LINES = Features({name: Value("string") for name in ("json", "fault", "file", "columns")} | {"row": Value("int64")})
"""A row of a text file: its JSON or what is wrong with the line; the file; the names of the columns that it fills."""

READER = "_reader"  # the column that says which of the `Readers` reads a row
Change = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""A stored row in, one of a known format out, such as `messages` and `images`: the `to_conversation` of a recipe."""


@dataclass(frozen=True)
class RowReader:
    """Stored rows in, `{"messages", "images", "row"}` out. File names are relative to `folder`. `change` is the
    `to_conversation` of `load_conversations`, `source` names the data, by `seed` rows were held out."""

    folder: Path
    allow_outside: bool = False
    change: Change | None = None
    columns: tuple[str, ...] = ()
    prompt: str | None = None
    system_prompt: str | None = None
    source: str = ""
    seed: int | None = None

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row as a conversation, images opened by their headers. Raises `ValueError` naming row and field."""
        converted = self.convert(row)
        for number, image in enumerate(converted["images"]):
            with named(f"{row_name(row)}: images[{number}]"):
                converted["images"][number] = self.open(image)
        return converted

    def convert(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """`read` with the images as they are stored: encoded bytes, file names, or what `change` made."""
        with named(row_name(row)):
            found, layout = self.judged(row)
            unused_columns(found, layout)
            messages = to_messages(found, layout, self.prompt, self.system_prompt)
            messages, images = normalise(messages, to_images(found, layout))
            # `change` only looked at these, so no pixel of them need be known: PIL empties `tile` on loading.
            images = [getattr(each, "stored", each) if getattr(each, "tile", None) else each for each in images]
            if row.keys() >= LINES.keys() and Path(row["file"]).stem == "metadata":
                folder, names = os.path.dirname(row["file"]), map(source_of, images)
                images = [os.path.join(folder, each) if isinstance(each, str) else each for each in names]
        return {"messages": messages, "images": images} | ({"row": row["row"]} if "row" in row else {})

    def open(self, image: Any) -> PILImage:
        return open_image(image, folder=self.folder, allow_outside=self.allow_outside)

    def judged(self, row: Mapping[str, Any]) -> tuple[Mapping[str, Any], Layout]:
        """The row's columns, or what `change` makes of them, and where its conversation is."""
        found = columns_of(row)
        if self.change is not None:
            found = _changed({name: self._openable(value, name) for name, value in found.items()}, self.change)
        return found, layout_of(found, self.columns, prompt=self.prompt is not None)

    def _openable(self, value: Any, column: str = "") -> Any:
        """The value as `change` gets it: stored images opened by their headers, file names of images as paths."""
        if isinstance(value, list):
            return [self._openable(each, column) for each in value]
        is_stored = isinstance(value, Mapping) and value.keys() == {"bytes", "path"}
        if is_stored or (isinstance(value, str) and value.startswith("data:image/")):
            with suppress(ValueError):  # it is named where it is read
                image = self.open(value)
                vars(image)["stored"] = value
                return image
        if isinstance(value, Mapping):
            return {name: self._openable(each) for name, each in value.items()}
        path = os.path.join(self.folder, value) if column in IMAGES and isinstance(value, str) else ""
        return os.path.abspath(path) if os.path.isfile(path) else value


@dataclass(eq=False)
class Readers:
    """The transform of every dataset that `load_conversations` returns: each row names its reader. A single column
    (`dataset["row"]`) is read as it is."""

    readers: dict[int, RowReader]

    def __eq__(self, other: object) -> bool:
        """Always, and both then read each other's rows: `interleave_datasets` and `concatenate_datasets` keep the first
        one's transform where all are equal, and drop it where they are not (datasets 5.2)."""
        if not isinstance(other, Readers):
            return False
        self.readers = other.readers = self.readers | other.readers
        return True

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        if len(batch) == 1:
            return dict(batch)
        stored = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        rows = [self.readers[row[READER]].read(row) for row in stored]
        return {name: [row[name] for row in rows] for name in rows[0]} if rows else {name: [] for name in batch}


def columns_of(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns of a stored row. Raises `ValueError` for a line of a file that holds none."""
    if not row.keys() >= LINES.keys():
        return {name: value for name, value in row.items() if name not in ("row", READER)}
    if row["fault"]:
        raise ValueError(row["fault"])
    found = json.loads(row["json"])
    found = {"messages": found} if isinstance(found, list) else found
    if not isinstance(found, dict):
        raise ValueError(f"the row is a {type(found).__name__}; expected an object with columns")
    return found


def _changed(row: Mapping[str, Any], change: Change) -> Mapping[str, Any]:
    try:
        changed = change(row)
    except Exception as error:  # a user's own function
        near = closest(str(error.args[0]), [*row]) if isinstance(error, KeyError) and error.args else ""
        found = f"{type(error).__name__}: {error}{near}; this row has the columns {', '.join(map(repr, row))}"
        remedy = f"Edit to_conversation, or name the columns: {flags(row)}"
        raise ValueError(f"to_conversation failed with {found}. {remedy}") from error
    if not isinstance(changed, Mapping):
        raise ValueError(f"to_conversation returned a {type(changed).__name__}; expected a dict of messages and images")
    return changed


def row_name(row: Mapping[str, Any]) -> str:
    return f"row {row.get('row', 'without a number')}"


@contextmanager
def named(what: str) -> Iterator[None]:
    """Puts the name in front of a `ValueError`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error.__cause__


def _transform_of(dataset: Any) -> Any:
    return dataset.format["format_kwargs"].get("transform") if isinstance(dataset, Dataset) else None


def _inside(dataset: Any, *keywords: str) -> Any:
    held = getattr(_transform_of(dataset), "keywords", {})  # where that is a partial of ours
    inner = next((held[name] for name in keywords if name in held), None)
    return dataset if inner is None else _inside(inner, *keywords)


def unpacked(dataset: Any) -> Any:
    """The dataset of conversations inside of one that `pack` made; any other as it is."""
    return _inside(dataset, "dataset")


def stored_rows(dataset: Any) -> Any:
    """The dataset of stored rows inside of one that `pack` or `check_rows` made; any other as it is."""
    return _inside(dataset, "dataset", "rows")


def checked_rows(rows: Dataset, sources: Any, answers: Any, columns: Mapping[str, Any]) -> Dataset:
    """Rows with these columns: row `sources[n]`, up to the answer in its message `answers[n]`, or all of it where that
    is -1. They are read when they are asked for, and nothing is copied."""
    numbers = np.array(rows.with_format(None)["row"][:]) if "row" in rows.column_names else np.arange(len(rows))
    table = Dataset.from_dict({"row": numbers[sources], "source": sources, "answer": answers, **columns})
    return table.with_transform(partial(_read_checked, rows=rows))


def _read_checked(batch: Mapping[str, list[Any]], rows: Dataset) -> dict[str, list[Any]]:
    if not batch.keys() >= {"source", "answer"}:
        return dict(batch)
    read = rows.__getitems__(batch["source"])
    for row, answer in zip(read, batch["answer"], strict=True):
        if answer >= 0:
            row |= one_answer(normalise(row["messages"], row.get("images")), answer)._asdict()
    columns = {name: [row[name] for row in read] for name in read[0]} if read else {}
    return columns | {name: values for name, values in batch.items() if name not in ("source", "answer")}


def readers_of(dataset: Any) -> dict[int, RowReader]:
    """The readers of a dataset that `load_conversations` returned, or of several mixed, by their number in `READER`."""
    transform = _transform_of(dataset)
    return transform.readers if isinstance(transform, Readers) else {}


def drawn_seed(dataset: Any) -> int | None:
    """The seed by which rows of this dataset were held out; None where the source has its own splits, or streams."""
    readers = readers_of(stored_rows(dataset)).values()
    return next((reader.seed for reader in readers if reader.seed is not None), None)


def held_out_record(rows: Any) -> dict[str, Any]:
    """What `run.json` keeps for `recorded_rows` to find these rows by: their numbers in the source, and a digest."""
    rows = stored_rows(rows)
    return {"rows": rows.with_format(None)["row"][:] if "row" in rows.column_names else [], "digest": row_digest(rows)}


def _record_of(run: Path) -> tuple[Path | None, dict[str, Any]]:
    """The `run.json` in a run's folder, or the one above it (of a checkpoint), and what it says."""
    file = next((file for file in (run / "run.json", run.parent / "run.json") if file.is_file()), None)
    with named(str(file)):
        return file, json.loads(file.read_text(encoding="utf-8")) if file else {}


def recorded_prompt(run: Path, given: str | None = None) -> str | None:
    """The `--system_prompt` that a run was trained with, as its `run.json` says, or `given`, where there was none.
    Raises `ValueError` for another one than that of training."""
    file, record = _record_of(run)
    trained: str | None = record.get("settings", {}).get("recipe", {}).get("system_prompt")
    if trained is None:
        return given
    if given not in (None, trained):
        found = f"{file} tells of a model that was trained with {trained!r}"
        why = f"{found}, and the prompt of training is that of inference"
        raise ValueError(f"--system_prompt {given!r}: {why}; leave --system_prompt out, and that one is asked with")
    print_main(f"asked with the --system_prompt of {file}: {trained!r}")
    return trained


def recorded_rows(rows: Dataset, run: Path) -> Dataset:
    """Those of the source's rows that a run held out, as the `run.json` in its folder, or the one above it, says.
    Raises `ValueError` where there is none, and where the source has other rows now."""
    file, recorded = _record_of(run)
    record = recorded.get("held_out")
    places = {number: place for place, number in enumerate(rows.with_format(None)["row"][:])}
    if record and record["rows"] and places.keys() >= set(record["rows"]):
        found = rows.select([places[number] for number in record["rows"]])
        if row_digest(found) == record["digest"]:
            return found
    told = f"{file} tells of no such rows" if file else f"{run} has no run.json that tells which were held out"
    score = "score all rows by --split train, those that were trained on among them"
    raise ValueError(f"the data has no test split, and {told}: name the folder of the run by --run, or {score}")


def row_digest(rows: Any) -> str:
    """The same for the same rows as they are stored, in every process: of a stream its first 16, of encoded images one
    in a thousand. Another name, place or time of a file changes nothing."""
    batches: Any = [[*rows.stored[0].take(16)]] if hasattr(rows, "stored") else ()  # of a stream
    if isinstance(rows, Dataset):
        names = sorted({*rows.column_names} - {"file", READER})
        some = {name: slice(1 if "binary" in str(rows.data.schema.field(name).type) else None) for name in names}
        tables = rows.with_format("arrow").iter(1000)
        batches = ([(name, table[name][some[name]].to_pylist()) for name in names] for table in tables)
    digest = hashlib.blake2b(digest_size=16)
    for batch in batches:
        digest.update(repr(batch).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def compare_processes(splits: Mapping[str, Any]) -> None:
    """Raises on every process of a launched run where one has other rows than the main one."""
    if PartialState().num_processes == 1:
        return
    sizes = {name: "a stream" if isinstance(rows, IterableDataset) else len(rows) for name, rows in splits.items()}
    main, *others = gather_object([{name: (size, row_digest(splits[name])) for name, size in sizes.items()}])
    for number, other in enumerate(others, 1):
        if names := sorted(name for name in main.keys() | other.keys() if main.get(name) != other.get(name)):
            its, mains = (found.get(names[0], ("none",))[0] for found in (other, main))
            reads = f"reads other rows of {names[0]!r} than the main one (it has {its}, the main one {mains})"
            remedy = "give every process the same data (a shared disk, or the same copy)"
            raise ValueError(f"process {number} {reads}; {remedy}")
