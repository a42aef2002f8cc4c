"""What a tool trained on, told from the token ids and labels that reached its model: no code of a tool is asked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from PIL import Image

IGNORE_INDEX = -100
ASKS = "What about"  # begins each question of the rows, and is in no answer

Row = dict[str, list[int]]


def facts(trained: Sequence[Row], rows: Sequence[dict[str, Any]], processor: Any) -> dict[str, str]:
    """Lines of the table: name -> what was found in the rows as trained. `rows` hold `messages` with parts."""
    tokenizer = processor.tokenizer
    image, stop, bos = processor.image_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id
    pairs = [(row, source_of(row, rows, tokenizer)) for row in trained]
    known = [(row, source) for row, source in pairs if source is not None]
    ended = [[f"{answer}{tokenizer.eos_token}" for answer in answers_of(source)] for _, source in known]
    spans = [[tokenizer.decode(span).lstrip() for span in spans_of(row)] for row, _ in known]
    both = list(zip(ended, spans, strict=True))
    whole = sum(any(answer in text for text in texts) for answers, texts in both for answer in answers)
    begins = []
    for row, source in known[:64]:
        prompt = prompt_of(source, processor)
        begins.append(without_runs(row["ids"], image)[: len(prompt)] == prompt)
    every = [token for row in trained for token in row["labels"] if token != IGNORE_INDEX]
    total = sum(map(len, ended))
    return {
        "rows": f"{len({id(source) for _, source in known})} of {len(rows)}",
        "image tokens a row": f"{sum(row['ids'].count(image) for row in trained) / max(1, len(trained)):.1f}",
        "learns user's words": of(sum(any(ASKS in text for text in s) for s in spans), len(known)),
        "image tokens among learned ones": f"{sum(token == image for token in every):,} of {len(every):,}",
        "answers learned with their stop token": of(whole, total),
        "rows in which nothing else is learned": of(sum(texts == answers for answers, texts in both), len(known)),
        "stop tokens an answer": f"{sum(token == stop for token in every) / max(1, total):.2f}",
        "BOS a row": "none in this family" if bos is None else one(row["ids"].count(bos) for row in trained),
        "prompts equal to inference": of(sum(begins), len(begins)),
    }


def of(count: int, total: int) -> str:
    return "all" if count == total else "none" if not count else f"{count} of {total}"


def one(counts: Any) -> str:
    return " or ".join(map(str, sorted(set(counts))))


def spans_of(row: Row) -> list[list[int]]:
    """The stretches of tokens that are learned."""
    runs = itertools.groupby(row["labels"], key=lambda label: label != IGNORE_INDEX)
    return [list(run) for learned, run in runs if learned]


def source_of(row: Row, rows: Sequence[dict[str, Any]], tokenizer: Any) -> dict[str, Any] | None:
    """The row whose first question is in the text of this one."""
    text = tokenizer.decode(row["ids"])
    return next((source for source in rows if text_of(source["messages"][0]) in text), None)


def text_of(message: dict[str, Any]) -> str:
    return "".join(part["text"] or "" for part in message["content"] if part["type"] == "text")


def answers_of(row: dict[str, Any]) -> list[str]:
    return [text_of(message) for message in row["messages"] if message["role"] == "assistant"]


def prompt_of(row: dict[str, Any], processor: Any) -> list[int]:
    """The tokens before the first answer as the processor's own template asks for one, runs of image tokens as one."""
    question = [
        {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": "image", "image": BLANK}
        for part in row["messages"][0]["content"]
    ]
    asked = [{"role": "user", "content": question}]
    made = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = made["input_ids"][0]
    return without_runs(ids if isinstance(ids, list) else ids.tolist(), processor.image_token_id)


BLANK = Image.new("RGB", (112, 112))


def without_runs(ids: Sequence[int], image: int) -> list[int]:
    return [token for n, token in enumerate(ids) if token != image or not n or ids[n - 1] != image]
