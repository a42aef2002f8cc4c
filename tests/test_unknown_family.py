"""A family outside the table, Mistral 3: refused with its modules, and with `model_parts` trained in every way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, Mistral3Config, TrainingArguments

from vlm_sft.models.adapters import check_adapters, lora_config
from vlm_sft.models.fingerprints import TRAINING_BASE, training_base
from vlm_sft.models.freezing import check_trainable, freeze
from vlm_sft.models.loading import load_model
from vlm_sft.models.parts import MODEL_PARTS, ModelParts
from vlm_sft.models.quantization import check_quantized, int8_config, nf4_config
from vlm_sft.training.optim import lr_by_part

PARTS = ModelParts(
    vision=("model.vision_tower",),
    projector=("model.multi_modal_projector",),
    language=("model.language_model",),
    head=("lm_head",),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"model_type": "mistral", "vocab_size": 64, "num_key_value_heads": 1, "head_dim": 16}
    config = Mistral3Config(
        vision_config={"model_type": "pixtral", "image_size": 32, "patch_size": 8, **small},
        text_config={**text, **small},
        image_token_index=5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config = GenerationConfig(eos_token_id=2)
    path = tmp_path_factory.mktemp("mistral3")
    model.save_pretrained(path)
    return path


def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, 5, 5, 5, 5, 7, 8]])
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    return {"input_ids": ids, "labels": ids, "pixel_values": pixels, "image_sizes": torch.tensor([[32, 32]])}


def test_without_its_parts_it_is_refused_and_its_modules_are_listed(folder: Path) -> None:
    model, config = load_model(folder), AutoConfig.from_pretrained(folder)
    refused = r"'mistral3' is not .* pass model_parts=ModelParts\(.*"
    listed = r"model\.vision_tower, model\.multi_modal_projector, model\.language_model, lm_head\.$"
    asked: list[tuple[Any, Any]] = [(lora_config, model), (lora_config, config), (freeze, model), (int8_config, model)]
    for ask, subject in asked:
        with pytest.raises(ValueError, match=refused + listed):
            ask(subject)
    with pytest.raises(ValueError, match=refused + r"model\.named_modules\(\) shows"):
        int8_config(config)
    assert "mistral3" not in MODEL_PARTS


@pytest.mark.parametrize("packed", [False, True])
def test_adapters_a_full_projector_and_a_quantized_base(packed: bool, folder: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    nf4 = nf4_config(config, compute_dtype=torch.float32, model_parts=PARTS) if packed else None
    model = load_model(folder, quantization_config=nf4, dtype="float32", model_parts=PARTS)
    if packed:
        assert len(check_quantized(model, model_parts=PARTS).quantized) == 14
    asked: dict[str, Any] = {"parts": ("language",), "projector": "full", "model_parts": PARTS}
    wrapped = get_peft_model(model, lora_config(model, use_dora=True, **asked))
    report = check_adapters(wrapped, **asked)
    assert report.layers_by_part == {"language": 14}
    assert report.trained_in_full == ("model.multi_modal_projector",)
    tower: list[bool] = []
    hook = model.model.vision_tower.register_forward_hook(
        lambda module, args, output: tower.append(output.last_hidden_state.requires_grad)
    )
    wrapped.enable_input_require_grads()
    wrapped(**batch()).loss.backward()
    hook.remove()
    assert tower == [False]
    with torch.no_grad():
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight += 0.1
    wrapped.save_pretrained(tmp_path)
    (tmp_path / TRAINING_BASE).write_text(json.dumps(training_base(wrapped)))
    logits = wrapped.eval()(**batch()).logits
    assert torch.equal(load_model(tmp_path, model_parts=PARTS)(**batch()).logits, logits)


def test_parts_in_full_at_their_own_rates(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder, model_parts=PARTS)
    freeze(model, train=("projector", "language"), model_parts=PARTS)
    assert "32" in check_trainable(model, train=("projector", "language"), model_parts=PARTS)
    args = TrainingArguments(str(tmp_path), learning_rate=1e-3, use_cpu=True, report_to="none")
    make, rates = lr_by_part(args, {"projector": 1e-2})
    groups = make()(model, **rates).param_groups
    assert {group["part"]: group["lr"] for group in groups} == {"language": 1e-3, "projector": 1e-2}
