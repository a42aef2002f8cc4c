"""Features read from disk train as those that the tower has just made, and other ones are never read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conversations import answer, ask, picture
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from vlm_sft import ChatCollator, freeze, lora_config, tiny
from vlm_sft.families import parts_of
from vlm_sft.features import FeatureCache
from vlm_sft.packing import accept_flat_rows

REFUSED = {"qwen3_vl"}
ROWS = [
    {"messages": [ask(None, "What is this?"), answer("A cat and a dog.")], "images": [picture(60, 40, 1)]},
    {"messages": [ask("Hello there"), answer("Hi")], "images": []},
    {
        "messages": [ask("Compare ", None, " and ", None), answer("One is a red car.")],
        "images": [picture(40, 40, 2), picture(30, 64, 3)],
    },
    {"messages": [ask(None, "And this?"), answer("A bus.")], "images": [picture(90, 30, 4)]},
]


def trainer(model: Any, processor: Any, output: Path, *callbacks: Any, **options: Any) -> SFTTrainer:
    flat = options.pop("padding_free", False)
    peft_config = options.pop("peft_config", None)
    args = SFTConfig(
        output_dir=str(output),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        max_length=None,
        remove_unused_columns=False,
        bf16=False,
        use_cpu=True,
        activation_checkpointing=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        **options,
    )
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=processor,
        data_collator=ChatCollator(processor, key_pictures=bool(callbacks), padding_free=flat),
        peft_config=peft_config,
        callbacks=list(callbacks),
    )


def tower_calls(model: Any) -> list[int]:
    """Grows by one entry each time the tower runs."""
    calls: list[int] = []
    [path] = parts_of(model).vision
    model.get_submodule(path).register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in REFUSED])
def test_losses_and_weights_are_those_without_it(family: str, tiny_model: Any, tiny_processor: Any, tmp_path: Path):
    runs = {}
    for name in ("without", "computed", "read"):
        model = tiny_model(family)
        cache = [] if name == "without" else [FeatureCache(tmp_path / "features", max_gb=1)]
        one = trainer(model, tiny_processor(family), tmp_path / name, *cache, peft_config=lora_config(model, r=4))
        calls = tower_calls(model)
        one.train()
        losses = [log["loss"] for log in one.state.log_history if "loss" in log]
        runs[name] = losses, {n: p.detach().clone() for n, p in one.model.named_parameters() if p.requires_grad}
        if name == "read":
            assert not calls
            assert (cache[0].read, cache[0].stored) == (6, 0)
        elif name == "computed":
            assert cache[0].stored == 3
    for name in ("computed", "read"):
        assert runs[name][0] == pytest.approx(runs["without"][0], abs=1e-5)
        for key, weight in runs["without"][1].items():
            assert torch.allclose(weight, runs[name][1][key], atol=2e-5), key


@pytest.mark.parametrize("family", ["llava15", "qwen2_5_vl"])
def test_rows_without_padding_find_theirs(family: str, tiny_model: Any, tiny_processor: Any, tmp_path: Path):
    losses = []
    for name in ("without", "with"):
        model = tiny_model(family)
        accept_flat_rows(model)
        freeze(model, train=("language",))
        cache = [FeatureCache(tmp_path / "features", max_gb=1)] if name == "with" else []
        one = trainer(model, tiny_processor(family), tmp_path / name, *cache, padding_free=True)
        one.train()
        losses.append([log["loss"] for log in one.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert cache[0].read


def test_other_pixels_weights_and_settings_have_other_features(tiny_model, tiny_processor, tmp_path):
    folders = []
    for change in ("nothing", "weights", "processor"):
        model, processor = tiny_model("llava15"), tiny_processor("llava15")
        freeze(model, train=("language",))
        if change == "weights":
            model.model.multi_modal_projector.linear_1.bias.data[0] += 1e-3
        if change == "processor":
            processor.image_processor.image_mean = [0.5, 0.5, 0.5]
        cache = FeatureCache(tmp_path / "features", max_gb=1)
        trainer(model, processor, tmp_path / change, cache, max_steps=1).train()
        assert 0 < cache.stored < 3
        assert not cache.read
        folders.append(len(list((tmp_path / "features").iterdir())))
    assert folders == [1, 2, 3]
    collator = ChatCollator(tiny_processor("llava15"), key_pictures=True)
    other = {**ROWS[0], "images": [picture(60, 40, 9)]}
    keys = collator([ROWS[0], ROWS[1], other, ROWS[0]])["pictures"].tolist()
    assert keys[0] == keys[3] != keys[2]
    assert keys[1] == [0, 0]


def test_the_disk_is_bounded(tiny_model, tiny_processor, tmp_path):
    model = tiny_model("llava15")
    freeze(model, train=("language",))
    cache = FeatureCache(tmp_path / "features", max_gb=10e-6)  # of the 17,000 bytes that all rows take
    trainer(model, tiny_processor("llava15"), tmp_path / "run", cache).train()
    assert sum(file.stat().st_size for file in tmp_path.glob("features/*/*")) <= 10_000
    assert 0 < cache.stored < 3


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_features_of_several_layers_are_refused(family, tiny_model, tiny_processor, tmp_path):
    with pytest.raises(ValueError, match="takes no features of one layer"):
        trainer(tiny_model(family), tiny_processor(family), tmp_path, FeatureCache(tmp_path, max_gb=1))


def test_what_moves_is_refused(tiny_model, tiny_processor, tmp_path):
    model = tiny_model("llava15")
    freeze(model, train=("language", "projector"))
    one = trainer(model, tiny_processor("llava15"), tmp_path, FeatureCache(tmp_path, max_gb=1))
    with pytest.raises(ValueError, match=r"4 weights of tower or projector train \(.*multi_modal_projector"):
        one.train()
    model = tiny_model("llava15")
    freeze(model, train=("language",))
    for layer in model.model.vision_tower.modules():
        if hasattr(layer, "dropout"):
            layer.dropout = 0.5
    one = trainer(model, tiny_processor("llava15"), tmp_path, FeatureCache(tmp_path, max_gb=1))
    with pytest.raises(ValueError, match="other features each time"):
        one.train()
