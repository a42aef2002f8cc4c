"""The language model of ten families comes out quantized, all of it and nothing else; any other outcome is named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig

from vlm_sft.models import quantization
from vlm_sft.models.parts import part_of, parts_of
from vlm_sft.models.quantization import check_quantized, nf4_config
from vlm_sft.tools import tiny

nf4 = partial(nf4_config, compute_dtype=torch.float32)
LANGUAGE = r"model\.language_model\..*_proj"


def by_hand(model: Any, **settings: Any) -> BitsAndBytesConfig:
    """A config that a user writes, on the language model alone."""
    return BitsAndBytesConfig(**settings, llm_int8_skip_modules=nf4(model).llm_int8_skip_modules)


int8 = partial(by_hand, load_in_8bit=True)


def packed(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}


@pytest.mark.parametrize("pack", [nf4, int8])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_linear_layers_of_the_language_model_and_nothing_else(
    family: str, pack: Callable[..., Any], tiny_model: Callable[..., Any]
) -> None:
    plain = tiny_model(family)
    parts = parts_of(plain)
    asked = {n for n, m in plain.named_modules() if isinstance(m, nn.Linear) and part_of(n, parts) == "language"}
    model = tiny_model(family, quantization_config=pack(plain))
    layers, _ = check_quantized(model)
    assert set(layers) == packed(model).keys() == asked
    for name, weight in plain.named_parameters():
        if name.removesuffix(".weight") not in asked:
            assert torch.equal(model.get_parameter(name), weight), name


def test_the_report_says_how(tiny_model: Callable[..., Any]) -> None:
    _, sentence = check_quantized(tiny_model("llava15", quantization_config=nf4(tiny_model("llava15"))))
    assert sentence == (
        "nf4 with double quantization (compute float32, storage uint8) on 14 linear layers of the language model; "
        "kept in float32: vision 18, projector 2, head 1 linear layers, all norms and embeddings"
    )
    _, sentence = check_quantized(
        tiny_model("llava15", quantization_config=int8(tiny_model("llava15")), dtype=torch.bfloat16)
    )
    assert sentence.startswith("int8 on 14 linear layers of the language model; kept in bfloat16: ")


def test_paths_are_those_of_the_loaded_model_where_the_checkpoint_names_them_differently(
    tiny_dir: Callable[[str], Path], tiny_model: Callable[..., Any]
) -> None:
    with safe_open(tiny_dir("llava15") / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    model = tiny_model("llava15", quantization_config=nf4(tiny_model("llava15")))
    assert not stored & set(model.state_dict())
    check_quantized(model)


@pytest.mark.parametrize("storage", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_type_double_quantization_compute_and_storage_of_a_config_by_hand(
    kind: str, storage: torch.dtype | None, tiny_model: Callable[..., Any]
) -> None:
    double = storage is None
    config = by_hand(
        tiny_model("llava15"),
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=storage,
        bnb_4bit_use_double_quant=double,
    )
    model = tiny_model("llava15", quantization_config=config)
    check_quantized(model)
    for layer in packed(model).values():
        assert layer.weight.quant_state.quant_type == kind
        assert layer.weight.quant_state.nested == double
        assert layer.compute_dtype == torch.bfloat16
        assert layer.weight.dtype == (storage or torch.uint8)


def test_nf4_is_what_qlora_is(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "best_dtype", lambda: torch.bfloat16)
    model = tiny_model("llava15", quantization_config=nf4_config(tiny_model("llava15")))
    assert check_quantized(model)[1].startswith("nf4 with double quantization (compute bfloat16, storage uint8)")


@pytest.mark.parametrize(("launched", "storage"), [("", torch.uint8), ("true", torch.bfloat16)])
def test_packed_weights_are_stored_as_the_launch_needs_them(
    launched: str, storage: torch.dtype, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", launched)
    assert nf4_config(tiny_model("llava15"), compute_dtype=torch.bfloat16).bnb_4bit_quant_storage == storage


def test_a_config_serves_like_the_model(tiny_dir: Callable[[str], Path], tiny_model: Callable[..., Any]) -> None:
    skipped = ["model.visual", "model.visual.merger", "lm_head"]
    folder = tiny_dir("qwen2_5_vl")
    for subject in (AutoConfig.from_pretrained(folder), tiny_model("qwen2_5_vl")):
        assert nf4(subject).llm_int8_skip_modules == skipped


@pytest.mark.parametrize(
    ("skipped", "complaint"),
    [
        (None, r"20 quantized outside the language model: model\.multi_modal_projector\.linear_1"),
        (["vision_tower", "multi_modal_projector", "lm_head"], r"20 quantized outside the language model"),
        (["model.vision_tower", "model.multi_modal_projector"], "1 quantized outside the language model: lm_head"),
        (
            ["model.vision_tower", "model.multi_modal_projector", "lm_head", "down_proj"],
            r"2 language layers left unquantized: model\.language_model\.layers\.0\.mlp\.down_proj, .*'down_proj'\]",
        ),
    ],
)
def test_another_skip_list_is_found_out(skipped: Any, complaint: str, tiny_model: Callable[..., Any]) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
    with pytest.raises(ValueError, match=complaint):
        check_quantized(tiny_model("llava15", quantization_config=config))


@pytest.mark.parametrize(
    ("setting", "value", "complaint"),
    [
        ("bnb_4bit_quant_type", "fp4", r"14 packed differently from the config: .*type nf4 instead of fp4"),
        ("bnb_4bit_use_double_quant", False, "double quantization True instead of False"),
        ("bnb_4bit_compute_dtype", torch.float16, r"compute dtype torch\.float32 instead of torch\.float16"),
        ("bnb_4bit_quant_storage", torch.bfloat16, r"storage dtype torch\.uint8 instead of torch\.bfloat16"),
    ],
)
def test_layers_that_are_packed_differently_from_the_config(
    setting: str, value: Any, complaint: str, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model("llava15", quantization_config=nf4(tiny_model("llava15")))
    setattr(model.config.quantization_config, setting, value)
    with pytest.raises(ValueError, match=complaint):
        check_quantized(model)


def test_adapters_on_top_change_nothing(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llava15", quantization_config=nf4(tiny_model("llava15")))
    before, _ = check_quantized(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=LANGUAGE, use_dora=True))
    assert len(check_quantized(wrapped)[0]) == len(before) == 14


def test_a_model_that_is_not_quantized(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="no bitsandbytes config; load it with load_model"):
        check_quantized(tiny_model("llava15"))


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16"])
def test_a_compute_dtype_that_is_not_a_float(dtype: Any, tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"compute_dtype=.*a float dtype such as torch\.bfloat16"):
        nf4_config(tiny_model("llava15"), compute_dtype=dtype)


@pytest.mark.parametrize(
    ("subject", "complaint"),
    [
        ("llava", "str is not a model of transformers"),
        (AutoConfig.for_model("llama"), "No vision-language model takes this 'llama' config"),
        (AutoConfig.for_model("git"), r"The parts of Git\w+ \(git\) cannot be told"),
    ],
)
def test_a_model_whose_parts_cannot_be_told(subject: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        nf4(subject)


def test_without_bitsandbytes(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        nf4(tiny_model("llava15"))


@pytest.mark.slow
def test_the_package_imports_without_bitsandbytes() -> None:
    script = """
import sys

sys.modules["bitsandbytes"] = None
import torch
import vlm_sft
from trl import SFTTrainer

try:
    vlm_sft.nf4_config("llava", compute_dtype=torch.float32)
except ImportError as error:
    print(error)
"""
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    assert "pip install bitsandbytes" in told
