"""`check_rows`: each row is read, decoded and encoded once before training: which would fail or teach nothing, and why.

It adds the columns `length`, `image_tokens` and `trained_tokens`, leaves bad rows out on request, and remembers what it
found of each row, so that a second start decodes only what is new.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
import time
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from vlm_sft.chat.messages import answers_of
from vlm_sft.common import core_count, restore_rng, rng_state
from vlm_sft.data.findings import SHOWN, CheckReport, Fault
from vlm_sft.data.records import (
    ONE_ANSWER,
    Known,
    Look,
    Record,
    Records,
    cache_file,
    encode_together,
    read_cache,
    write_cache,
)
from vlm_sft.data.rows import COLUMNS, READER, RowReader, compare_processes, one_answer_rows, readers_of, unpacked
from vlm_sft.distributed import print_main

_TOGETHER = 8  # rows of one call of the processor

Data = TypeVar("Data")


@dataclass(frozen=True)
class Checked:
    """How a dataset went through `check_rows`: with which collator (its fingerprint, and `max_length` beside it), a
    digest of what its rows hold, images told by bytes or by name and size, and one of when their files were written."""

    on_bad_rows: str
    collator: str
    max_length: int | None
    rows: int | None = None
    bad: int | None = None
    cached: int | None = None
    content: str | None = None
    written: str | None = None


_CHECKED: dict[str, Checked] = {}  # by fingerprint; a stream, which has none, holds its own as `checked`


def rows_checked(dataset: Any) -> Checked | None:
    """How this very dataset, or the one that `pack` packed, went through `check_rows`; None if it did not."""
    dataset = unpacked(dataset)
    return getattr(dataset, "checked", None) or _CHECKED.get(getattr(dataset, "_fingerprint", ""))


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

    `on_bad_rows="error"`: `ValueError` with the report of all splits; rows that only repeat others stay. `"drop"`: bad
    rows are left out and counted; `ValueError` where errors are more than one, and more than `max_bad_fraction` of all
    rows. `"ignore"`: no row is looked at, and no column added. A stream is checked as its rows come. Rows that stand in
    two splits are printed.

    Every process of a launched run must call it; each looks at its share of the rows. Raises `ValueError` where one
    has other rows than the main process.
    """
    if on_bad_rows not in ("error", "drop", "ignore"):
        raise ValueError(f"on_bad_rows={on_bad_rows!r}; expected 'error', 'drop' or 'ignore'")
    drop = on_bad_rows == "drop"
    splits: dict[str, Any] = dict(data) if isinstance(data, dict) else {"": data}
    compare_processes(splits)
    stored = {name: rows for name, rows in splits.items() if not isinstance(rows, IterableDataset)}
    looked_at = {} if on_bad_rows == "ignore" else {name: rows for name, rows in stored.items() if len(rows)}
    reports = {name: check_report(rows, collator, num_proc=num_proc) for name, rows in looked_at.items()}
    text = "\n".join(f"{name}: {report}".removeprefix(": ") for name, report in reports.items())
    rows, bad, errors = (sum(getattr(r, of) for r in reports.values()) for of in ("rows", "bad_rows", "errors"))
    if errors > (max(1, max_bad_fraction * rows) if drop else 0):
        why = "fix these rows, or leave them out with --on_bad_rows drop: check_rows(..., on_bad_rows='drop')"
        why = f"more than --max_bad_fraction {max_bad_fraction} of the rows are bad; fix them" if drop else why
        raise ValueError(f"{text}\n{why}")
    if none_left := [name for name, report in reports.items() if drop and report.bad_rows == report.rows]:
        raise ValueError(f"{text}\nno row is left of {', '.join(none_left)}")
    if bad:
        print_main(f"{f'{bad:,} of {rows:,} rows are left out.' if drop else 'These rows stay:'}\n{text}")
    for (name, first), (other, second) in itertools.combinations(reports.items(), 2):
        if len(both := np.setdiff1d(np.intersect1d(first.keys, second.keys), [b""])):
            where = ", ".join(f"row {first.numbers[first.keys == key][0]}" for key in both[:SHOWN])
            print_main(
                f"{len(both):,} rows of {other} stand in {name} as well: {where}" + ", ..." * (len(both) > SHOWN)
            )
    for name, split in splits.items():
        counts: tuple[Any, ...] = ()
        if report := reports.get(name):
            if (report.answers >= 0).any():
                print_main(
                    f"{name}: {len(split):,} rows became {report.rows:,}, each with one answer to train on: the chat "
                    "template renders earlier answers differently from how the model is asked for them"
                )
                split = one_answer_rows(split, report.sources, report.answers, report.columns)
            else:
                split = _with_columns(split, report.columns)
            kept = report.keep if drop and report.faults else range(report.rows)
            split = split.select(kept) if len(kept) < report.rows else split
            content, written = _digest(report.contents[kept], report.answers[kept]), _digest(report.written[kept])
            counts = (report.rows, report.bad_rows, report.known, content, written)
        elif name not in stored and on_bad_rows != "ignore":
            rows_of, reader = getattr(split, "stored", (split, None))
            check = _StreamCheck(reader, collator if drop else None, max_bad_fraction, collator.split)
            names = rows_of.column_names or [*next(iter(rows_of))]
            split = rows_of.map(check, batched=True, batch_size=1, remove_columns=names)
        checked = Checked(on_bad_rows, str(collator.fingerprint()), collator.settings.max_length, *counts)
        if isinstance(split, IterableDataset):
            vars(split)["checked"] = checked
        else:
            _CHECKED[split._fingerprint] = checked
        splits[name] = split
    return type(data)(splits) if isinstance(data, dict) else splits[""]


def check_report(rows: Any, collator: Any = None, *, num_proc: int | None = None) -> CheckReport:
    """What is wrong with which of `rows`, a dataset or a list; without a collator, of their texts and images alone."""
    if not hasattr(rows, "__len__") or not len(rows):
        raise ValueError("the dataset to check has no row, or streams; load it without --streaming")
    start = time.monotonic()
    cache = cache_file("" if collator is None else str(collator.fingerprint()))
    found, places, fresh = _look_at_all(_Rows(rows, collator, Known(read_cache(cache))), num_proc)
    if len(fresh):
        write_cache(cache, fresh)
    order = np.argsort(places[:, 0], kind="stable")
    sources, numbers, was_known, answers, contents, written = places[order].T
    known = len(np.unique(sources[was_known > 0]))
    values, texts = found.values[order], found.notes
    notes = values[:, 3]
    bad = np.array([bool(faults) for faults, _ in texts])[notes]
    keys = np.where(bad, b"", found.keys[order])
    faults = [Fault(int(n), f"row {numbers[n]}", detail) for n in np.flatnonzero(bad) for detail in texts[notes[n]][0]]
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    first = first[group]
    # A row that a mixture draws again has the same number, and is meant.
    for n in np.flatnonzero((numbers != numbers[first]) & (keys != b"")):
        detail = f"repeats row {numbers[first[n]]}; drop one of them"
        faults.append(Fault(int(n), f"row {numbers[n]}", detail, is_error=False))
    faults.sort(key=lambda fault: fault.index)
    repairs: Counter[str] = Counter()
    for (_, repaired), count in zip(texts, np.bincount(notes, minlength=len(texts)).tolist(), strict=True):
        repairs.update({repair: repaired.count(repair) * count for repair in repaired})
    columns = {name: np.where(bad, 0, values[:, n]) for n, name in enumerate(COLUMNS)}
    with_what = "no model's processor" if collator is None else type(collator.processor).__name__
    seconds = time.monotonic() - start
    print_main(
        f"{len(rows):,} rows checked in {seconds:,.0f} s ({len(rows) / seconds:,.0f} rows a second), {known:,} of them "
        "known from before"
    )
    counts = {repair: count for repair, count in repairs.most_common() if count}
    told = (tuple(faults), counts, columns, known, keys, numbers, sources, answers, contents, written)
    return CheckReport(len(sources), with_what, *told)


def _digest(*arrays: Any) -> str:
    return hashlib.blake2b(b"".join(array.tobytes() for array in arrays), digest_size=16).hexdigest()


class _Finding(NamedTuple):
    place: int
    number: int
    key: bytes | None  # what the row holds; None where it holds no conversation
    record: Record
    known: bool
    answer: int  # the message that the row is to end with; -1 for the whole row
    fresh: dict[bytes, Record]  # what is to be remembered
    content: bytes
    written: int


class _Rows:
    """A map-style dataset of findings, so that a `DataLoader` spreads the work as it does in training."""

    def __init__(self, dataset: Any, collator: Any, known: Known) -> None:
        self.dataset, self.collator, self.known = dataset, collator, known
        self.readers = readers_of(dataset)
        self.stored = dataset if self.readers is None else dataset.with_format(None)
        self.encoder = collator and collator.with_settings(max_length=None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[_Finding]:
        rows = map(self._read, indices) if self.readers is None else self.stored.__getitems__(indices)
        readers = self.readers
        made = ((row, None if readers is None else readers[row[READER]]) for row in rows)
        looks = [Look(index, *each) for index, each in zip(indices, made, strict=True)]
        encode_together([look for look in looks if look.key and self.known.get(look.key) is None], self.encoder)
        return [finding for look in looks for finding in self._findings(look)]

    def _read(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:  # a transform may raise anything
            return error

    def _findings(self, look: Look) -> list[_Finding]:
        """One, or one for each answer where the chat template asks for that."""
        whole = self._finding(look, look.key, None)
        if whole.record.faults != [ONE_ANSWER]:
            return [whole]
        key = look.key or b""
        parts = [
            self._finding(look, hashlib.blake2b(key + b"answer%d" % answer, digest_size=16).digest(), answer)
            for answer in answers_of(look.decoded.messages)
        ]
        parts[0].fresh.update(whole.fresh)
        return parts

    def _finding(self, look: Look, key: bytes | None, answer: int | None) -> _Finding:
        fresh: dict[bytes, Record] = {}

        def record_of(key: bytes | None, collator: Any) -> Record:
            if key is None or (record := self.known.get(key)) is None:
                record = look.record(collator, answer)
                fresh.update({key: record} if key and look.lasts else {})
            return record

        record, settings = record_of(key, self.encoder), self.collator and self.collator.settings
        if key and settings and settings.max_length and record.length > settings.max_length:
            if settings.truncation == "trim":
                look.encoded = None
                trimmed = hashlib.blake2b(key + b"trim%d" % settings.max_length, digest_size=16).digest()
                record = record_of(trimmed, self.collator)
            else:
                told = f"{record.length} tokens ({record.image_tokens} from images), more than max_length="
                remedy = "raise it, set truncation='trim', or drop the row"
                record = record._replace(faults=[f"{told}{settings.max_length}; {remedy}"])
        known, place = bool(key) and not look.looked_at, -1 if answer is None else answer
        return _Finding(look.index, look.number, key, record, known, place, fresh, look.content, look.written)


def _look_at_all(rows: Any, num_proc: int | None) -> tuple[Records, Any, Records]:
    """What was found, each process of a launched run looking at its share; of each finding the place and the number of
    its row, whether it was known, its answer, a digest of what it holds, and when its files were written [N, 6]; and
    what is to be remembered."""
    state = PartialState()
    share = range(state.process_index, len(rows), state.num_processes)
    if num_proc is None:
        cores = core_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        num_proc = min(len(share) // 256, cores)
    batches: Any = DataLoader(Subset(rows, share), batch_size=_TOGETHER, collate_fn=list, num_workers=num_proc)
    found, fresh, places = Records(), Records(), array("q")
    before = rng_state()  # a DataLoader draws a seed for its workers
    try:
        with tqdm(total=len(share), desc="Checking", unit=" rows", disable=not state.is_main_process) as progress:
            for finding in itertools.chain.from_iterable(batches):
                found.add(finding.key, finding.record)
                content = int.from_bytes(finding.content[:8], "little", signed=True)
                places.extend((finding.place, finding.number, finding.known, finding.answer, content, finding.written))
                for key, record in finding.fresh.items():
                    fresh.add(key, record)
                progress.update()
    finally:
        restore_rng(before)
    whole, to_keep, places_of = Records(), Records(), []
    for its_found, its_fresh, its_places in gather_object([(found, fresh, places)]):
        whole.extend(its_found)
        to_keep.extend(its_fresh)
        places_of.append(np.array(its_places).reshape(-1, 6))
    return whole, np.concatenate(places_of), to_keep


def _with_columns(rows: Dataset, columns: Mapping[str, Any]) -> Dataset:
    """The rows with these columns. `add_column` (datasets 5.2) would write selected rows anew, images and all: where
    their numbers tell the place of each, the columns go to the whole, and the rows are selected again."""
    how, rows = rows.format, rows.with_format(None)  # as stored: `add_column` may write what a transform makes
    rows = rows.remove_columns([name for name in columns if name in rows.column_names])
    chosen, whole = np.arange(len(rows)), Dataset(rows.data, info=rows.info)
    every = whole.data["row"].to_numpy() if "row" in rows.column_names else chosen[:0]
    if len(whole) and len(np.unique(every)) == len(whole):
        order = np.argsort(every)
        chosen = order[np.searchsorted(every, np.array(rows.with_format("numpy")["row"][:]), sorter=order)]
        rows = whole
    for name, values in columns.items():
        spread = np.zeros(len(rows), np.int64)
        spread[chosen] = values
        rows = rows.add_column(name, spread)
    return rows.select(chosen).with_format(how["type"], **how["format_kwargs"])


class _StreamCheck:
    """Checks a batch of one row as it comes. Without a collator a bad row raises (what only a collator can tell, the
    training's own tells); with one it is left out and counted, on stderr, in each worker."""

    def __init__(self, reader: RowReader | None, collator: Any, max_bad_fraction: float, split: Any) -> None:
        self.reader, self.collator, self.max_bad_fraction, self.split = reader, collator, max_bad_fraction, split
        self.rows = self.dropped = 0

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        look = Look(self.rows, {name: value for name, [value] in batch.items()}, self.reader)
        self.rows += 1
        if (faults := look.record(self.collator).faults) in ([], (), [ONE_ANSWER]):
            parts = self.split({**look.converted, **look.decoded._asdict()})
            return {field: [part[field] for part in parts] for field in parts[0]}
        last = f"{look.name}: {'; '.join(faults)}"
        if self.collator is None:
            raise ValueError(last)
        self.dropped += 1
        if self.rows >= 100 and self.dropped > self.max_bad_fraction * self.rows:
            limit = f"--max_bad_fraction {self.max_bad_fraction}; fix them. The last is {last}"
            raise ValueError(f"{self.dropped} of the first {self.rows} rows are bad, more than {limit}")
        if self.dropped == 1 or self.dropped % 100 == 0:
            told = f"{self.dropped} of {self.rows} rows of the stream are left out; the last is {last}"
            print(told, file=sys.stderr, flush=True)
        return {field: [] for field in ("messages", "images", "row")}
