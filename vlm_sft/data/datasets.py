"""`load_conversations`: rows of the Hub, of files or in memory, as conversations. They stay as their source stores
them, and are converted, and their images opened, when they are read: so in the data loader's workers."""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, DatasetInfo, Features, IterableDataset, IterableDatasetDict
from huggingface_hub import constants
from PIL.Image import Image as PILImage

from vlm_sft.chat.images import to_rgb
from vlm_sft.data import files, formats
from vlm_sft.data import rows as reading
from vlm_sft.data.files import EVAL_SPLITS, KINDS, data_files, listed, read_rows, split_of
from vlm_sft.data.formats import closest, is_filled, named_columns, unused_columns
from vlm_sft.data.rows import LINES, READER, Change, Readers, RowReader, columns_of, named
from vlm_sft.distributed import print_main

FIRST_ROWS = 8  # looked at while loading
EVAL_ROWS = 500  # held out at most, unless a number is given
_MOST_KINDS = 64  # sets of columns that are looked at while loading
_CODE = (formats.__file__, reading.__file__, files.__file__)
_NUMBERS = itertools.count()  # of readers

Source: TypeAlias = str | Path | Dataset | DatasetDict | IterableDataset | IterableDatasetDict | list[dict[str, Any]]


def load_conversations(
    name_or_path: Source,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    split: str = "train",
    eval_split: str | None = None,
    eval_fraction: float = 0.2,
    streaming: bool = False,
    columns: Sequence[str] | None = None,
    to_conversation: Change | None = None,
    prompt: str | None = None,
    system_prompt: str | None = None,
    image_folder: str | Path | None = None,
    allow_outside: bool = False,
    max_eval_rows: int | None = None,
    seed: int = 0,
) -> DatasetDict | IterableDatasetDict:
    """`{"train", "test"}` whose rows hold `messages`, `images` and `row`, the row's place in its source.

    docs/data.md says where rows may come from, and has a row of each format that is known; each row is judged by
    itself. Where yours have other names, `columns` says so: `["prompt=question", "images=photo"]`. Columns that nothing
    reads are printed, those of images refused.

    - `to_conversation`: from a stored row to one of a known format; images come to it opened. It is not used with
      `columns` or `prompt`, nor where it asks for a column that rows of a known format do not have; that is printed.
    - `prompt`, `system_prompt`: the question (as of images with captions) and the system message of rows without one.
    - `split` becomes "train". `eval_split`, else the source's validation or test split, becomes "test"; where there is
      none, `max_eval_rows` rows drawn with `seed` do. A number of 0 makes it empty, to train without evaluation;
      without one, of its own split 500 rows at most, else `eval_fraction` of all, at most 500; with a fraction of 0
      all of its own split, and else no "test".
    - `streaming`: "train" is an `IterableDataset` in the order of the source; "test" a `Dataset` in memory of
      `max_eval_rows` rows, the first ones where the source has no split for it.
    - `image_folder`: what file names in rows are relative to, else the folder of the data. Files outside it are refused
      unless `allow_outside` is set, URLs always.

    Raises `ValueError` for a path or folder that does not exist, a column that is not there, a split without rows, and
    where none of the first rows can be read. A bad row among good ones raises when it is read."""
    if image_folder and not Path(image_folder).expanduser().is_dir():
        raise ValueError(f"--image_folder {str(image_folder)!r}: there is no such folder (from {Path.cwd()})")
    if allow_outside not in (True, False):
        raise ValueError(f"allow_outside={allow_outside!r}: expected True or False, as text counts as true")
    if max_eval_rows is not None and max_eval_rows < 0:
        expected = "how many rows to hold out, or 0 to train without evaluation (left out: 500, at most a fifth)"
        raise ValueError(f"--num_eval_rows {max_eval_rows}: expected {expected}")
    name, root, sources, columns = _sources(name_or_path, config_name, revision, streaming, columns)
    own: dict[str, str] = {}
    for key in [key for key in sources if key != split]:
        with suppress(ValueError):  # nothing of an unclear name is trained on
            own.setdefault(split_of(Path(key)), key)
    found = eval_split or next((own[key] for key in EVAL_SPLITS if key in own), None)
    wanted = {"train": split} | ({"test": found} if found else {})
    if others := sources.keys() - {*wanted.values()}:
        print_main(f"{name}: splits that are not used: {', '.join(sorted(others))}")
    by = "--columns" if columns else None if prompt is None else "--prompt"
    if by and to_conversation:
        print_main(f"{name}: read by {by}; to_conversation is not used")
    folder, change = Path(image_folder).expanduser() if image_folder else root, None if by else to_conversation
    reader = RowReader(folder, allow_outside, change, tuple(columns or ()), prompt, system_prompt, name)
    stored: dict[str, Any] = {}
    faults, number = [], next(_NUMBERS)
    for key, wanted_split in wanted.items():
        try:
            with named_faults(f"{name}, split {wanted_split!r}"):
                if wanted_split not in sources:
                    near = closest(wanted_split, [*sources])
                    raise ValueError(f"no split {wanted_split!r}{near}; found {', '.join(sources)}")
                stored[key] = _stored(sources[wanted_split], root, streaming, number)
                reader = _fitting(stored[key], reader, name, may_replace=key == "train")
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    if "test" not in stored and (eval_fraction or max_eval_rows is not None):
        with named_faults(name):
            stored = _held_out(stored["train"], eval_fraction, max_eval_rows, seed)
        reader = replace(reader, seed=None if streaming else seed)
    if "test" in stored:
        count = EVAL_ROWS if max_eval_rows is None and eval_fraction else max_eval_rows
        rows = stored["test"] if count is None else stored["test"].take(count)
        if streaming:
            held = [*rows]
            with named_faults(name):
                if held and not rows.features:  # as of a generator
                    rows = _stored(Dataset.from_list(held), root, False, number)
                else:
                    rows = _dataset_of(held, rows.features or LINES)
                    rows = rows.add_column(READER, np.full(len(rows), number, np.int32))
        stored["test"] = rows
    readers = Readers({number: reader})
    splits = {key: rows.with_transform(readers) for key, rows in stored.items() if isinstance(rows, Dataset)}
    if not streaming:
        return DatasetDict(splits)
    names = stored["train"].column_names or [*next(iter(stored["train"]))]
    train = stored["train"].map(reader.read, remove_columns=names)
    vars(train)["stored"] = (stored["train"], reader)  # for `check_rows`: an error ends a mapped stream
    return IterableDatasetDict({"train": train, **splits})


@contextmanager
def named_faults(name: str | Path) -> Iterator[None]:
    """Whatever goes wrong, as a `ValueError` that names the file and why, which `DatasetGenerationError` does not."""
    try:
        yield
    except Exception as error:
        why = error if isinstance(error, ValueError) else error.__cause__ or error
        raise ValueError(f"{name}: {why}") from error


def _sources(
    data: Source, config_name: str | None, revision: str | None, streaming: bool, columns: Sequence[str] | None
) -> tuple[str, Path, dict[str, Any], Sequence[str] | None]:
    """How the data is called, the folder of its images, its splits, and the columns that are named for it."""
    if not isinstance(data, (str, Path)):
        splits = {split: _in_memory(rows, streaming) for split, rows in _splits_of(data).items()}
        return f"a {type(data).__name__} in memory", Path.cwd(), splits, columns
    path, name = Path(data).expanduser(), str(data)
    if entry := listed(path, config_name):
        source, columns, config_name = entry[0], columns or entry[1], None
        print_main(f"{name}: read as dataset_info.json says: {source} {' '.join(columns)}".rstrip())
        path, name = Path(source), source
    root = path if path.is_dir() else path.parent if path.exists() else Path(constants.HF_HUB_CACHE)
    with named_faults(name if path.exists() else f"{name} (no such path, so taken for a Hub id)"):
        if path.exists():
            return name, root, _local_sources(path, streaming=streaming), columns
        if name.count("/") > 1 or name.startswith((".", "~")) or path.suffix.lower() in KINDS:
            raise ValueError("it does not exist; give the path of a file or folder, or the id of a Hub dataset")
        found = datasets.load_dataset(name, name=config_name, revision=revision, streaming=streaming)
        return name, root, dict(found), columns


def _splits_of(data: Any) -> dict[str, Any]:
    return dict(data) if isinstance(data, dict) else {"train": data}


def _in_memory(rows: Any, streaming: bool) -> Any:
    if isinstance(rows, list):
        rows = _dataset_of([*_lines_of((row, "") for row in rows)], LINES)
    if not isinstance(rows, IterableDataset if streaming else Dataset):
        expected = "an IterableDataset" if streaming else "a Dataset, a list of dicts, or a dict of them by split"
        raise ValueError(f"the rows are a {type(rows).__name__}; expected {expected} (streaming={streaming})")
    if isinstance(rows, Dataset) and rows.format["type"] == "custom":
        raise ValueError("the dataset has a transform, which would not be applied; give it as to_conversation")
    return rows


def _dataset_of(rows: list[dict[str, Any]], features: Features) -> Dataset:
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def _local_sources(path: Path, *, streaming: bool) -> dict[str, Any]:
    """Splits of a folder written by `save_to_disk`, of a data file, or of a folder of them, told by their names."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        if next(path.rglob("*.arrow"), None) is None:
            raise ValueError("it holds no row")
        splits = _splits_of(datasets.load_from_disk(path))
        return {name: rows.to_iterable_dataset() for name, rows in splits.items()} if streaming else splits
    by_split: dict[str, list[str]] = {}
    found = data_files(path)
    kinds = {KINDS[file.suffix.lower()] for file in found}
    if len(kinds) != 1:
        what = "files of several kinds; give one of them" if kinds else f"none of {', '.join(KINDS)}"
        raise ValueError(f"it holds {what}")
    for file in found:
        by_split.setdefault(split_of(file.relative_to(path)) if path.is_dir() else "train", []).append(str(file))
    if kinds == {"text"}:
        return {split: tuple(map(Path, names)) for split, names in by_split.items()}
    return dict(datasets.load_dataset(kinds.pop(), data_files=by_split, streaming=streaming))


def _stored(source: Any, root: Path, streaming: bool, reader: int) -> Any:
    """The source with the columns `row` and, unless it streams, `READER`, images left encoded."""
    if isinstance(source, tuple):
        if not any(True for file in source for _ in read_rows(file)):  # `from_generator` says nothing that helps
            raise ValueError("it holds no row")
        # By the stamp the cache sees that the files, or the code that reads them, have changed.
        stamp = tuple((os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in (*source, *_CODE))
        from_generator = IterableDataset.from_generator if streaming else Dataset.from_generator
        source = from_generator(_lines, features=LINES, gen_kwargs={"files": source, "root": root, "stamp": stamp})
    if (source.features or {}).keys() != LINES.keys():
        names = [name for name in source.column_names or next(iter(source), {}) if name != "row"]
        source = source.with_format(None).select_columns(names)
        # `cast` would write all images of a `Dataset` anew.
        unread = source.to_iterable_dataset() if isinstance(source, Dataset) else source
        unread = unread.decode(False) if source.features else unread
        if streaming:
            known = source.features and Features({**unread.features, "row": LINES["row"]})
            return unread.map(_number, with_indices=True, features=known)
        source = Dataset(source.flatten_indices().data, info=DatasetInfo(features=unread.features))
        source = source.add_column("row", np.arange(len(source)))
    return source if streaming else source.add_column(READER, np.full(len(source), reader, np.int32))


def _lines(files: tuple[Path, ...], root: Path, stamp: Any) -> Iterator[dict[str, Any]]:
    yield from _lines_of((row, str(file.relative_to(root))) for file in files for row in read_rows(file))


def _lines_of(rows: Iterable[tuple[Any, str]]) -> Iterator[dict[str, Any]]:
    for number, (row, file) in enumerate(rows):
        fault = str(row) if isinstance(row, ValueError) else None
        with named(f"row {number}"):
            text = None if fault else json.dumps(row, default=_as_json)
        columns = {"messages": row} if isinstance(row, list) else row if isinstance(row, Mapping) else {}
        filled = json.dumps([name for name, value in columns.items() if is_filled(value)]) if columns else None
        yield {"json": text, "fault": fault, "file": file, "columns": filled, "row": number}


def _as_json(value: Any) -> Any:
    """An image in memory as a data URL: lossless, upright RGB."""
    if isinstance(value, PILImage):
        held = BytesIO()
        to_rgb(value).save(held, "PNG", compress_level=1)
        value = held.getvalue()
    if isinstance(value, (bytes, bytearray)):
        return f"data:image/png;base64,{base64.b64encode(value).decode()}"
    if isinstance(value, Path):
        return str(value)
    raise ValueError(f"it holds a {type(value).__name__}; expected text, numbers, lists, dicts, bytes and PIL images")


def _number(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {**row, "row": number}


def _held_out(rows: Any, fraction: float, count: int | None, seed: int) -> dict[str, Any]:
    """Training and test rows, both in the order of the source; of a stream its first rows are those for testing."""
    if isinstance(rows, IterableDataset):
        count = EVAL_ROWS if count is None else count
        if next(iter(rows.skip(count)), None) is None:
            raise ValueError(f"--num_eval_rows {count} holds out every row of the stream; give fewer")
        return {"train": rows.skip(count), "test": rows.take(count)}
    if count is None:
        count = max(1, min(EVAL_ROWS, round(fraction * len(rows)))) if len(rows) > 1 else 0
    if count >= len(rows):
        raise ValueError(f"--num_eval_rows {count} of {len(rows)} rows leaves none to train on; give fewer, or a split")
    test = set(random.Random(seed).sample(range(len(rows)), count))
    return {"train": rows.select([n for n in range(len(rows)) if n not in test]), "test": rows.select(sorted(test))}


def _fitting(rows: Any, reader: RowReader, name: str, *, may_replace: bool) -> RowReader:
    """The reader, without `change` where that asks for a column that the first row has not (nor a similar one) and the
    format is known. Raises `ValueError` for columns that are not there, and where no first row can be read."""
    kinds, first = _kinds(rows), [*rows.take(FIRST_ROWS)]
    if not reader.change:
        columns = dict.fromkeys(column for row in kinds for column in _columns(row))
        named_columns(reader.columns, [*columns], prompt=reader.prompt is not None)
    fault, plain = _fault(first, reader), replace(reader, change=None)
    missing = fault.__cause__ if fault and reader.change and may_replace else None
    asked = str(missing.args[0]) if isinstance(missing, KeyError) and missing.args else ""
    if asked and not closest(asked, _columns(first[0])) and not _fault(first, plain):
        fault, reader = None, plain
        missed = f"a column {asked!r}, which rows of {', '.join(_columns(first[0]))} do not have"
        print_main(f"{name}: to_conversation asks for {missed}; it is not used, and they are read by their own format")
    if fault:
        raise fault
    _say_unused(kinds, reader, name)
    return reader


def _fault(rows: Sequence[Mapping[str, Any]], reader: RowReader) -> ValueError | None:
    """Why none of the rows can be read; None where one can."""
    first = None
    for row in rows:
        try:
            reader.read(row)
        except ValueError as error:
            first = first or error
        else:
            return None
    fault = ValueError(f"none of the first {len(rows)} rows can be read. {first}" if rows else "it holds no row")
    fault.__cause__ = first.__cause__ if first else None
    return fault


def _columns(row: Mapping[str, Any]) -> list[str]:
    with suppress(ValueError):
        return [*columns_of(row)]
    return []


def _kinds(rows: Any) -> list[Mapping[str, Any]]:
    """The first row of each set of columns that rows fill (of a stream, its first 64 rows)."""
    if isinstance(rows, IterableDataset):
        return [*rows.take(_MOST_KINDS)]
    table, is_text = rows.data.table, rows.features.keys() >= LINES.keys()
    names = ["file", "columns"] if is_text else [name for name in table.column_names if name not in ("row", READER)]
    filled = {name: table[name] if is_text else pc.is_valid(table[name]) for name in names}
    kinds = pa.table({**filled, "row": table["row"]}).group_by(names).aggregate([("row", "min")])
    return [rows[number] for number in sorted(kinds["row_min"].to_pylist())[:_MOST_KINDS]]


def _say_unused(kinds: Sequence[Mapping[str, Any]], reader: RowReader, name: str) -> None:
    """Prints the columns that nothing reads. Raises `ValueError` for files of which some hold no conversation."""
    unused, strange, known = dict[str, int](), dict[str, list[str]](), set[str]()
    for row in kinds:
        file = str(row.get("file"))
        try:
            for column in unused_columns(*reader.judged(row)):
                unused.setdefault(column, row["row"])
            known.add(file)
        except ValueError:
            strange |= {file: _columns(row)} if _columns(row) else {}
    if known and not reader.change and (others := strange.keys() - known):
        told = "; ".join(f"{file} (columns {', '.join(strange[file])})" for file in sorted(others))
        ours = ", ".join(sorted(known))
        raise ValueError(f"files of other rows lie beside {ours}: {told}. Give one file, or move them")
    if unused:
        told = ", ".join(f"{column!r}" + f" (from row {row})" * (row > 0) for column, row in unused.items())
        print_main(f"{name}: columns that are not used: {told}")
