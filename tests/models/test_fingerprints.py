"""What a run was made of is recorded, and every difference is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from vlm_sft.models.fingerprints import (
    TRAINING_BASE,
    data_settings,
    differences,
    model_settings,
    plain,
    read_training_base,
    training_base,
    weight_differences,
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
    assert len(bare["weights"]) == len(dict(tiny_model("llava15").named_parameters()))


@pytest.mark.parametrize(
    ("kind", "storage", "said"),
    [
        ("load_in_4bit", "uint8", "fp4/float32/cpu"),
        ("load_in_4bit", "bfloat16", "fp4/float32/cpu"),
        ("load_in_8bit", "uint8", "int8/float32/cpu"),
    ],
)
def test_quantized_weights_are_compared_among_themselves(
    kind: str, storage: str, said: str, tiny_model: Any, tmp_path: Path
) -> None:
    kept = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    config = BitsAndBytesConfig(**{kind: True}, bnb_4bit_quant_storage=storage, llm_int8_skip_modules=kept)
    model = tiny_model("llava15", quantization_config=config, dtype=torch.float32)
    found, bare = training_base(model), training_base(tiny_model("llava15"))
    assert found["quantization_config"][kind] is True
    packed = {name for name, line in found["weights"].items() if line.split()[1] == said}
    assert packed == {name for name in bare["weights"] if "language_model.layers" in name and "_proj" in name}
    assert weight_differences(bare["weights"], found["weights"]) == []
    assert weight_differences(found["weights"], bare["weights"]) == []
    # After a forward pass in either mode, as the audit takes one, and below adapters, it is the same base.
    ids = torch.tensor([[1, 5, 6]])
    model(input_ids=ids)
    model.train()(input_ids=ids)
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*_proj"))
    assert training_base(adapted)["weights"] == found["weights"]
    other = tiny_model("llava15")
    with torch.no_grad():
        for layer in other.model.language_model.layers:
            layer.mlp.up_proj.weight.mul_(-1)
    other.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    said_to_differ = weight_differences(found["weights"], training_base(again)["weights"])
    assert [line.split(":")[0] for line in said_to_differ] == [
        f"model.language_model.layers.{n}.mlp.up_proj.weight" for n in (0, 1)
    ]


def test_weights_differ_by_presence_shape_and_digest() -> None:
    recorded = {"a": "2x3 float32 12ab"}
    assert weight_differences(recorded, {"a": "2x3 float32 12ab", "b": "1 float32 00ff"}) == []
    assert weight_differences(recorded, {"a": "2x3 bfloat16 34cd"}) == []
    for found in ({}, {"a": "2x3 float32 34cd"}, {"a": "3x2 bfloat16 34cd"}):
        assert len(weight_differences(recorded, found)) == 1


def test_another_base_of_the_same_shapes_is_told_apart() -> None:
    first, second = (training_base(tiny.build("llava15", seed=seed)[0]) for seed in (0, 1))
    shapes = [{name: line.split()[0] for name, line in found["weights"].items()} for found in (first, second)]
    assert shapes[0] == shapes[1]
    assert weight_differences(first["weights"], second["weights"])


def test_a_weight_is_looked_at_from_its_first_value_to_its_last(tiny_model: Any) -> None:
    model, name = tiny_model("llava15"), "model.language_model.layers.1.mlp.up_proj.weight"
    known = training_base(model)["weights"]
    with torch.no_grad():
        model.get_parameter(name)[-1, -1] += 1
    assert [line.split(":")[0] for line in weight_differences(known, training_base(model)["weights"])] == [name]


def test_what_is_not_there_reads_as_none(tmp_path: Path) -> None:
    assert read_training_base(tmp_path) is None
    (tmp_path / TRAINING_BASE).write_text('{"revision": "abc"}')
    assert read_training_base(tmp_path) == {"revision": "abc"}


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
