"""What a run was made of is recorded, and every difference is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from vlm_sft import tiny
from vlm_sft.provenance import (
    TRAINING_BASE,
    data_settings,
    differences,
    model_settings,
    plain,
    read_training_base,
    training_base,
)


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
        {"targets": {"v", "q"}, "dtype": torch.bfloat16, "config": LoraConfig(target_modules=["q"]).to_dict()}
    )
    assert value == json.loads(json.dumps(value))
    assert value["targets"] == ["q", "v"]
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
    ("kind", "storage"), [("load_in_4bit", "uint8"), ("load_in_4bit", "bfloat16"), ("load_in_8bit", "uint8")]
)
def test_quantized_weights_are_left_out(kind: str, storage: str, tiny_model: Any) -> None:
    kept = ["model.vision_tower", "lm_head"]
    config = BitsAndBytesConfig(**{kind: True}, bnb_4bit_quant_storage=storage, llm_int8_skip_modules=kept)
    found = training_base(tiny_model("llava15", quantization_config=config, dtype=torch.float32))
    assert found["quantization_config"][kind] is True
    bare = training_base(tiny_model("llava15"))
    left_out = bare["weights"].keys() - found["weights"].keys()
    assert {name.split(".")[1] for name in left_out} == {"language_model", "multi_modal_projector"}
    assert all(found["weights"][name] == bare["weights"][name] for name in found["weights"])


def test_another_base_of_the_same_shapes_is_told_apart() -> None:
    first, second = (training_base(tiny.build("llava15", seed=seed)[0]) for seed in (0, 1))
    shapes = [{name: line.split()[0] for name, line in found["weights"].items()} for found in (first, second)]
    assert shapes[0] == shapes[1]
    assert differences(first["weights"], second["weights"])


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
    assert data_settings(rows.to_iterable_dataset()) == {"rows": None, "columns": {}}
    assert data_settings([1, 2]) == {"rows": 2, "columns": {}}
