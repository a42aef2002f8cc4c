"""`check_rows` finds each bad row, says why, adds the lengths, and looks at no row twice."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from families import TEN
from PIL import Image

from vlm_sft import ChatCollator, check_rows, load_conversations
from vlm_sft.chat.audit import audit
from vlm_sft.data.check_rows import CheckReport, check_report
from vlm_sft.data.records import COLUMNS

pytestmark = pytest.mark.usefixtures("own_cache")


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def example(number: int = 0, **changes: Any) -> dict[str, Any]:
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"Question {number}?"}]}
    answer = {"role": "assistant", "content": f"Answer {number}."}
    return {"messages": [user, answer], "images": [Image.new("RGB", (16, 16), "red")]} | changes


def say(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


PLANTED: dict[str, tuple[Callable[[dict[str, Any]], None], int]] = {
    # name of the fault: what it does to a row of JSON, how many rows get it
    "messages is None": (lambda row: row.update(messages=None), 1),
    "messages missing": (lambda row: row.pop("messages"), 1),
    "unknown role": (lambda row: row["messages"][1].update(role="bot"), 3),
    "two users": (lambda row: row["messages"].insert(0, {"role": "user", "content": "Well?"}), 2),
    "assistant first": (lambda row: row["messages"].reverse(), 2),
    "no answer": (lambda row: row["messages"].pop(), 2),
    "blank answer": (lambda row: row["messages"][1].update(content=" \n"), 3),
    "empty answer": (lambda row: row["messages"][1].update(content=""), 2),
    "a picture too many": (lambda row: row["images"].append("good.png"), 3),
    "a picture too few": (lambda row: row["images"].clear(), 2),
    "index out of range": (lambda row: row["messages"][0]["content"][0].update(index=5), 1),
    "missing file": (lambda row: row.update(images=["gone.png"]), 3),
    "outside the folder": (lambda row: row.update(images=["../good.png"]), 1),
    "a URL": (lambda row: row.update(images=["https://example.org/a.png"]), 1),
    "truncated JPEG": (lambda row: row.update(images=["cut.jpg"]), 3),
    "empty file": (lambda row: row.update(images=["empty.png"]), 1),
    "HTML": (lambda row: row.update(images=["page.jpg"]), 1),
    "a stripe": (lambda row: row.update(images=["stripe.png"]), 1),
    "a bomb": (lambda row: row.update(images=["bomb.png"]), 1),
    "None picture": (lambda row: row.update(images=[None]), 1),
    "unknown part": (lambda row: row["messages"][0]["content"].append({"type": "audio"}), 1),
    "lone surrogate": (lambda row: row["messages"][1].update(content="a \ud800 b"), 1),
}


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """5,000 rows of JSON with 37 faults, and which row has which."""
    folder = tmp_path_factory.mktemp("planted")
    noise().resize((16, 16)).save(folder / "good.png")
    (folder / "cut.jpg").write_bytes(encoded(noise(), "JPEG")[:-400])
    (folder / "empty.png").touch()
    (folder / "page.jpg").write_text("<html>404</html>")
    Image.new("1", (5000, 2)).save(folder / "stripe.png")
    Image.new("1", (8000, 8000)).save(folder / "bomb.png")
    rows = [example(number, images=["good.png"]) for number in range(5000)]
    names = [name for name, (_, count) in PLANTED.items() for _ in range(count)]
    where = dict(zip(random.Random(5).sample(range(5000), len(names)), names, strict=True))
    for number, name in where.items():
        PLANTED[name][0](rows[number])
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl", where


@pytest.fixture(scope="session")
def report(planted: tuple[Path, dict[int, str]]) -> CheckReport:
    return check_report(load_conversations(planted[0], eval_fraction=0)["train"], num_proc=2)


def test_37_faults_among_5000_rows_are_found_and_nothing_else(
    planted: tuple[Path, dict[int, str]], report: CheckReport
) -> None:
    _, where = planted
    assert len(where) == 37
    assert [fault.index for fault in report.faults] == sorted(where)
    assert [fault.row for fault in report.faults] == [f"row {index}" for index in sorted(where)]
    assert (report.rows, report.bad_rows, len(report.keep)) == (5000, 37, 4963)
    assert set(report.keep).isdisjoint(where)
    # Faults of one kind share a reason, and those of two kinds do not.
    reasons = {(where[fault.index], fault.reason) for fault in report.faults}
    merged = {"empty answer": "blank answer"}
    assert len({(merged.get(name, name), reason) for name, reason in reasons}) == len(PLANTED) - len(merged)


def test_the_report_is_a_table_of_reasons(
    planted: tuple[Path, dict[int, str]], report: CheckReport, tmp_path: Path
) -> None:
    _, where = planted
    blank = sorted(number for number, name in where.items() if name in ("blank answer", "empty answer"))
    assert str(report).startswith("5,000 rows checked with no model's processor: 37 bad\n")
    assert (
        f"\n        5  {', '.join(f'row {number}' for number in blank)}\n"
        "           messages[1] is a blank answer; give it words, mark it 'train': false or drop the row\n"
    ) in str(report)
    report.to_jsonl(tmp_path / "faults.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == sorted(where)
    assert lines[0].keys() == {"index", "row", "detail", "is_error", "reason"}


def test_a_clean_dataset_has_no_faults() -> None:
    report = check_report([example(n) for n in range(4)])
    assert (report.rows, report.faults, report.keep) == (4, (), [0, 1, 2, 3])
    assert str(report) == "4 rows checked with no model's processor: 0 bad"


def stored(number: int) -> dict[str, Any]:
    row = example(number)
    row["messages"][1]["content"] = [{"type": "text", "text": f"Answer {number}."}]
    return row | {"row": number}


@pytest.fixture(scope="module")
def collator(tiny_processor: Callable[..., Any]) -> ChatCollator:
    return ChatCollator(tiny_processor("llava15"))


def splits(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> DatasetDict:
    return DatasetDict({"train": Dataset.from_list(train), "test": Dataset.from_list(test)})


def with_one_too_many(rows: list[dict[str, Any]], *bad: int) -> list[dict[str, Any]]:
    return [row | {"images": row["images"] * (1 + (row["row"] in bad))} for row in rows]


def test_all_splits_are_reported_together_by_name(collator: ChatCollator) -> None:
    rows = [stored(n) for n in range(30)]
    data = splits(with_one_too_many(rows, 7), with_one_too_many(rows, 3))
    with pytest.raises(
        ValueError,
        match=r"(?s)^train: 30 rows checked .*1 bad.*row 7.*\ntest: 30 rows.*1 bad.*row 3.*--on_bad_rows drop",
    ):
        check_rows(data, collator)


def test_dropping_is_counted_told_and_limited(collator: ChatCollator, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [stored(n) for n in range(30)]
    dropped = check_rows(splits(with_one_too_many(rows, 3, 7), rows), collator, on_bad_rows="drop")
    assert dropped["train"]["row"][:] == [n for n in range(30) if n not in (3, 7)]
    assert len(dropped["test"]) == 30
    told = capsys.readouterr().err
    assert "2 of 60 rows are left out." in told
    assert "row 3, row 7" in told
    # One in nine of the training rows, but one in eighteen of all.
    half = splits(with_one_too_many(rows, *range(3)), rows[:20])
    assert len(check_rows(half, collator, on_bad_rows="drop")["train"]) == 27
    with pytest.raises(ValueError, match=r"(?s)test: 20 rows.*more than --max_bad_fraction 0.05"):
        check_rows(half, collator, on_bad_rows="drop", max_bad_fraction=0.05)


def test_a_repetition_is_told_and_stays_unless_rows_are_dropped(
    collator: ChatCollator, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = Dataset.from_list([stored(n % 29) | {"row": n} for n in range(30)])
    assert len(check_rows(rows, collator)) == 30
    assert "row 29\n           repeats row 0" in capsys.readouterr().err
    assert len(check_rows(rows, collator, on_bad_rows="drop")) == 29
    half = Dataset.from_list([stored(n % 5) | {"row": n} for n in range(10)])
    assert len(check_rows(half, collator, on_bad_rows="drop")) == 5


def test_the_particulars_of_a_reason_are_those_of_its_first_row() -> None:
    rows = [example(0), example(1), example(0), example(1)]
    assert "2  row 2, row 3\n           row 2: repeats row 0; drop one of them" in str(check_report(rows))


def test_settings_and_datasets_that_do_not_serve(collator: ChatCollator) -> None:
    with pytest.raises(ValueError, match="on_bad_rows='skip'; expected"):
        check_rows(Dataset.from_list([stored(0)]), collator, on_bad_rows="skip")
    for empty in ([], iter([example()])):
        with pytest.raises(ValueError, match="has no row, or streams; load it without --streaming"):
            check_report(empty)


def test_a_row_that_repeats_an_earlier_one_is_named() -> None:
    rows = [example(0), example(1), example(0), example(0, images=[Image.new("RGB", (16, 16), "blue")])]
    report = check_report(rows)
    assert [(fault.index, fault.detail) for fault in report.faults] == [(2, "repeats row 0; drop one of them")]


def test_a_row_that_a_mixture_draws_again_is_no_repetition() -> None:
    rows = [stored(0), stored(1), stored(0)]
    assert not check_report(rows).faults


def test_every_fault_of_a_row_is_told() -> None:
    stripe = Image.new("RGB", (2001, 10))
    talk = say(("user", [{"type": "image"}] * 3), ("assistant", " "), ("user", "And?"), ("assistant", ""))
    report = check_report([example(messages=talk, images=[stripe, b"no", stripe])])
    assert [fault.detail.split(";")[0] for fault in report.faults] == [
        "messages[1] is a blank answer",
        "messages[3] is a blank answer",
        "images[0]: 2001 x 10 pixels are beyond 200 to 1",
        "images[1]: the image is not an image that can be read: it begins with b'no'",
        "images[2]: 2001 x 10 pixels are beyond 200 to 1",
    ]
    assert not check_report([example(images=[Image.new("RGB", (2000, 10))])]).faults
    for shape in ((1, 50), (50, 1), (1, 1)):
        [fault] = check_report([example(images=[Image.new("RGB", shape)])]).faults
        assert fault.detail.startswith(f"images[0]: {shape[0]} x {shape[1]} pixels show nothing")
    assert not check_report([example(images=[Image.new("RGB", (2, 50))])]).faults


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x1b", "\x7f"])
def test_a_control_character_is_a_fault_but_not_a_tab_or_line_break(character: str) -> None:
    for role in ("user", "assistant"):
        words = {"user": "a", "assistant": "b"} | {role: f"x{character}y\t\r\n"}
        [fault] = check_report([example(messages=say(*words.items()), images=[])]).faults
        number, name = ("user", "assistant").index(role), f"U+{ord(character):04X}"
        assert fault.detail == f"messages[{number}] holds the control character {name}; remove it or drop the row"
    assert not check_report([example(messages=say(("user", "a\tb\r\nc"), ("assistant", "d")), images=[])]).faults


def test_answers_that_are_not_trained_on_may_be_blank() -> None:
    talk = say(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c"))
    talk[1]["train"] = False
    assert not check_report([example(messages=talk, images=[])]).faults
    talk[3]["train"] = False
    [fault] = check_report([example(messages=talk, images=[])]).faults
    assert fault.reason == "no answer is to be trained on"


def test_repairs_are_counted() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    moving = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    deep = encoded(Image.fromarray(np.full((4, 4), 9999, dtype=np.uint16)))
    clear = encoded(Image.new("RGBA", (4, 4)))
    print_ = encoded(Image.new("CMYK", (4, 4)), "JPEG")
    rows = [example(n, images=[image]) for n, image in enumerate([turned, moving, deep, clear, print_, turned])]
    report = check_report(rows)
    assert not report.faults
    assert report.repairs == {
        "turned upright as their EXIF says": 2,
        "of several frames, the first taken": 1,
        "of 14 bits (by their largest value), scaled to 8": 1,
        "with transparency, laid on white": 1,
        "of mode CMYK, converted to RGB": 1,
    }
    assert "        2  images turned upright as their EXIF says" in str(report)


def test_a_processor_finds_what_only_it_can(tiny_processor: Callable[..., Any]) -> None:
    collator = ChatCollator(tiny_processor("gemma3"), max_length=60)
    rows = [example(n) for n in range(6)]
    rows[1]["messages"][0]["content"][1]["text"] = "Hello <end_of_turn> there"
    rows[2]["messages"][1]["content"] = "long " * 100
    rows[4]["messages"][0]["content"][1]["text"] = "The <image_soft_token> of it"
    assert not check_report(rows).faults
    report = check_report(rows, collator)
    assert [fault.index for fault in report.faults] == [1, 2, 4]
    for fault, word in zip(report.faults, ("<end_of_turn>", "max_length=60", "<image_soft_token>"), strict=True):
        assert word in fault.detail
    lengths = [n not in (1, 2, 4) and len(collator.encode([rows[n]])[0][0]) for n in range(6)]
    assert report.found["length"].tolist() == lengths
    assert "checked with Gemma3Processor: 3 bad" in str(report)
    assert "tokens per row: 50% up to" in str(report)


def test_whatever_a_processor_raises_is_a_fault_of_the_row(
    collator: ChatCollator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(self: Any, examples: Any) -> Any:
        raise ZeroDivisionError("in the \x1b[31m template\n" + "x" * 1000)

    monkeypatch.setattr(ChatCollator, "encode", encode)
    [fault] = check_report([example()], collator).faults
    assert fault.row == "row 0"
    assert fault.detail.startswith(r"ZeroDivisionError: in the \x1b[31m template\nxxx")
    assert len(fault.detail) < 520


WORDS = (
    *(
        "hello",
        "the cat",
        " sat",
        "\n",
        "on the mat. ",
        "1234",
        "  ",
        "é日本",
        "A",
        "?",
        "</div>",
        "\n\n",
        "🙂",
        "Yes,",
    ),
    *("Yes,", "<b>", "think", "[INST]", "USER: hi ASSISTANT: yes", "e\u0301", "\u200b", "\t"),
)


def conversation(seed: int) -> dict[str, Any]:
    """1 to 3 exchanges, 0 to 4 images of random sizes, texts with odd white space, several in a row."""
    draw = random.Random(seed)

    def text() -> dict[str, str]:
        return {"type": "text", "text": "x" + "".join(draw.choice(WORDS) for _ in range(draw.choice([0, 1, 3, 9])))}

    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}] if draw.random() < 0.2 else []
    images = []
    for turn in range(draw.choice([1, 1, 2, 3])):
        parts: list[dict[str, str]] = [text() for _ in range(draw.choice([1, 1, 2]))]
        for _ in range(draw.choice([0, 1, 1, 2]) if len(images) < 3 else 0):
            parts.insert(draw.randint(0, len(parts)), {"type": "image"})
            images.append(Image.new("RGB", (draw.randint(20, 160), draw.randint(20, 160))))
        messages.append({"role": "user", "content": parts})
        answer = {"role": "assistant", "content": [text()]}
        messages.append(answer | ({"train": False} if turn and draw.random() < 0.2 else {}))
    return {"messages": messages, "images": images}


@pytest.mark.parametrize("family", TEN)
def test_the_columns_are_the_collators_own(family: str, tiny_processor: Callable[..., Any]) -> None:
    collator = ChatCollator(tiny_processor(family))
    rows = [conversation(seed) for seed in range(20)]
    report = check_report(rows, collator, num_proc=2)
    assert not report.faults
    encoded = [collator.encode([row])[0][0] for row in rows]
    assert {name: report.found[name].tolist() for name in COLUMNS} == {
        "length": [len(row) for row in encoded],
        "image_tokens": [int(row.image.sum()) for row in encoded],
        "trained_tokens": [int((row.labels != -100).sum()) for row in encoded],
    }


def turns(*texts: str, image: bool = False, untrained: int | None = None) -> dict[str, Any]:
    """A conversation, user and assistant in turn; the answer in message `untrained` is not trained on."""
    messages: list[dict[str, Any]] = []
    for n, text in enumerate(texts):
        content = [{"type": "image"}] * (image and n == 0) + [{"type": "text", "text": text}]
        messages.append({"role": ("user", "assistant")[n % 2], "content": content, "train": n != untrained})
    return {"messages": messages, "images": [noise()] * image}


def test_a_thinking_template_makes_a_row_of_each_answer(
    tiny_processor: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with its history as inference has it; the reasoning in an answer stays where the template puts it."""
    collator = ChatCollator(tiny_processor("qwen3_5"), chat_template_kwargs={"enable_thinking": True})
    thought = "<think>\nTwo and two.\n</think>\n\nFour."
    rows = [
        turns("What is it?", "A cat.", "Sure?", "Yes.", "2 + 2?", thought, image=True),
        turns("Alone?", "Yes, alone."),
        turns("One?", "1.", "Two?", "2.", "Three?", "3.", untrained=3),
    ]
    data = Dataset.from_list([{**row, "row": 10 + n} for n, row in enumerate(rows)])
    for start in range(2):
        found = check_rows({"train": data}, collator)["train"]
        said = capsys.readouterr().err
        assert "train: 3 rows became 6, each with one answer to train on: the chat template renders earlier" in said
        assert f"{3 * start} of them known from before" in said
        assert found["row"][:] == [10, 10, 10, 11, 12, 12]
        assert [len(found[n]["messages"]) for n in range(6)] == [2, 4, 6, 2, 2, 6]
        batch = collator([found[n] for n in range(6)])
        learned = [collator.processor.tokenizer.decode(ids[ids != -100]) for ids in batch["labels"]]
        assert [text.rpartition("</think>")[2].strip() for text in learned] == [
            f"{answer}<|im_end|>" for answer in ("A cat.", "Yes.", "Four.", "Yes, alone.", "1.", "3.")
        ]
        assert "Two and two." in learned[2]
        assert found["length"][:] == batch["attention_mask"].sum(1).tolist()
        assert found["trained_tokens"][:] == (batch["labels"] != -100).sum(1).tolist()
        assert found["image_tokens"][:] == [found["image_tokens"][0]] * 3 + [0] * 3
        assert set(audit(collator, found).prompts) == {"equal those of inference"}
    blank = [*rows, turns("And?", "Fine.", "More?", " ")]
    with pytest.raises(ValueError, match=r"row 3\n.*messages\[3\] is a blank answer"):
        check_rows(Dataset.from_list([{**row, "row": n} for n, row in enumerate(blank)]), collator)
    assert len(check_rows(Dataset.from_list(rows).select([1]), collator)) == 1
    plain = check_rows(data, ChatCollator(tiny_processor("qwen2_5_vl")))
    assert len(plain) == 3
