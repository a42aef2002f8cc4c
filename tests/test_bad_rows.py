"""What people's data does wrong, and how each ends: repaired, a named error, or set aside by `check_rows` and counted.

Each bad row lies among nine good ones, is loaded, checked and handed to a collator as it would be in training.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, List, Value
from PIL import Image
from torch.utils.data import DataLoader

from vlm_sft import ChatCollator, load_conversations
from vlm_sft.chat.messages import normalise, text_of
from vlm_sft.data.check_rows import check_report
from vlm_sft.data.rows import RowReader

pytestmark = pytest.mark.usefixtures("own_cache")

BAD = 4  # the bad row's place among the good ones
SIDE = 24
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
CLEAR = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def big(format: str) -> bytes:
    return encoded(NOISE.resize((128, 128)), format)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def on_white(rgba: np.ndarray[Any, Any]) -> Image.Image:
    alpha = rgba[..., 3:] / 255
    return Image.fromarray((rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8))


def say(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


IMAGE, QUESTION = {"type": "image"}, {"type": "text", "text": "What is it?"}
GOOD = say(("user", [IMAGE, QUESTION]), ("assistant", "A square."))
TEXT = say(("user", "Hello?"), ("assistant", "Good day."))


@dataclass(frozen=True)
class Case:
    """`row` is the bad row as it stands in the file; `files` are written beside it. `says` is a pattern for what the
    user is told. A repaired row has to equal `equals`: messages and PIL images, or the batch is not what it should be.
    `write` replaces the JSON-lines file of nine good rows and this one."""

    name: str
    ends: str
    says: str = ""
    row: Any = None
    files: dict[str, bytes] | None = None
    equals: dict[str, Any] | None = None
    write: Callable[[Path, list[Any]], Path] | None = None


def picture(name: str, data: bytes, ends: str, says: str, equals: Image.Image | None = None) -> Case:
    """A row whose only fault is its picture, held in a file."""
    shown = {"messages": GOOD, "images": [equals]} if equals else None
    return Case(name, ends, says, {"messages": GOOD, "images": ["bad.png"]}, {"bad.png": data}, shown)


def talk(name: str, messages: Any, ends: str, says: str, images: Any = (), equals: Any = None) -> Case:
    row = {"messages": messages, "images": list(images) if isinstance(images, tuple) else images}
    shown = {"messages": equals[0], "images": equals[1]} if equals else None
    return Case(name, ends, says, row, equals=shown)


def deep(dtype: str, white: float) -> tuple[bytes, Image.Image]:
    ramp = np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)
    stored = (ramp * white).astype(dtype)
    return encoded(Image.fromarray(stored), "TIFF"), Image.fromarray((stored / white * 255).round().astype(np.uint8))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(NOISE, "PNG", exif=exif)


def as_parquet(path: Path, rows: list[Any], features: Features) -> Path:
    table = Dataset.from_list([{name: row[name] for name in features} for row in rows], features=features)
    pq.write_table(table.data.table, path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def arrow_unified(path: Path, rows: list[Any]) -> Path:
    """Structs of one type, in which Arrow has filled every field that a part does not have with None."""
    part = {"type": Value("string"), "text": Value("string"), "index": Value("int64"), "image": Value("string")}
    message = {"role": Value("string"), "content": [part], "name": Value("string")}
    features = Features({"messages": [message], "images": List(datasets.Image())})
    data = encoded(NOISE)
    for row in rows:
        for m in row["messages"]:
            m["content"] = [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"]
            m["content"] = [{name: p.get(name) for name in part} for p in m["content"]]
            m["name"] = None
        row["images"] = [{"bytes": data, "path": None} for _ in row["images"]]
    return as_parquet(path, rows, features)


def in_two_files(path: Path, rows: list[Any]) -> Path:
    """Parts in one file, strings and other columns in the next."""
    lines = [json.dumps(row) for row in rows]
    (path.parent / "rows").mkdir()
    NOISE.save(path.parent / "rows" / "good.png")
    (path.parent / "rows" / "1.jsonl").write_text("\n".join(lines[:BAD]))
    (path.parent / "rows" / "2.json").write_text(f"[{','.join(lines[BAD:])}]")
    return path.parent / "rows"


def one_line_cut(path: Path, rows: list[Any]) -> Path:
    lines = [json.dumps(row) for row in rows]
    lines[BAD] = lines[BAD][:40]
    path.write_text("\n".join(lines))
    return path


def no_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("")
    return path


def only_this_row(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows[BAD]))
    return path


def renamed_column(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps({"mesages": row["messages"], "images": row["images"]}) for row in rows))
    return path


def image_struct(stored: dict[str, Any]) -> Callable[[Path, list[Any]], Path]:
    """The picture as `datasets.Image` stores it: bytes, or a path that `datasets` itself would open or fetch."""

    def write(path: Path, rows: list[Any]) -> Path:
        text = {"role": Value("string"), "content": Value("string")}
        features = Features({"messages": [text], "images": List(datasets.Image())})
        good = {"bytes": encoded(NOISE), "path": None}
        plain = [say(("user", f"<image>Number {n}?"), ("assistant", "A square.")) for n, _ in enumerate(rows)]
        stored_rows = [{"messages": m, "images": [stored if n == BAD else good]} for n, m in enumerate(plain)]
        return as_parquet(path, stored_rows, features)

    return write


def with_path(path: str, says: str, name: str, ends: str = "named error") -> Case:
    return Case(name, ends, says, {"messages": GOOD, "images": [path]})


DEEP_TIFF, DEEP_SHOWN = deep("<u2", 65_535)
FLOAT_TIFF, FLOAT_SHOWN = deep("f4", 1)
FRAMES = encoded(NOISE.quantize(), "GIF", save_all=True, append_images=[Image.new("P", (SIDE, SIDE))])
IN_ORDER = (GOOD, [NOISE])

CASES = [
    # Pictures that do not open
    picture("JPEG cut in the middle", big("JPEG")[:2000], "named error", r"row 4: image 'bad.png' is damaged"),
    picture(
        "PNG cut near its end",
        big("PNG")[:-900],
        "named error",
        r"image 'bad.png' is damaged \(image file is truncated",
    ),
    picture("WebP cut in the middle", big("WEBP")[:2000], "named error", r"image 'bad.png' is damaged"),
    picture(
        "JPEG with a corrupt header",
        flipped(big("JPEG"), 1),
        "named error",
        "is not an image that can be read: it begins with",
    ),
    picture("PNG with a corrupt checksum", flipped(big("PNG"), 30), "named error", "is not an image that can be read"),
    picture("WebP with a corrupt header", flipped(big("WEBP"), 13), "named error", "damaged|not an image"),
    picture("file of zero bytes", b"", "named error", r"is empty \(0 bytes\)"),
    picture(
        "HTML saved as a picture", b"<!DOCTYPE html>404", "named error", "it begins with b'<!DOCTYPE ht'; expected"
    ),
    picture("PostScript (would run Ghostscript)", encoded(NOISE, "EPS"), "named error", "is not an image"),
    picture("WebP named .png", encoded(NOISE, "WEBP", lossless=True), "repaired", "told by its content", NOISE),
    with_path("sub", "is a directory in the image folder", "directory"),
    with_path("gone.png", "does not exist in the image folder", "missing file"),
    # Pictures that open and are not what they seem
    picture("1 x 1 pixel", encoded(Image.new("RGB", (1, 1))), "set aside", "1 x 1 pixels show nothing"),
    picture(
        "20000 x 10 pixels", encoded(Image.new("RGB", (20_000, 10))), "set aside", "20000 x 10 pixels are beyond 200"
    ),
    picture(
        "bomb of 64 megapixels", encoded(Image.new("1", (8000, 8000))), "named error", "8000 x 8000 pixels; at most"
    ),
    picture("CMYK", encoded(NOISE.convert("CMYK"), "TIFF"), "repaired", "mode CMYK, converted", NOISE),
    picture("palette", encoded(NOISE.quantize()), "repaired", "mode P, conv", NOISE.quantize().convert("RGB")),
    picture("RGBA", encoded(Image.fromarray(CLEAR)), "repaired", "transparency, laid on white", on_white(CLEAR)),
    picture(
        "grey with alpha (LA)",
        encoded(Image.fromarray(CLEAR[..., 2:])),
        "repaired",
        "transparency, laid on white",
        on_white(CLEAR[..., [2, 2, 2, 3]]),
    ),
    picture("16 bits (I;16)", DEEP_TIFF, "repaired", "of 16 bits .*, scaled to 8", DEEP_SHOWN.convert("RGB")),
    picture("floats (F)", FLOAT_TIFF, "repaired", "of floats up to 1 .*, scaled", FLOAT_SHOWN.convert("RGB")),
    picture("animated GIF", FRAMES, "repaired", "several frames, the first taken", NOISE.quantize().convert("RGB")),
    picture("EXIF says rotated", turned(), "repaired", "turned upright", NOISE.transpose(Image.Transpose.ROTATE_270)),
    # Fields of pictures
    talk("picture is None", GOOD, "named error", r"images\[0\]: the image is None", [None]),
    talk("pictures are missing", GOOD, "named error", "stands for image 0 but the row has 0 images", None),
    talk("pictures are an empty list", GOOD, "named error", "stands for image 0 but the row has 0 images", []),
    talk("pictures are a number", GOOD, "named error", r"images\[0\]: the image is a int; expected", 5),
    talk("pictures are a nested list", GOOD, "repaired", "made flat", [["good.png"]], IN_ORDER),
    talk("one picture too many", GOOD, "named error", "2 images but the messages hold 1", ("good.png",) * 2),
    talk(
        "one picture too few",
        say(("user", [IMAGE] * 2), ("assistant", "a")),
        "named error",
        "image 1 but",
        ("good.png",),
    ),
    talk(
        "index out of range",
        say(("user", [IMAGE | {"index": 3}, QUESTION]), ("assistant", "A square.")),
        "named error",
        "stands for image 3 but the row has 1 images",
        ("good.png",),
    ),
    talk(
        "the same picture twice, by index",
        say(("user", [IMAGE | {"index": 0}, IMAGE | {"index": 0}, QUESTION]), ("assistant", "A square.")),
        "repaired",
        "shown in both places",
        ("good.png",),
        (say(("user", [IMAGE, IMAGE, QUESTION]), ("assistant", "A square.")), [NOISE, NOISE]),
    ),
    talk(
        "picture inside the part",
        say(("user", [IMAGE | {"image": "good.png"}, QUESTION]), ("assistant", "A square.")),
        "repaired",
        "taken from the part",
        None,
        IN_ORDER,
    ),
    talk(
        "picture in an answer",
        say(("user", [QUESTION]), ("assistant", [IMAGE])),
        "named error",
        r"messages\[1\].content\[0\] is an image in an assistant message",
        ("good.png",),
    ),
    # Messages
    talk("messages are None", None, "named error", "`messages` is None"),
    talk("messages are empty", [], "named error", "`messages` is empty"),
    talk("messages as a JSON string", json.dumps(GOOD), "repaired", "parsed", ("good.png",), IN_ORDER),
    talk("messages as other text", "User: hi", "named error", "`messages` is a str"),
    talk(
        "content is a string",
        TEXT,
        "repaired",
        "one text part",
        None,
        (
            say(("user", [{"type": "text", "text": "Hello?"}]), ("assistant", [{"type": "text", "text": "Good day."}])),
            [],
        ),
    ),
    talk(
        "content is an empty list",
        say(("user", []), ("assistant", "a")),
        "set aside",
        r"messages\[0\] \(user\) is blank",
    ),
    talk(
        "content is None",
        say(("user", None), ("assistant", "a")),
        "named error",
        r"messages\[0\] has a content that is None",
    ),
    talk(
        "content is a nested list",
        say(("user", [[QUESTION]]), ("assistant", "a")),
        "named error",
        "is a list; expected a dict",
    ),
    talk(
        "unknown part",
        say(("user", [{"type": "video"}]), ("assistant", "a")),
        "named error",
        "video and sound are not",
    ),
    talk("unknown role", say(("bot", "q"), ("assistant", "a")), "named error", "has the role 'bot'; expected one of"),
    talk(
        "tool role", say(("user", "q"), ("tool", "r"), ("assistant", "a")), "named error", "is from tool; expected ass"
    ),
    talk(
        "two users in a row",
        say(("user", "q"), ("user", "r"), ("assistant", "a")),
        "named error",
        "is from user; expected assistant",
    ),
    talk(
        "assistant first",
        say(("assistant", "a"), ("user", "q"), ("assistant", "b")),
        "named error",
        "is from assistant; expected user",
    ),
    talk("no assistant", say(("user", "q")), "named error", "nothing answers it"),
    talk("only a system message", say(("system", "s")), "named error", "is from system and nothing answers it"),
    talk("empty answer", say(("user", "q"), ("assistant", "")), "set aside", r"messages\[1\] is a blank answer"),
    talk("blank answer", say(("user", "q"), ("assistant", " \n\t")), "set aside", r"messages\[1\] is a blank answer"),
    talk(
        "a key no template is given", [{**TEXT[0], "tool_calls": []}, TEXT[1]], "named error", "has the keys tool_calls"
    ),
    Case(
        "structs that Arrow filled with None",
        "repaired",
        "None counts as absent",
        {"messages": GOOD, "images": [0]},
        equals={"messages": GOOD, "images": [NOISE]},
        write=arrow_unified,
    ),
    Case(
        "extra columns",
        "repaired",
        "not read",
        {"messages": TEXT, "images": [], "score": 1, "meta": {"a": [None]}},
        equals={"messages": TEXT, "images": []},
    ),
    # Text
    talk(
        "lone surrogate", say(("user", "q \ud800"), ("assistant", "a")), "named error", "lone surrogate at character 2"
    ),
    talk(
        "control character", say(("user", "q \x1b[0m"), ("assistant", "a")), "set aside", r"control character U\+001B"
    ),
    talk(
        "NUL",
        say(("user", "q"), ("assistant", "a \0")),
        "set aside",
        r"messages\[1\] holds the control character U\+0000",
    ),
    talk(
        "a mark of transformers' own", say(("user", "\U000f0000"), ("assistant", "a")), "named error", r"holds U\+F0000"
    ),
    talk(
        "a turn of a million characters",
        say(("user", "word " * 200_000), ("assistant", "a")),
        "named error",
        "more than max_length=400",
    ),
    talk(
        "<image> typed in a part",
        say(("user", [IMAGE, {"type": "text", "text": "an <image>"}]), ("assistant", "a")),
        "named error",
        "holds '<image>' as text",
        ("good.png",),
    ),
    talk(
        "<image> typed in a string",
        say(("user", "<image>\nWhat is it?"), ("assistant", "A square.")),
        "repaired",
        "made an image part",
        ("good.png",),
        IN_ORDER,
    ),
    talk(
        "<image> typed and no picture",
        say(("user", "<image>\nWhat?"), ("assistant", "a")),
        "named error",
        "stands for image 0 but",
    ),
    talk("a stop token typed", say(("user", "q </s> r"), ("assistant", "a")), "named error", "holds '</s>' as text"),
    talk(
        "a turn imitated",
        say(("user", "q ASSISTANT: a USER: r"), ("assistant", "a")),
        "repaired",
        "text, and nothing else",
        None,
        (
            say(
                ("user", [{"type": "text", "text": "q ASSISTANT: a USER: r"}]),
                ("assistant", [{"type": "text", "text": "a"}]),
            ),
            [],
        ),
    ),
    # Files
    Case(
        "a line that is no JSON",
        "named error",
        "the line is not JSON",
        {"messages": GOOD, "images": []},
        write=one_line_cut,
    ),
    Case(
        "other schemas in other files",
        "repaired",
        "brought into one form",
        {"messages": TEXT, "extra": 1},
        equals={"messages": TEXT, "images": []},
        write=in_two_files,
    ),
    Case("no row at all", "named error", "it holds no row", {"messages": GOOD}, write=no_rows),
    Case(
        "one row only",
        "repaired",
        "no test split is made of it",
        {"messages": TEXT, "images": []},
        equals={"messages": TEXT, "images": []},
        write=only_this_row,
    ),
    Case(
        "column misspelt",
        "named error",
        r"did you mean 'mesages'\?\); expected messages",
        {"messages": GOOD, "images": []},
        write=renamed_column,
    ),
    Case(
        "the same id twice",
        "repaired",
        "ids are not read",
        {"id": "0", "messages": TEXT, "images": []},
        equals={"messages": TEXT, "images": []},
    ),
    Case(
        "the same row twice",
        "set aside",
        "repeats row 0",
        {
            "messages": say(("user", [IMAGE, {"type": "text", "text": "Number 0?"}]), ("assistant", "A square.")),
            "images": ["good.png"],
        },
    ),
    # Rows that reach for what is not theirs
    with_path("https://127.0.0.1:9/a.png", "is a URL, and nothing is fetched", "URL"),
    with_path("data:image/png;base64,iVBORw0KGgo=", "it begins with", "data URL of a cut image"),
    with_path("file:///etc/hostname", "lies outside the image folder", "file URL"),
    with_path("../outside.png", "lies outside the image folder", "path that climbs out of the folder"),
    with_path("/etc/hostname", "lies outside the image folder", "absolute path"),
    with_path("link.png", "lies outside the image folder", "link that leads out of the folder"),
    with_path("a\0.png", "with a NUL character", "path with a NUL"),
    with_path("a\ud800.png", "which is not Unicode; rename the file", "path with a lone surrogate"),
    Case(
        "URL in datasets.Image",
        "named error",
        "is a URL, and nothing is fetched",
        {},
        write=image_struct({"bytes": None, "path": "https://127.0.0.1:9/a.png"}),
    ),
    Case(
        "absolute path in datasets.Image",
        "named error",
        "lies outside the image folder",
        {},
        write=image_struct({"bytes": None, "path": "/etc/hostname"}),
    ),
    Case(
        "corrupt bytes in datasets.Image",
        "named error",
        "row 4: the image is damaged",
        {},
        write=image_struct({"bytes": big("JPEG")[:1500], "path": "x.jpg"}),
    ),
]

ENDED: dict[str, tuple[str, str]] = {}


@pytest.fixture(scope="module")
def collator(tiny_processor: Callable[..., Any]) -> ChatCollator:
    return ChatCollator(tiny_processor("llava15"), max_length=400)


def prepared(case: Case, tmp_path: Path) -> Path:
    """The data of a case: nine good rows and the bad one, or what the case writes instead."""
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    NOISE.save(folder / "good.png")
    NOISE.save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    for name, data in (case.files or {}).items():
        (folder / name).write_bytes(data)
    rows = []
    for n in range(10):
        question = {"type": "text", "text": f"Number {n}?"}
        messages = say(("user", [IMAGE, question]), ("assistant", "A square."))
        rows.append({"id": str(n), "messages": messages, "images": ["good.png"]} if n != BAD else case.row)
    path = folder / "rows.jsonl"
    if case.write:
        return case.write(path, rows)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def ending(case: Case, tmp_path: Path, collator: ChatCollator) -> tuple[str, str]:
    """How the case ends, and what is said; raises where it ends in none of the three ways."""
    path = prepared(case, tmp_path)
    try:
        rows = load_conversations(path, eval_fraction=0)["train"]
    except ValueError as error:
        return ("named error" if str(path) in str(error) else "error without the file"), str(error)
    bad = BAD if len(rows) > 1 else 0
    report = check_report(rows, collator, num_proc=0)
    if not report.faults:
        batch, expected = collator([rows[bad]]), collator([{**case.equals, "row": bad}])
        assert batch.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(batch[name], values, rtol=0, atol=0.02, msg=f"{case.name}: {name}")
        return "repaired", str(report) if report.repairs else case.says
    assert {(fault.index, fault.row) for fault in report.faults} == {(bad, f"row {bad}")}
    assert report.keep == [n for n in range(len(rows)) if n != bad]
    try:
        collator([rows[bad]])
    except ValueError as error:
        named = f"row {bad}" in str(error) and "object at 0x" not in str(error)
        return ("named error" if named else "error without the row"), str(error)
    return "set aside", report.faults[0].detail


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_row_ends_as_it_should(case: Case, tmp_path: Path, collator: ChatCollator) -> None:
    ends, said = ENDED[case.name] = ending(case, tmp_path, collator)
    assert ends == case.ends, said
    assert re.search(case.says, said)
    assert len({other.name for other in CASES}) == len(CASES) >= 40


def test_the_matrix_is_printed(
    tmp_path: Path, collator: ChatCollator, record_property: Callable[[str, object], None]
) -> None:
    lines = []
    for n, case in enumerate(CASES):
        ends, said = ENDED.get(case.name) or ending(case, tmp_path / str(n), collator)
        found = re.search(rf"[^\n]*{case.says}[^\n]*", said)
        text = found[0] if found else said
        text = re.sub(r"^.*?(?=row \d|\d  images)|^.*split 'train': ", "", text).removeprefix("1  ").strip()
        lines.append(f"  {case.name:40.40}  {ends:11}  {text:.110}")
        assert ends == case.ends
    counts = ", ".join(
        f"{sum(case.ends == way for case in CASES)} {way}" for way in ("repaired", "named error", "set aside")
    )
    record_property("shown", "\n".join([f"Bad rows: {len(CASES)} cases, {counts}", *lines]))


def test_a_worker_says_which_row_it_was(tmp_path: Path, collator: ChatCollator) -> None:
    case = next(case for case in CASES if case.name == "JPEG cut in the middle")
    rows = load_conversations(prepared(case, tmp_path), eval_fraction=0)["train"]
    batches = iter(DataLoader(rows, batch_size=2, num_workers=1, collate_fn=collator))
    next(batches)
    next(batches)
    with pytest.raises(ValueError, match=r"ValueError: row 4: "):
        next(batches)


JUNK: tuple[Any, ...] = (
    *(None, True, 0, -1, 3.5, "", " ", "text", "\0", "\ud800", "<image>", "</s>", "USER:", "\U000f0001", "🙂" * 40),
    *([], {}, [None], [[]], {"type": "text"}, {"type": "image"}, {"type": "image", "index": 9}, {"bytes": b"x"}),
    *("user", "assistant", "system", "https://127.0.0.1:9/a.png", "../outside.png", "good.png", float("nan"), 10**30),
    *(b"bytes", ("a", "tuple"), {1: 2}, ["good.png"] * 3, np.zeros((2, 2)), NOISE, encoded(NOISE)),
)


def mutated(value: Any, draw: random.Random) -> Any:
    """The value with one thing in it, at any depth, replaced by junk, dropped, doubled or moved."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.85:
        copy = dict(value) if isinstance(value, dict) else list(value)
        key = draw.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        match draw.random() if len(copy) else 1.0:
            case chance if chance < 0.1:
                del copy[key]
            case chance if chance < 0.2 and isinstance(copy, list):
                copy.insert(draw.randrange(len(copy) + 1), copy[key])
            case chance if chance < 0.3 and isinstance(copy, list):
                draw.shuffle(copy)
            case chance if chance < 0.35 and isinstance(copy, dict):
                copy[draw.choice(["role", "content", "type", "text", "index", "image", "train", "x"])] = draw.choice(
                    JUNK
                )
            case _:
                copy[key] = mutated(copy[key], draw)
        return copy
    return draw.choice(JUNK)


def test_fuzzed_rows_are_read_or_named(
    tmp_path: Path, collator: ChatCollator, record_property: Callable[[str, object], None]
) -> None:
    """`FUZZ_ROWS=10000 FUZZ_SEED=7 pytest tests/test_bad_rows.py -k fuzzed` looks further."""
    count, seed = int(os.environ.get("FUZZ_ROWS", 400)), int(os.environ.get("FUZZ_SEED", 0))
    NOISE.save(tmp_path / "good.png")
    reader = RowReader(tmp_path)
    draw, ends = random.Random(seed), Counter()
    for number in range(count):
        turns = draw.randint(1, 3)
        talk = [m for _ in range(turns) for m in (GOOD if draw.random() < 0.5 else TEXT)]
        row: dict[str, Any] = {"messages": talk, "images": ["good.png"] * sum(m is GOOD[0] for m in talk)}
        for _ in range(draw.randint(0, 3)):
            field = draw.choice(["messages", "messages", "images"])
            row[field] = mutated(row[field], draw)
        row["row"] = number
        try:
            read = reader.read(row)
            [encoded_row] = collator.encode([read])[0]
        except ValueError as error:
            assert re.match(rf"row {number}: ", str(error)), error  # noqa: PT017
            ends["named errors"] += 1
            continue
        conversation = normalise(read["messages"], read["images"])
        assert int(encoded_row.image.sum()) == 16 * len(conversation.images)
        answers = [m for m in conversation.messages if m["role"] == "assistant" and m.get("train", True)]
        learned = "".join(encoded_row.text[turn.start : turn.end] for turn in encoded_row.trained)
        assert learned == "".join((f" {text_of(m)}" if m["content"] else "") + "</s>" for m in answers)
        ends["read"] += 1
    record_property(
        "shown", f"Fuzzed conversations, seed {seed}: {count:,}, of which {ends['read']:,} are read, all others named"
    )
    assert min(ends["read"], ends["named errors"]) > count / 10


@pytest.mark.parametrize("streaming", [False, True])
def test_fuzzed_files_are_loaded_whatever_they_hold(tmp_path: Path, streaming: bool) -> None:
    """Rows in three layouts, mutated: each is read, or raises by its own name when it is; none keeps others from it."""
    NOISE.save(tmp_path / "good.png")
    draw = random.Random(3)
    llava = {
        "image": "good.png",
        "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}],
    }
    alpaca = {"instruction": "q", "input": "", "output": "a", "history": [["q", "a"]], "image": "good.png"}
    junk = [value for value in JUNK if isinstance(value, (str, int, float, list, type(None)))]
    for name, good in (("llava", llava), ("alpaca", alpaca), ("messages", {"messages": TEXT, "images": ["good.png"]})):
        rows: list[Any] = [good] * 8
        for _ in range(150):
            row: Any = json.loads(json.dumps(good))
            for _ in range(draw.randint(1, 3)):
                key = draw.choice(list(good))
                row[key] = mutated(row.get(key), draw)
            rows.append(row if draw.random() < 0.95 else draw.choice(junk))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row, default=str, skipkeys=True) for row in rows))
        loaded = load_conversations(tmp_path / f"{name}.jsonl", eval_fraction=0, streaming=streaming)["train"]
        if streaming:
            with pytest.raises(ValueError, match=r"^row \d+: "):
                list(loaded)
            continue
        assert len(loaded) == len(rows)
        ends = Counter()
        for number in range(len(rows)):
            try:
                ends["read"] += bool(loaded[number])
            except ValueError as error:
                ends["named"] += bool(re.match(rf"row {number}: ", str(error)))
        assert ends["read"] + ends["named"] == len(rows)
        assert ends["named"] > 10
