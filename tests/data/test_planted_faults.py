"""More than 200 faults planted over all formats, in one file: every one is found in its row, and none is invented."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_sft import load_conversations
from vlm_sft.data.check_rows import check_report

pytestmark = pytest.mark.usefixtures("own_cache")
Row = Callable[[Any, Any, Any], Any]


def parts(question: Any, image: Any) -> list[Any]:
    return [{"type": "image", "image": image}, {"type": "text", "text": question}]


def turns(question: Any, answer: Any) -> list[Any]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


FORMATS: dict[str, Row] = {
    "messages": lambda q, a, i: {"messages": turns(q, a), "images": [i]},
    "parts": lambda q, a, i: {"messages": turns(parts(q, i), a)},
    "openai": lambda q, a, i: {
        "messages": turns([{"type": "image_url", "image_url": {"url": i}}, {"type": "text", "text": q}], a)
    },
    "path": lambda q, a, i: {"messages": turns([{"type": "image", "path": i}, {"type": "text", "text": q}], a)},
    "xtuner": lambda q, a, i: {"messages": turns(q, a), "images": {"url": i}},
    "llava": lambda q, a, i: {
        "image": i,
        "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}],
    },
    "swift": lambda q, a, i: {"query": q, "response": a, "images": [i], "history": [["Hi", "Hello"]]},
    "alpaca": lambda q, a, i: {"instruction": q, "input": "", "output": a, "image": i},
    "trl": lambda q, a, i: {"prompt": turns(q, "")[:1], "completion": turns("", a)[1:], "images": [i]},
    "qa": lambda q, a, i: {"question": q, "answer": a, "image": i},
    "cauldron": lambda q, a, i: {"texts": [{"user": q, "assistant": a}], "images": [i]},
    "system": lambda q, a, i: {"system": "Be brief.", "prompt": q, "response": a, "image": i},
}
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    held = io.BytesIO()
    image.save(held, kind)
    return held.getvalue()


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


IMAGES = {  # value of an image -> what is said
    "gone.png": "does not exist in the image folder",
    "../outside.png": "lies outside the image folder",
    "/etc/hostname": "lies outside the image folder",
    "file:///etc/hostname": "lies outside the image folder",
    "https://example.org/a.png": "is a URL, and nothing is fetched",
    "sub": "is a directory",
    "cut.jpg": "is damaged",
    "empty.png": r"is empty (0 bytes)",
    "page.jpg": "is not an image that can be read",
    "stripe.png": "are beyond 200 to 1",
    "bomb.png": "at most 50,000,000 are decoded",
    "dot.png": "show nothing",
    "a\0.png": "NUL",
    "a\ud800.png": "not Unicode",
    url(encoded(NOISE)[:-900]): "damaged",
    "data:image/png;base64,AAA": "not base64",
}
ANSWERS = {
    " \n": "is a blank answer",
    "a\x1b[0m": "control character U+001B",
    "a \ud800 b": "lone surrogate",
    "a \U000f0000": "a mark that processors keep",
    7: "a content that is a int",
}
QUESTIONS = {
    "q\0": "control character U+0000",
    "q \udfff": "lone surrogate",
}
LINES = {
    '"text"': "the row is a str; expected an object",
    "{": "the line is not JSON",
    '{"prompt": "q"': "the line is not JSON",
    "17": "the row is a int",
    json.dumps({"question": "q"}): "no column of conversations among question",
    json.dumps({"question": "q", "answer": "a", "img": "a.jpg"}): "the column 'img' looks like images",
    json.dumps({"messages": [{"role": "bot", "content": "q"}]}): "has the role 'bot'",
    json.dumps({"messages": turns("q", "a")[::-1]}): "is from assistant; expected user",
    json.dumps({"messages": turns("<image>", "a")}): "stands for image 0 but the row has 0 images",
    json.dumps({"messages": [*turns("q", "a"), {"role": "user", "content": "r"}]}): "nothing answers it",
    json.dumps({"messages": [turns("q", "a")[0], {"role": "assistant", "content": "a", "weight": 2}]}): "the weight 2",
    json.dumps({"messages": turns("q", "a"), "system": "s", "tools": "x"}): "tools is 'x'",
}


def planted() -> list[tuple[str, str]]:
    """Lines of JSON, each with a fault, and what is to be said of it."""
    found = [*LINES.items()]
    for n, make in enumerate(FORMATS.values()):
        found += [(json.dumps(make(f"Q{n}?", f"A {said}.", image)), said) for image, said in IMAGES.items()]
        found += [(json.dumps(make(f"Q{n}?", answer, "good.png")), said) for answer, said in ANSWERS.items()]
        found += [(json.dumps(make(question, f"A{n}.", "good.png")), said) for question, said in QUESTIONS.items()]
    return found


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.sweep), pytest.param(2, marks=pytest.mark.sweep)]
)
def test_every_planted_fault_is_found_and_none_invented(
    seed: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    NOISE.save(folder / "good.png")
    NOISE.save(tmp_path / "outside.png")
    (folder / "cut.jpg").write_bytes(encoded(NOISE, "JPEG")[:-400])
    (folder / "empty.png").touch()
    (folder / "page.jpg").write_text("<html>404</html>")
    for name, size in (("stripe", (5000, 2)), ("bomb", (8000, 8000)), ("dot", (1, 1))):
        Image.new("1", size).save(folder / f"{name}.png")
    draw, faults = random.Random(seed), planted()
    makes = [*FORMATS.values()]
    lines: list[tuple[str, str]] = [
        (json.dumps(draw.choice(makes)(f"Question {n}?", f"Answer {n}.", "good.png")), "") for n in range(900)
    ]
    for fault in faults:
        lines.insert(draw.randrange(FIRST, len(lines) + 1), fault)
    (folder / "rows.jsonl").write_text("\n".join(line for line, _ in lines))
    report = check_report(load_conversations(folder / "rows.jsonl", eval_fraction=0)["train"], num_proc=0)
    found = {fault.index: fault.detail for fault in report.faults if fault.is_error}
    expected = {n: said for n, (_, said) in enumerate(lines) if said}
    assert found.keys() == expected.keys()
    assert not {n: (said, found[n]) for n, said in expected.items() if said not in found[n]}
    assert not [fault for fault in report.faults if not fault.is_error]
    assert len(faults) > 200
    record_property(
        "shown", f"{len(faults)} faults planted in {len(lines):,} rows of {len(FORMATS)} formats: all found"
    )


FIRST = 8  # some good rows come first: if none of the first can be read, loading says so
