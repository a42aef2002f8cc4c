"""What is to be known of a row before training, found once and remembered in a file of the cache of datasets.

`check_rows` looks at all rows by it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from PIL.Image import Image as PILImage

from vlm_sft.chat.collator import IGNORE_INDEX, EncodedRow
from vlm_sft.chat.images import MAX_DECODED_PIXELS, repairs_of, source_of, to_rgb
from vlm_sft.chat.messages import Conversation, Message, check_turns, count_images, normalise, one_answer, text_of
from vlm_sft.chat.template import RenderedDifferently
from vlm_sft.data.rows import ImageFolder, RowReader, named, open_at
from vlm_sft.distributed import print_main

MAX_ASPECT = 200  # Qwen's processors refuse what is longer, LLaVA's cut it to a stripe
_PACKAGES = ("transformers", "tokenizers", "pillow", "torchvision")
_NAME = re.compile(r"^(?:row (?:\d+|without a number)|example \d+ of the batch): ")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_DETAIL = 500  # characters of a fault; a template may put a whole row into its message


ONE_ANSWER = "one answer a row"
"""In the place of a fault: the chat template renders earlier answers differently, so each answer is to be a row."""


class Record(NamedTuple):
    """What is remembered of a row: its tokens, or what is wrong with it, and how its images are repaired."""

    length: int = 0
    image_tokens: int = 0
    trained_tokens: int = 0
    faults: Sequence[str] = ()
    repairs: Sequence[str] = ()


_NOTHING = "[[], []]"  # the note of a record without faults and repairs


class Records:
    """Records by key, in some 40 bytes each: `keys` [N] of 16 bytes, b"" for none; `values` [N, 4], the counts and the
    number of a note; `notes`, (faults, repairs), of which the first one is empty."""

    def __init__(self, table: pa.Table | None = None) -> None:
        self._keys, self._values, self._notes = bytearray(), array("i"), {_NOTHING: 0}
        for batch in table.to_batches() if table is not None else ():
            self._keys += b"".join(batch["key"].to_pylist())
            notes = [self._notes.setdefault(note, len(self._notes)) for note in batch["note"].to_pylist()]
            columns = [*(batch[name].to_numpy() for name in Record._fields[:3]), notes]
            self._values.frombytes(np.stack(columns, 1).astype(np.int32).tobytes())

    def add(self, key: bytes | None, record: Record) -> None:
        self._keys += (key or b"").ljust(16, b"\0")
        note = json.dumps(record[3:]) if record.faults or record.repairs else _NOTHING
        self._values.extend((*record[:3], self._notes.setdefault(note, len(self._notes))))

    def extend(self, other: Records) -> None:
        values, numbers = other.values, [self._notes.setdefault(note, len(self._notes)) for note in other._notes]
        values[:, 3] = np.array(numbers, np.int32)[values[:, 3]]
        self._keys += other._keys
        self._values.frombytes(values.tobytes())

    def __len__(self) -> int:
        return len(self._keys) // 16

    @property
    def keys(self) -> np.ndarray[Any, np.dtype[np.bytes_]]:
        return np.frombuffer(bytes(self._keys), "S16")

    @property
    def values(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        return np.array(self._values, np.int32).reshape(-1, 4)

    @property
    def notes(self) -> list[tuple[list[str], list[str]]]:
        return [tuple(json.loads(note)) for note in self._notes]

    def table(self) -> pa.Table:
        """Each key once."""
        keys, first = np.unique(self.keys, return_index=True)
        held = pa.array(np.ascontiguousarray(keys).view("V16").tolist(), pa.binary(16))
        counts = dict(zip(Record._fields[:3], self.values[first].T, strict=False))
        notes = np.array([*self._notes], object)[self.values[first, 3]]
        return pa.table({"key": held, **counts, "note": pa.array(notes, pa.string())})


class Known:
    """What `read_cache` found: records by key, looked up and not changed."""

    def __init__(self, records: Records) -> None:
        order = np.argsort(records.keys)
        self.keys, self.values, self.notes = records.keys[order], records.values[order], records.notes

    def get(self, key: bytes) -> Record | None:
        place = int(np.searchsorted(self.keys, key))
        if place == len(self.keys) or self.keys[place] != key.rstrip(b"\0"):
            return None
        *counts, note = self.values[place].tolist()
        return Record(*counts, *self.notes[note])


class Look:
    """One row, as it is stored, or the exception that reading it raised: what it holds (`key`, for which nothing is
    decoded), and what the collator makes of it (`record`)."""

    def __init__(self, index: int, row: Any, reader: RowReader | None) -> None:
        self.index, self.number, self.name, self.reader = index, index, f"row {index}", reader
        self.folder = reader.folder if reader else None
        self.key: bytes | None = None
        self.content = b""  # a digest of what the row holds, wherever its files lie
        self.written = 0  # when its files were, the last of them, in nanoseconds
        self.looked_at = False
        self.decoded = Conversation([], [])
        self.encoded: EncodedRow | None = None
        self.errors: list[Exception] = []
        self.repairs: list[str] = []
        try:
            self._read(row)
        except Exception as error:
            self.errors.append(error)

    def _read(self, row: Any) -> None:
        if isinstance(row, Exception):
            raise row
        if isinstance(number := row.get("row"), int):
            self.number, self.name = number, f"row {number}"
        self.converted = self.reader.convert(row) if self.reader else row
        messages, self.images = normalise(self.converted.get("messages"), self.converted.get("images"))
        check_turns(messages)
        self.decoded = Conversation(messages, [])
        where = self.folder and (os.path.realpath(self.folder.path), self.folder.allow_outside)
        content = hashlib.blake2b(json.dumps(messages).encode(), digest_size=16)
        place = hashlib.blake2b(repr(where).encode(), digest_size=16)
        for image in self.images:
            what, lies, written = _identity(image, self.folder)
            content.update(what)
            place.update(lies)
            self.written = max(self.written, written)
        self.content = content.digest()
        self.key = hashlib.blake2b(self.content + place.digest(), digest_size=16).digest()

    @property
    def lasts(self) -> bool:
        """Whether what was found will be found again: not so where a disk or the memory failed."""
        return self.key is not None and not any(map(_passes, self.errors))

    def record(self, collator: Any, answer: int | None = None) -> Record:
        """What the collator makes of the row, or of the row that ends with the answer in this message."""
        self.decode()
        errors = self.errors if answer is None else [*self.errors]
        if not errors and collator is not None:
            try:
                if answer is None:
                    self.encoded = row = self.encoded or collator.encode([self.decoded._asdict()])[0][0]
                else:
                    [row] = collator.encode([one_answer(self.decoded, answer)._asdict()])[0]
                if trained := int((row.labels != IGNORE_INDEX).sum()):
                    return Record(len(row), int(row.image.sum()), trained, (), self.repairs)
                errors.append(ValueError("no token is left to train on; give it an answer that is not blank"))
            except RenderedDifferently as error:
                if answer is None:
                    return Record(0, 0, 0, [ONE_ANSWER], self.repairs)
                errors.append(error)
            except Exception as error:  # a chat template or a processor may raise anything; the pass continues
                errors.append(error)
        return Record(0, 0, 0, [*map(_words, errors)], self.repairs)

    def decode(self) -> None:
        """Decodes the images, once; keeps what is wrong with texts and images."""
        if self.looked_at or self.key is None:
            return
        self.looked_at = True
        self.errors += map(ValueError, _text_faults(self.decoded.messages))
        for number, image in enumerate(self.images):
            try:
                opened = open_at(image, f"images[{number}]", self.folder) if self.folder else image
                with named(f"images[{number}]"):
                    self.repairs += repairs_of(opened)
                    self.decoded.images.append(_shown(to_rgb(opened)))
            except Exception as error:
                self.errors.append(error)


def encode_together(looks: Sequence[Look], collator: Any) -> None:
    """Encodes sound rows by one call of the processor, which takes a third less time than one for each. Where that
    fails, they are encoded one by one, so that the row is found."""
    for look in looks:
        look.decode()
    sound = [look for look in looks if not look.errors]
    if collator is None or not sound:
        return
    try:
        rows, _ = collator.encode([look.decoded._asdict() for look in sound])
    except Exception:
        return
    for look, row in zip(sound, rows, strict=True):
        look.encoded = row


def _identity(image: Any, folder: ImageFolder | None) -> tuple[bytes, bytes, int]:
    """What tells an image: its encoded bytes, its pixels, or the name and size of its file; where its file lies, and
    when it was written (in nanoseconds)."""
    with suppress(ValueError):  # such as a data URL that is none
        image = source_of(image)
    data: bytes | bytearray = b""
    about, place, written = repr(image) if isinstance(image, (str, Path)) else type(image).__name__, "", 0
    if isinstance(image, (str, Path)) and folder:
        with suppress(OSError, ValueError):  # such as no file
            place = os.path.realpath(os.path.join(folder.path, image))
            found = os.stat(place)
            about, place, written = f"{about} {found.st_size}", f"{place!r} {found.st_mtime_ns}", found.st_mtime_ns
    elif isinstance(image, PILImage):
        about = repr((image.mode, image.size, image.getpalette(), sorted(map(repr, image.info.items()))))
        with suppress(Exception):  # one that was opened and is damaged
            data = image.tobytes() if math.prod(image.size) <= MAX_DECODED_PIXELS else b""
    elif isinstance(image, np.ndarray):
        about, data = f"{image.dtype} {image.shape}", image.tobytes()
    else:
        data = image if isinstance(image, (bytes, bytearray)) else repr(image).encode()
    what, place_bytes = (text.encode("utf-8", "backslashreplace") for text in (about, place))
    return what + hashlib.blake2b(data).digest(), place_bytes, written


def _shown(image: PILImage) -> PILImage:
    """The image. Raises `ValueError` for one that shows nothing."""
    shape = f"{image.width} x {image.height} pixels"
    if min(image.size) == 1:
        raise ValueError(f"{shape} show nothing; replace the image or drop the row")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{shape} are beyond {MAX_ASPECT} to 1; crop the image or drop the row")
    return image


def _text_faults(messages: Sequence[Message]) -> Iterator[str]:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not any(message.get("train", True) for message in answers):
        yield "no answer is to be trained on; leave one without 'train': false, or drop the row"
    for number, message in enumerate(messages):
        text = text_of(message)
        if control := _CONTROL.search(text):
            yield f"messages[{number}] holds the control character U+{ord(control[0]):04X}; remove it or drop the row"
        if text.strip() or not message.get("train", True) or message.get("tool_calls"):
            continue
        if message["role"] == "assistant":
            yield f"messages[{number}] is a blank answer; give it words, mark it 'train': false or drop the row"
        elif not count_images([message]):
            yield f"messages[{number}] ({message['role']}) is blank; give it words or drop the row"


def _words(error: Exception) -> str:
    """What is wrong, without the name of the row: on one line, safe to print."""
    detail = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    detail = _NAME.sub("", detail)
    detail = detail if len(detail) <= _DETAIL else f"{detail[:_DETAIL]} ..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in detail)


def _passes(error: BaseException | None) -> bool:
    """Whether an error came of a disk or of memory, and may not come again."""
    if error is None or isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
        return error is not None
    return _passes(error.__cause__ or error.__context__)


@functools.cache
def _code() -> str:
    """A hash of the files that decide what is made of a row."""
    room = Path(__file__).parents[1]
    files = sorted(file for name in ("chat", "data") for file in (room / name).glob("*.py"))
    return hashlib.blake2b(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.distributions(name=name) for name in _PACKAGES}
    return {name: next((each.version for each in distributions), "none") for name, distributions in found.items()}


def cache_file(made_by: str) -> Path:
    """One file for all rows that this collator (its `max_length` left aside), this code and these versions read."""
    described = json.dumps([made_by, _code(), _versions()], sort_keys=True)
    name = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE, "vlm_sft", f"{name}.parquet")


def read_cache(file: Path) -> Records:
    """What an earlier pass found. Says so where the file cannot be read."""
    try:
        return Records(pq.read_table(file, page_checksum_verification=True) if file.is_file() else None)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        print_main(f"{file} cannot be read ({error}); all rows are checked again")
        return Records()


def write_cache(file: Path, fresh: Records) -> None:
    """Adds to the file what is new, on the main process, by a rename; says so where that cannot be done."""
    if not PartialState().is_main_process:
        return
    fresh.extend(read_cache(file))  # another run may have written since
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(fresh.table(), part, write_page_checksum=True)
        part.replace(file)
    except OSError as error:
        print_main(f"what was found of the rows cannot be kept ({error}); the next start checks all of them again")
        with suppress(OSError):
            part.unlink()
