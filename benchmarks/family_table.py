"""The table of families: what holds for the tiny twin of each, found out by running it.

    PYTHONPATH=tests/torchvision_cpu python benchmarks/family_table.py

Prints Markdown. A cell that does not hold says `no` and why, and the exit status is 1. More is proven by
`make test-families`.

- mask exact: in a padded batch the trained tokens are each answer with its stop token, and nothing else.
- stop token: what ends an answer, written by the chat template or inserted; generation ends there.
- BOS: what the row starts with, once; the whole prompt is that of inference, token for token.
- multi-image, text-only: a training step with finite loss and gradients; the model itself refuses another number of
  image tokens than of image features.
- adapters, NF4: the share of the language model's matrices that TRAINS = {"language": "lora"} reaches, and that 4-bit
  packs (the experts of a mixture, stacked in one weight, stay in 16 bit).
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from PIL import Image

from vlm_sft import IGNORE_INDEX, ChatCollator, load_model, lora_config
from vlm_sft.models.adapters import check_trains
from vlm_sft.models.parts import part_of, parts_of, stacked_weights
from vlm_sft.tools import tiny

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import families as twins

REFUSED = ("emu3", "llama4", "paligemma", "t5gemma2")

Row = dict[str, Any]


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
    rows = rows_for(collator, [ONE, MANY, TEXT])
    batch = collator(rows)
    for example, labels, attended in zip(rows, batch["labels"], batch["attention_mask"], strict=True):
        answers = [m["content"][0]["text"] for m in example["messages"][1::2] if m.get("train", True)]
        expected = "".join(answer + collator.template.stops[0] for answer in answers)
        found = collator.processor.tokenizer.decode(labels[labels != IGNORE_INDEX])
        found = re.sub(r"</?think>", "", found)  # a model that thinks writes an empty thought
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
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    ids = [int(i) for i in collator.processor.apply_chat_template(prompt, **settings)["input_ids"][0]]
    check(batch["input_ids"][0, :answer].tolist() == ids, "the prompt is not that of inference")
    count = ids.count(tokenizer.bos_token_id)
    check(count <= 1, f"{count} BOS")
    return f"`{tokenizer.bos_token}`" if count else "none"


def multi_image(collator: ChatCollator, model: Any) -> str:
    return trains(collator, model, [MANY, ONE])


def text_only(collator: ChatCollator, model: Any) -> str:
    if collator.template.needs_images:
        with contextlib.suppress(ValueError):
            collator([TEXT])
            return "no: not refused"
        return "refused"
    return trains(collator, model, [TEXT, row("Hi", "Hello")])


def adapters(collator: ChatCollator, model: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for trains in ({"language": "lora"}, {"language": ["q_proj", "k_proj", "v_proj", "o_proj"]}):
            loaded, dropout = load_model(folder), 0 if stacked_weights(model) else 0.05
            try:
                wrapped = get_peft_model(loaded, lora_config(loaded, trains, lora_dropout=dropout))
            except ValueError as error:
                check("adapt its attention alone" in str(error), str(error))
                continue
            return percent(check_trains(wrapped, trains).parts["language"].share)
    return "no: nothing"


def nf4(collator: ChatCollator, model: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        packed = load_model(folder, load_in_4bit=True, experts_in_16bit=True)
    lora_config(packed, {"projector": "full"})
    found, parts = check_trains(packed, {"projector": "full"}).parts["language"], parts_of(packed)
    left = sum(weight.numel() for name, weight in stacked_weights(packed).items() if part_of(name, parts) == "language")
    return percent(found.quantized / (found.quantized + left))


def percent(share: float) -> str:
    return f"{share:.0%}"


def rows_for(collator: ChatCollator, rows: Sequence[Row]) -> list[Row]:
    """The rows that this template can render, one for each answer where it asks for that."""
    kept = [each for each in rows if each["images"] or not collator.template.needs_images]
    return [part for each in kept for part in collator.split(each)]


def trains(collator: ChatCollator, model: Any, rows: Sequence[Row]) -> str:
    model.zero_grad()
    loss = model.float()(**collator(rows_for(collator, rows)), use_cache=False).loss
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
    "adapters": adapters,
    "NF4": nf4,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Prints what holds for each family, as Markdown; 1 if a cell does not."
    )
    known = sorted({*tiny.FAMILIES, *twins.FAMILIES} - {*REFUSED})
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(known)}; default: all")
    families = parser.parse_args(arguments).families or known
    torch.set_num_threads(1)
    print("| family |", " | ".join(COLUMNS), "|")
    print("|---" * (len(COLUMNS) + 1) + "|")
    failed = False
    for family in families:
        model, processor = (tiny if family in twins.TEN else twins).build(family)
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
