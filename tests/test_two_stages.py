"""LLaVA's two stages on real handwritten digits: assembled from a tower and a text model, then trained by both recipes.

The tower is random and stays so. The text model has only learnt to say a word again that it is shown, in place of all
that a pretrained one knows. So what is read from the pictures after stage 1 is what the projector alone has learnt;
stage 2 teaches the question, which the text model has not seen before.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Features, List
from PIL import Image
from recipe_data import PICTURE, TEXT, captions, llava_parts, save
from recipe_runs import run
from sklearn.datasets import load_digits
from transformers import AutoModelForCausalLM, AutoTokenizer

from vlm_sft.chat.template import ChatTemplate
from vlm_sft.evaluation.generate import generate
from vlm_sft.evaluation.metrics import exact_match
from vlm_sft.models.llava import plain_template
from vlm_sft.models.loading import load_model, load_processor

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "Which digit is this?"
TRAIN, TEST = 1000, 200
FLAGS = (
    *("--per_device_train_batch_size", 16, "--gradient_accumulation_steps", 1, "--per_device_eval_batch_size", 100),
    *("--dataloader_num_workers", 0, "--dataloader_persistent_workers", "False", "--disable_tqdm", "True"),
    *("--eval_strategy", "no", "--save_strategy", "no", "--activation_checkpointing", "False"),
)


def digits() -> list[tuple[Image.Image, str]]:
    """Pictures and words, shuffled."""
    bundled = load_digits()
    gray = [(255 - image * 255 / 16).astype("uint8") for image in bundled.images]
    pictures = [Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for image in gray]
    pairs = list(zip(pictures, (WORDS[digit] for digit in bundled.target), strict=True))
    random.Random(0).shuffle(pairs)
    return pairs[: TRAIN + TEST]


def conversation(picture: Image.Image, word: str) -> dict[str, Any]:
    question = [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}]
    answer = [{"type": "text", "text": word}]
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "images": [picture],
    }


def teach_to_repeat(folder: Path) -> None:
    """Trains the text model, in place, on each word shown sixteen times and said once more."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    shown = {word: " ".join([word] * 16) for word in WORDS}
    texts = [f"{shown[word]} {word}\n" for word in WORDS]
    texts += [f"USER: {shown[word]}\n ASSISTANT: {word}</s>" for word in WORDS]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def answers(model: Any, processor: Any, rows: Any) -> list[str]:
    return generate(model, ChatTemplate(processor), rows, batch_size=100, max_new_tokens=3)


@pytest.mark.sweep
def test_both_stages_learn_to_read_digits(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    torch.manual_seed(0)
    tower, text = llava_parts(tmp_path, corpus=[QUESTION, *WORDS])
    teach_to_repeat(text)
    pairs = digits()
    held_out, expected = [conversation(*pair) for pair in pairs[TRAIN:]], [word for _, word in pairs[TRAIN:]]
    caption_file = captions(tmp_path / "captions", pairs[:TRAIN])
    part = {"type": TEXT, "text": TEXT}
    features = Features({"messages": List({"role": TEXT, "content": List(part)}), "images": List(PICTURE)})
    rows = [conversation(*pair) for pair in pairs]
    talks = save(rows, tmp_path / "talks", features, {"train": TRAIN, "test": TEST})

    source = ["--dataset_name", caption_file, "--image_folder", caption_file.parent / "images"]
    stage_1 = ["--model_name_or_path", text, "--vision_tower", tower, *source]
    rates = ["--max_steps", 100, "--learning_rate", 5e-3, "--output_dir", tmp_path / "stage_1"]
    run("llava_pretrain", [*FLAGS, *stage_1, *rates])
    model, processor = load_model(tmp_path / "stage_1"), load_processor(tmp_path / "stage_1")
    question = {"role": "user", "content": [{"type": "image"}]}
    said = generate(
        model,
        ChatTemplate(processor, {"chat_template": plain_template(processor.tokenizer)}, stop_token=None),
        [{"messages": [question], "images": row["images"]} for row in held_out],
        batch_size=100,
        max_new_tokens=1,
    )
    captioned = exact_match(said, expected)
    asked = exact_match(answers(model, processor, held_out), expected)

    stage_2 = ["--model_name_or_path", tmp_path / "stage_1", "--vision_tower", tower, "--dataset_name", talks]
    rates = ["--max_steps", 150, "--learning_rate", 3e-3, "--mm_projector_lr", 3e-3]
    run("llava_finetune_full", [*FLAGS, *stage_2, *rates, "--output_dir", tmp_path / "stage_2"])
    model, processor = load_model(tmp_path / "stage_2"), load_processor(tmp_path / "stage_2")
    answered = exact_match(
        generate(model, ChatTemplate(processor), held_out, batch_size=100, max_new_tokens=3), expected
    )

    record_property(
        "shown",
        f"Held-out digits: {captioned:.2f} captioned after stage 1; asked, {asked:.2f}, after stage 2 {answered:.2f}",
    )
    # One in ten is chance; two hundred digits leave some 0.04 to it.
    assert captioned > 0.3
    assert answered > 0.5
    assert answered > asked + 0.3
