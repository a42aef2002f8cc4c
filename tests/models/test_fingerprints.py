"""What a run was made of is recorded, and every difference is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from vlm_sft.models.fingerprints import (
    TRAINING_BASE,
    data_settings,
    differences,
    model_settings,
    place_of_base,
    plain,
    read_training_base,
    shareable,
    stored_weights,
    training_base,
    weight_differences,
    write_training_base,
)
from vlm_sft.tools import tiny


def test_differences_are_listed_by_leaf() -> None:
    recorded = {"a": 1, "b": {"c": [1, 2], "d": None}, "e": 5}
    assert differences(recorded, recorded) == []
    assert differences(recorded, {"a": 2, "b": {"c": [1], "d": None}, "f": 6}) == [
        "a: recorded 1, now 2",
        "b.c: recorded [1, 2], now [1]",
        "e: recorded 5, now None",
        "f: recorded None, now 6",
    ]


def test_plain_survives_json() -> None:
    value = plain(
        {"targets": {*"vqkoudg"}, "dtype": torch.bfloat16, "config": LoraConfig(target_modules=["q"]).to_dict()}
    )
    assert value == json.loads(json.dumps(value))
    assert value["targets"] == sorted("vqkoudg")
    assert value["dtype"] == "torch.bfloat16"


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*language_model.*_proj"},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["model.multi_modal_projector", "lm_head"]},
    ],
    ids=["lora", "dora", "modules_to_save"],
)
def test_an_adapter_leaves_the_base_what_it_is(settings: dict[str, Any], tiny_model: Any) -> None:
    bare = training_base(tiny_model("llava15"))
    adapted = get_peft_model(tiny_model("llava15"), LoraConfig(**settings))
    assert training_base(adapted) == bare
    assert len(bare["weights"]) == 80


@pytest.mark.parametrize("loaded", ["4bit", "8bit", "bfloat16", "quantized in 4 bits of bfloat16"])
def test_a_base_is_the_same_however_it_is_loaded(loaded: str, tiny_model: Any, tmp_path: Path) -> None:
    """And another one is another one: the two are told apart whatever each of them is loaded as."""
    kept = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    four = {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16" if "of" in loaded else "uint8"}
    bits = {"load_in_8bit": True} if loaded == "8bit" else four
    config = None if loaded == "bfloat16" else BitsAndBytesConfig(**bits, llm_int8_skip_modules=kept)
    model = tiny_model("llava15", quantization_config=config, dtype=torch.bfloat16)
    found, bare = training_base(model), training_base(tiny_model("llava15"))
    assert found["weights"] == bare["weights"]
    assert len(bare["weights"]) == 80
    other = tiny_model("llava15")
    with torch.no_grad():
        for layer in other.model.language_model.layers:
            layer.mlp.up_proj.weight.mul_(-1)
    other.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    said_to_differ = weight_differences(found["weights"], training_base(again)["weights"])
    assert [line.split(":")[0] for line in said_to_differ] == [
        f"language_model.model.layers.{n}.mlp.up_proj.weight" for n in (0, 1)
    ]


@pytest.mark.parametrize(
    ("first", "second"), [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32")]
)
def test_a_copy_in_another_dtype_is_the_same_base(first: str, second: str, tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llava15").to(getattr(torch, first))
    model.save_pretrained(tmp_path / "first", max_shard_size="200KB")
    model.to(getattr(torch, second)).save_pretrained(tmp_path / "second")
    recorded, copied = (stored_weights(str(tmp_path / name)) for name in ("first", "second"))
    assert len(recorded) == len(copied) == 80
    assert len([*(tmp_path / "first").glob("*.safetensors")]) > 1
    assert recorded != copied
    assert weight_differences(recorded, copied) == weight_differences(copied, recorded) == []
    with torch.no_grad():
        model.lm_head.weight.mul_(1.02)  # more than any of these dtypes rounds
    model.save_pretrained(tmp_path / "second")
    assert len(weight_differences(recorded, stored_weights(str(tmp_path / "second")))) == 1


def test_weights_differ_by_presence_shape_and_values() -> None:
    recorded = {"a": "2x3 float32 0000803f"}
    assert weight_differences(recorded, recorded | {"b": "1 float32 00000000"}) == []
    assert weight_differences(recorded, {"renamed.a": "2x3 float32 0000803f"}) == []
    assert weight_differences(recorded, {"a": "2x3 bfloat16 803f"}) == []
    for found in (
        {},
        {"a": "2x3 float32 00000040"},
        {"a": "3x2 bfloat16 803f"},
        {"a": "2x3 uint8 80"},
        {"b": "1 float32 0"},
    ):
        assert len(weight_differences(recorded, found)) == 1, found


def test_another_base_of_the_same_shapes_is_told_apart(tmp_path: Path) -> None:
    folders = [str(tiny.save("llava15", tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    first, second = map(stored_weights, folders)
    assert [line.split()[:2] for line in first.values()] == [line.split()[:2] for line in second.values()]
    assert len(weight_differences(first, second)) == 39


def test_a_weight_is_looked_at_from_its_first_value_to_its_last(tiny_dir: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny_dir("llava15"), tmp_path, dirs_exist_ok=True)
    known, file = stored_weights(str(tmp_path)), tmp_path / "model.safetensors"
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    for at in ((0, 0), (-1, -1)):
        weights = load_file(tiny_dir("llava15") / "model.safetensors")
        weights[name][at] += 1
        save_file(weights, file, metadata={"format": "pt"})
        assert [line.split(":")[0] for line in weight_differences(known, stored_weights(str(tmp_path)))] == [name]


def test_a_model_made_in_memory_has_no_stored_weights(tmp_path: Path) -> None:
    assert training_base(tiny.build("llava15")[0])["weights"] == {}
    assert stored_weights("someone/not-here") == stored_weights(str(tmp_path)) == {}


def test_no_path_of_this_machine_is_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = {"llava-hf/llava-1.5-7b-hf": "llava-hf/llava-1.5-7b-hf", "models/llava": "models/llava"}
    told |= {
        str(tmp_path / "models/llava"): "models/llava",
        "/data/secret/llava": ".../llava",
        "~/x/llava": ".../llava",
    }
    assert {name: shareable(name) for name in told} == told


def test_an_adapter_finds_its_base_where_it_was_trained_but_tells_no_path(tmp_path: Path) -> None:
    base, adapter = tmp_path / 'böse "base"', tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "r": 4}))
    (adapter / "README.md").write_text(f"base_model: {base}\n", "utf-8")
    named = shareable(str(base))
    write_training_base(adapter, {"base_model_name_or_path": named}, str(base))
    read = json.loads((adapter / "adapter_config.json").read_text())
    assert read == {"base_model_name_or_path": named, "r": 4}
    shown = [file.read_text("utf-8") for file in adapter.iterdir() if file.is_file()]
    assert len(shown) == 3
    assert not any(str(tmp_path) in text for text in shown)
    uploaded = filter_repo_objects(
        [str(f.relative_to(adapter)) for f in adapter.rglob("*")], ignore_patterns=DEFAULT_IGNORE_PATTERNS
    )
    assert {*uploaded} == {"adapter_config.json", "README.md", TRAINING_BASE, ".cache"}
    assert place_of_base(adapter, named) == str(base)
    assert place_of_base(adapter, "someone/else") == "someone/else"  # the config was edited
    base.rmdir()
    assert place_of_base(adapter, named) == named


def test_what_is_not_there_reads_as_none(tmp_path: Path) -> None:
    assert read_training_base(tmp_path) is None
    (tmp_path / TRAINING_BASE).write_text('{"revision": "abc"}')
    assert read_training_base(tmp_path) == {"revision": "abc"}
    (tmp_path / TRAINING_BASE).write_text('{"revision": "ab')
    with pytest.raises(ValueError, match=r"training_base\.json is damaged"):
        read_training_base(tmp_path)


def test_settings_of_the_model(tiny_model: Any) -> None:
    model = tiny_model("llava15")
    everything = model_settings(model)
    model.lm_head.requires_grad_(False)
    assert [line.split(":")[0] for line in differences(everything, model_settings(model))] == [
        "trained.names",
        "trained.tensors",
    ]
    adapted = model_settings(get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=3)))
    assert adapted["adapters"]["default"]["r"] == 3


def test_settings_of_the_data() -> None:
    rows = runs.rows(20)
    known = data_settings(rows)
    assert known["rows"] == 20
    assert known["columns"].keys() == {"row", "images", "messages"}
    assert data_settings(runs.rows(20)) == known
    # Neither a lazy transform nor an index over the same rows makes it another dataset.
    assert data_settings(rows.with_transform(lambda batch: batch)) == known
    assert data_settings(rows.select(range(20))) == known
    assert data_settings(rows.select(range(19, -1, -1)))["columns"]["row"] != known["columns"]["row"]
    assert data_settings(runs.rows(20, seed=1))["columns"]["images"] != known["columns"]["images"]
    # Sixteen rows are looked at, from all of the set.
    changed = rows.map(lambda row, at: {"row": row["row"] + (at >= 16)}, with_indices=True)
    assert data_settings(changed)["columns"]["row"] != known["columns"]["row"]
    assert data_settings(rows.to_iterable_dataset()) == {"rows": None, "columns": {}}
    assert data_settings([1, 2]) == {"rows": 2, "columns": {}}
