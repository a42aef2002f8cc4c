"""What collation costs: the text side for each family and all of it beside the image work alone.

    python benchmarks/collation.py

CPU time of one thread, medians. The text side is everything but the call of the processor: rendering, where the answers
lie, labels, padding. Image work is the decoding of JPEGs and the image processor, called as the collator calls it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mix
import torch
from datasets import load_from_disk
from PIL import Image
from training import note_collate
from transformers import CLIPImageProcessor, CLIPImageProcessorPil
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from vlm_sft import ChatCollator, load_conversations
from vlm_sft.data.check_rows import check_report
from vlm_sft.tools import tiny

ROWS, BATCH = 64, 8


def text_side(family: str, *, repeats: int = 15) -> tuple[float, float]:
    """Milliseconds a row of one exchange, and of four, with a picture; of all rows that `ChatCollator.split` makes of
    one."""
    _, processor = tiny.build(family)
    called = [0.0]

    class Timed(type(processor)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return super().__call__(*args, **kwargs)
            finally:
                called[0] += time.process_time() - start

    processor.__class__ = Timed
    collator = ChatCollator(processor)
    found = []
    for exchanges in (1, 4):
        talk: list[dict[str, Any]] = []
        for n in range(exchanges):
            parts = [{"type": "text", "text": f"What is on the left of the {n} red cars, and where do they go?"}]
            talk.append({"role": "user", "content": [{"type": "image"}, *parts] if n == 0 else parts})
            talk.append({"role": "assistant", "content": [{"type": "text", "text": "There is a cat, and a dog. " * 4}]})
        rows = collator.split({"messages": talk, "images": [Image.new("RGB", (64, 48))]}) * 4
        times = []
        for _ in range(repeats):
            called[0] = 0.0
            start = time.process_time()
            collator(rows)
            times.append((time.process_time() - start - called[0]) / 4 * 1e3)
        found.append(statistics.median(times))
    return found[0], found[1]


def beside_image_work(backend: str = "pil", *, repeats: int = 7) -> dict[str, float]:
    """Milliseconds a row of the mix: image work alone, TRL's collator, the 2024 note's, and ours; in alternation."""
    _, processor = tiny.build("llava15", corpus=[" ".join(mix.WORDS)])
    edges = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    kind = CLIPImageProcessorPil if backend == "pil" else CLIPImageProcessor
    processor.image_processor = kind(**edges)  # LLaVA-1.5's own
    collator = ChatCollator(processor)
    trl = DataCollatorForVisionLanguageModeling(processor)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "rows"))
        mix.rows(ROWS).save_to_disk(path)
        stock, ours = load_from_disk(path), load_conversations(path, eval_fraction=0)["train"]

        def image_work(batch: list[int]) -> None:
            pictures = [image.convert("RGB") for row in stock.__getitems__(batch) for image in row["images"]]
            processor.image_processor(pictures, return_tensors="pt")

        ways: dict[str, Callable[[list[int]], Any]] = {
            "image work alone": image_work,
            "TRL": lambda batch: trl(stock.__getitems__(batch)),
            "note": lambda batch: note_collate(processor, stock.__getitems__(batch)),
            "recipe": lambda batch: collator(ours.__getitems__(batch)),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                start = time.process_time()
                for first in range(0, ROWS, BATCH):
                    way(list(range(first, first + BATCH)))
                times[name].append((time.process_time() - start) / ROWS * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def lengths(count: int = 4096) -> list[int]:
    """Tokens of each row of the mix, as LLaVA-1.5's collator makes them."""
    collator = ChatCollator(tiny.build("llava15", corpus=[" ".join(mix.WORDS)])[1])
    return check_report(mix.rows(count), collator, num_proc=0).found["length"]


def main() -> None:
    torch.set_num_threads(1)
    print("family, one exchange, four exchanges: ms a row")
    for family in tiny.FAMILIES:
        print(family, *(f"{value:.2f}" for value in text_side(family)))
    print(beside_image_work())


if __name__ == "__main__":
    main()
