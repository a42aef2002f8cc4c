"""A family that no table of ours names, Mistral 3, trains in every way; one whose parts cannot be told, registered."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    TrainingArguments,
)

from vlm_sft.models import parts as module
from vlm_sft.models.adapters import check_trains, lora_config
from vlm_sft.models.fingerprints import TRAINING_BASE, training_base
from vlm_sft.models.loading import load_model
from vlm_sft.models.parts import register_parts
from vlm_sft.models.quantization import check_quantized, nf4_config
from vlm_sft.training.optim import lr_by_part

LORA_AND_PROJECTOR: Any = {"language": "lora", "projector": "full"}
IN_FULL: Any = {"projector": "full", "language": "full"}


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


def test_where_its_parts_cannot_be_told_it_is_refused_until_they_are_registered(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PARTS_OVERRIDES", {})
    model, config = load_model(folder), AutoConfig.from_pretrained(folder)
    monkeypatch.setattr(Mistral3ForConditionalGeneration, "get_decoder", lambda self: self)
    refused = r"cannot be told: it has no language model\..*register_parts\('mistral3', .*"
    listed = r"model\.vision_tower, model\.multi_modal_projector, model\.language_model, lm_head\.$"
    asked: list[tuple[Any, Any]] = [
        (lora_config, model),
        (partial(check_trains, trains=IN_FULL), model),
        (nf4_config, model),
        (nf4_config, config),
        (load_model, folder),
    ]
    for ask, subject in asked:
        with pytest.raises(ValueError, match=refused + listed):
            ask(subject)
    paths = {"vision": "model.vision_tower", "projector": "model.multi_modal_projector", "head": "lm_head"}
    register_parts("mistral3", language="model.language_model", **paths)
    for ask, subject in asked[:1] + asked[2:]:
        ask(subject)
    assert "enable_input_require_grads" in vars(load_model(folder))


@pytest.mark.parametrize("packed", [False, True])
def test_adapters_a_full_projector_and_a_quantized_base(packed: bool, folder: Path, tmp_path: Path) -> None:
    nf4 = nf4_config(AutoConfig.from_pretrained(folder), compute_dtype=torch.float32) if packed else None
    model = load_model(folder, quantization_config=nf4, dtype="float32")
    if packed:
        assert len(check_quantized(model)[0]) == 14
    wrapped = get_peft_model(model, lora_config(model, LORA_AND_PROJECTOR, use_dora=True))
    report = check_trains(wrapped, LORA_AND_PROJECTOR)
    assert report.parts["language"].adapted_layers == report.parts["total"].adapted_layers == 14
    assert report.parts["projector"].how == "full"
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
    assert torch.equal(load_model(tmp_path)(**batch()).logits, logits)


def test_parts_in_full_at_their_own_rates(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    assert lora_config(model, IN_FULL) is None
    check_trains(model, IN_FULL)
    args = TrainingArguments(str(tmp_path), learning_rate=1e-3, use_cpu=True, report_to="none")
    make, rates = lr_by_part(args, {"projector": 1e-2})
    groups = make()(model, **rates).param_groups
    assert {group["part"]: group["lr"] for group in groups} == {"language": 1e-3, "projector": 1e-2}
