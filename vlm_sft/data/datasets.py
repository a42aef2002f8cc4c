"""`load_conversations`: rows of the Hub or of files as a `DatasetDict` whose rows hold `messages`, `images` and `row`.

Rows stay as their source stores them; they are converted, and their images opened, when they are read, so in the data
loader's workers. Images are read only inside the image folder: nothing in a row fetches a URL or reads another file.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, DatasetInfo, Features, IterableDataset, IterableDatasetDict, List
from huggingface_hub import constants

from vlm_sft.chat.messages import normalise
from vlm_sft.data import formats
from vlm_sft.data import rows as reading
from vlm_sft.data.formats import TEXT_SUFFIXES, closest, layout_of, read_rows
from vlm_sft.data.rows import LINES, Change, ImageFolder, RowReader, named

EVAL_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")
FIRST_ROWS = 8  # looked at while loading
_CODE = (formats.__file__, reading.__file__)
_KINDS = {".parquet": "parquet", ".arrow": "arrow"} | dict.fromkeys(TEXT_SUFFIXES, "text")
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])")

NUMBER = {"row": LINES["row"]}


def load_conversations(
    name_or_path: str | Path,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    split: str = "train",
    eval_split: str | None = None,
    eval_fraction: float = 0.02,
    streaming: bool = False,
    columns: Sequence[str] | None = None,
    to_conversation: Change | None = None,
    image_folder: str | Path | None = None,
    allow_outside: bool = False,
    max_eval_rows: int | None = None,
    seed: int = 0,
) -> DatasetDict | IterableDatasetDict:
    """`{"train", "test"}` whose rows hold `messages`, `images` and `row`, the row's place in its source.

    Reads a Hub dataset; a folder written by `save_to_disk`; a Parquet, Arrow, JSON, JSON-lines, CSV or TSV file, or a
    folder of them, split by their names; a folder of images with a `metadata.jsonl`. Conversations may be `messages`,
    LLaVA's and ShareGPT's `conversations`, or prompt and response; `columns` says so where yours have other names:
    `["prompt=question", "images=photo"]`.

    - `to_conversation`: from a stored row to a dict of `messages` and `images`, used where no `columns` are given.
    - `split` becomes "train". `eval_split`, else the source's validation or test split, becomes "test". Where there is
      none, `max_eval_rows` rows do, drawn with `seed`, but at most a fifth of all; without a number `eval_fraction` of
      them, where 0 makes none. With a number "test" must be there, and has at most so many rows.
    - `streaming`: "train" is an `IterableDataset` in the order of the source; "test" a `Dataset` in memory of
      `max_eval_rows` rows, the first ones where the source has no split for it.
    - `image_folder`: what file names in rows are relative to; the folder of the data unless given. Files outside it
      are refused unless `allow_outside` is set, URLs always.

    Raises `ValueError` for a path or folder that does not exist, a column that is not there, a split without rows, and
    where none of the first rows can be read. A bad row among good ones raises when it is read.
    """
    if image_folder and not Path(image_folder).expanduser().is_dir():
        raise ValueError(f"image_folder={str(image_folder)!r}: there is no such folder (from {Path.cwd()})")
    path, name = Path(name_or_path).expanduser(), str(name_or_path)
    root = path if path.is_dir() else path.parent if path.exists() else Path(constants.HF_HUB_CACHE)
    with _named_faults(name if path.exists() else f"{name} (no such path, so taken for a Hub id)"):
        if path.exists():
            sources = _local_sources(path, streaming=streaming)
        elif name.count("/") > 1 or name.startswith((".", "~")) or path.suffix.lower() in _KINDS:
            raise ValueError("it does not exist; give the path of a file or folder, or the id of a Hub dataset")
        else:
            sources = dict(datasets.load_dataset(name, name=config_name, revision=revision, streaming=streaming))
    wanted = {"train": split}
    if found := eval_split or next((name for name in EVAL_SPLITS if name in sources and name != split), None):
        wanted["test"] = found
    read_from = ImageFolder(Path(image_folder).expanduser() if image_folder else root, allow_outside)
    stored: dict[str, Any] = {}
    readers: dict[str, RowReader] = {}
    for key, wanted_split in wanted.items():
        with _named_faults(f"{name}, split {wanted_split!r}"):
            if wanted_split not in sources:
                near = closest(wanted_split, [*sources])
                raise ValueError(f"no split {wanted_split!r}{near}; found {', '.join(sources)}")
            stored[key], names = _stored(sources[wanted_split], root, streaming)
            how = (None, layout_of(names, columns)) if columns or not to_conversation else (to_conversation, None)
            readers[key] = RowReader(read_from, *how)
            _check_first_rows(stored[key], readers[key])
    if "test" not in stored and eval_fraction:
        rows = stored["train"]
        stored = _held_out(rows, max_eval_rows) if streaming else _drawn(rows, eval_fraction, max_eval_rows, seed)
        drawn_by = seed if "test" in stored and not streaming else None
        readers["test"] = readers["train"] = replace(readers["train"], seed=drawn_by)
    if max_eval_rows is not None and "test" not in stored:
        raise ValueError(f"{name}: one row, and none to hold out; give more rows, or an eval_split")
    if "test" in stored:
        test, count = stored["test"], max_eval_rows
        if isinstance(test, Dataset):
            stored["test"] = test if count is None else test.take(min(count, len(test)))
        else:
            rows = list(test if count is None else test.take(count))
            stored["test"] = Dataset.from_list(rows, features=test.features)
    splits = {key: rows.with_transform(readers[key]) for key, rows in stored.items() if isinstance(rows, Dataset)}
    if not streaming:
        return DatasetDict(splits)
    names = stored["train"].column_names or [*next(iter(stored["train"]))]
    train = stored["train"].map(readers["train"].read, remove_columns=names)
    vars(train)["stored"] = (stored["train"], readers["train"])  # for `check_rows`: an error ends a mapped stream
    return IterableDatasetDict({"train": train, **splits})


@contextmanager
def _named_faults(name: str | Path) -> Iterator[None]:
    """Whatever goes wrong, as a `ValueError` that names the file and why, which `DatasetGenerationError` does not."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name}: {error.__cause__ or error}") from error


def _local_sources(path: Path, *, streaming: bool) -> dict[str, Any]:
    """Splits of a folder written by `save_to_disk`, of a data file, or of a folder of data files, told by their names.
    Raises `ValueError` for a path that holds no data, or data of several kinds."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        if next(path.rglob("*.arrow"), None) is None:
            raise ValueError("it has no row")
        saved = datasets.load_from_disk(path)
        splits = dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
        return {name: rows.to_iterable_dataset() for name, rows in splits.items()} if streaming else splits
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in found if file.suffix.lower() in _KINDS and not file.name.startswith("dataset_info")]
    files = [file for file in files if file.stem == "metadata"] or files
    kinds = {_KINDS[file.suffix.lower()] for file in files}
    if len(kinds) != 1:
        what = "files of several kinds; give one of them" if kinds else f"none of {', '.join(_KINDS)}"
        raise ValueError(f"it holds {what}")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        named = _SPLIT.search(file.relative_to(path).as_posix().lower()) if path.is_dir() else None
        by_split.setdefault(named[1] if named else "train", []).append(file)
    if kinds == {"text"}:
        return {split: tuple(paths) for split, paths in by_split.items()}
    data_files = {split: [str(file) for file in paths] for split, paths in by_split.items()}
    return dict(datasets.load_dataset(kinds.pop(), data_files=data_files, streaming=streaming))


def _stored(source: Any, root: Path, streaming: bool) -> tuple[Any, list[str]]:
    """The source with the column `row`, images left encoded; and the names of its own columns."""
    if isinstance(source, tuple):
        first = islice((row for file in source for row in read_rows(file)), 64)
        names = [*dict.fromkeys(name for row in first for name in (row if isinstance(row, Mapping) else ()))]
        if not names:
            raise ValueError("no row is an object with columns; expected {'messages': [...], ...} and the like")
        # By the stamp the cache sees that the files, or the code that reads them, have changed.
        stamp = tuple((os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in (*source, *_CODE))
        kind: Any = IterableDataset if streaming else Dataset
        how = {"files": source, "root": root, "stamp": stamp}
        return kind.from_generator(_lines, features=LINES, gen_kwargs=how), names
    if streaming:
        unread = source.decode(False) if source.features else source
        names = [name for name in source.column_names or next(iter(unread), {}) if name != "row"]
        known = source.features and Features({name: _undecode(source.features[name]) for name in names} | NUMBER)
        return unread.select_columns(names).map(_number, with_indices=True, features=known), names
    if not len(source):
        raise ValueError("it has no row")
    source = source.remove_columns(["row"] if "row" in source.column_names else [])
    features = Features({name: _undecode(feature) for name, feature in source.features.items()})
    # `cast` would write all images anew.
    unread = Dataset(source.data, info=DatasetInfo(features=features))
    return unread.add_column("row", list(range(len(unread))), feature=NUMBER["row"]), source.column_names


def _lines(files: tuple[Path, ...], root: Path, stamp: Any) -> Iterator[dict[str, Any]]:
    rows = ((row, file) for file in files for row in read_rows(file))
    for number, (row, file) in enumerate(rows):
        # Beside a metadata file, names are relative to it.
        folder = str(file.parent.relative_to(root)) if file.stem == "metadata" else ""
        fault = str(row) if isinstance(row, ValueError) else None
        yield {"json": None if fault else json.dumps(row), "fault": fault, "folder": folder, "row": number}


def _number(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {**row, "row": number}


def _undecode(feature: Any) -> Any:
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecode(part) for name, part in feature.items()}
    if isinstance(feature, (List, datasets.LargeList)):
        return type(feature)(_undecode(feature.feature))
    return feature


def _drawn(rows: Dataset, fraction: float, most: int | None, seed: int) -> dict[str, Dataset]:
    """Training and test rows, both in the order of the source."""
    if len(rows) < 2:
        return {"train": rows}
    count = round(fraction * len(rows)) if most is None else min(most, len(rows) // 5)
    test = set(random.Random(seed).sample(range(len(rows)), max(1, count)))
    return {"train": rows.select([n for n in range(len(rows)) if n not in test]), "test": rows.select(sorted(test))}


def _held_out(stream: IterableDataset, count: int | None) -> dict[str, IterableDataset]:
    """The first rows of the stream for testing, those after them for training."""
    if count is None:
        raise ValueError("a stream without a test split: say how many of its first rows to hold out (max_eval_rows)")
    train = stream.skip(count)
    if next(iter(train), None) is None:
        raise ValueError(f"max_eval_rows={count} holds out every row of the stream; give less")
    return {"train": train, "test": stream.take(count)}


def _check_first_rows(rows: Any, reader: RowReader) -> None:
    """Raises `ValueError` unless one of the first rows reads: a wrong column or folder shows in all of them."""
    faults = []
    for row in rows.take(FIRST_ROWS if isinstance(rows, IterableDataset) else min(FIRST_ROWS, len(rows))):
        try:
            read = reader.read(row)
            with named(f"row {row['row']}"):
                normalise(read["messages"], read["images"])
            return
        except ValueError as error:
            faults.append(str(error))
    raise ValueError(f"none of the first {len(faults)} rows can be read. {faults[0]}" if faults else "it has no row")
