"""`check_rows`: each row is read, decoded and encoded once before training: which would fail or teach nothing, and why.

It adds the columns `length`, `image_tokens` and `trained_tokens`, leaves bad rows out on request, and remembers what it
found of each row, so that a second start decodes only what is new. Call it on what `load_conversations` returns, with
the collator of the training.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from vlm_sft.common import restore_rng, rng_state
from vlm_sft.data.records import Look, Record, cache_file, encode_together, read_cache, write_cache
from vlm_sft.data.rows import COLUMNS, STREAMS, RowReader, reader_of, unpacked
from vlm_sft.distributed import print_main

_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*")
_SHOWN = 5  # rows of each reason
_TOGETHER = 8  # rows of one call of the processor

Data = TypeVar("Data")


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row: `index` is its place in the dataset that was checked, `row` its name. A repetition is
    no error: it only weighs twice."""

    index: int
    row: str
    detail: str
    is_error: bool = True

    @property
    def reason(self) -> str:
        """The detail without its particulars and the remedy: the same for faults of one kind."""
        return _PARTICULARS.sub("…", self.detail.split(";")[0])


@dataclass(frozen=True)
class CheckReport:
    """`faults` in the order of the rows; `repairs` counts the images that are read differently from how they are
    stored; `columns` holds the tokens of each row (0 for bad ones); `known` rows were remembered from before."""

    rows: int
    checked_with: str
    faults: tuple[Fault, ...]
    repairs: Mapping[str, int]
    columns: Mapping[str, list[int]]
    known: int

    @property
    def keep(self) -> list[int]:
        """Indices of the good rows, for `dataset.select`."""
        bad = {fault.index for fault in self.faults}
        return [index for index in range(self.rows) if index not in bad]

    @property
    def bad_rows(self) -> int:
        return len({fault.index for fault in self.faults})

    @property
    def errors(self) -> int:
        """Bad rows, those that only repeat others not counted."""
        return len({fault.index for fault in self.faults if fault.is_error})

    def __str__(self) -> str:
        lines = [f"{self.rows:,} rows checked with {self.checked_with}: {self.bad_rows:,} bad"]
        reasons: dict[str, list[Fault]] = {}
        for fault in self.faults:
            reasons.setdefault(fault.reason, []).append(fault)
        for faults in sorted(reasons.values(), key=len, reverse=True):
            names = ", ".join(fault.row for fault in faults[:_SHOWN]) + ", ..." * (len(faults) > _SHOWN)
            first = f"{faults[0].row}: " * any(fault.detail != faults[0].detail for fault in faults)
            lines += [f"{len(faults):>9,}  {names}", f"{'':9}  {first}{faults[0].detail}"]
        lines += [f"{count:>9,}  images {repair}" for repair, count in self.repairs.items()]
        if ordered := sorted(filter(None, self.columns["length"])):
            shares = ((share, ordered[(len(ordered) - 1) * share // 100]) for share in (50, 90, 99, 100))
            lines.append("tokens per row: " + ", ".join(f"{share}% up to {length:,}" for share, length in shares))
        return "\n".join(lines)

    def to_jsonl(self, path: str | Path) -> None:
        """Writes a line for each fault: index, row, reason, detail."""
        with Path(path).open("w", encoding="utf-8") as file:
            for fault in self.faults:
                file.write(json.dumps({**asdict(fault), "reason": fault.reason}, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Checked:
    """How a dataset went through `check_rows`: with which collator (its fingerprint, and `max_length` beside it), and
    of how many rows how many were bad, and known from before."""

    on_bad_rows: str
    collator: str
    max_length: int | None
    rows: int | None = None
    bad: int | None = None
    cached: int | None = None


_CHECKED: dict[str, Checked] = {}
_CHECKED_STREAMS: WeakKeyDictionary[IterableDataset, Checked] = WeakKeyDictionary()


def rows_checked(dataset: Any) -> Checked | None:
    """How this very dataset, or the one that `pack` packed, went through `check_rows`; None if it did not."""
    dataset = unpacked(dataset)
    if isinstance(dataset, IterableDataset):
        return _CHECKED_STREAMS.get(dataset)
    return _CHECKED.get(getattr(dataset, "_fingerprint", ""))


def check_rows(
    data: Data,
    collator: Any,
    *,
    on_bad_rows: str = "error",
    max_bad_fraction: float = 0.1,
    num_proc: int | None = None,
) -> Data:
    """The splits with the columns `length`, `image_tokens` and `trained_tokens`, each row read once in `num_proc`
    processes, or not at all if the cache of datasets holds what an earlier pass found of it.

    A row is bad if it cannot be read, its roles do not alternate, its images and image parts do not match, an image
    does not open, is one pixel wide or more than 200 times as long as wide, a text is blank or holds control
    characters, the collator refuses it or finds nothing to train on, or it repeats an earlier row.

    - `on_bad_rows="error"`: bad rows raise `ValueError` with the report of all splits; rows that only repeat others
      are reported and stay. `"drop"`: all of them are left out and counted; `ValueError` where errors are more than
      `max_bad_fraction` of all rows. `"ignore"`: no row is looked at, and no column added.
    - A stream is checked as its rows come: a bad one raises, or is left out and counted (`"drop"`).

    Every process of a launched run must call it; each looks at its share of the rows.
    """
    if on_bad_rows not in ("error", "drop", "ignore"):
        raise ValueError(f"on_bad_rows={on_bad_rows!r}; expected 'error', 'drop' or 'ignore'")
    splits: dict[str, Any] = dict(data) if isinstance(data, dict) else {"": data}
    streams = {name: rows for name, rows in splits.items() if isinstance(rows, IterableDataset)}
    stored = {name: rows for name, rows in splits.items() if name not in streams and on_bad_rows != "ignore"}
    made_by = _fingerprint(collator)
    reports = {name: _report(rows, collator, made_by, num_proc) for name, rows in stored.items()}
    text = "\n".join(f"{name}: {report}" if name else str(report) for name, report in reports.items())
    errors = sum(report.errors for report in reports.values())
    if on_bad_rows == "error" and errors:
        raise ValueError(f"{text}\nfix these rows, or leave them out with on_bad_rows='drop'")
    if on_bad_rows == "drop" and errors > max_bad_fraction * sum(report.rows for report in reports.values()):
        raise ValueError(f"{text}\nmore than max_bad_fraction={max_bad_fraction} of the rows are bad; fix them")
    if any(report.faults for report in reports.values()):
        bad, rows = (sum(getattr(report, of) for report in reports.values()) for of in ("bad_rows", "rows"))
        dropped = f"{bad:,} of {rows:,} rows are left out."
        print_main(f"{dropped if on_bad_rows == 'drop' else 'These rows stay (drop leaves them out):'}\n{text}")
    mark = functools.partial(Checked, on_bad_rows, made_by, collator.settings.max_length)
    for name, rows in splits.items():
        if name in reports:
            report = reports[name]
            checked = _with_columns(rows, report.columns)
            if on_bad_rows == "drop" and report.faults:
                checked = checked.select(report.keep)
            splits[name] = checked
            _CHECKED[checked._fingerprint] = mark(report.rows, report.bad_rows, report.known)
        elif name in streams:
            if on_bad_rows != "ignore":
                splits[name] = _checked_stream(rows, collator if on_bad_rows == "drop" else None, max_bad_fraction)
            _CHECKED_STREAMS[splits[name]] = mark()
        else:
            _CHECKED[rows._fingerprint] = mark()
    return type(data)(splits) if isinstance(data, dict) else splits[""]


def check_report(rows: Any, collator: Any = None, *, num_proc: int | None = None) -> CheckReport:
    """What is wrong with which of `rows`, a dataset or a list; without a collator, of their texts and images alone."""
    return _report(rows, collator, _fingerprint(collator), num_proc)


def _report(rows: Any, collator: Any, made_by: str, num_proc: int | None) -> CheckReport:
    if not hasattr(rows, "__len__") or not len(rows):
        raise ValueError("the dataset to check has no row, or streams; load it with streaming=False")
    start = time.monotonic()
    cache = cache_file(made_by)
    known = read_cache(cache)
    findings = _look_at_all(_Rows(rows, collator, known), num_proc)
    if fresh := {key: record for finding in findings for key, record in finding.fresh}:
        write_cache(cache, fresh)
    faults: list[Fault] = []
    seen: dict[bytes, str] = {}
    for finding in findings:
        index, name, key, record, *_ = finding
        faults += [Fault(index, name, detail) for detail in record.faults]
        # A row that a mixture draws again has the same name, and is meant.
        if key and not record.faults and (first := seen.setdefault(key, name)) != name:
            faults.append(Fault(index, name, f"repeats {first}; drop one of them", is_error=False))
    repairs = Counter(repair for finding in findings for repair in finding.record.repairs)
    columns = {
        name: [0 if finding.record.faults else getattr(finding.record, name) for finding in findings]
        for name in COLUMNS
    }
    with_what = "no model's processor" if collator is None else type(collator.processor).__name__
    remembered = sum(finding.known for finding in findings)
    seconds = time.monotonic() - start
    print_main(
        f"{len(rows):,} rows checked in {seconds:,.0f} s ({len(rows) / seconds:,.0f} rows a second), {remembered:,} of "
        "them known from before"
    )
    return CheckReport(len(rows), with_what, tuple(faults), dict(repairs.most_common()), columns, remembered)


class _Finding(NamedTuple):
    place: int
    row: str
    key: bytes | None  # what the row holds; None where it holds no conversation
    record: Record
    known: bool
    fresh: tuple[tuple[bytes, Record], ...]  # what is to be remembered


class _Rows:
    """A map-style dataset of findings, so that a `DataLoader` spreads the work as it does in training."""

    def __init__(self, dataset: Any, collator: Any, known: Mapping[bytes, Record]) -> None:
        self.dataset, self.collator, self.known = dataset, collator, known
        self.reader = reader_of(dataset)
        self.stored = dataset.with_format(None) if self.reader else dataset
        self.encoder = collator and collator.with_settings(max_length=None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[_Finding]:
        rows = self.stored.__getitems__(indices) if self.reader else [self._read(index) for index in indices]
        looks = [self._look(index, row) for index, row in zip(indices, rows, strict=True)]
        encode_together([look for look in looks if look.key and look.key not in self.known], self.encoder)
        return [self._finding(index, look) for index, look in zip(indices, looks, strict=True)]

    def _read(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:  # a transform may raise anything
            return error

    def _look(self, index: int, row: Any) -> Look:
        look = Look(f"row {index}", self.reader)
        try:
            look.read(row)
        except Exception as error:
            look.errors.append(error)
        return look

    def _finding(self, index: int, look: Look) -> _Finding:
        fresh: dict[bytes, Record] = {}

        def record_of(key: bytes, collator: Any) -> Record:
            if (record := self.known.get(key)) is None:
                record = look.record(collator)
                fresh.update({key: record} if look.lasts else {})
            return record

        if look.key is None:
            return _Finding(index, look.name, None, look.record(None), False, ())
        record, known = record_of(look.key, self.encoder), look.key in self.known
        limit = self.collator and self.collator.settings.max_length
        if limit and record.length > limit:
            if self.collator.settings.truncation == "trim":
                trimmed = hashlib.blake2b(look.key + b"trim%d" % limit, digest_size=16).digest()
                look.encoded = None
                record, known = record_of(trimmed, self.collator), known and trimmed in self.known
            else:
                record = record._replace(faults=(_too_long(record, self.collator.settings),))
        return _Finding(index, look.name, look.key, record, known, tuple(fresh.items()))


def _look_at_all(rows: Any, num_proc: int | None) -> list[_Finding]:
    """The findings in the order of the rows, each process of a launched run looking at its share."""
    state = PartialState()
    share = range(state.process_index, len(rows), state.num_processes)
    if num_proc is None:
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        num_proc = min(len(share) // 256, cores)
    batches: Any = DataLoader(Subset(rows, share), batch_size=_TOGETHER, collate_fn=list, num_workers=num_proc)
    findings: list[_Finding] = []
    before = rng_state()  # a DataLoader draws a seed for its workers
    try:
        with tqdm(total=len(share), desc="Checking", unit=" rows", disable=not state.is_main_process) as progress:
            for batch in batches:
                findings += batch
                progress.update(len(batch))
    finally:
        restore_rng(before)
    return sorted(gather_object(findings), key=lambda finding: finding.place)


def _too_long(record: Record, settings: Any) -> str:
    return (
        f"{record.length} tokens ({record.image_tokens} from images), more than max_length="
        f"{settings.max_length}; raise it, set truncation='trim', or drop the row"
    )


def _with_columns(rows: Dataset, columns: Mapping[str, list[int]]) -> Dataset:
    """The rows with these columns. To selected rows, `add_column` (datasets 5.2) would first write anew, images and
    all; where their numbers tell the place of each, the columns go to the whole, and they are selected again."""
    # As stored: with a transform, `add_column` may write what that makes.
    how, rows = rows.format, rows.with_format(None)
    rows = rows.remove_columns([name for name in columns if name in rows.column_names])
    whole, chosen = Dataset(rows.data, info=rows.info), None
    if "row" in rows.column_names:
        place = {number: n for n, number in enumerate(whole["row"][:])}
        if len(place) == len(whole):
            chosen = [place[number] for number in rows["row"][:]]
    added = rows if chosen is None else whole
    for name, values in columns.items():
        column = np.zeros(len(added), dtype=np.int64)
        column[... if chosen is None else chosen] = values
        added = added.add_column(name, column.tolist())
    added = added if chosen is None else added.select(chosen)
    return added.with_format(how["type"], **how["format_kwargs"])


class _StreamCheck:
    """Checks a batch of one row as it comes. Without a collator a bad row raises (what only a collator can tell, the
    training's own tells); with one it is left out and counted, on stderr, in each worker."""

    def __init__(self, reader: RowReader | None, collator: Any, max_bad_fraction: float) -> None:
        self.reader, self.collator, self.max_bad_fraction = reader, collator, max_bad_fraction
        self.rows = self.dropped = 0

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        [row] = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        look = Look(f"row {self.rows}", self.reader)
        self.rows += 1
        try:
            look.read(row)
        except ValueError as error:
            look.errors.append(error)
        if not (faults := look.record(self.collator).faults):
            return {field: [value] for field, value in {**look.converted, **look.example()}.items()}
        name = look.name
        if self.collator is None:
            raise ValueError(f"{name}: {'; '.join(faults)}")
        self.dropped += 1
        if self.rows >= 100 and self.dropped > self.max_bad_fraction * self.rows:
            raise ValueError(
                f"{self.dropped} of the first {self.rows} rows are bad, more than max_bad_fraction="
                f"{self.max_bad_fraction}; fix them. The last is {name}: {faults[0]}"
            )
        if self.dropped == 1 or self.dropped % 100 == 0:
            last = f"the last is {name}: {faults[0]}"
            print(f"{self.dropped} of {self.rows} rows of the stream are left out; {last}", file=sys.stderr, flush=True)
        return {field: [] for field in ("messages", "images", "row")}


def _checked_stream(stream: IterableDataset, collator: Any, max_bad_fraction: float) -> IterableDataset:
    stored, reader = STREAMS.get(stream, (stream, None))
    names = stored.column_names or [*next(iter(stored))]
    check = _StreamCheck(reader, collator, max_bad_fraction)
    return stored.map(check, batched=True, batch_size=1, remove_columns=names)


def _fingerprint(collator: Any) -> str:
    return "" if collator is None else str(collator.fingerprint())
