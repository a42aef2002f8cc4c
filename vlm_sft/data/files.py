"""Files of rows: JSON, JSON lines, CSV and TSV read row by row; the split that a file is; LLaMA-Factory's list."""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from vlm_sft.data.formats import FIELDS, closest, is_message

KINDS = {".parquet": "parquet", ".arrow": "arrow", **dict.fromkeys((".json", ".jsonl", ".csv", ".tsv"), "text")}

_BETWEEN = re.compile(r"[\s,]*")
_SPLITS = {  # split -> words of a name that say so
    "train": "train training trainset",
    "validation": "validation validate validset",
    "valid": "valid",
    "val": "val valset",
    "dev": "dev devset",
    "eval": "eval evals evaluation evalset",
    "holdout": "holdout heldout",
    "test": "test tests testing testset",
}
EVAL_SPLITS = tuple(_SPLITS)[1:]
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words.split()}
_UNCLEAR = re.compile(
    r"[a-z]{0,4}(?:eval|evaluation|test|valid|validation|dev|holdout|heldout)"
    r"(?:set|data|split|rows|part|s|ing|ation|ate|uate|ed)?"
)
_WORDS = {"latest", "contest", "protest", "attest", "detest", "fittest", "hottest", "medieval", "invalid"}


def split_of(file: Path) -> str:
    """The split that the words of a file's name and folders say; "train" where they say none. Raises `ValueError` for
    a name of two splits, and one in which a split's word is part of another (`myeval`)."""
    names = [re.sub("held[_-]out|hold[_-]out", "heldout", name.lower()) for name in (*file.parent.parts, file.stem)]
    words = [word for name in names for word in re.findall("[a-z]+", name)]
    found = {_SPLIT_OF[word] for word in words if word in _SPLIT_OF}
    unclear = [word for word in words if not found and word not in _WORDS and _UNCLEAR.fullmatch(word)]
    if len(found) > 1 or unclear:
        what = f"{unclear[0]!r}, which may mean rows to hold out" if unclear else " and ".join(sorted(found))
        raise ValueError(f"{file}: the name holds {what}; rename it (train, validation, test), or give the file itself")
    return found.pop() if found else "train"


def data_files(path: Path) -> list[Path]:
    """The data file itself, or all below a folder, hidden ones left out. Where there are metadata files (folders of
    images), these alone."""
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    shown = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    files = [file for file in shown if file.suffix.lower() in KINDS and not file.name.startswith("dataset_info")]
    return [file for file in files if file.stem == "metadata"] or files


_TAGS = {  # names that are read without being told
    **{"role_tag": "role from", "content_tag": "content value", "user_tag": "user human", "system_tag": "system"},
    **{"assistant_tag": "assistant gpt", "observation_tag": "observation", "function_tag": "function_call"},
}


def listed(path: Path, name: str | None) -> tuple[str, list[str]] | None:
    """The file or Hub id of a dataset, and `--columns` for it, that LLaMA-Factory's `dataset_info.json` (this path or
    in this folder) lists as `name`; a path FOLDER/NAME names both, a data file the entry that lists it. None where
    there is no list. Raises `ValueError` for a name that is not in it, and an entry that is no conversation."""
    file = (path if path.is_dir() else path.parent) / "dataset_info.json"
    entries = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else None
    entries = entries if isinstance(entries, dict) else {}
    entries = {key: entry for key, entry in entries.items() if isinstance(entry, dict)}
    if not any({"file_name", "hf_hub_url", "ms_hub_url", "script_url"} & entry.keys() for entry in entries.values()):
        return None  # that of a Hub dataset
    if path.is_file() and path != file:
        name = next((key for key, entry in entries.items() if entry.get("file_name") == path.name), None)
        if name is None:
            return None
    name = name or (path.name if not path.exists() else next(iter(entries)) if len(entries) == 1 else None)
    if name not in entries:
        near = closest(name, [*entries]) if name else ""
        found = f"no dataset {name!r}{near} is listed" if name else "it lists several datasets; give one of them"
        raise ValueError(f"{file}: {found}, as in {file.parent}/NAME; listed are {', '.join(entries)}")
    try:
        columns, entry = _columns(entries[name]), entries[name]
    except ValueError as error:
        raise ValueError(f"{file}: {name}: {error}") from None
    return str(file.parent / entry["file_name"]) if "file_name" in entry else entry["hf_hub_url"], columns


def _columns(entry: Mapping[str, Any]) -> list[str]:
    if other := sorted(entry.keys() - {"file_name", "hf_hub_url", "formatting", "columns", "tags"}):
        raise ValueError(f"{', '.join(other)}: not read; give the file itself, and its columns by --columns")
    tags, said = ({k: v for k, v in (entry.get(name) or {}).items() if v} for name in ("tags", "columns"))
    if odd := [f"{tag}={name}" for tag, name in tags.items() if name not in _TAGS.get(tag, "").split()]:
        raise ValueError(f"{', '.join(odd)}: other names than role and content, from and value; use to_conversation")
    fields = {"prompt": "prompt", "query": "prompt"} | {name: name for name in FIELDS if name != "ignore"}
    if odd := sorted(said.keys() - fields.keys()):
        raise ValueError(f"columns {', '.join(odd)}: not read; only {', '.join(fields)} are")
    if entry.get("formatting", "alpaca") == "alpaca" and "prompt" in said:
        said.setdefault("response", "output")
    return [f"{field}={said[name]}" for name, field in fields.items() if name in said]


def read_rows(path: Path) -> Iterator[Any]:
    """Each row of JSON arrays, of JSON lines, or of a CSV or TSV file (all strings), in the memory of one row; a list
    of messages is a row as well, a line that is none the `ValueError` that says so. Raises it for a broken file."""
    with path.open("rb") as raw:
        head = raw.read(4)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head:
        raise ValueError(f"{path.name} is not UTF-8 but UTF-16 or another encoding; save it as UTF-8")
    if path.suffix.lower() in (".csv", ".tsv"):
        yield from _read_csv(path, "," if path.suffix.lower() == ".csv" else "\t")
        return
    # What is not UTF-8 becomes a lone surrogate, which is then found in its row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        start = file.read(1 << 16).lstrip()[:1]
        file.seek(0)
        yield from _read_arrays(file, path.name) if start == "[" else _read_lines(file, path.name)


def _read_lines(file: TextIO, name: str) -> Iterator[Any]:
    rows = (_parse(line) for line in file if line.strip())
    first = [*itertools.islice(rows, 2)]
    if len(first) == 2 and all(isinstance(row, ValueError) for row in first):
        found = f"{name} is not JSON lines, nor an array of rows: its first two lines are not JSON by themselves"
        remedy = f"Write one row a line (jq -c . {name}), or the rows in one array [...]"
        raise ValueError(f"{found} (pretty-printed?). {remedy}")
    yield from itertools.chain(first, rows)


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"the line is not JSON ({error}); fix or remove it")


def _read_arrays(file: TextIO, name: str) -> Iterator[Any]:
    """The elements of arrays, one after another; an array of messages is one row."""
    decoder, buffer, at, count, line, inside = json.JSONDecoder(), "", 0, 0, 1, False
    messages: list[Any] = []
    while True:
        at = _BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]  # matches the empty string too
        mark, why = buffer[at : at + 1], f"{buffer[at : at + 20]!r} after the array"
        if mark == ("]" if inside else "["):
            yield from [messages] if messages else []
            at, count, inside, messages = at + 1, count + bool(messages), not inside, []
            continue
        if inside:
            try:
                element, at = decoder.raw_decode(buffer, at)
            except (ValueError, RecursionError) as error:  # perhaps because it goes on
                why = str(error)
            else:
                if is_message(element):
                    messages.append(element)
                else:
                    yield element
                    count += 1
                continue
        more = file.read(max(1 << 20, len(buffer))) if inside or not mark else ""
        if not more and not inside and not mark:
            return
        line += buffer.count("\n", 0, at)
        if not more:
            raise ValueError(f"{name}: row {count} (line {line}) cannot be read, nor what follows: {why}; fix it")
        buffer, at = buffer[at:] + more, 0


def _read_csv(path: Path, separator: str) -> Iterator[Any]:
    """Rows of strings: an answer may read "42", "NA" or "null"."""
    csv.field_size_limit(sys.maxsize)  # the module's own limit of 128 KiB would refuse an image in a field
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.reader(file, delimiter=separator, strict=True)
        header = next(lines, [])
        other = next((mark for mark in ";\t|," if len(header) == 1 and mark != separator and mark in header[0]), None)
        if other:
            found = f"its fields are separated by {other!r}; expected {separator!r}"
            raise ValueError(f"{path.name}: {found}: save it anew")
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise ValueError(f"{path.name}: several columns are named {', '.join(map(repr, twice))}; rename them")
        begins = lines.line_num + 1
        try:
            for fields in lines:
                if len(fields) == len(header):
                    yield dict(zip(header, fields, strict=True))
                elif fields:
                    found = f"line {begins} has {len(fields)} fields and the header {len(header)}"
                    yield ValueError(f"{found}; put fields that hold the separator in quotes")
                begins = lines.line_num + 1
        except csv.Error as error:
            why = f"{error}; a quote is not closed, or stands inside a field and is not doubled"
            raise ValueError(f"{path.name}: the row that begins in line {begins}: {why}") from None
