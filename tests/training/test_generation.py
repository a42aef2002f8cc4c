"""Generation settings come through training as they were loaded, and a saved model generates and stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from runs import rows, trainer
from transformers import GenerationConfig

from vlm_sft.chat.collator import ChatCollator
from vlm_sft.models.adapters import lora_config
from vlm_sft.models.loading import load_model, load_processor
from vlm_sft.training.generation import KeepGeneration


@pytest.mark.parametrize("family", ["llava15", "gemma3"])
def test_checkpoints_and_model_keep_the_settings_they_were_loaded_with(
    family: str, tiny_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_model(tiny_dir(family))
    model.generation_config.max_new_tokens = 99
    loaded = model.generation_config.to_dict()
    keep = KeepGeneration(model)
    run = trainer(tiny_dir(family), tmp_path, callbacks=[keep], model=model)
    assert model.config.use_cache is False  # what the Trainer does, and what this is for
    run.train()
    run.save_model(str(tmp_path / "final"))
    assert not hasattr(model.config, "use_cache")
    assert model.generation_config.to_dict() == loaded
    for folder in ("checkpoint-2", "checkpoint-4", "final"):
        saved = json.loads((tmp_path / folder / "config.json").read_text())
        assert "use_cache" not in saved
        assert saved["text_config"]["use_cache"] is True
        assert GenerationConfig.from_pretrained(tmp_path / folder).max_new_tokens == 99


def test_a_setting_of_use_cache_is_put_back(tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_model(tiny_dir("llava15"))
    model.config.use_cache = True
    keep = KeepGeneration(get_peft_model(model, lora_config(model)))
    trainer(tiny_dir("llava15"), tmp_path, callbacks=[keep], model=keep.model, max_steps=1).train()
    assert model.config.use_cache is True


def test_end_tokens_of_training_are_added_and_unset_tokens_filled(
    tiny_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    model, processor = load_model(tiny_dir("qwen2_5_vl")), load_processor(tiny_dir("qwen2_5_vl"))
    end, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=7, temperature=0.5, do_sample=True)
    keep = KeepGeneration(model)
    trainer(tiny_dir("qwen2_5_vl"), tmp_path, callbacks=[keep], model=model, max_steps=1).train()
    assert model.generation_config.eos_token_id == [7, end]
    assert model.generation_config.pad_token_id == pad
    assert model.generation_config.temperature == 0.5


def test_a_config_that_could_not_be_saved_stops_the_run_before_its_first_step(
    tiny_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_model(tiny_dir("llava15"))
    model.generation_config.temperature = 0.9  # without do_sample
    keep = KeepGeneration(model)
    run = trainer(tiny_dir("llava15"), tmp_path, callbacks=[keep], model=model)
    with pytest.raises(ValueError, match=r"(?s)could not be saved after training.*temperature.*do_sample=True"):
        run.train()
    assert run.state.global_step == 0
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_saved_model_generates_what_it_learnt_and_stops(tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    model, processor = load_model(tiny_dir("llava15")), load_processor(tiny_dir("llava15"))
    data = rows(1)
    run = trainer(
        tiny_dir("llava15"),
        tmp_path,
        callbacks=[KeepGeneration(model)],
        model=model,
        dataset=data,
        collator=ChatCollator(processor),
        max_steps=40,
        save_strategy="no",
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=1,
    )
    run.train()
    run.save_model(str(tmp_path / "final"))
    again, processor = load_model(tmp_path / "final"), load_processor(tmp_path / "final")
    turn: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many are there?"}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[data[0]["images"]], return_tensors="pt")
    lengths: list[int] = []
    again.get_input_embeddings().register_forward_hook(lambda module, ids, out: lengths.append(ids[0].shape[1]))
    ids = again.generate(**inputs, do_sample=False, max_new_tokens=30)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(ids, skip_special_tokens=True).strip() == "There are 0."
    assert ids[-1] == processor.tokenizer.eos_token_id
    assert len(ids) < 30
    assert lengths[1:] == [1] * (len(ids) - 1)  # the cache is used
