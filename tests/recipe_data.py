"""Small local datasets with the columns of those that the recipes train on, and the parts that a LLaVA is made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from vlm_sft.tools import tiny

TEXT, NUMBER, PICTURE = Value("string"), Value("int64"), ImageFeature()


def noise(count: int, *, seed: int = 0) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 32, 40, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


def chats(folder: Path, *, train: int = 8, test: int = 2) -> Path:
    """The columns of HuggingFaceH4/llava-instruct-mix-vsft: two turns, and None where a part has no such field."""

    def part(index: int | None, text: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "type": "image" if text is None else "text"}

    features = Features(
        {
            "messages": List({"content": List({"index": NUMBER, "text": TEXT, "type": TEXT}), "role": TEXT}),
            "images": List(PICTURE),
        }
    )
    rows = [
        {
            "messages": [
                {"role": "user", "content": [part(None, f"What is {n}?\n"), part(0, None)]},
                {"role": "assistant", "content": [part(None, f"It is {n}.")]},
                {"role": "user", "content": [part(None, "Are there two?")]},
                {"role": "assistant", "content": [part(None, "No.")]},
            ],
            "images": [picture],
        }
        for n, picture in enumerate(noise(train + test))
    ]
    return save(rows, folder, features, {"train": train, "test": test})


def charts(folder: Path) -> Path:
    """The columns and splits of HuggingFaceM4/ChartQA."""
    kinds = ClassLabel(names=["human", "machine"])
    features = Features({"image": PICTURE, "query": TEXT, "label": List(TEXT), "human_or_machine": kinds})
    rows = [
        {"image": picture, "query": f"How many are {n}?", "label": [str(n)], "human_or_machine": n % 2}
        for n, picture in enumerate(noise(12))
    ]
    return save(rows, folder, features, {"train": 8, "val": 2, "test": 2})


def formulas(folder: Path) -> Path:
    """The columns of unsloth/LaTeX_OCR."""
    rows = [{"image": picture, "text": rf"x^{{{n}}}"} for n, picture in enumerate(noise(10))]
    return save(rows, folder, Features({"image": PICTURE, "text": TEXT}), {"train": 8, "test": 2})


def questions(folder: Path) -> Path:
    """The columns of flaviagiammarino/vqa-rad."""
    rows = [
        {"image": picture, "question": f"Is it {n}?", "answer": ("no", "yes")[n % 2]}
        for n, picture in enumerate(noise(10))
    ]
    return save(rows, folder, Features({"image": PICTURE, "question": TEXT, "answer": TEXT}), {"train": 8, "test": 2})


def captions(folder: Path, pictures: Iterable[tuple[Image.Image, str]] = ()) -> Path:
    """A JSON file as liuhaotian/LLaVA-Pretrain's; the pictures are in `images` beside it."""
    (folder / "images" / "00000").mkdir(parents=True)
    rows = []
    for n, (picture, caption) in enumerate(pictures or [(p, f"picture {n} .") for n, p in enumerate(noise(8))]):
        name = f"00000/{n:09d}.png"
        picture.save(folder / "images" / name)
        question = {"from": "human", "value": "Give a brief description of the image.\n<image>"}
        rows.append({"id": f"{n:09d}", "image": name, "conversations": [question, {"from": "gpt", "value": caption}]})
    (folder / "captions.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "captions.json"


def save(rows: list[dict[str, Any]], folder: Path, features: Features, splits: dict[str, int]) -> Path:
    data, start = DatasetDict(), 0
    for split, count in splits.items():
        data[split] = Dataset.from_list(rows[start : start + count], features=features)
        start += count
    data.save_to_disk(folder)
    return folder


def llava_parts(folder: Path, *, hidden_size: int = 64, num_layers: int = 2, **options: Any) -> tuple[Path, Path]:
    """Folders of a random CLIP tower and of a random Llama whose tokenizer knows no image and no padding."""
    model, processor = tiny.build("llava15", hidden_size=hidden_size, num_layers=num_layers, **options)
    tower, text = folder / "clip", folder / "llama"
    model.model.vision_tower.save_pretrained(tower)
    processor.image_processor.save_pretrained(tower)
    bpe = json.loads(processor.tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in bpe["merges"]]
    tokenizer = LlamaTokenizer(vocab=bpe["vocab"], merges=merges, add_bos_token=True)
    tokenizer.save_pretrained(text)
    settings = model.config.text_config.to_dict() | {"vocab_size": len(tokenizer), "pad_token_id": None}
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(text)
    return tower, text


DATASETS: dict[str, Callable[[Path], Path]] = {
    "captions": captions,
    "charts": charts,
    "chats": chats,
    "formulas": formulas,
    "questions": questions,
}
