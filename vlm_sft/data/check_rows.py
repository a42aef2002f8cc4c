"""`check_rows`: each row is read, decoded and encoded once before training: which would fail or teach nothing, and why.

It adds the columns `length`, `image_tokens` and `trained_tokens`, leaves bad rows out on request, and remembers what it
found of each row, so that a second start decodes only what is new. Call it on what `load_conversations` returns, with
the collator of the training.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from PIL.Image import Image as PILImage
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from vlm_sft.chat.collator import IGNORE_INDEX, EncodedRow
from vlm_sft.chat.images import MAX_DECODED_PIXELS, repairs_of, to_rgb
from vlm_sft.chat.messages import Conversation, Message, check_turns, count_images, normalise, text_of
from vlm_sft.common import restore_rng, rng_state
from vlm_sft.data.rows import COLUMNS, STREAMS, ImageFolder, RowReader, reader_of, unpacked
from vlm_sft.distributed import print_main

MAX_ASPECT = 200  # Qwen's processors refuse what is longer, LLaVA's cut it to a stripe
_PACKAGES = ("transformers", "tokenizers", "pillow", "torchvision")
_NAME = re.compile(r"^(?:row (?:\d+|without a number)|example \d+ of the batch): ")
_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SHOWN = 5  # rows of each reason
_TOGETHER = 8  # rows of one call of the processor
_DETAIL = 500  # characters of a fault; a template may put a whole row into its message

Data = TypeVar("Data")


class Record(NamedTuple):
    """What is remembered of a row: its tokens, or what is wrong with it, and how its images are repaired."""

    length: int = 0
    image_tokens: int = 0
    trained_tokens: int = 0
    faults: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()


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
    does not open, is one pixel wide or more than `MAX_ASPECT` times as long as wide, a text is blank or holds control
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
    cache = _cache_file(made_by)
    known = _read_cache(cache)
    findings = _look_at_all(_Rows(rows, collator, known), num_proc)
    if fresh := {key: record for finding in findings for key, record in finding.fresh}:
        _write_cache(cache, fresh)
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
        _encode_together([look for look in looks if look.key and look.key not in self.known], self.encoder)
        return [self._finding(index, look) for index, look in zip(indices, looks, strict=True)]

    def _read(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:  # a transform may raise anything
            return error

    def _look(self, index: int, row: Any) -> _Look:
        look = _Look(f"row {index}", self.reader)
        try:
            look.read(row)
        except Exception as error:
            look.errors.append(error)
        return look

    def _finding(self, index: int, look: _Look) -> _Finding:
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


class _Look:
    """One row: what it holds (`key`, for which nothing is decoded), and what the collator makes of it (`record`)."""

    def __init__(self, name: str, reader: RowReader | None) -> None:
        self.name, self.reader = name, reader
        self.key: bytes | None = None
        self.looked_at = False
        self.decoded: Conversation | None = None
        self.encoded: EncodedRow | None = None
        self.errors: list[Exception] = []
        self.repairs: list[str] = []

    def read(self, row: Any) -> None:
        """Takes the row as it is stored. Raises what is wrong with it before an image is opened."""
        if isinstance(row, Exception):
            raise row
        self.name = f"row {row['row']}" if row.get("row") is not None else self.name
        self.converted = self.reader.convert(row) if self.reader else row
        messages, images = normalise(self.converted.get("messages"), self.converted.get("images"))
        check_turns(messages)
        folder = self.reader.folder if self.reader else None
        where = folder and (os.path.realpath(folder.path), *folder[1:])
        digest = hashlib.blake2b(json.dumps([messages, where]).encode(), digest_size=16)
        for image in images:
            digest.update(_identity(image, folder))
        self.key = digest.digest()

    @property
    def lasts(self) -> bool:
        """Whether what was found will be found again: not so where a disk or the memory failed."""
        return not any(map(_passes, self.errors))

    def record(self, collator: Any) -> Record:
        """What is to be known of the row."""
        self.decode()
        if not self.errors and collator is not None:
            try:
                self.encoded = row = self.encoded or collator.encode([self._example()])[0][0]
                if trained := int((row.labels != IGNORE_INDEX).sum()):
                    return Record(len(row), int(row.image.sum()), trained, (), tuple(self.repairs))
                self.errors.append(ValueError("no token is left to train on; give it an answer that is not blank"))
            except Exception as error:  # a chat template or a processor may raise anything; the pass continues
                self.errors.append(error)
        return Record(0, 0, 0, tuple(map(_words, self.errors)), tuple(self.repairs))

    def decode(self) -> None:
        """Decodes the images, once; keeps what is wrong with texts and images."""
        if self.looked_at or self.key is None:
            return
        self.looked_at = True
        try:
            opened = self.reader.open(self.converted) if self.reader else self.converted
            conversation = normalise(opened.get("messages"), opened.get("images"))
        except Exception as error:
            self.errors.append(error)
            return
        self.errors += map(ValueError, _text_faults(conversation.messages))
        images = []
        for number, image in enumerate(conversation.images):
            try:
                self.repairs += repairs_of(image)
                images.append(decoded := to_rgb(image))
            except ValueError as error:
                self.errors.append(ValueError(f"images[{number}]: {error}"))
                self.errors[-1].__cause__ = error
                continue
            shape = f"images[{number}]: {decoded.width} x {decoded.height} pixels"
            if min(decoded.size) == 1:
                self.errors.append(ValueError(f"{shape} show nothing; replace the image or drop the row"))
            elif max(decoded.size) > MAX_ASPECT * min(decoded.size):
                self.errors.append(ValueError(f"{shape} are beyond {MAX_ASPECT} to 1; crop the image or drop the row"))
        self.decoded = Conversation(conversation.messages, images)

    def _example(self) -> dict[str, Any]:
        assert self.decoded is not None
        return self.decoded._asdict()


def _encode_together(looks: Sequence[_Look], collator: Any) -> None:
    """Encodes sound rows by one call of the processor, which takes a third less time than one for each. Where that
    fails, they are encoded one by one, so that the row is found."""
    for look in looks:
        look.decode()
    sound = [look for look in looks if not look.errors]
    if collator is None or not sound:
        return
    try:
        rows, _ = collator.encode([look._example() for look in sound])
    except Exception:
        return
    for look, row in zip(sound, rows, strict=True):
        look.encoded = row


def _identity(image: Any, folder: ImageFolder | None) -> bytes:
    """Equal for equal images: by their encoded bytes, their file with its size and time, or their pixels."""
    if isinstance(image, Mapping):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, (str, Path)) and folder:
        target = os.path.realpath(os.path.join(folder.path, image))
        try:
            found = os.stat(target)
        except (OSError, ValueError):
            return f"no file {target!r}".encode()
        return f"file {target!r} {found.st_size} {found.st_mtime_ns}".encode()
    if isinstance(image, PILImage):
        about = (image.mode, image.size, image.getpalette(), sorted(map(repr, image.info.items())))
        try:
            pixels = image.tobytes() if math.prod(image.size) <= MAX_DECODED_PIXELS else b""
        except Exception:  # one that was opened and is damaged
            pixels = b""
        return repr(about).encode() + hashlib.blake2b(pixels).digest()
    if isinstance(image, np.ndarray):
        return f"{image.dtype} {image.shape}".encode() + hashlib.blake2b(image.tobytes()).digest()
    return hashlib.blake2b(image if isinstance(image, (bytes, bytearray)) else repr(image).encode()).digest()


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


def _text_faults(messages: Sequence[Message]) -> Iterator[str]:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not any(message.get("train", True) for message in answers):
        yield "no answer is to be trained on; leave one without 'train': false, or drop the row"
    for number, message in enumerate(messages):
        text = text_of(message)
        if control := _CONTROL.search(text):
            yield f"messages[{number}] holds the control character U+{ord(control[0]):04X}; remove it or drop the row"
        if text.strip() or not message.get("train", True):
            continue
        if message["role"] == "assistant":
            yield f"messages[{number}] is a blank answer; give it words, mark it 'train': false or drop the row"
        elif not count_images([message]):
            yield f"messages[{number}] ({message['role']}) is blank; give it words or drop the row"


def _too_long(record: Record, settings: Any) -> str:
    remedy = "set truncation='trim' or 'drop'" if settings.truncation == "error" else "leave the row out"
    return (
        f"{record.length} tokens ({record.image_tokens} from images), more than max_length="
        f"{settings.max_length}; raise it, or {remedy}"
    )


def _words(error: Exception) -> str:
    """What is wrong, without the name of the row: on one line, safe to print."""
    detail = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    detail = _NAME.sub("", detail)
    detail = detail if len(detail) <= _DETAIL else f"{detail[:_DETAIL]} ..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in detail)


def _passes(error: BaseException | None) -> bool:
    """Whether an error came of a disk or of memory, and may not come again."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            return True
        error = error.__cause__ or error.__context__
    return False


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
        look = _Look(f"row {self.rows}", self.reader)
        self.rows += 1
        try:
            look.read(row)
        except ValueError as error:
            look.errors.append(error)
        if not (faults := look.record(self.collator).faults):
            return {field: [value] for field, value in {**look.converted, **look._example()}.items()}
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


@functools.cache
def _code() -> str:
    """A hash of the files that decide what is made of a row."""
    room = Path(__file__).parents[1]
    files = sorted(file for name in ("chat", "data") for file in (room / name).glob("*.py"))
    return hashlib.blake2b(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.distributions(name=name) for name in _PACKAGES}
    return {name: next((each.version for each in distributions), "none") for name, distributions in found.items()}


def _cache_file(made_by: str) -> Path:
    """One file for all rows that this collator (its `max_length` left aside), this code and these versions read."""
    described = json.dumps([made_by, _code(), _versions()], sort_keys=True)
    name = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE, "vlm_sft", f"{name}.parquet")


def _read_cache(file: Path) -> dict[bytes, Record]:
    if not file.is_file():
        return {}
    try:
        columns = pq.read_table(file).to_pydict()
        faults, repairs = (map(tuple, columns[name]) for name in ("faults", "repairs"))
        numbers = (columns[name] for name in COLUMNS)
        return dict(zip(columns["key"], map(Record, *numbers, faults, repairs), strict=True))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        print_main(f"{file} cannot be read ({error}); all rows are checked again")
        return {}


def _write_cache(file: Path, fresh: Mapping[bytes, Record]) -> None:
    """Adds to the file what is new, on the main process, by a rename; says so where that cannot be done."""
    if not PartialState().is_main_process:
        return
    merged = {**_read_cache(file), **fresh}  # another run may have written since
    records = list(merged.values())
    table = {"key": list(merged), **{name: [getattr(record, name) for record in records] for name in Record._fields}}
    strings = pa.list_(pa.string())
    types = [pa.binary(), pa.int64(), pa.int64(), pa.int64(), strings, strings]
    written = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as written:
            pq.write_table(pa.table(table, schema=pa.schema(zip(table, types, strict=True))), written)
        os.replace(written.name, file)
    except OSError as error:
        print_main(f"what was found of the rows cannot be kept ({error}); the next start checks all of them again")
        if written is not None:
            Path(written.name).unlink(missing_ok=True)
