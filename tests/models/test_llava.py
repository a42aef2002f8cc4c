"""A LLaVA made of parts computes what its parts compute, and its processor fits it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from recipe_data import llava_parts, noise
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    GenerationConfig,
    LlamaTokenizer,
    LlavaProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    set_seed,
)

from vlm_sft.chat.audit import AuditReport, audit, check_embedding, check_forward, check_stops
from vlm_sft.chat.collator import ChatCollator
from vlm_sft.models import llava
from vlm_sft.models.adapters import lora_config
from vlm_sft.models.llava import assemble_llava, check_tower, plain_template
from vlm_sft.models.loading import load_model, load_processor

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]

ENDS = ["<|endoftext|>", "<|im_start|>"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.manual_seed(0)
    return llava_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def assembled(parts: tuple[Path, Path]) -> tuple[Any, Any]:
    return assemble_llava(*parts, seed=0)


def qwen(folder: Path, tokenizer: Any) -> Path:
    """A Qwen2 whose embedding is larger than its vocabulary, and shared with its head."""
    settings = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=1024, num_key_value_heads=2, tie_word_embeddings=True, **settings)
    model = Qwen2ForCausalLM(config)
    ends = tokenizer.convert_tokens_to_ids(ENDS)
    # As Qwen2-Instruct's: sampling settings, and more than one end.
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_tower_and_text_model_are_those_of_the_parts(assembled: tuple[Any, Any], parts: tuple[Path, Path]) -> None:
    model, processor = assembled
    tower, text = CLIPVisionModel.from_pretrained(parts[0]), AutoModelForCausalLM.from_pretrained(parts[1])
    pixels = processor.image_processor(noise(1), return_tensors="pt")["pixel_values"]
    read = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    expected = model.model.multi_modal_projector(read)
    found = model.get_image_features(pixel_values=pixels).pooler_output
    assert torch.equal(torch.stack(list(found)), expected)
    ids = processor.tokenizer("Hello world", return_tensors="pt")["input_ids"]
    logits = text(ids).logits
    assert torch.equal(model(ids).logits[..., : logits.shape[-1]], logits)


@torch.no_grad()
def test_the_saved_folder_is_an_ordinary_llava(assembled: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = assembled
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reloaded, its_processor = load_model(tmp_path), load_processor(tmp_path)
    text = its_processor.apply_chat_template(TALK[:2], add_generation_prompt=True)
    inputs = its_processor(text=text, images=noise(1), return_tensors="pt")
    assert torch.equal(reloaded(**inputs).logits, model(**inputs).logits)
    assert reloaded.config.assembled_from == {"vision_tower": "clip", "language_model": "llama"}
    assert reloaded.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_the_tokenizer_gains_what_it_lacks_and_the_embedding_grows(
    assembled: tuple[Any, Any], parts: tuple[Path, Path]
) -> None:
    model, processor = assembled
    before = AutoTokenizer.from_pretrained(parts[1])
    assert before.pad_token is None
    assert "<image>" not in before.get_vocab()
    tokenizer = processor.tokenizer
    assert tokenizer.convert_ids_to_tokens([len(before), len(before) + 1]) == ["<image>", "<pad>"]
    assert model.config.image_token_id == processor.image_token_id == len(before)
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == len(before) + 1
    rows = model.get_input_embeddings().num_embeddings
    assert rows % 64 == 0
    assert len(tokenizer) <= rows == model.lm_head.out_features == model.config.text_config.vocab_size


def test_a_qwen_keeps_its_size_its_shared_head_and_its_ends(
    parts: tuple[Path, Path], tiny_processor: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = tiny_processor("internvl").tokenizer
    model, processor = assemble_llava(parts[0], qwen(tmp_path, tokenizer), seed=0)
    assert model.get_input_embeddings().num_embeddings == 1024
    assert model.lm_head.weight is model.get_input_embeddings().weight
    ends = tokenizer.convert_tokens_to_ids(ENDS)
    assert tokenizer.eos_token_id not in ends
    assert set(model.generation_config.eos_token_id) == {*ends, tokenizer.eos_token_id}
    assert set(tokenizer.all_special_tokens) <= set(processor.tokenizer.all_special_tokens)
    assert not model.generation_config.do_sample
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    proven(model, load_processor(tmp_path / "llava"))


def proven(model: Any, processor: Any) -> AuditReport:
    """The report on one row, which the model takes, too."""
    collator = ChatCollator(processor)
    report = audit(collator, [{"messages": TALK, "images": noise(1)}])
    check_stops(collator, report.rows, model.generation_config)
    check_embedding(report.rows, model)
    check_forward(collator, report.shortest, model)
    return report


def test_every_part_has_the_dtype_of_the_hardware(parts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava, "best_dtype", lambda: torch.bfloat16)
    model, _ = assemble_llava(*parts, seed=0)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_the_seed_decides_what_is_drawn_and_nothing_else_does(parts: tuple[Path, Path]) -> None:
    def drawn(seed: int, before: int) -> list[torch.Tensor]:
        """The projector, and the rows by which embedding and head grew."""
        torch.manual_seed(before)
        state = torch.get_rng_state()
        model = assemble_llava(*parts, seed=seed)[0]
        assert torch.equal(torch.get_rng_state(), state)
        rows = (model.get_input_embeddings().weight, model.lm_head.weight)
        return [*model.model.multi_modal_projector.parameters(), *(weight[-64:] for weight in rows)]

    first, again, other = drawn(1, before=5), drawn(1, before=6), drawn(2, before=5)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(first, other, strict=True))


def test_the_projector_is_the_one_that_torch_draws_from_this_seed(assembled: tuple[Any, Any]) -> None:
    """As before `seed` was an argument: `transformers.set_seed(seed)`, then the first draw."""
    projector = assembled[0].model.multi_modal_projector
    set_seed(0)
    for layer in (projector.linear_1, projector.linear_2):
        drawn = torch.nn.Linear(layer.in_features, layer.out_features)
        assert torch.equal(drawn.weight, layer.weight)
        assert torch.equal(drawn.bias, layer.bias)


def test_its_frozen_tower_stays_out_of_autograd(assembled: tuple[Any, Any]) -> None:
    model, processor = assembled
    pixels = processor.image_processor(noise(1), return_tensors="pt")["pixel_values"]
    lora_config(model, {"projector": "full"})
    model.enable_input_require_grads()
    assert not model.model.vision_tower(pixels).last_hidden_state.requires_grad
    model.disable_input_require_grads()
    model.requires_grad_(True)


def test_every_answer_is_written_with_its_end_and_trained(assembled: tuple[Any, Any]) -> None:
    model, processor = assembled
    text = "Be brief. USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes.</s>"
    assert processor.apply_chat_template(TALK) == text
    assert processor.apply_chat_template(TALK[:2], add_generation_prompt=True) == text[: text.index(" A cat")]
    report = proven(model, processor)
    assert report.answers == {"end with '</s>'": 2}
    assert report.prompts == {"equal those of inference": 2}


def with_llama_tokenizer(processor: Any) -> Any:
    """This processor with a `LlamaTokenizer` of the same vocabulary, whose first token alone begins with a blank."""
    model = json.loads(processor.tokenizer.backend_tokenizer.to_str())["model"]
    special = {"pad_token": "<pad>", "extra_special_tokens": ["<image>"]}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True, **special)
    settings = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(processor.image_processor, tokenizer, patch_size=processor.patch_size, **settings)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_caption_is_tokenized_as_if_it_stood_alone(legacy: bool, tiny_processor: Callable[..., Any]) -> None:
    processor = tiny_processor("llava15")
    if not legacy:
        processor = with_llama_tokenizer(processor)
    assert processor.tokenizer.tokenize("<image>a")[1].startswith("▁") == legacy
    caption = "a cat and a dog.\n"
    talk = [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": caption}]},
    ]
    template = {"chat_template": plain_template(processor.tokenizer)}
    collator = ChatCollator(processor, chat_template_kwargs=template, stop_token=None)
    batch = collator([{"messages": talk, "images": [Image.new("RGB", (32, 32))]}])
    learned = batch["labels"][batch["labels"] != -100].tolist()
    assert learned == processor.tokenizer(caption, add_special_tokens=False)["input_ids"]
    assert batch["input_ids"][0].tolist() == [1, *[processor.image_token_id] * 16, *learned]


def test_a_clip_with_its_text_half_serves(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """As those of the Hub come."""
    tower = CLIPVisionModel.from_pretrained(parts[0])
    text = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    whole = CLIPModel(CLIPConfig(text_config=text | {"num_attention_heads": 4}, vision_config=tower.config.to_dict()))
    whole.save_pretrained(tmp_path)
    shutil.copy(parts[0] / "preprocessor_config.json", tmp_path)
    model, _ = assemble_llava(tmp_path, parts[1], seed=0)
    held = dict(model.model.vision_tower.named_parameters())
    saved = {name.removeprefix("vision_model."): weight for name, weight in whole.state_dict().items()}
    assert held
    assert all(torch.equal(weight, saved[name]) for name, weight in held.items())


def test_all_wrong_parts_are_named_at_once(parts: tuple[Path, Path]) -> None:
    tower, text = parts
    with pytest.raises(ValueError, match=r"'llama' model: the tower must be a CLIP; .*: the text model must be one of"):
        assemble_llava(text, tower, seed=0)
    with pytest.raises(ValueError, match=r"no model in '/nowhere'.*the text model must be one of llama"):
        assemble_llava("/nowhere", tower, seed=0)


def test_missing_weights_are_refused(parts: tuple[Path, Path], tmp_path: Path) -> None:
    tower, text = parts
    folder = shutil.copytree(text, tmp_path / "text")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit LlamaForCausalLM: 1 missing_keys \(model.norm.weight\)"):
        assemble_llava(tower, folder, seed=0)


def test_another_tower_is_refused(
    assembled: tuple[Any, Any], parts: tuple[Path, Path], tiny_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    assembled[0].config.save_pretrained(tmp_path)
    check_tower(tmp_path, parts[0])
    check_tower(tmp_path, None)
    with pytest.raises(ValueError, match=r"was assembled on 'clip' .*'openai/clip-vit-base-patch32' is asked for"):
        check_tower(tmp_path, "openai/clip-vit-base-patch32")
    with pytest.raises(ValueError, match="has no record of its tower"):
        check_tower(tiny_dir("llava15"), parts[0])
