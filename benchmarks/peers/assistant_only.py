"""What TRL's own `assistant_only_loss` trains, for each family of the tests' twins:

    PYTHONPATH=tests/torchvision_cpu python benchmarks/peers/assistant_only.py [FAMILY ...]

TRL's collator is set up as SFTTrainer sets it up (1.16), with the training template that TRL has for the processor
where its own marks no answers. Two rows: one exchange with an image, and two exchanges without.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from PIL import Image
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "tests")]

import families
from labels import IGNORE_INDEX, answers_of, of, spans_of

from vlm_sft.common import eos_ids
from vlm_sft.tools import tiny


def row(*turns: str, images: int = 0) -> dict[str, Any]:
    talk = [
        {"role": ("user", "assistant")[n % 2], "content": [{"type": "text", "text": t}]} for n, t in enumerate(turns)
    ]
    talk[0]["content"] = [{"type": "image"}] * images + talk[0]["content"]
    return {"messages": talk, "images": [Image.new("RGB", (64, 48))] * images}


ROWS = (row("What is this?", "A red car.", images=1), row("How many?", "Two.", "Sure?", "Yes."))


def trained(model: Any, processor: Any) -> str:
    """In words: what of the answers is trained, and what beside them."""
    marked = has_generation_markers(processor.chat_template)
    try:
        template = None if marked else get_training_chat_template(processor)
        collator = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True, chat_template=template)
        batches = [collator([dict(example)]) for example in ROWS]
    except Exception as error:  # each step of TRL's and of a processor's has its own
        return f"refused: {type(error).__name__}: {' '.join(str(error).split())[:90]}"
    tokenizer, stops = processor.tokenizer, eos_ids(model.generation_config.eos_token_id)
    answers = whole = stopped = 0
    beside: dict[str, None] = {}
    for example, batch in zip(ROWS, batches, strict=True):
        labels = batch["labels"][0].tolist()
        said = answers_of(example)
        spans = spans_of({"labels": labels, "ids": []})
        texts = [tokenizer.decode(span) for span in spans]
        answers += len(said)
        whole += sum(any(answer in text for text in texts) for answer in said)
        stopped += sum(label in stops for label in labels if label != IGNORE_INDEX)
        for text in texts:
            for known in (*said, *(tokenizer.decode([stop]) for stop in stops)):
                text = text.replace(known, "", 1)
            beside |= {repr(text): None} if text.strip(" ") else {}
    found = f"answers: {of(whole, answers)}; stop tokens: {of(stopped, answers)}"
    return f"{found}; beside them: {', '.join(beside) or 'nothing'}"


def main(names: list[str]) -> None:
    print("| family | trained by `assistant_only_loss` |\n|---|---|")
    for name in names or [*tiny.FAMILIES, *families.FAMILIES]:
        try:
            made = (tiny if name in tiny.FAMILIES else families).build(name)
        except (ImportError, ValueError) as error:
            print(f"| {name} | no twin: {error} |")
            continue
        print(f"| {name} | {trained(*made)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
