"""`check_rows`: each row is read, decoded and encoded once before training: which would fail or teach nothing, and why.
What is found of a row is remembered, so that a second start decodes only what is new."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import IterableDataset
from torch.utils.data import Subset
from tqdm.auto import tqdm

from vlm_sft.chat.messages import answers_of
from vlm_sft.common import core_count, in_processes
from vlm_sft.data import records
from vlm_sft.data.rows import READER, RowReader, checked_rows, compare_processes, readers_of, unpacked
from vlm_sft.distributed import print_main

_TOGETHER = 8  # rows of one call of the processor
_SHOWN = 5  # rows of each reason
_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*")
_PLACES = ("place", "number", "part", "answer", "content", "written")
FOUND = [*((name, "i8") for name in _PLACES), ("known", "?"), *records.KEPT]
"""What is found of a row: its place in the dataset, its number in the source, that of its reader; the message that it
ends with (-1: the last one); digests of what it holds and when its files were written; whether it was remembered."""

Data = TypeVar("Data")


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row: its place in the checked dataset, its name. A repetition is not an error."""

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
    """`found` is an array of `FOUND` in the order of the rows, the tokens of bad ones 0, as are `faults`; `repairs`
    counts the images that are read differently from how they are stored."""

    checked_with: str
    found: Any
    faults: tuple[Fault, ...]
    repairs: Mapping[str, int]

    @property
    def rows(self) -> int:
        return len(self.found)

    @property
    def known(self) -> int:
        """How many rows were remembered."""
        return len(np.unique(self.found["place"][self.found["known"]]))

    @property
    def keep(self) -> list[int]:
        """Indices of the good rows, for `dataset.select`."""
        bad = {fault.index for fault in self.faults}
        return [index for index in range(self.rows) if index not in bad]

    @property
    def bad_rows(self) -> int:
        return len({fault.index for fault in self.faults})

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
        if lengths := sorted(self.found["length"][self.found["length"] > 0].tolist()):
            shares = (f"{share}% up to {lengths[(len(lengths) - 1) * share // 100]:,}" for share in (50, 90, 99, 100))
            lines.append(f"tokens per row: {', '.join(shares)}")
        return "\n".join(lines)

    def to_jsonl(self, path: str | Path) -> None:
        """Writes a line for each fault: index, row, reason, detail."""
        lines = (json.dumps({**asdict(fault), "reason": fault.reason}, ensure_ascii=False) for fault in self.faults)
        Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@dataclass(frozen=True)
class Checked:
    """How a dataset went through `check_rows`: by which collator (its fingerprint, `max_length` beside it), digests of
    what its rows hold, images told by bytes or by name and size, and of when their files were written."""

    on_bad_rows: str
    collator: str
    max_length: int | None
    bad: int | None = None
    cached: int | None = None
    content: str | None = None
    written: str | None = None


def rows_checked(dataset: Any) -> Checked | None:
    """How this very dataset, or the one that `pack` packed, went through `check_rows`; None if it did not."""
    dataset = unpacked(dataset)
    held: tuple[str, Checked | None] = getattr(dataset, "checked", ("", None))
    return held[1] if held[0] == getattr(dataset, "_fingerprint", "") else None  # not that of a changed copy


def check_rows(
    data: Data, collator: Any, *, on_bad_rows: str = "error", max_bad_fraction: float = 0.1, num_proc: int | None = None
) -> Data:
    """The splits with the columns `length`, `image_tokens` and `trained_tokens`, each row read once in `num_proc`
    processes, or not at all if the cache of datasets holds what an earlier pass found of it.

    A row is bad if it cannot be read, its roles do not alternate, its images and image parts do not match, an image
    does not open, is one pixel wide or more than 200 times as long as wide, a text is blank or holds control
    characters, the collator refuses it or finds nothing to train on, or it repeats an earlier row. A stream is checked
    as its rows come. Rows that stand in two splits are printed.

    `on_bad_rows="error"`: `ValueError` with the report of all splits; rows that only repeat others stay. `"drop"`: bad
    rows are left out and counted; `ValueError` where errors are more than one, and more than `max_bad_fraction` of all
    rows. `"ignore"`: no row is looked at, and no column added. Every process of a launched run must call it, each looks
    at its share of the rows; `ValueError` where one has other rows than the main process."""
    if on_bad_rows not in ("error", "drop", "ignore"):
        raise ValueError(f"on_bad_rows={on_bad_rows!r}; expected 'error', 'drop' or 'ignore'")
    drop = on_bad_rows == "drop"
    splits: dict[str, Any] = dict(data) if isinstance(data, dict) else {"": data}
    compare_processes(splits)
    to_check = {} if on_bad_rows == "ignore" else splits
    stored = {name: rows for name, rows in to_check.items() if not isinstance(rows, IterableDataset) and len(rows)}
    reports = {name: check_report(rows, collator, num_proc=num_proc) for name, rows in stored.items()}
    _judge(reports, drop, max_bad_fraction)
    for name, split in splits.items():
        counts: tuple[Any, ...] = ()
        if name in reports:
            report = reports[name]
            if (report.found["answer"] >= 0).any():
                became = f"{name}: {len(split):,} rows became {report.rows:,}, each with one answer to train on"
                why = "the chat template renders earlier answers differently from how the model is asked for them"
                print_main(f"{became}: {why}")
            found = report.found[report.keep if drop and report.faults else slice(None)]
            chosen, sources = np.unique(found["place"], return_inverse=True)
            split = split if len(chosen) == len(split) else split.select(chosen)
            split = checked_rows(split, sources, found["answer"], {name: found[name] for name in records.COLUMNS})
            content = records.digest(found["content"].tobytes(), found["answer"].tobytes()).hex()
            written = records.digest(found["written"].tobytes()).hex()
            counts = (report.bad_rows, report.known, content, written)
        elif name in to_check and isinstance(split, IterableDataset):
            rows, reader = getattr(split, "stored", (split, None))
            check = _StreamCheck(reader, collator if drop else None, max_bad_fraction, collator.split)
            names = rows.column_names or [*next(iter(rows))]
            split = rows.map(check, batched=True, batch_size=1, remove_columns=names)
        checked = Checked(on_bad_rows, str(collator.fingerprint()), collator.settings.max_length, *counts)
        vars(split)["checked"] = (getattr(split, "_fingerprint", ""), checked)
        splits[name] = split
    return type(data)(splits) if isinstance(data, dict) else splits[""]


def _judge(reports: Mapping[str, CheckReport], drop: bool, max_bad_fraction: float) -> None:
    """Prints what was found of all splits. Raises `ValueError` where that is too much, or nothing is left of one."""
    text = "\n".join(f"{name}: {report}".removeprefix(": ") for name, report in reports.items())
    rows, bad = (sum(getattr(report, of) for report in reports.values()) for of in ("rows", "bad_rows"))
    errors = sum(len({each.index for each in report.faults if each.is_error}) for report in reports.values())
    if errors > (max(1, max_bad_fraction * rows) if drop else 0):
        why = "fix these rows, or leave them out with --on_bad_rows drop: check_rows(..., on_bad_rows='drop')"
        why = f"more than --max_bad_fraction {max_bad_fraction} of the rows are bad; fix them" if drop else why
        raise ValueError(f"{text}\n{why}")
    if none_left := [name for name, report in reports.items() if drop and report.bad_rows == report.rows]:
        raise ValueError(f"{text}\nno row is left of {', '.join(none_left)}")
    if bad:
        print_main(f"{f'{bad:,} of {rows:,} rows are left out.' if drop else 'These rows stay:'}\n{text}")
    for (name, first), (other, second) in itertools.combinations(reports.items(), 2):
        found = first.found
        if len(both := np.setdiff1d(np.intersect1d(found["key"], second.found["key"]), [b""])):
            numbers = [found["number"][found["key"] == key][0] for key in both[:_SHOWN]]
            where = ", ".join(f"row {number}" for number in numbers) + ", ..." * (len(both) > _SHOWN)
            print_main(f"{len(both):,} rows of {other} stand in {name} as well: {where}")


def check_report(rows: Any, collator: Any = None, *, num_proc: int | None = None) -> CheckReport:
    """What is wrong with which of `rows`, a dataset or a list; without a collator, of their texts and images alone."""
    if not hasattr(rows, "__len__") or not len(rows):
        raise ValueError("the dataset to check has no row, or streams; load it without --streaming")
    start = time.monotonic()
    cache = records.cache_file("" if collator is None else str(collator.fingerprint()))
    found, fresh = _look_at_all(_Rows(rows, collator, records.read_cache(cache)), num_proc)
    if len(fresh):
        records.write_cache(cache, fresh)
    found = found[np.argsort(found["place"], kind="stable")]
    parts, faults, repairs = readers_of(rows), list[Fault](), Counter[str]()

    def name_of(n: int) -> str:
        return f"row {found['number'][n]}" + (f" of {parts[found['part'][n]].source}" if len(parts) > 1 else "")

    for n in np.flatnonzero(found["note"]).tolist():
        details, repaired = json.loads(found["note"][n])
        faults += [Fault(n, name_of(n), detail) for detail in details]
        repairs.update(repaired)
        found["key"][n] = b"" if details else found["key"][n]
    _, first, group = np.unique(found["key"], return_index=True, return_inverse=True)
    first = first[group]
    # A row that a mixture draws again is meant.
    again = (found[["number", "part"]] == found[["number", "part"]][first]) | (found["key"] == b"")
    for n in np.flatnonzero(~again).tolist():
        faults.append(Fault(n, name_of(n), f"repeats {name_of(first[n])}; drop one of them", is_error=False))
    faults.sort(key=lambda fault: fault.index)
    with_what = "no model's processor" if collator is None else type(collator.processor).__name__
    report = CheckReport(with_what, found, tuple(faults), dict(repairs.most_common()))
    seconds = time.monotonic() - start
    speed = f"{seconds:,.0f} s ({len(rows) / seconds:,.0f} rows a second)"
    print_main(f"{len(rows):,} rows checked in {speed}, {report.known:,} of them known from before")
    return report


class _Rows:
    """A map-style dataset of what is found of rows, so that a `DataLoader` spreads the work as it does in training:
    of each, entries for arrays of `FOUND` and, if they are new, of `KEPT`."""

    def __init__(self, dataset: Any, collator: Any, known: Any) -> None:
        self.dataset, self.collator, self.known = dataset, collator, known
        self.readers = readers_of(dataset)
        self.stored = dataset.with_format(None) if self.readers else None
        self.encoder = collator and collator.with_settings(max_length=None)

    def __len__(self) -> int:
        return len(self.dataset)

    def knows(self, indices: list[int]) -> bool:
        """Whether all of these are remembered; none is decoded."""
        return all(records.recall(self.known, look.key) for look in self._looks(indices))

    def _looks(self, indices: list[int]) -> list[records.Look]:
        rows = self.stored.__getitems__(indices) if self.stored else map(self._read, indices)
        return [
            records.Look(index, row, self.readers[row[READER]] if self.readers else None)
            for index, row in zip(indices, rows, strict=True)
        ]

    def __getitems__(self, indices: list[int]) -> list[tuple[list[Any], list[Any]]]:
        looks = self._looks(indices)
        fresh = [look for look in looks if look.key and records.recall(self.known, look.key) is None]
        records.encode_together(fresh, self.encoder)
        return [self._found(look) for look in looks]

    def _read(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:  # a transform may raise anything
            return error

    def _found(self, look: records.Look) -> tuple[list[Any], list[Any]]:
        """One entry, or one for each answer where the chat template asks for that."""
        found, fresh = list[Any](), list[Any]()

        def record_of(key: bytes | None, collator: Any, answer: int = -1) -> records.Record:
            if (record := records.recall(self.known, key)) is None:
                record = look.record(collator, answer)
                fresh.extend([(key, *record)] if look.lasts else [])
            return record

        pieces = [(-1, look.key, record_of(look.key, self.encoder))]
        if look.key and pieces[0][2].told[0] == [records.ONE_ANSWER]:
            answers = answers_of(look.decoded.messages)
            keys = [records.digest(look.key, b"answer%d" % answer) for answer in answers]
            pieces = [(n, key, record_of(key, self.encoder, n)) for n, key in zip(answers, keys, strict=True)]
        settings = self.collator and self.collator.settings
        content = int.from_bytes(look.content[:8], "little", signed=True)
        for answer, key, record in pieces:
            if key and settings and settings.max_length and record.length > settings.max_length:
                if settings.truncation == "trim":
                    look.encoded = None
                    record = record_of(records.digest(key, b"trim%d" % settings.max_length), self.collator, answer)
                else:
                    told = f"{record.length} tokens ({record.image_tokens} from images), more than max_length="
                    told += f"{settings.max_length}; raise it, set truncation='trim', or drop the row"
                    record = records.Record(note=records.note_of([told], record.told[1]))
            places = (look.index, look.number, look.part, answer, content, look.written)
            known = bool(look.key) and not look.looked_at
            found.append((*places, known, key or b"", *record))
        return found, fresh


def _arrays(batch: list[tuple[list[Any], list[Any]]]) -> list[Any]:
    both = zip(*batch, strict=True)
    return [np.array([*itertools.chain(*each)], kind) for each, kind in zip(both, (FOUND, records.KEPT), strict=True)]


def _look_at_all(rows: Any, num_proc: int | None) -> list[Any]:
    """Arrays of `FOUND` and of `KEPT`, each process of a launched run looking at its share of the rows."""
    state = PartialState()
    share = range(state.process_index, len(rows), state.num_processes)
    if num_proc is None:
        is_known = len(rows.known) and rows.knows([*share[:: max(1, len(share) // _TOGETHER)]])
        # One that is forked takes as long as 128 rows, or 2,048 known ones; one started anew imports for seconds.
        worth = 128 if multiprocessing.get_start_method() == "fork" and not is_known else 2048
        num_proc = min(len(share) // worth, core_count())
        num_proc = num_proc if num_proc > 1 else 0  # one would only be waited for
    batches = in_processes(_arrays, Subset(rows, share), _TOGETHER, num_proc)
    shown = {"desc": "Checking", "unit": " rows", "unit_scale": _TOGETHER, "disable": not state.is_main_process}
    mine = [_arrays([([], [])]), *tqdm(batches, total=math.ceil(len(share) / _TOGETHER), **shown)]
    ours = gather_object([[np.concatenate(each) for each in zip(*mine, strict=True)]])
    return [np.concatenate(each) for each in zip(*ours, strict=True)]


@dataclass
class _StreamCheck:
    """Checks a batch of one row as it comes. Without a collator a bad row raises (what only a collator can tell, the
    training's own tells); with one it is left out and counted, on stderr, in each worker."""

    reader: RowReader | None
    collator: Any
    max_bad_fraction: float
    split: Any
    rows: int = 0
    dropped: int = 0

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        look = records.Look(self.rows, {name: value for name, [value] in batch.items()}, self.reader)
        self.rows += 1
        if (faults := look.record(self.collator).told[0]) in ([], [records.ONE_ANSWER]):
            parts = self.split({**look.converted, **look.decoded._asdict()})
            return {field: [part[field] for part in parts] for field in parts[0]}
        last = f"row {look.number}: {'; '.join(faults)}"
        if self.collator is None:
            raise ValueError(last)
        self.dropped += 1
        told = f"{self.dropped} of {self.rows} rows of the stream are left out; the last is {last}"
        if self.rows >= 100 and self.dropped > self.max_bad_fraction * self.rows:
            raise ValueError(f"more than --max_bad_fraction {self.max_bad_fraction} of the rows are bad: {told}")
        if self.dropped == 1 or self.dropped % 100 == 0:
            print(told, file=sys.stderr, flush=True)
        return {field: [] for field in ("messages", "images", "row")}
