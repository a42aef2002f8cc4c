"""`load_conversations`: rows of the Hub, of files or in memory as a `DatasetDict` whose rows hold `messages`, `images`
and `row`.

Rows stay as their source stores them; they are converted, and their images opened, when they are read, so in the data
loader's workers. Images are read only inside the image folder: nothing in a row fetches a URL or reads another file.
"""

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
from vlm_sft.data.formats import closest, named_columns
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

    Reads a Hub dataset; a folder written by `save_to_disk`; a Parquet, Arrow, JSON, JSON-lines, CSV or TSV file, or a
    folder of them, split by their names; a folder of images with a `metadata.jsonl`; a dataset that LLaMA-Factory's
    `dataset_info.json` lists, as FOLDER/NAME or by `config_name`; a `Dataset`, `DatasetDict` or list of dicts. Each row
    is judged by itself: docs/data.md has a row of each format that is known. Where yours have other names, `columns`
    says so: `["prompt=question", "images=photo"]`. Columns that nothing reads are printed, those of images refused.

    - `to_conversation`: from a stored row to one of a known format, as `messages` and `images`; images come to it
      opened. It is not used with `columns` or `prompt`, nor where it asks for a column that rows of a known format do
      not have; that is printed.
    - `prompt`: the question of rows that have none, such as images with captions; `system_prompt`: the system message
      of rows that have none.
    - `split` becomes "train". `eval_split`, else the source's validation or test split, becomes "test". Where there is
      none, `max_eval_rows` rows do, drawn with `seed`. A number of 0 makes it empty, to train without evaluation.
      Without a number, of its own split 500 rows at most, else `eval_fraction` of all, at most 500; with a fraction of
      0 all of its own split, and else no "test".
    - `streaming`: "train" is an `IterableDataset` in the order of the source; "test" a `Dataset` in memory of
      `max_eval_rows` rows, the first ones where the source has no split for it.
    - `image_folder`: what file names in rows are relative to; the folder of the data unless given. Files outside it
      are refused unless `allow_outside` is set, URLs always.

    Raises `ValueError` for a path or folder that does not exist, a column that is not there, a split without rows, and
    where none of the first rows can be read. A bad row among good ones raises when it is read.
    """
    if image_folder and not Path(image_folder).expanduser().is_dir():
        raise ValueError(f"--image_folder {str(image_folder)!r}: there is no such folder (from {Path.cwd()})")
    name, root, sources, columns = _sources(name_or_path, config_name, revision, streaming, columns)
    own: dict[str, str] = {}
    for key in [key for key in sources if key != split]:
        with suppress(ValueError):  # nothing of an unclear name is trained on
            own.setdefault(split_of(Path(key)), key)
    wanted = {"train": split}
    if found := eval_split or next((own[key] for key in EVAL_SPLITS if key in own), None):
        wanted["test"] = found
    if others := sources.keys() - {*wanted.values()}:
        print_main(f"{name}: splits that are not used: {', '.join(sorted(others))}")
    by = "--columns" if columns else None if prompt is None else "--prompt"
    if by and to_conversation:
        print_main(f"{name}: read by {by}; to_conversation is not used")
    reader = RowReader(
        Path(image_folder).expanduser() if image_folder else root,
        allow_outside,
        change=None if by else to_conversation,
        columns=tuple(columns or ()),
        prompt=prompt,
        system_prompt=system_prompt,
        source=name,
    )
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
    count = max_eval_rows
    if "test" not in stored and (eval_fraction or count is not None):
        rows = stored["train"]
        with named_faults(name):
            stored = _held_out(rows, count) if streaming else _drawn(rows, eval_fraction, count, seed)
        reader = replace(reader, seed=None if streaming else seed)
    if "test" in stored:
        test, count = stored["test"], EVAL_ROWS if count is None and eval_fraction else count
        if isinstance(test, Dataset):
            stored["test"] = test if count is None else test.select(range(min(count, len(test))))
        else:
            rows = _dataset_of([*(test if count is None else test.take(count))], test.features)
            stored["test"] = rows.add_column(READER, np.full(len(rows), number, np.int32))
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
        return f"a {type(data).__name__} in memory", Path.cwd(), _in_memory(data, streaming), columns
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


def _in_memory(data: Any, streaming: bool) -> dict[str, Any]:
    splits = dict(data) if isinstance(data, dict) else {"train": data}
    for name, rows in splits.items():
        if isinstance(rows, list):
            splits[name] = rows = _dataset_of([*_lines_of((row, "") for row in rows)], LINES)
        if not isinstance(rows, IterableDataset if streaming else Dataset):
            expected = "an IterableDataset" if streaming else "a Dataset, a list of dicts, or a dict of them by split"
            raise ValueError(f"the rows are a {type(rows).__name__}; expected {expected} (streaming={streaming})")
        if isinstance(rows, Dataset) and rows.format["type"] == "custom":
            raise ValueError("the dataset has a transform, which would not be applied; give it as to_conversation")
    return splits


def _dataset_of(rows: list[dict[str, Any]], features: Features) -> Dataset:
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def _local_sources(path: Path, *, streaming: bool) -> dict[str, Any]:
    """Splits of a folder written by `save_to_disk`, of a data file, or of a folder of data files, told by their names.
    Raises `ValueError` for a path that holds no data, or data of several kinds."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        if next(path.rglob("*.arrow"), None) is None:
            raise ValueError("it holds no row")
        saved = datasets.load_from_disk(path)
        splits = dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
        return {name: rows.to_iterable_dataset() for name, rows in splits.items()} if streaming else splits
    by_split: dict[str, list[Path]] = {}
    found = data_files(path)
    kinds = {KINDS[file.suffix.lower()] for file in found if file.suffix.lower() in KINDS}
    if len(kinds) != 1:
        what = "files of several kinds; give one of them" if kinds else f"none of {', '.join(KINDS)}"
        raise ValueError(f"it holds {what}")
    for file in found:
        by_split.setdefault(split_of(file.relative_to(path)) if path.is_dir() else "train", []).append(file)
    if kinds == {"text"}:
        return {split: tuple(paths) for split, paths in by_split.items()}
    names = {split: [str(file) for file in paths] for split, paths in by_split.items()}
    return dict(datasets.load_dataset(kinds.pop(), data_files=names, streaming=streaming))


def _stored(source: Any, root: Path, streaming: bool, reader: int) -> Any:
    """The source with the columns `row` and, unless it streams, `READER`, images left encoded."""
    if isinstance(source, tuple):
        # By the stamp the cache sees that the files, or the code that reads them, have changed.
        stamp = tuple((os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in (*source, *_CODE))
        kind: Any = IterableDataset if streaming else Dataset
        if not any(True for file in source for _ in read_rows(file)):  # `from_generator` says nothing that helps
            raise ValueError("it holds no row")
        source = kind.from_generator(_lines, features=LINES, gen_kwargs={"files": source, "root": root, "stamp": stamp})
    is_text = (source.features or {}).keys() == LINES.keys()
    if streaming and not is_text:
        unread = source.decode(False) if source.features else source
        names = [name for name in source.column_names or next(iter(unread), {}) if name != "row"]
        features = {name: unread.features[name] for name in names} if source.features else {}
        known = Features(features | {"row": LINES["row"]}) if features else None
        return unread.select_columns(names).map(_number, with_indices=True, features=known)
    if streaming:
        return source
    if not is_text:
        source = source.flatten_indices().with_format(None)
        source = source.remove_columns(["row"] if "row" in source.column_names else [])
        # `cast` would write all images anew.
        features = source.to_iterable_dataset().decode(False).features
        source = Dataset(source.data, info=DatasetInfo(features=features)).add_column("row", np.arange(len(source)))
    return source.add_column(READER, np.full(len(source), reader, np.int32))


def _lines(files: tuple[Path, ...], root: Path, stamp: Any) -> Iterator[dict[str, Any]]:
    yield from _lines_of((row, str(file.relative_to(root))) for file in files for row in read_rows(file))


def _lines_of(rows: Iterable[tuple[Any, str]]) -> Iterator[dict[str, Any]]:
    for number, (row, file) in enumerate(rows):
        line = {"json": None, "fault": None, "file": file, "columns": None, "row": number}
        if isinstance(row, ValueError):
            yield line | {"fault": str(row)}
            continue
        with named(f"row {number}"):
            line["json"] = json.dumps(row, default=_as_json)
        columns = {"messages": row} if isinstance(row, list) else row
        if isinstance(columns, Mapping):
            line["columns"] = json.dumps([name for name, value in columns.items() if formats.is_filled(value)])
        yield line


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


def _drawn(rows: Dataset, fraction: float, count: int | None, seed: int) -> dict[str, Dataset]:
    """Training and test rows, both in the order of the source."""
    if count is None:
        count = max(1, min(EVAL_ROWS, round(fraction * len(rows)))) if len(rows) > 1 else 0
    if count >= len(rows):
        raise ValueError(f"--num_eval_rows {count} of {len(rows)} rows leaves none to train on; give fewer, or a split")
    test = set(random.Random(seed).sample(range(len(rows)), count))
    return {"train": rows.select([n for n in range(len(rows)) if n not in test]), "test": rows.select(sorted(test))}


def _held_out(stream: IterableDataset, count: int | None) -> dict[str, IterableDataset]:
    """The first rows of the stream for testing, those after them for training."""
    count = EVAL_ROWS if count is None else count
    train = stream.skip(count)
    if next(iter(train), None) is None:
        raise ValueError(f"--num_eval_rows {count} holds out every row of the stream; give fewer")
    return {"train": train, "test": stream.take(count)}


def _fitting(rows: Any, reader: RowReader, name: str, *, may_replace: bool) -> RowReader:
    """The reader, without `change` where that asks for a column that the first row has not (nor a similar one), while
    the format of the rows is known. Prints what is not read of them. Raises `ValueError` for columns that are not
    there, and where none of the first rows can be read: a wrong column or folder shows in all of them."""
    kinds = _kinds(rows)
    if not reader.change:
        named_columns(
            reader.columns,
            [*dict.fromkeys(c for row in kinds for c in _columns(row))],
            prompt=reader.prompt is not None,
        )
    first = [*itertools.islice(rows, FIRST_ROWS)]
    fault, plain = _fault(first, reader), replace(reader, change=None)
    missing = fault.__cause__ if fault and reader.change and may_replace else None
    asked = str(missing.args[0]) if isinstance(missing, KeyError) and missing.args else ""
    if asked and not closest(asked, _columns(first[0])) and not _fault(first, plain):
        fault, reader = None, plain
        print_main(
            f"{name}: to_conversation asks for a column {asked!r}, which rows of {', '.join(_columns(first[0]))} do "
            "not have; it is not used, and they are read by their own format"
        )
    if fault:
        raise fault
    _say_unused(kinds, reader, name)
    return reader


def _fault(rows: Sequence[Mapping[str, Any]], reader: RowReader) -> ValueError | None:
    """Why none of the rows can be read; None where one can."""
    faults = []
    for row in rows:
        try:
            reader.read(row)
            return None
        except ValueError as error:
            faults.append(error)
    fault = ValueError(
        f"none of the first {len(faults)} rows can be read. {faults[0]}" if faults else "it holds no row"
    )
    fault.__cause__ = faults[0].__cause__ if faults else None
    return fault


def _columns(row: Mapping[str, Any]) -> list[str]:
    with suppress(ValueError):
        return [*columns_of(row)]
    return []


def _kinds(rows: Any) -> list[Mapping[str, Any]]:
    """The first row of each set of columns that rows fill (of a stream, its first 64 rows)."""
    if isinstance(rows, IterableDataset):
        return [*rows.take(_MOST_KINDS)]
    table = rows.data.table
    names = [name for name in table.column_names if name not in ("row", READER)]
    filled = {name: pc.is_valid(table[name]) for name in names}
    if rows.features.keys() >= LINES.keys():
        filled = {name: table[name] for name in ("file", "columns")}
    kinds = pa.table({**filled, "row": table["row"]}).group_by([*filled]).aggregate([("row", "min")])
    return [rows[number] for number in sorted(kinds["row_min"].to_pylist())[:_MOST_KINDS]]


def _say_unused(kinds: Sequence[Mapping[str, Any]], reader: RowReader, name: str) -> None:
    """Prints the columns that nothing reads. Raises `ValueError` for files of which some hold no conversation."""
    unused: dict[str, int] = {}
    strange: dict[str, list[str]] = {}
    known = set()
    for row in kinds:
        file = str(row.get("file"))
        try:
            for column in reader.unused(row):
                unused.setdefault(column, row["row"])
            known.add(file)
        except ValueError:
            if columns := _columns(row):
                strange.setdefault(file, columns)
    if others := {file: names for file, names in strange.items() if file not in known and known and not reader.change}:
        told = "; ".join(f"{file} (columns {', '.join(names)})" for file, names in others.items())
        raise ValueError(
            f"files of other rows lie beside {', '.join(sorted(known))}: {told}. Give one file, or move them"
        )
    if unused:
        told = ", ".join(f"{column!r}" + f" (from row {row})" * (row > 0) for column, row in unused.items())
        print_main(f"{name}: columns that are not used: {told}")
