"""What is to be known of a row before training, found once and remembered in a file of the cache of datasets."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
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
from vlm_sft.data.rows import READER, RowReader, named
from vlm_sft.distributed import print_main

MAX_ASPECT = 200  # Qwen's processors refuse what is longer, LLaVA's cut it to a stripe
_PACKAGES = ("transformers", "tokenizers", "pillow", "torchvision")
_NAME = re.compile(r"^(?:row (?:\d+|without a number)|example \d+ of the batch): ")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_DETAIL = 500  # characters of a fault; a template may put a whole row into its message

COLUMNS = ("length", "image_tokens", "trained_tokens")
"""What `check_rows` adds to a row."""
ONE_ANSWER = "one answer a row"
"""In the place of a fault: the chat template renders earlier answers differently, so each answer is to be a row."""
KEPT: list[tuple[str, str]] = [("key", "S16"), *((name, "i4") for name in COLUMNS), ("note", "O")]
"""What is remembered of a row, in 36 bytes of an array: its key and a `Record`."""


class Record(NamedTuple):
    """The tokens of a row, and JSON of what is wrong with it and how its images are repaired, None without either."""

    length: int = 0
    image_tokens: int = 0
    trained_tokens: int = 0
    note: str | None = None

    @property
    def told(self) -> tuple[list[str], list[str]]:
        """What is wrong, and how images are repaired."""
        return tuple(json.loads(self.note)) if self.note else ([], [])


def note_of(faults: Sequence[str], repairs: Sequence[str]) -> str | None:
    return json.dumps([faults, repairs]) if faults or repairs else None


def recall(known: Any, key: bytes | None) -> Record | None:
    """The record of this key in an array in the order of its keys; None where there is none."""
    place = int(np.searchsorted(known["key"], key)) if key else len(known)
    if not key or place == len(known) or known["key"][place] != key.rstrip(b"\0"):  # NumPy drops zeros at the end
        return None
    return Record(*known[place].item()[1:])


class Look:
    """One row, as it is stored, or the exception that reading it raised: what it is told by (`key`, for which nothing
    is decoded; `content`, wherever its files lie; `written`, when the last of them was, in nanoseconds), and what the
    collator makes of it (`record`)."""

    def __init__(self, index: int, row: Any, reader: RowReader | None) -> None:
        self.index, self.number, self.part, self.reader = index, index, 0, reader
        self.key: bytes | None = None
        self.content, self.written, self.looked_at = b"", 0, False
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
        if isinstance(row.get("row"), int):
            self.number, self.part = row["row"], row.get(READER, 0)
        self.converted = self.reader.convert(row) if self.reader else row
        messages, self.images = normalise(self.converted.get("messages"), self.converted.get("images"))
        check_turns(messages)
        self.decoded = Conversation(messages, [])
        folder = os.path.realpath(self.reader.folder) if self.reader else None
        told = [_identity(image, folder) for image in self.images]
        self.content = digest(json.dumps(messages).encode(), *(what for what, _, _ in told))
        where = repr((folder, self.reader and self.reader.allow_outside)).encode()
        self.key = digest(self.content, where, *(place for _, place, _ in told))
        self.written = max((written for _, _, written in told), default=0)

    @property
    def lasts(self) -> bool:
        """Whether what was found will be found again: not so where a disk or the memory failed."""
        return self.key is not None and not any(map(_passes, self.errors))

    def record(self, collator: Any, answer: int = -1) -> Record:
        """What the collator makes of the row, or of the row that ends with the answer in this message."""
        self.decode()
        errors = [*self.errors]
        if not errors and collator is not None:
            try:
                row = self.encoded if answer < 0 else None
                asked = self.decoded if answer < 0 else one_answer(self.decoded, answer)
                row = row or collator.encode([asked._asdict()])[0][0]
                if trained := int((row.labels != IGNORE_INDEX).sum()):
                    return Record(len(row), int(row.image.sum()), trained, note_of([], self.repairs))
                errors.append(ValueError("no token is left to train on; give it an answer that is not blank"))
            except Exception as error:  # a chat template or a processor may raise anything; the pass continues
                if isinstance(error, RenderedDifferently) and answer < 0:
                    return Record(note=note_of([ONE_ANSWER], self.repairs))
                errors.append(error)
        self.errors = errors if answer < 0 else self.errors
        return Record(note=note_of([*map(_words, errors)], self.repairs))

    def decode(self) -> None:
        """Decodes the images, once; keeps what is wrong with texts and images."""
        if self.looked_at or self.key is None:
            return
        self.looked_at = True
        self.errors += map(ValueError, _text_faults(self.decoded.messages))
        for number, image in enumerate(self.images):
            try:
                with named(f"images[{number}]"):
                    opened = self.reader.open(image) if self.reader else image
                    self.repairs += repairs_of(opened)
                    self.decoded.images.append(to_rgb(opened))
                    _check_shape(self.decoded.images[-1])
            except Exception as error:
                self.errors.append(error)


def encode_together(looks: Sequence[Look], collator: Any) -> None:
    """Encodes sound rows by one call of the processor, which takes a third less time than one for each. Where that
    fails, they are encoded one by one, so that the row is found."""
    for look in looks:
        look.decode()
    sound = [look for look in looks if not look.errors]
    if collator is not None and sound:
        with suppress(Exception):
            rows, _ = collator.encode([look.decoded._asdict() for look in sound])
            for look, row in zip(sound, rows, strict=True):
                look.encoded = row


def digest(*parts: bytes) -> bytes:
    """16 bytes that tell these apart from any others."""
    return hashlib.blake2b(b"".join(hashlib.blake2b(part).digest() for part in parts), digest_size=16).digest()


def _identity(image: Any, folder: str | None) -> tuple[bytes, bytes, int]:
    """What tells an image: its encoded bytes, its pixels, or the name and size of its file; where its file lies, and
    when it was written (in nanoseconds)."""
    with suppress(ValueError):  # such as a data URL that is none
        image = source_of(image)
    about, data, place, written = type(image).__name__, b"", "", 0
    if isinstance(image, (str, Path)):
        about = repr(image)
        with suppress(OSError, ValueError):  # such as no file
            place = os.path.realpath(os.path.join(folder or "", image))
            found = os.stat(place)
            about, place, written = f"{about} {found.st_size}", f"{place!r} {found.st_mtime_ns}", found.st_mtime_ns
    elif isinstance(image, PILImage):
        about = repr((image.mode, image.size, image.getpalette(), sorted(map(repr, image.info.items()))))
        with suppress(Exception):  # one that was opened and is damaged
            data = image.tobytes() if math.prod(image.size) <= MAX_DECODED_PIXELS else b""
    else:
        data = bytes(image) if isinstance(image, (bytes, bytearray)) else repr(image).encode()
    return digest(about.encode("utf-8", "backslashreplace"), data), place.encode("utf-8", "backslashreplace"), written


def _check_shape(image: PILImage) -> None:
    """Raises `ValueError` for an image that shows nothing."""
    shape = f"{image.width} x {image.height} pixels"
    if min(image.size) == 1:
        raise ValueError(f"{shape} show nothing; replace the image or drop the row")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{shape} are beyond {MAX_ASPECT} to 1; crop the image or drop the row")


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
def _made_with() -> dict[str, Any]:
    """What decides what is made of a row: our code and the versions of packages."""
    files = sorted(file for room in ("chat", "data") for file in (Path(__file__).parents[1] / room).glob("*.py"))
    versions = {name: [each.version for each in importlib.metadata.distributions(name=name)] for name in _PACKAGES}
    return {"code": digest(*(file.read_bytes() for file in files)).hex(), **versions}


def cache_file(made_by: str) -> Path:
    """One file for all rows that this collator (its `max_length` left aside), this code and these versions read."""
    name = digest(json.dumps([made_by, _made_with()], sort_keys=True).encode()).hex()
    return Path(datasets.config.HF_DATASETS_CACHE, "vlm_sft", f"{name}.parquet")


def read_cache(file: Path) -> Any:
    """What an earlier pass found, an array of `KEPT` in the order of its keys. Says so where it cannot be read."""
    if not file.is_file():
        return np.zeros(0, KEPT)
    try:
        table = pq.read_table(file, page_checksum_verification=True)
        found = np.zeros(len(table), KEPT)
        for name, _ in KEPT:
            found[name] = table[name].to_numpy()
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        print_main(f"{file} cannot be read ({error}); all rows are checked again")
        return np.zeros(0, KEPT)
    return found[np.unique(found["key"], return_index=True)[1]]


def write_cache(file: Path, fresh: Any) -> None:
    """Adds to the file what is new, on the main process, by a rename; says so where that cannot be done."""
    if not PartialState().is_main_process:
        return
    found = np.concatenate([fresh, read_cache(file)])  # another run may have written since
    found = found[np.unique(found["key"], return_index=True)[1]]
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        keys = pa.array(found["key"].tolist(), pa.binary())  # of NumPy's array it would cut them at their first zero
        table = pa.table({"key": keys, **{name: found[name] for name, _ in KEPT[1:]}})
        pq.write_table(table, part, write_page_checksum=True)
        part.replace(file)
    except OSError as error:
        print_main(f"what was found of the rows cannot be kept ({error}); the next start checks all of them again")
        with suppress(OSError):
            part.unlink()
