"""What a path or a Hub id holds, by split: files of text to be read row by row, or datasets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
from datasets import DatasetDict

from vlm_sft.data.formats import TEXT_SUFFIXES

Source = Any
"""A tuple of text files, a `Dataset`, or an `IterableDataset`."""

_KINDS = {".parquet": "parquet", ".arrow": "arrow"} | dict.fromkeys(TEXT_SUFFIXES, "text")
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])")


def local_sources(path: Path, *, streaming: bool) -> dict[str, Source]:
    """Splits of a folder written by `save_to_disk`, of a data file, or of a folder of data files, told by their names.

    Raises `ValueError` for a path that holds no data, or data of several kinds.
    """
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


def hub_sources(name: str, *, config_name: str | None, revision: str | None, streaming: bool) -> dict[str, Source]:
    """Splits of a Hub dataset. Raises `ValueError` for what looks like a path, which then does not exist."""
    if name.count("/") > 1 or name.startswith((".", "~")) or Path(name).suffix.lower() in _KINDS:
        raise ValueError("it does not exist; give the path of a file or folder, or the id of a Hub dataset")
    return dict(datasets.load_dataset(name, name=config_name, revision=revision, streaming=streaming))
