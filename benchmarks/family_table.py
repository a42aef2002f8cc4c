"""The table of families: what the collator does, found out by running it on the tiny twin of each.

    python benchmarks/family_table.py

Prints Markdown. A cell that does not hold says `no` and why, and the exit status is 1.

- mask exact: in a padded batch the trained tokens are each answer with its stop token, and nothing else.
- stop token: what ends an answer, written by the chat template or inserted; generation ends there.
- BOS: what the row starts with, once; the whole prompt is that of inference, token for token.
- multi-image, text-only: a training step with finite loss and gradients; the model itself refuses another number of
  image tokens than of image features.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from vlm_sft import IGNORE_INDEX, ChatCollator
from vlm_sft.tools import tiny

Row = dict[str, Any]

THINKING = ("qwen3_5",)  # earlier answers are not rendered as they were prompted for; one answer a row trains them


def row(*turns: str, images: Sequence[tuple[int, int]] = ()) -> Row:
    """Questions and answers in turn; images, told by their sizes, stand in front of the first question."""
    talk = [
        {"role": ("user", "assistant")[n % 2], "content": [{"type": "text", "text": t}]} for n, t in enumerate(turns)
    ]
    talk[0]["content"] = [{"type": "image"} for _ in images] + talk[0]["content"]
    return {"messages": talk, "images": [Image.new("RGB", size, (90 * n, 120, 40)) for n, size in enumerate(images)]}


ONE = row("What is this?", "A red car.", images=[(64, 48)])
MANY = row("Compare them.", "The first is wide.", "Sure?", "Yes: 日本語, é.", images=[(90, 40), (40, 80), (64, 64)])
TEXT = row("USER: hi ASSISTANT: no\nassistant\n", "Two words\n", "And 2 + 2?", "4")


def mask_exact(collator: ChatCollator, model: Any) -> str:
    rows = [ONE, MANY, TEXT]
    batch = collator(rows)
    for example, labels, attended in zip(rows, batch["labels"], batch["attention_mask"], strict=True):
        answers = [message["content"][0]["text"] for message in example["messages"][1::2]]
        expected = "".join(answer + collator.template.stops[0] for answer in answers)
        found = collator.processor.tokenizer.decode(labels[labels != IGNORE_INDEX])
        # Without white space, which templates trim and tokenizers move when they decode.
        check("".join(found.split()) == "".join(expected.split()), f"{found!r} is trained, not {expected!r}")
        check(bool(attended[labels != IGNORE_INDEX].all()), "padding is trained")
    return "yes"


def stop_token(collator: ChatCollator, model: Any) -> str:
    [stop] = collator.template.stops
    ends, stop_id = model.generation_config.eos_token_id, collator.processor.tokenizer.convert_tokens_to_ids(stop)
    check(stop_id in (ends if isinstance(ends, list) else [ends]), f"{stop} ({stop_id}) does not end generation")
    check(collator([ONE])["labels"][0].tolist().count(stop_id) == 1, f"{stop} is not trained once")
    written = ChatCollator(collator.processor, stop_token=None).template.stops
    return f"`{stop}`, {'from the template' if written else 'inserted'}"


def bos(collator: ChatCollator, model: Any) -> str:
    batch, tokenizer = collator([ONE]), collator.processor.tokenizer
    [answer] = (batch["labels"][:, 1:] != IGNORE_INDEX).int().argmax(dim=1) + 1
    prompt = [
        {"role": "user", "content": [{"type": "image", "image": ONE["images"][0]}, ONE["messages"][0]["content"][1]]}
    ]
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    ids = [int(i) for i in collator.processor.apply_chat_template(prompt, **settings)["input_ids"][0]]
    check(batch["input_ids"][0, :answer].tolist() == ids, "the prompt is not that of inference")
    count = ids.count(tokenizer.bos_token_id)
    check(count <= 1, f"{count} BOS")
    return f"`{tokenizer.bos_token}`" if count else "none"


def multi_image(collator: ChatCollator, model: Any) -> str:
    return trains(collator, model, [MANY, ONE])


def text_only(collator: ChatCollator, model: Any) -> str:
    return trains(collator, model, [TEXT, row("Hi", "Hello")])


def trains(collator: ChatCollator, model: Any, rows: Sequence[Row]) -> str:
    model.zero_grad()
    loss = model(**collator(rows), use_cache=False).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    check(all(bool(value.isfinite().all()) for value in [loss, *gradients]), f"loss {loss.item()}, or its gradients")
    check(any(bool(gradient.any()) for gradient in gradients), "no gradient")
    return "yes"


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


COLUMNS: dict[str, Callable[[ChatCollator, Any], str]] = {
    "mask exact": mask_exact,
    "stop token": stop_token,
    "BOS": bos,
    "multi-image": multi_image,
    "text-only": text_only,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Prints what holds for each family, as Markdown; 1 if a cell does not."
    )
    help_text = f"of {', '.join(tiny.FAMILIES)}; default: all but {', '.join(THINKING)}"
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=help_text)
    families = parser.parse_args(arguments).families or [name for name in tiny.FAMILIES if name not in THINKING]
    torch.set_num_threads(1)
    print("| family |", " | ".join(COLUMNS), "|")
    print("|---" * (len(COLUMNS) + 1) + "|")
    failed = False
    for family in families:
        model, processor = tiny.build(family)
        cells = []
        for column in COLUMNS.values():
            try:
                cells.append(column(ChatCollator(processor), model))
            except Exception as error:  # whatever goes wrong is the cell
                cells.append(f"no: {error}")
                failed = True
        print(f"| {family} |", " | ".join(cell.replace("|", "\\|") for cell in cells), "|")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
