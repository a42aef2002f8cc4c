"""A config is shrunk to a model that builds, runs, and reads rows of the same lengths."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import FAMILIES, TEN
from test_tiny import ANSWER, QUESTION, pixels_of
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, LlamaConfig

from vlm_sft import ChatCollator, load_model, load_processor
from vlm_sft.__main__ import main
from vlm_sft.tools import tiny
from vlm_sft.tools.shrink import shrink

# What decides the length of a row, by the names that configs have for it.
LENGTHS = ("vocab_size", "image_size", "patch_size", "spatial_merge_size", "scale_factor", "downsample_ratio")
LENGTHS += (
    "downsample_factor",
    "pixel_shuffle_ratio",
    "window_size",
    "image_grid_pinpoints",
    "projector_pooling_ratio",
)
LENGTHS += ("mm_tokens_per_image", "vision_soft_tokens_per_image", "num_image_tokens", "resampler_n_latents")

# A tower of timm, taps, experts, layers that share or cross: the others run with `make test-families`.
FEW = ("llava15", "qwen2_5_vl", "qwen3_5", "qwen3_vl_moe", "gemma3n", "gemma4", "mllama", "perception_lm")
OTHERS = [family for family in (*TEN, *FAMILIES) if family not in (*FEW, "t5gemma2")]
EACH = [*FEW, *(pytest.param(family, marks=pytest.mark.families) for family in OTHERS)]


def fields(config: dict[str, Any], at: str = "") -> Iterator[tuple[str, str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from fields(value, f"{at}{name}.")
        else:
            yield f"{at}{name}", name, value


def large(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A family's folder as a Hub has it, its config as large as the family's default, but without weights."""
    if family in TEN:
        model, processor = tiny.build(family, hidden_size=256, num_layers=6)
        config = model.config
        model.generation_config.save_pretrained(folder)
    else:
        processor = families.processor_of(family)
        with monkeypatch.context() as patch:
            patch.setattr(families, "shrink", lambda settings: settings)
            config = families.config_of(family, processor)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    load_processor(folder).save_pretrained(folder)  # as transformers writes it once it was read
    return folder


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of processors of GLM, among themselves
@pytest.mark.parametrize("family", EACH)
def test_a_twin_of_a_model_reads_rows_as_the_model_does(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin = large(family, tmp_path / "model", monkeypatch), tmp_path / "twin"
    assert tiny.save_like(model, twin) == twin
    for file in model.iterdir():
        if file.name not in ("config.json", "generation_config.json", "tokenizer_config.json"):
            assert (twin / file.name).read_bytes() == file.read_bytes()
    before, after = (json.loads((folder / "config.json").read_text("utf-8")) for folder in (model, twin))
    settled = {at: value for at, _, value in fields(after)}
    for at, name, value in fields(before):
        if name in LENGTHS or name.endswith(("token_id", "token_index")):
            assert settled[at] == value, at
    small = AutoModelForImageTextToText.from_pretrained(twin)
    assert small.num_parameters() < 5_000_000
    assert {weight.dtype for weight in small.parameters()} == {torch.float32}
    if family not in ("emu3", "paligemma"):
        images = [pixels_of(0), pixels_of(1)]
        messages = [{**QUESTION, "content": [*QUESTION["content"], *QUESTION["content"]]}, ANSWER]
        rows = [{"messages": messages, "images": images}]
        [theirs], [ours] = (ChatCollator(load_processor(at)).encode(rows)[0] for at in (model, twin))
        assert len(ours) == len(theirs) > int(ours.image.sum()) > 1


@pytest.mark.parametrize("family", ["llava15", "qwen2_5_vl", "gemma3"])
def test_the_generation_settings_are_the_models_own(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = large(family, tmp_path / "model", monkeypatch)
    settings = GenerationConfig(eos_token_id=[5, 7], pad_token_id=3, temperature=0.3, do_sample=True)
    settings.save_pretrained(model)
    found = load_model(tiny.save_like(model, tmp_path / "twin")).generation_config
    assert (found.eos_token_id, found.pad_token_id, found.temperature) == ([5, 7], 3, 0.3)


def test_seed_decides_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = large("qwen3_vl_moe", tmp_path / "model", monkeypatch)
    weights = [
        (tiny.save_like(model, tmp_path / str(n), seed=seed) / "model.safetensors").read_bytes()
        for n, seed in enumerate((0, 0, 1))
    ]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(
    ("family", "at", "expected"),
    [
        ("gemma3", "text_config.layer_types", ["sliding_attention", "full_attention"]),
        ("gemma3", "text_config.head_dim", 16),
        ("qwen2_5_vl", "vision_config.fullatt_block_indexes", [1]),
        ("qwen2_5_vl", "text_config.num_key_value_heads", 2),
        ("llava_next", "text_config.num_key_value_heads", 4),  # as many as heads
        ("qwen3_vl", "vision_config.deepstack_visual_indexes", [1]),
        ("qwen3_vl_moe", "text_config.num_local_experts", 4),
        ("qwen3_5", "text_config.layer_types", ["linear_attention", "full_attention"]),
        ("glm4v_moe", "text_config.first_k_dense_replace", 1),
        ("llama4", "text_config.moe_layers", [0, 1]),
        ("llama4", "text_config.no_rope_layers", [1, 0]),
        ("llama4", "vision_config.intermediate_size", 256),  # its projector reads 2 x 2 patches
        ("mllama", "text_config.cross_attention_layers", [1]),
        ("mllama", "vision_config.vision_output_dim", 128),  # the last layer, and one that is tapped
        ("vipllava", "vision_feature_layer", [-2, -2, -2, -2, 1]),
        ("gemma3n", "text_config.num_kv_shared_layers", 2),
        ("gemma4", "text_config.per_layer_config", {1: {"head_dim": 32}}),
        ("paligemma", "text_config.num_key_value_heads", 1),
        ("gemma3n", "vision_config.hidden_size", 2048),  # timm knows no other
    ],
)
def test_of_layers_each_kind_is_kept_and_sizes_fit(family: str, at: str, expected: Any) -> None:
    small = shrink(AutoConfig.for_model(family).to_dict())
    for name in at.split("."):
        small = small[name]
    assert small == expected


@pytest.mark.parametrize(
    ("sections", "share", "head_dim", "expected"),
    [
        ([16, 24, 24], 1.0, 16, [2, 2, 4]),
        ([11, 11, 10], 0.25, 32, [1, 1, 2]),
        ([8, 12, 12], 0.5, 16, [1, 1, 2]),
        ([16, 16, 16, 16], 1.0, 16, [2, 2, 2, 2]),
    ],
)
def test_rotary_sections_fill_the_head(sections: list[int], share: float, head_dim: int, expected: list[int]) -> None:
    rope = {"rope_type": "default", "mrope_section": sections, "partial_rotary_factor": share}
    small = shrink({"hidden_size": 2048, "num_attention_heads": 16, "head_dim": 256, "rope_parameters": rope})
    assert small["head_dim"] == head_dim
    assert small["rope_parameters"] == rope | {"mrope_section": expected}


def test_layers_are_kept_in_order_and_small_numbers_stay() -> None:
    kinds = ["full", "full", "sliding", "full", "sliding", "full"]
    config: dict[str, Any] = {"num_hidden_layers": 6, "layer_types": kinds, "tapped_layers": [3, 5]}
    config |= {"first_k_dense_replace": 1, "num_kv_shared_layers": 2, "moe_intermediate_size": [512, 256]}
    config |= {"hidden_size": 32, "num_attention_heads": 2, "quantization_config": {"bits": 4}, "tie": True}
    assert shrink(config) == {
        **{"num_hidden_layers": 6, "layer_types": kinds, "tapped_layers": [3, 5]},
        **{"first_k_dense_replace": 1, "num_kv_shared_layers": 2, "moe_intermediate_size": [256, 256]},
        **{"hidden_size": 32, "num_attention_heads": 2, "tie": True},
    }
    fewer = shrink(config | {"first_k_dense_replace": 0, "num_kv_shared_layers": 0})
    assert (fewer["layer_types"], fewer["tapped_layers"]) == (["full", "sliding", "full"], [2])
    alike = shrink({"depth": 30, "layer_scale": [0.5] * 30})
    assert alike == {"depth": 2, "layer_scale": [0.5] * 2}


def test_what_cannot_be_a_twin_is_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_dir: Callable[[str], Path]
) -> None:
    text, strange, reads_answers = (tmp_path / name for name in ("text", "strange", "t5gemma2"))
    LlamaConfig().save_pretrained(text)
    processor = families.processor_of("qwen3_vl_moe")
    for folder, family in ((strange, "dots3_note"), (reads_answers, "t5gemma2")):
        processor.save_pretrained(folder)
        AutoConfig.for_model(family).save_pretrained(folder)
    full, out = tiny_dir("llava15"), str(tmp_path / "out")
    capsys.readouterr()
    for arguments, said in (
        (["--like", str(text), out], "is a 'llama' model, which takes no images"),
        (["--like", str(strange), out], "cannot be shrunk: .*head_dim.* Sizes that stayed as they are: .*=128"),
        (["--like", str(reads_answers), out], "an encoder-decoder"),
        (["--like", str(tmp_path / "none"), out], "No folder"),
        (["--like", str(full), str(full)], "exists and is not an empty folder"),
        (["--like", str(full), "gemma3", out], "give FAMILY DIR, or --like MODEL DIR"),
        ([out], "give FAMILY DIR, or --like MODEL DIR"),
    ):
        assert main(["tiny", *arguments]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("tiny: ")
        with pytest.raises(ValueError, match=said):
            raise ValueError(line)
        assert not Path(out).exists()
    assert main(["tiny", "--like", str(full), out]) == 0
    assert capsys.readouterr().out.strip() == out
