"""More than 200 faults, planted one to a row among good rows, in every format of docs/data.md: all are found, at their
row, and none invented."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_formats import ROWS, load, options_of

from vlm_sft import ChatCollator
from vlm_sft.data.check_rows import check_report

GOOD, HELD = 40, "R0lGODlhAgACAIAAAP8AAP///yH5BAAAAAAALAAAAAACAAIAAAIChFEAOw=="


def images(folder: Path) -> None:
    colours = Image.new("RGB", (24, 16), "red")
    for name in ("a.jpg", "b.jpg", "../outside.jpg"):
        colours.save(folder / name)
    data = (folder / "a.jpg").read_bytes()
    for name, content in {"broken.jpg": b"no image", "cut.jpg": data[:300], "empty.jpg": b"", "text.txt": b"a"}.items():
        (folder / name).write_bytes(content)
    Image.new("RGB", (1, 50)).save(folder / "thin.png")
    Image.new("RGB", (1000, 2)).save(folder / "long.png")
    (folder / "sub").mkdir()


def parts(name: str) -> tuple[str, str, str]:
    """A format's row as JSON, its last answer and its last question."""
    asked, answered = (
        [t for role, t, _ in options_of(name)[1] if role == which][-1] for which in ("user", "assistant")
    )
    return json.dumps(ROWS[name]), answered, asked


def planted_in(name: str, folder: Path) -> dict[str, str]:
    """What is wrong -> the row of this format as JSON with that fault, where it can have it."""
    text, answer, question = parts(name)
    found = {"a number": "5", "a text": '"text"', "nothing": "{}", "null": "null", "no JSON": text[:-2]}
    if text.startswith("["):  # lines of arrays, which end where one of them is broken
        found = {}

    def change(name: str, old: str, new: str) -> None:
        if old in text:
            found[name] = text.replace(old, new, 1)

    files = [
        "gone.jpg",
        "broken.jpg",
        "cut.jpg",
        "empty.jpg",
        "text.txt",
        "thin.png",
        "long.png",
        "../outside.jpg",
        "sub",
    ]
    addresses = ["https://nowhere.invalid/a.jpg"]
    addresses += [f"data:{rest}" for rest in ("image/png;base64,QUJD", "image/png;base64,%", "text/html,a")]
    for name in (*files, str(folder.parent / "outside.jpg"), *addresses):
        change(name, '"a.jpg"', json.dumps(name))
    change("a number for an image", '"a.jpg"', "7")
    change("an image of another kind", HELD, "QUJD")
    change("no base64", HELD, "%%%")
    for name, new in {
        "blank": "   ",
        "empty": "",
        "bell": f"{answer}\a",
        "half": f"{answer}\ud800",
        "end": "a</s>b",
    }.items():
        change(f"answer {name}", f'"{answer}"', json.dumps(new))
    for new in ("null", "5", "{}", '["a", "b"]', "true"):
        change(f"answer {new}", f'"{answer}"', new)
    change("two marks", question, f"<image><image>{question}")
    change("a stop token in the question", question, f"</s>{question}")
    change("a bell in the question", question, f"\\u0007{question}")
    for role in ("user", "human"):
        change(f"role {role}", f'": "{role}"', '": "usr"')
    for role in ("assistant", "gpt"):
        change(f"role {role}", f'": "{role}"', '": "asst"')
    return found


@pytest.fixture(scope="module")
def collator(tiny_processor: Callable[[str], Any]) -> ChatCollator:
    return ChatCollator(tiny_processor("llava15"))


@pytest.mark.parametrize("name", ROWS)
def test_all_are_found_and_none_invented(name: str, collator: ChatCollator, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    images(folder)
    options, (text, answer, _) = options_of(name)[0], parts(name)

    def numbered(number: int, text: str) -> str:
        return text.replace(f'"{answer}"', f'"{answer} {number}"', 1)

    planted = planted_in(name, folder)
    where = dict(zip(random.Random(name).sample(range(GOOD + len(planted)), len(planted)), planted, strict=True))
    rows = [planted[where[n]] if n in where else numbered(n, text) for n in range(GOOD + len(planted))]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    report = check_report(load(folder / "rows.jsonl", **options), collator)
    found = {fault.index: fault.detail for fault in report.faults if fault.is_error}
    missed, invented = (
        {where[n]: rows[n] for n in where.keys() - found.keys()},
        {n: found[n] for n in found.keys() - where.keys()},
    )
    assert (missed, invented) == ({}, {})


def test_there_are_more_than_200(record_property: Callable[[str, object], None]) -> None:
    count = sum(len(planted_in(name, Path("data"))) for name in ROWS)
    record_property("shown", f"{count} faults are planted in {len(ROWS)} formats")
    assert count > 200
