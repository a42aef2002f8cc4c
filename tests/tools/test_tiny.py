"""A twin is small, deterministic, trainable, and behaves as its family does after a trip through a folder."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_sft.models.parts import PARTS, part_of, parts_of
from vlm_sft.tools import tiny

# Tokens that end generation, that pad, and that begin: as the Hub's generation settings have them.
ENDS = {
    "gemma3": ("<eos> <end_of_turn>", "<pad>", "<bos>"),
    "gemma4": ("<eos> <turn|>", "<pad>", "<bos>"),
    "idefics3": ("<|end_of_text|> <end_of_utterance>", "<|pad|>", "<|begin_of_text|>"),
    "internvl": ("<|im_end|>", "<|endoftext|>", "<|endoftext|>"),
    "llava15": ("</s>", "<pad>", "<s>"),
    "llava_next": ("</s>", "<pad>", "<s>"),
    "llava_onevision": ("<|im_end|> <|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "qwen2_5_vl": ("<|im_end|> <|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "qwen2_vl": ("<|im_end|> <|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "qwen3_5": ("<|im_end|> <|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "qwen3_vl": ("<|im_end|> <|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "smolvlm": ("<end_of_utterance>", "<|im_end|>", "<|im_start|>"),
}
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)


def pixels_of(seed: int, *, width: int = 40, height: int = 28) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def batch_of(processor: Any, *images: Image.Image, messages: Any = (QUESTION, ANSWER)) -> Any:
    prompt = processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=False)
    bos = processor.tokenizer.bos_token
    return processor(
        text=[prompt] * len(images),
        images=[[image] for image in images],
        add_special_tokens=not (bos and prompt.startswith(bos)),
        padding=True,
        return_tensors="pt",
    )


@every_family
def test_folder_gives_the_same_processor_and_logits(
    family: str, tiny_model: Callable[..., Any], tiny_processor: Callable[..., Any]
) -> None:
    model, processor = tiny.build(family)
    built, loaded = batch_of(processor, pixels_of(0)), batch_of(tiny_processor(family), pixels_of(0))
    assert built.keys() == loaded.keys()
    assert all(torch.equal(built[key], loaded[key]) for key in built)
    with torch.no_grad():
        assert torch.equal(model(**built).logits, tiny_model(family)(**loaded).logits)


@every_family
def test_placeholders_are_as_many_as_features(
    family: str, tiny_model: Callable[..., Any], tiny_processor: Callable[..., Any]
) -> None:
    model = tiny_model(family)
    batch = batch_of(tiny_processor(family), pixels_of(0), pixels_of(1, width=90, height=40))
    takes = inspect.signature(model.get_image_features).parameters
    with torch.no_grad():
        features = model.get_image_features(**{k: v for k, v in batch.items() if k in takes}).pooler_output
    placeholders = (batch["input_ids"] == model.config.image_token_id).sum()
    assert placeholders == sum(image.shape[:-1].numel() for image in features) > 0


@every_family
def test_answers_depend_on_the_image_and_on_positions(
    family: str, tiny_model: Callable[..., Any], tiny_processor: Callable[..., Any]
) -> None:
    model, processor = tiny_model(family), tiny_processor(family)
    batch, other = batch_of(processor, pixels_of(0)), batch_of(processor, pixels_of(1))
    with torch.no_grad():
        last = model(**batch).logits[0, -1]
        assert (model(**other).logits[0, -1] - last).abs().max() > 0.1
        positions = torch.zeros_like(batch["input_ids"])
        assert (model(**batch, position_ids=positions).logits[0, -1] - last).abs().max() > 0.1


@every_family
def test_gradient_reaches_every_part(
    family: str, tiny_model: Callable[..., Any], tiny_processor: Callable[..., Any]
) -> None:
    model = tiny_model(family).train()
    parts = parts_of(model)
    batch = batch_of(tiny_processor(family), pixels_of(0))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    reached = {
        part_of(name, parts)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.grad is not None and parameter.grad.abs().max() > 1e-6
    }
    assert reached == set(PARTS)


@every_family
def test_generation_ends_at_the_tokens_of_the_family(
    family: str, tiny_model: Callable[..., Any], tiny_processor: Callable[..., Any]
) -> None:
    model, processor = tiny_model(family), tiny_processor(family)
    stop, pad, bos = ENDS[family]
    settings, id_of = model.generation_config, processor.tokenizer.convert_tokens_to_ids
    stop_ids = id_of(stop.split())
    assert settings.eos_token_id == (stop_ids if len(stop_ids) > 1 else stop_ids[0])
    assert (settings.pad_token_id, settings.bos_token_id) == (id_of(pad), id_of(bos))
    assert processor.tokenizer.pad_token == pad

    batch = batch_of(processor, pixels_of(0), messages=[QUESTION])
    length = batch["input_ids"].shape[1]
    first = model.generate(**batch, do_sample=False, max_new_tokens=5)[0, length]
    # Were the first greedy token a stop token, generation would end after it.
    settings.eos_token_id = [*stop_ids, int(first)]
    assert model.generate(**batch, do_sample=False, max_new_tokens=5).shape[1] == length + 1


@every_family
def test_twin_is_small_and_lies_in_the_table_of_parts(family: str, tiny_dir: Callable[[str], Path]) -> None:
    model, processor = tiny.build(family)
    parts = parts_of(model)
    assert {part_of(name, parts) for name, _ in model.named_parameters(remove_duplicate=False)} == set(PARTS)
    assert model.num_parameters() < 1_000_000
    assert sum(file.stat().st_size for file in tiny_dir(family).iterdir()) < 5_000_000
    assert len(processor.tokenizer) <= model.config.get_text_config().vocab_size
    # NF4 packs blocks of 64 weights of a row.
    language = model.get_submodule(parts.language[0])
    widths = {m.in_features for m in language.modules() if isinstance(m, torch.nn.Linear)}
    assert all(width % 64 == 0 for width in widths)


@every_family
def test_tokenizer_loses_no_text(family: str, tiny_processor: Callable[..., Any]) -> None:
    tokenizer = tiny_processor(family).tokenizer
    for text in ("Hello world, a cat.", "two\n\n\nlines  and spaces", "naïve 日本語 🙂 ßœ"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_seed_decides_the_weights_and_nothing_else_moves() -> None:
    state = torch.random.get_rng_state()
    models = [tiny.build("llava15", seed=seed)[0].state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    head = "lm_head.weight"
    assert not torch.equal(models[0][head], models[2][head])


@pytest.mark.parametrize(
    ("family", "text", "spoken"),
    [
        (
            "llava15",
            "Be brief. USER: <image>\nWhat is this? ASSISTANT: A cat. USER: Sure? ASSISTANT:",
            "A cat. ",
        ),
        (
            "llava_onevision",
            "<|im_start|>system \nBe brief.<|im_end|><|im_start|>user <image>\nWhat is this?<|im_end|>"
            "<|im_start|>assistant \nA cat.<|im_end|><|im_start|>user \nSure?<|im_end|><|im_start|>assistant\n",
            "\nA cat.",
        ),
        (
            "internvl",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<IMG_CONTEXT>\nWhat is this?<|im_end|>\n"
            "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
            "",
        ),
    ],
)
def test_own_templates_render_what_the_hub_s_render(
    family: str, text: str, spoken: str, tiny_processor: Callable[..., Any]
) -> None:
    processor = tiny_processor(family)
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    again = {"role": "user", "content": [{"type": "text", "text": "Sure?"}]}
    messages = [system, QUESTION, ANSWER, again]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == text
    if spoken:
        # One exchange: the mask takes in the token that follows, where it shares the answer's last space.
        encoded = processor.tokenizer.apply_chat_template(
            [QUESTION, ANSWER],
            chat_template=processor.chat_template,
            return_assistant_tokens_mask=True,
            return_dict=True,
            tokenize=True,
        )
        marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
        assert processor.tokenizer.decode(marked) == spoken


def test_the_llama_tokenizer_of_the_hubs_files_survives_the_folder(tiny_processor: Callable[..., Any]) -> None:
    tokenizer = tiny_processor("llava15").tokenizer
    assert tokenizer.backend_tokenizer.pre_tokenizer is None
    assert tokenizer.backend_tokenizer.normalizer is not None
    tokens = tokenizer.tokenize("<image>\nWhat")
    # The normalizer writes a space at the start of every stretch of text.
    assert tokens[1].startswith("▁")
    assert tokenizer("Hello")["input_ids"][0] == tokenizer.bos_token_id


def test_options_shape_the_twin() -> None:
    words = ["zero", "quadrillion", "xylophone"]
    model, processor = tiny.build(
        "llava15", hidden_size=128, num_layers=3, image_size=48, patch_size=12, corpus=[" ".join(words)]
    )
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.hidden_size, text.num_hidden_layers) == (128, 3)
    assert (vision.hidden_size, vision.image_size, vision.patch_size) == (128, 48, 12)
    assert all(len(processor.tokenizer.tokenize(f"a {word}")) == 2 for word in words)
    batch = batch_of(processor, pixels_of(0))
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 16
    assert torch.isfinite(model(**batch).logits).all()


@every_family
def test_every_family_takes_other_sizes(family: str) -> None:
    model, processor = tiny.build(family, hidden_size=128, num_layers=3, image_size=64, patch_size=16)
    with torch.no_grad():
        logits = model(**batch_of(processor, pixels_of(0, width=100, height=70))).logits
    assert logits.shape[-1] == model.config.get_text_config().vocab_size
    assert torch.isfinite(logits).all()


def test_faulty_options_are_named_all_at_once() -> None:
    with pytest.raises(ValueError, match=r"'llava'; the known ones are llava15, .*internvl") as error:
        tiny.build("llava")
    assert all(family in str(error.value) for family in tiny.FAMILIES)
    with pytest.raises(ValueError, match=r"hidden_size=100.*num_layers=0.*image_size=36"):
        tiny.build("gemma3", hidden_size=100, num_layers=0, image_size=36)


def test_a_folder_is_written_once(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "twin"
    assert tiny.save("idefics3", folder) == folder
    assert {"config.json", "generation_config.json", "model.safetensors"} <= set(os.listdir(folder))
    written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    with pytest.raises(ValueError, match=f"{folder} exists and is not an empty folder"):
        tiny.save("gemma3", folder)
    assert written == {file: file.stat().st_mtime_ns for file in folder.iterdir()}


@pytest.mark.slow
def test_another_process_writes_the_same_twin_and_names_what_is_missing(
    tmp_path: Path, tiny_dir: Callable[[str], Path]
) -> None:
    """A fresh process without torchvision: one family does without it, the other says what to install."""
    script = f"""
import sys
sys.modules["torchvision"] = None
from vlm_sft.__main__ import main
sys.exit([main(["tiny", family, {str(tmp_path)!r} + "/" + family]) for family in ("llava15", "qwen3_vl")][-1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (1, str(tmp_path / "llava15"))
    assert "tiny: qwen3_vl needs torchvision, of torch's own build" in done.stderr
    assert os.listdir(tmp_path) == ["llava15"]
    for file in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "llava15" / file).read_bytes() == (tiny_dir("llava15") / file).read_bytes()
