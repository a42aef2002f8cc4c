"""Random conversations for property tests, and what each family has to learn from them, written down by hand."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from vlm_sft import ChatCollator
from vlm_sft.chat import collator as collators
from vlm_sft.chat.places import Places, find_texts


class Learned(NamedTuple):
    """What stands before and behind the words of an answer in the trained text; `trims` where the template strips."""

    before: str
    stop: str
    trims: bool = False


LEARNED = {
    "llava15": Learned(" ", "</s>"),
    "llava_next": Learned(" ", "</s>"),
    "llava_onevision": Learned("", "<|im_end|>"),
    "qwen2_vl": Learned("", "<|im_end|>"),
    "qwen2_5_vl": Learned("", "<|im_end|>"),
    "qwen3_vl": Learned("", "<|im_end|>"),
    "smolvlm": Learned(" ", "<end_of_utterance>"),
    "idefics3": Learned(" ", "<end_of_utterance>"),
    "gemma3": Learned("", "<end_of_turn>", trims=True),
    "internvl": Learned("", "<|im_end|>"),
}
BYTE_LEVEL = {"llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "internvl"}
"""Families whose tokenizer gives back every byte; the others move spaces when they decode."""

FRAGMENTS = (
    *("Hello", " world", "the cat", "a dog", "1234", "3.14", "don't", "</div>", "{{ x }}", "{% if %}", "$", "\\n", '"'),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u200b", "\u202eabc"),
    *("é", "e\u0301", "日本語", "🙂", "👩‍👩‍👧", "привет", "ﬁ", "ℵ", "…", "a" * 30),
    *("ASSISTANT:", "USER: hi ASSISTANT: yes", "<start_of_turn>model\n", "<|im_start|>assistant\nfake", "[/INST]"),
    *("</s>", "<|im_end|>", "<end_of_utterance>", "<end_of_turn>", "<s>", "<bos>", "<image>", "<|image_pad|>", "</s"),
)
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=5).map("".join)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


pictures = st.builds(picture, st.integers(20, 90), st.integers(20, 90), st.integers(0, 99))


@st.composite
def examples(draw: st.DrawFn) -> dict[str, Any]:
    """1 to 5 exchanges, 0 to 4 images, with a system message or without, in one of the ways datasets write them."""
    as_struct = draw(st.booleans())
    images = draw(st.lists(pictures, max_size=4))
    left = len(images)
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": [text_part(draw(texts.filter(str.strip)), as_struct)]})
    exchanges = draw(st.integers(1, 5))
    for exchange in range(exchanges):
        here = left if exchange == exchanges - 1 else draw(st.integers(0, left))
        left -= here
        parts = [image_part(as_struct)] * here
        for text in draw(st.lists(texts, min_size=1, max_size=2)):
            parts.insert(draw(st.integers(0, len(parts))), text_part(text, as_struct))
        messages.append({"role": "user", "content": parts})
        answer = draw(texts)
        content = answer if not as_struct and draw(st.booleans()) else [text_part(answer, as_struct)]
        messages.append({"role": "assistant", "content": content})
    return {"messages": messages, "images": images or draw(st.sampled_from([[], None]))}


def text_part(text: str, as_struct: bool = False) -> dict[str, Any]:
    return {"type": "text", "text": text} | ({"index": None, "image": None} if as_struct else {})


def image_part(as_struct: bool = False) -> dict[str, Any]:
    return {"type": "image"} | ({"text": None, "index": None, "image": None} if as_struct else {})


def ask(*parts: str | Image.Image | None) -> dict[str, Any]:
    """A user message; None stands for an image part."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else image_part() for part in parts]
    return {"role": "user", "content": content}


def answer(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}], **fields}


def learned_text(family: str, example: dict[str, Any]) -> str:
    """All that is trained in the example, as one text."""
    before, stop, trims = LEARNED[family]
    answers = []
    for message in example["messages"]:
        if message["role"] == "assistant":
            content = message["content"]
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            answers.append(before + (text.strip() if trims else text) + stop)
    return "".join(answers)


def assert_as_in_full(collator: ChatCollator, batch: Sequence[dict[str, Any]]) -> None:
    """What the collator makes is what comes out where no shape is remembered and each image token is read."""

    def find(self: Places, messages: Any, render: Any, plain: str, *key: Any) -> Any:
        return find_texts(messages, render, plain), {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Places, "of", find)
        patch.setattr(collators, "reading_runs_once", lambda template: template.processor)
        expected, pixels = collator.encode(batch)
    found, inputs = collator.encode(batch)
    assert [(row.text, row.turns) for row in found] == [(row.text, row.turns) for row in expected]
    columns = [(vars(row) | row.tokens, vars(other) | other.tokens) for row, other in zip(found, expected, strict=True)]
    for ours, other in [*columns, (inputs, pixels)]:
        assert ours.keys() == other.keys()
        assert all(torch.equal(ours[key], value) for key, value in other.items() if isinstance(value, torch.Tensor))


def plain(text: str) -> str:
    """The text as it compares: composed, without the word joiner that escapes reserved tokens."""
    return unicodedata.normalize("NFC", text.replace("\u2060", ""))
