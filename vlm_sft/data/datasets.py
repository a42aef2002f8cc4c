"""Conversations from the Hub or from files, as a `DatasetDict` whose rows hold `messages`, `images` and `row`.

Text is brought into one column once, and cached. Pictures are opened when a row is read, so in the data loader's
workers, and only inside the image folder: nothing in a row fetches a URL or reads another file.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, DatasetInfo, Features, IterableDataset, IterableDatasetDict, List
from huggingface_hub import constants

from vlm_sft.chat.messages import normalise
from vlm_sft.data import formats, rows
from vlm_sft.data.formats import Columns, Layout, closest, layout_of, read_rows, to_pictures
from vlm_sft.data.rows import FEATURES, IMAGES, Change, ImageFolder, RowReader, convert, store, store_image
from vlm_sft.data.sources import Source, hub_sources, local_sources

EVAL_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")
CONVERSATION: Layout = {"messages": ("messages",), "images": ("images",)}
FIRST_ROWS = 8  # looked at while loading
_CODE = (formats.__file__, rows.__file__)


def load_conversations(
    name_or_path: str | Path,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    split: str = "train",
    eval_split: str | None = None,
    eval_fraction: float = 0.02,
    streaming: bool = False,
    columns: Columns | None = None,
    to_conversation: Change | None = None,
    image_folder: str | Path | None = None,
    allow_outside: bool = False,
    max_pixels: int | None = None,
    pad_to_square: tuple[int, int, int] | None = None,
    max_rows: int | None = None,
    max_eval_rows: int | None = None,
    seed: int = 0,
) -> DatasetDict | IterableDatasetDict:
    """`{"train", "test"}` with the columns `messages`, `images` and `row`, the row's place in its source.

    Reads a Hub dataset; a folder written by `save_to_disk`; a Parquet, Arrow, JSON, JSON-lines, CSV or TSV file, or a
    folder of them, split by their names; a folder of pictures with a `metadata.jsonl`. Conversations may be `messages`,
    LLaVA's and ShareGPT's `conversations`, or prompt and response; `columns` says so where yours have other names:
    `{"prompt": "frage", "response": "antwort", "images": "bild"}`, or `["prompt=frage", ...]` as flags write it.

    - `to_conversation`: a function of your own from a stored row to a dict of `messages` and `images`, where
      no `columns` are given; pictures pass through it as they are stored.
    - `split` becomes "train". `eval_split`, else the source's validation or test split, becomes "test". Where there is
      none, `eval_fraction` of the rows does, drawn with `seed` (when streaming, every n-th row); 0 makes none.
    - `max_rows`: only the first rows of each split. `max_eval_rows`: of "test", which then must be there.
    - `image_folder`: what file names in rows are relative to; the folder of the data unless given. Files outside it
      are refused unless `allow_outside` is set, URLs always.
    - `max_pixels`: larger pictures are made smaller, in their shape. `pad_to_square`: LLaVA-1.5's padding, a background
      as in `tuple(int(255 * mean) for mean in processor.image_processor.image_mean)`.

    Raises `ValueError` for a path or folder that does not exist, a column that is not there, a split without rows, and
    where none of the first rows can be read. One bad row among good ones raises when it is read; `scan` finds them all.
    """
    if columns:
        to_conversation = None
    if image_folder and not Path(image_folder).expanduser().is_dir():
        raise ValueError(f"image_folder={str(image_folder)!r}: there is no such folder (from {Path.cwd()})")
    path = Path(name_or_path).expanduser()
    root = path if path.is_dir() else path.parent if path.exists() else Path(constants.HF_HUB_CACHE)
    with _named_faults(name_or_path if path.exists() else f"{name_or_path} (no such path, so taken for a Hub id)"):
        sources = (
            local_sources(path, streaming=streaming)
            if path.exists()
            else hub_sources(str(name_or_path), config_name=config_name, revision=revision, streaming=streaming)
        )
    read_from = Path(image_folder).expanduser() if image_folder else root
    folder = ImageFolder(read_from, allow_outside, max_pixels, pad_to_square)
    stored = not streaming and all(isinstance(source, Dataset) for source in sources.values())
    reader = RowReader({"": folder}, to_conversation if stored else None)
    wanted = {"train": split}
    if found := eval_split or next((name for name in EVAL_SPLITS if name in sources and name != split), None):
        wanted["test"] = found
    if missing := [name for name in wanted.values() if name not in sources]:
        raise ValueError(
            f"{name_or_path} has no split {missing[0]!r}{closest(missing[0], [*sources])}; found {', '.join(sources)}"
        )
    loaded = {}
    for key, name in wanted.items():
        with _named_faults(f"{name_or_path}, split {name!r}"):
            loaded[key] = _convert(sources[name], columns, to_conversation, root, max_rows, streaming)
            _check_first_rows(loaded[key], reader)
    if "test" not in loaded and eval_fraction:
        loaded = _divide(loaded["train"], eval_fraction, seed)
    if max_eval_rows is not None:
        if "test" not in loaded:
            raise ValueError(f"{name_or_path}: one row, and none to hold out; give more rows, or an eval_split")
        rows = loaded["test"]
        loaded["test"] = rows.take(max_eval_rows if streaming else min(max_eval_rows, len(rows)))
    if streaming:
        return IterableDatasetDict({key: rows.map(reader.read) for key, rows in loaded.items()})
    return DatasetDict({key: rows.with_transform(reader) for key, rows in loaded.items()})


def mix(parts: Mapping[str, DatasetDict], *, weights: Mapping[str, float], seed: int = 0) -> DatasetDict:
    """One `{"train", "test"}` of several: training rows drawn by weight until each has come at least once (those of
    light parts come again), test rows once each. A column `source` holds the part's name.

    Storage that differs between the parts is made the same first, once, and cached. Raises `ValueError` for weights
    that do not fit the parts.
    """
    if parts.keys() != weights.keys() or not all(weight > 0 for weight in weights.values()):
        raise ValueError(f"weights={dict(weights)}; expected one above 0 for each of {', '.join(parts)}")
    readers = {name: part["train"].format["format_kwargs"]["transform"] for name, part in parts.items()}
    if changed := [name for name, reader in readers.items() if reader.change is not None]:
        raise ValueError(f"{', '.join(changed)}: read with to_conversation, and cannot be mixed; use columns= instead")
    folders = {name: reader.folders[""] for name, reader in readers.items()}
    uniform = {
        key: [_uniform(part[key], name) for name, part in parts.items() if key in part] for key in ("train", "test")
    }
    total = sum(weights.values())
    mixed = {
        "train": datasets.interleave_datasets(
            uniform["train"],
            probabilities=[weights[name] / total for name in parts],
            seed=seed,
            stopping_strategy="all_exhausted",
        )
    }
    if uniform["test"]:
        mixed["test"] = datasets.concatenate_datasets(uniform["test"])
    return DatasetDict({key: rows.with_transform(RowReader(folders)) for key, rows in mixed.items()})


@contextmanager
def _named_faults(name: str | Path) -> Iterator[None]:
    """Whatever goes wrong in reading `name`, as a `ValueError` that says why: each layer below has its own exceptions,
    and `DatasetGenerationError` keeps the reason to itself."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name}: {error.__cause__ or error}") from error


def _convert(
    source: Source, columns: Columns | None, change: Change | None, root: Path, max_rows: int | None, streaming: bool
) -> Any:
    """The source with the columns `messages`, `images` and `row`, pictures not opened yet."""

    def layout(found: list[str]) -> Layout:
        return layout_of(found, columns) if change is None else CONVERSATION

    if isinstance(source, tuple):
        first = islice((row for file in source for row in read_rows(file)), 64)
        found = dict.fromkeys(name for row in first for name in (row if isinstance(row, Mapping) else ()))
        if not found:
            raise ValueError("no row is an object with columns; expected {'messages': [...], ...} and the like")
        settings = {
            "files": source,
            "root": root,
            "layout": layout(list(found)),
            "change": change,
            "max_rows": max_rows,
        }
        # By this the cache sees that the files, or the code that reads them, have changed.
        settings["stamp"] = tuple((os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in (*source, *_CODE))
        if streaming:
            return IterableDataset.from_generator(_stored_rows, gen_kwargs=settings)
        return Dataset.from_generator(_stored_rows, features=FEATURES, gen_kwargs=settings)
    if streaming:
        undecoded = source.decode(False) if source.features else source
        names = source.column_names or list(next(iter(undecoded), {}))
        converted = partial(convert, layout=layout(names), change=change)
        rows = undecoded.map(converted, with_indices=True, remove_columns=names)
        return rows if max_rows is None else rows.take(max_rows)
    if max_rows is not None:
        source = source.take(min(max_rows, len(source)))
    if not len(source):
        raise ValueError("it has no row")
    if change is None:
        return _from_arrow(source, layout(source.column_names))
    # Changed when read: to store the result would copy every picture.
    source = source.remove_columns(["row"] if "row" in source.column_names else [])
    features = Features({name: _undecode(feature) for name, feature in source.features.items()})
    return _numbered(Dataset(source.data, info=DatasetInfo(features=features)))


def _stored_rows(
    files: tuple[Path, ...], root: Path, layout: Layout, change: Change | None, max_rows: int | None, stamp: Any
) -> Iterator[dict[str, Any]]:
    found = ((row, file) for file in files for row in read_rows(file))
    for number, (row, file) in enumerate(islice(found, max_rows)):
        # Beside a metadata file, names are relative to it.
        folder = str(file.parent.relative_to(root)) if file.stem == "metadata" else ""
        yield store(row, number, layout=layout, folder=folder, change=change)


def _from_arrow(source: Dataset, layout: Layout) -> Dataset:
    """The columns side by side, those of the source as they are: pixels are not copied."""
    if "messages" in layout:
        text = _undecoded(source, layout["messages"][0], "messages")
    else:
        used = [name for field, names in layout.items() if field != "images" for name in names]
        how = {"fn_kwargs": {"layout": layout}, "remove_columns": used, "desc": "Reading conversations"}
        text = source.select_columns(used).map(store, with_indices=True, **how).select_columns(["messages"])
    if "images" in layout:
        images = _undecoded(source, layout["images"][0], "images")
    else:
        images = Dataset.from_dict({"images": [None] * len(text)}, features=Features({"images": IMAGES}))
    return _numbered(datasets.concatenate_datasets([text, images], axis=1))


def _numbered(rows: Dataset) -> Dataset:
    return rows.add_column("row", list(range(len(rows))), feature=FEATURES["row"])


def _undecoded(source: Dataset, name: str, new_name: str) -> Dataset:
    """One column, in which pictures stay encoded when a row is read. (`cast_column` would copy them all.)"""
    column = source.select_columns([name])
    info = DatasetInfo(features=Features({new_name: _undecode(column.features[name])}))
    return Dataset(column.data.rename_columns([new_name]), info=info)


def _undecode(feature: Any) -> Any:
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecode(part) for name, part in feature.items()}
    if isinstance(feature, (List, datasets.LargeList)):
        return type(feature)(_undecode(feature.feature))
    return feature


def _uniform(rows: Dataset, source: str) -> Dataset:
    """The rows stored as `FEATURES`, with the column `source`."""
    rows = rows.with_format(None)
    columns = []
    for name, feature in FEATURES.items():
        column = rows.select_columns([name])
        if column.features[name] != feature:
            column = column.map(
                _uniform_cell, features=Features({name: feature}), desc=f"Bringing {name} into one form"
            )
        columns.append(column)
    return datasets.concatenate_datasets(columns, axis=1).add_column("source", [source] * len(rows))


def _uniform_cell(row: dict[str, Any]) -> dict[str, Any]:
    if "images" in row:
        return {"images": [store_image(image, n) for n, image in enumerate(to_pictures(row, {"images": ("images",)}))]}
    return {"messages": json.dumps(row["messages"])}


def _divide(rows: Any, fraction: float, seed: int) -> dict[str, Any]:
    """Training and test rows, both in the order of the source."""
    if isinstance(rows, IterableDataset):
        every = max(2, round(1 / fraction))
        return {
            key: rows.filter(partial(_is_drawn, every=every, drawn=drawn))
            for key, drawn in (("train", False), ("test", True))
        }
    if len(rows) < 2:
        return {"train": rows}
    test = set(random.Random(seed).sample(range(len(rows)), max(1, round(fraction * len(rows)))))
    return {
        "train": rows.select([n for n in range(len(rows)) if n not in test]),
        "test": rows.select(sorted(test)),
    }


def _is_drawn(row: dict[str, Any], *, every: int, drawn: bool) -> bool:
    return (row["row"] % every == 0) is drawn


def _check_first_rows(rows: Any, reader: RowReader) -> None:
    """Raises `ValueError` unless one of the first rows reads: a wrong column or folder shows in all of them."""
    faults = []
    for row in rows.take(FIRST_ROWS) if isinstance(rows, IterableDataset) else rows.take(min(FIRST_ROWS, len(rows))):
        try:
            read = reader.read(row)
        except ValueError as error:
            faults.append(str(error))
            continue
        try:
            normalise(read["messages"], read["images"])
        except ValueError as error:
            faults.append(f"row {row['row']}: {error}")
        else:
            return
    raise ValueError(f"none of the first {len(faults)} rows can be read. {faults[0]}" if faults else "it has no row")
