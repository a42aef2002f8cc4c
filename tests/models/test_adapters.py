"""Adapters land on the asked parts of ten families, learn there, come back from disk; a wrong set is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from runs import Collate, rows
from torch import nn
from transformers import AutoConfig

from vlm_sft.models.adapters import check_adapters, lora_config
from vlm_sft.models.parts import part_of, parts_of
from vlm_sft.models.quantization import int8_config, nf4_config
from vlm_sft.tools import tiny

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILIES)
LANGUAGE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def batch(tiny_processor: Callable[..., Any]) -> Callable[[str], dict[str, torch.Tensor]]:
    return lambda family: Collate(tiny_processor(family))(list(rows(1).remove_columns("row")))


def linears(model: nn.Module, part: str) -> set[str]:
    parts = parts_of(model)
    return {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and part_of(n, parts) == part}


def stir(model: nn.Module) -> None:
    """Non-zero adapters, so that they have an effect and gradients pass through both of their matrices."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.1 + ("magnitude" in name)


@FAMILIES
def test_by_default_every_linear_layer_of_the_language_model_and_nothing_else(
    family: str, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(family)
    asked = linears(model, "language")
    wrapped = get_peft_model(model, lora_config(model))
    report = check_adapters(wrapped)
    assert set(report.adapted) == asked
    assert {name.rsplit(".", 1)[-1] for name in report.adapted} == LANGUAGE
    trainable = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * len(asked)
    assert all(".lora_" in name for name in trainable)
    assert not report.dora
    assert str(report).startswith(f"LoRA rank 16 on {len(asked)} layers (language {len(asked)}), DoRA off; ")


@FAMILIES
def test_tower_and_projector_adapters_all_receive_a_gradient(
    family: str, tiny_model: Callable[..., Any], batch: Callable[[str], Any]
) -> None:
    projector = "full" if family == "gemma3" else "lora"  # Gemma3's projector is one bare matrix
    asked: dict[str, Any] = {"parts": ("language", "vision"), "projector": projector}
    model = tiny_model(family)
    tower = linears(model, "vision")
    wrapped = get_peft_model(model, lora_config(model, r=4, **asked))
    report = check_adapters(wrapped, **asked)
    stir(wrapped)
    wrapped(**batch(family)).loss.backward()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    left_out = tower - set(report.adapted)
    dropped = {"llava15", "llava_next"}  # vision_feature_layer=-2
    last = model.config.vision_config.to_dict().get("num_hidden_layers", 0) - 1
    assert all(f".layers.{last}." in name for name in left_out)
    assert len(left_out) == (6 if family in dropped else 0)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl", "smolvlm", "gemma3"])
def test_a_projector_trained_in_full_is_saved_and_comes_back_with_the_adapter(
    family: str, tiny_model: Callable[..., Any], batch: Callable[[str], Any], tmp_path: Path
) -> None:
    model = tiny_model(family)
    wrapped = get_peft_model(model, lora_config(model, r=4, projector="full"))
    report = check_adapters(wrapped, projector="full")
    parts = parts_of(tiny_model(family))
    assert report.trained_in_full
    assert {part_of(name, parts) for name in report.trained_in_full} == {"projector"}
    before = {name: parameter.clone() for name, parameter in wrapped.named_parameters()}
    stir(wrapped)
    moved = {name for name, parameter in wrapped.named_parameters() if not torch.equal(parameter, before[name])}
    assert all(".lora_" in name or ".modules_to_save." in name for name in moved)
    wrapped.save_pretrained(tmp_path)
    expected = wrapped.eval()(**batch(family)).logits
    again = PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    assert torch.equal(again(**batch(family)).logits, expected)
    assert not torch.allclose(tiny_model(family)(**batch(family)).logits, expected)


@pytest.mark.parametrize(
    ("pack", "use_dora"), [(partial(nf4_config, compute_dtype=torch.float32), True), (int8_config, False)]
)
def test_adapters_and_a_full_projector_on_a_quantized_base(
    pack: Callable[..., Any],
    use_dora: bool,
    tiny_model: Callable[..., Any],
    batch: Callable[[str], Any],
    tmp_path: Path,
) -> None:
    def base() -> Any:
        return tiny_model("llava15", quantization_config=pack("llava"))

    wrapped = get_peft_model(model := base(), lora_config(model, use_dora=use_dora, projector="full"))
    report = check_adapters(wrapped, projector="full")
    assert report.dora == use_dora
    assert report.trained_in_full == ("model.multi_modal_projector",)
    assert set(report.adapted) == linears(tiny_model("llava15"), "language")
    stir(wrapped)
    wrapped(**batch("llava15")).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in wrapped.parameters() if p.requires_grad)
    wrapped.save_pretrained(tmp_path)
    expected = wrapped.eval()(**batch("llava15")).logits
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(again(**batch("llava15")).logits, expected)


def test_dora_on_8_bit_layers_fails_on_a_cpu(tiny_model: Callable[..., Any], batch: Callable[[str], Any]) -> None:
    model = tiny_model("llava15", quantization_config=int8_config("llava"))
    with pytest.raises(ValueError, match=r"no working DoRA for Linear8bitLt on cpu .* nf4_config"):
        lora_config(model, use_dora=True)
    config = lora_config(model)
    config.use_dora = True
    wrapped = get_peft_model(model, config).eval()
    wrapped(**batch("llava15"))
    with pytest.raises(AttributeError):  # once it passes, the refusal above can go
        wrapped(**batch("llava15"))


def test_a_quantized_projector_cannot_be_trained_in_full(tiny_model: Callable[..., Any]) -> None:
    config = nf4_config("llava", compute_dtype=torch.float32)
    config.llm_int8_skip_modules = ["vision_tower", "multi_modal_projector", "lm_head"]  # names instead of paths
    model = tiny_model("llava15", quantization_config=config)
    with pytest.raises(ValueError, match=r"multi_modal_projector\.linear_1.*came out quantized.*nf4_config"):
        lora_config(model, projector="full")


@FAMILIES
def test_config_and_model_type_give_the_same_pattern_as_the_model(
    family: str, tiny_model: Callable[..., Any], tiny_dir: Callable[[str], Path]
) -> None:
    model = tiny_model(family)
    pattern = lora_config(model).target_modules
    assert lora_config(model.config.model_type).target_modules == pattern
    assert lora_config(AutoConfig.from_pretrained(tiny_dir(family))).target_modules == pattern


def test_named_layers_only(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llava15")
    asked: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "parts": ("language", "vision")}
    report = check_adapters(get_peft_model(model, lora_config(model, **asked)), **asked)
    assert {name.rsplit(".", 1)[-1] for name in report.adapted} == {"q_proj", "v_proj"}
    assert report.layers_by_part == {"vision": 4, "language": 4}


def test_settings_reach_the_config(tiny_model: Callable[..., Any]) -> None:
    asked = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.2, "use_dora": True, "use_rslora": True}
    config = lora_config(tiny_model("llava15"), **asked)
    assert {name: getattr(config, name) for name in asked} == asked


def test_a_pooling_head_of_the_tower_is_left_out() -> None:
    """Gemma's tower has one by default, and the language model never sees what it makes."""
    pattern = lora_config("gemma3", parts=("vision",)).target_modules
    assert isinstance(pattern, str)
    assert re.fullmatch(pattern, "model.vision_tower.encoder.layers.0.mlp.fc1")
    assert not re.fullmatch(pattern, "model.vision_tower.head.mlp.fc1")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"r": 0}, "r=0: the rank is at least 1"),
        ({"r": -4, "lora_alpha": 0, "lora_dropout": 1.0}, r"r=-4.*lora_alpha=0.*lora_dropout=1\.0"),
        ({"parts": ("tower",)}, "tower.*language, vision, projector"),
        ({"parts": "language"}, "a tuple of one or more of"),
        ({"parts": ()}, "a tuple of one or more of"),
        ({"projector": "half"}, "'half'.*frozen, full, lora"),
        ({"projector": "full", "parts": ("language", "projector")}, "train it in full or adapt it"),
        ({"target_modules": ["q_proj,", "v_proj"]}, r"\['q_proj,'\].*without comma"),
        ({"target_modules": [" q_proj"]}, "without comma, blank"),
        ({"target_modules": "q_proj,v_proj"}, "a list such as"),
        ({"target_modules": []}, "leave it out for every linear layer"),
        ({"target_modules": ["q_proj", "queries"]}, "'queries' matches no linear layer of language.*'q_proj'"),
        ({"target_modules": ["embed_tokens"]}, "'embed_tokens' matches no linear layer"),
        ({"target_modules": ["gate_proj"], "parts": ("language", "vision")}, "no linear layer .* part 'vision'.*fc1"),
    ],
)
def test_a_setting_that_cannot_be_meant(settings: Any, complaint: str, tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=complaint):
        lora_config(tiny_model("llava15"), **settings)


def test_a_projector_without_a_linear_layer_cannot_be_adapted(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"no linear layer to adapt in part 'projector'.*projector=\"full\""):
        lora_config(tiny_model("gemma3"), projector="lora")


def test_a_model_type_alone_does_not_tell_the_tower_layers_of_llava() -> None:
    with pytest.raises(ValueError, match="pass the loaded model or its config"):
        lora_config("llava", parts=("vision",))
    assert lora_config("qwen2_5_vl", parts=("vision",)).target_modules


def test_dora_on_a_layer_type_that_peft_cannot(tiny_model: Callable[..., Any]) -> None:
    class AwqLinear(nn.Module):
        in_features = out_features = 64

    model = tiny_model("llava15")
    model.model.language_model.layers[0].mlp.up_proj = AwqLinear()
    with pytest.raises(
        ValueError, match=r"no working DoRA for AwqLinear on cpu \(model\.language_model\.layers\.0\.mlp\.up_proj\)"
    ):
        lora_config(model, use_dora=True)
    lora_config(model)


def wrap(model: Any, **settings: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, **settings))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"target_modules": sorted(LANGUAGE)},
            r"6 adapted, not asked for: model\.vision_tower.*3 adapted in a tower layer whose output the model drops",
        ),
        ({"target_modules": ["down_proj,", "o_proj,", "v_proj"]}, r"12 asked for, not adapted.*adapted, not asked for"),
        ({"target_modules": r"model\.language_model\..*_proj", "modules_to_save": ["lm_head"]}, "in full.*: lm_head"),
        ({"target_modules": r"model\.language_model\..*[qv]_proj"}, "10 asked for, not adapted: .*down_proj"),
    ],
)
def test_the_check_says_where_a_hand_written_config_went(
    settings: Any, complaint: str, tiny_model: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_adapters(wrap(tiny_model("llava15"), **settings))


def test_the_check_accepts_a_hand_written_config_that_is_right(tiny_model: Callable[..., Any]) -> None:
    wrapped = wrap(tiny_model("llava15"), target_modules=r"model\.language_model\..*_proj", use_dora=True)
    assert check_adapters(wrapped).dora


def test_the_check_sees_what_else_trains_and_what_does_not(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llava15")
    wrapped = get_peft_model(model, lora_config(model))
    bias = "model.vision_tower.encoder.layers.0.mlp.fc1.bias"
    model.get_parameter(bias).requires_grad_(True)
    with pytest.raises(ValueError, match=f"1 trained outside the adapters: {re.escape(bias)}"):
        check_adapters(wrapped)
    model.get_parameter(bias).requires_grad_(False)
    for parameter in model.model.language_model.layers[1].parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="7 adapted, but frozen: "):
        check_adapters(wrapped)


def test_the_check_sees_a_projector_that_was_not_asked_for_or_is_missing(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("qwen3_vl")
    wrapped = get_peft_model(model, lora_config(model, projector="full"))
    with pytest.raises(ValueError, match=r"trained in full, not asked for: model\.visual\.deepstack_merger_list\.0"):
        check_adapters(wrapped)
    model = tiny_model("qwen3_vl")
    wrapped = get_peft_model(model, lora_config(model))
    with pytest.raises(ValueError, match=r"asked for in full, not trained in full: model\.visual\.deepstack"):
        check_adapters(wrapped, projector="full")


def test_the_check_wants_a_model_with_adapters(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration holds no adapters"):
        check_adapters(tiny_model("llava15"))


def test_dora_on_some_layers_only(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llava15")
    wrapped = get_peft_model(model, lora_config(model, use_dora=True))
    model.model.language_model.layers[0].mlp.up_proj.lora_magnitude_vector.clear()
    with pytest.raises(ValueError, match=r"1 without DoRA, while others have it: .*layers\.0\.mlp\.up_proj"):
        check_adapters(wrapped)
