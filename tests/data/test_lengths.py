"""Lengths that are told without decoding a pixel are the collator's own, in every family."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_sft import ChatCollator, load_conversations
from vlm_sft.data.lengths import Lengths, measure_lengths
from vlm_sft.data.picture_tokens import FEW_SIZES, PictureTokens
from vlm_sft.tools import tiny

pytestmark = pytest.mark.usefixtures("own_cache")

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
    *("<b>", "think", "[INST]", "USER: hi ASSISTANT: yes", "e\u0301", "\u200b", "\t"),
)


def conversation(seed: int) -> dict[str, Any]:
    """1 to 3 exchanges, 0 to 4 pictures of random sizes, texts with odd white space, blank ones, several in a row."""
    draw = random.Random(seed)

    def text() -> dict[str, str]:
        return {"type": "text", "text": "".join(draw.choice(WORDS) for _ in range(draw.choice([0, 1, 3, 9])))}

    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}] if draw.random() < 0.2 else []
    images = []
    for _ in range(draw.choice([1, 1, 2, 3])):
        parts: list[dict[str, str]] = [text() for _ in range(draw.choice([1, 1, 2]))]
        for _ in range(draw.choice([0, 1, 1, 2]) if len(images) < 3 else 0):
            parts.insert(draw.randint(0, len(parts)), {"type": "image"})
            images.append(Image.new("RGB", (draw.randint(20, 160), draw.randint(20, 160))))
        messages.append({"role": "user", "content": parts})
        answer = {"role": "assistant", "content": [text()]}
        messages.append(answer | ({"train": False} if draw.random() < 0.2 else {}))
    return {"messages": messages, "images": images}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [conversation(seed) for seed in range(30)]


def counted(collator: ChatCollator, rows: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    encoded = [collator.encode([row])[0][0] for row in rows]
    return [len(row) for row in encoded], [int(row.image.sum()) for row in encoded]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_lengths_are_the_collators_own(
    family: str, rows: list[dict[str, Any]], tiny_processor: Callable[..., Any]
) -> None:
    collator = ChatCollator(tiny_processor(family))
    lengths = measure_lengths(rows, collator, num_proc=0)
    tokens, image_tokens = counted(collator, rows)
    assert lengths.tokens.tolist() == tokens
    assert lengths.image_tokens.tolist() == image_tokens
    assert lengths.exact


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("count", [1, 2])
def test_a_rule_for_sizes_is_right_and_saves_measuring(
    family: str, count: int, tiny_processor: Callable[..., Any]
) -> None:
    collator = ChatCollator(tiny_processor(family))
    draw = random.Random(0)
    pictures = PictureTokens(collator, count)
    sizes = [(draw.randint(16, 200), draw.randint(16, 200)) for _ in range(150)] + [(300, 30), (30, 300), (64, 64)]
    pictures.seen.update(sizes)
    told = {size: pictures.tokens_of(size) for size in sizes}
    assert len(pictures.measured) <= FEW_SIZES + 20
    measure = PictureTokens(collator, count).measure
    for size in draw.sample(sizes, 12) + sizes[-3:]:
        assert told[size] == measure(size), size


def test_no_pixel_is_decoded(tmp_path: Path, tiny_processor: Callable[..., Any], monkeypatch: Any) -> None:
    Image.new("RGB", (50, 40)).save(tmp_path / "a.jpg")
    data = io.BytesIO()
    Image.new("RGB", (90, 30)).save(data, "PNG")
    (tmp_path / "cut.png").write_bytes(data.getvalue()[:60])  # header only
    lines = [{"prompt": f"<image>{n}", "response": "x", "image": "a.jpg" if n < 8 else "cut.png"} for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    collator = ChatCollator(tiny_processor("qwen2_vl"))
    monkeypatch.setattr("vlm_sft.data.lengths.CHECKED_ROWS", 1)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load_prepare", lambda *_: pytest.fail("decoded"))
    dataset = load_conversations(tmp_path / "rows.jsonl", eval_fraction=0)["train"].select(range(8, -1, -1))
    with pytest.raises(ValueError, match=r"row 8.*damaged"):  # the row that is compared
        measure_lengths(dataset, collator)
    monkeypatch.setattr("vlm_sft.data.lengths.CHECKED_ROWS", 0)
    lengths = measure_lengths(dataset, collator)
    same = measure_lengths(
        [{**row, "images": [Image.new("RGB", image.size) for image in row["images"]]} for row in dataset], collator
    )
    assert lengths.tokens.tolist() == same.tokens.tolist()


def test_processes_do_not_change_the_result(rows: list[dict[str, Any]], tiny_processor: Callable[..., Any]) -> None:
    collator = ChatCollator(tiny_processor("llava15"), max_length=3)  # which does not matter here
    one, two = (measure_lengths(rows, collator, num_proc=num_proc) for num_proc in (0, 2))
    assert one.tokens.tolist() == two.tokens.tolist()


def test_settings_of_the_collator_count(rows: list[dict[str, Any]], tiny_processor: Callable[..., Any]) -> None:
    rows = [*rows[:10], {"messages": [{"role": "user", "content": "a </s> b"}, {"role": "assistant", "content": "c"}]}]
    for options in ({"stop_token": None}, {"train_on": "last_assistant"}):
        collator = ChatCollator(tiny_processor("llava15"), reserved_tokens="escape", **options)
        assert measure_lengths(rows, collator).tokens.tolist() == counted(collator, rows)[0]


def test_a_template_that_takes_texts_apart_is_followed(rows: list[dict[str, Any]], tiny_processor: Any) -> None:
    processor = tiny_processor("qwen2_vl")
    processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
        "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
        "{{ c.text if c.text|length < 20 else c.text[:20] + '!' + c.text[20:] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    talk = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
    long = [{"role": "user", "content": "What is it, in so many words?"}, talk[1]]
    rows = [{"messages": talk}] * 5 + [{"messages": long}] * 4
    collator = ChatCollator(processor)
    with pytest.raises(ValueError, match="does not write the text"):
        counted(collator, rows)
    # What the collator would refuse is noticed where it is compared; until then it is an estimate.
    with pytest.raises(ValueError, match="does not write the text"):
        measure_lengths(rows, collator)


def test_a_difference_to_the_collator_is_told(
    rows: list[dict[str, Any]], tiny_processor: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(PictureTokens, "tokens_of", lambda self, size: self.measure((64, 64)) + size[0] // 64)
    lengths = measure_lengths(rows, ChatCollator(tiny_processor("llava15")))
    assert not lengths.exact
    assert "Lengths are estimates: of 8 rows compared with the collator" in caplog.text
    assert str(lengths).startswith("tokens per row (estimated): ")


def test_a_bad_row_is_named(rows: list[dict[str, Any]], tiny_processor: Callable[..., Any]) -> None:
    collator = ChatCollator(tiny_processor("llava15"))
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for bad, message in (
        ({"messages": good["messages"][:1]}, "row 2: .*nothing answers it"),
        ({"messages": good["messages"], "images": ["a.png"]}, "row 2: picture 'a.png' is a path"),
        ({"messages": [{"role": "user", "content": "</s>"}, good["messages"][1]]}, "row 2: .*'</s>'"),
        ({"messages": good["messages"], "row": 7, "images": [None]}, "row 7: the picture is None"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_lengths([good, good, bad], collator)


def test_the_summary() -> None:
    lengths = Lengths(np.array([10, 40, 20, 1000]), np.array([0, 30, 0, 600]), exact=True)
    assert str(lengths) == (
        "tokens per row: 50% up to 40, 90% up to 1,000, 99% up to 1,000, 100% up to 1,000 (row 3); 59% of all are of "
        "images"
    )
