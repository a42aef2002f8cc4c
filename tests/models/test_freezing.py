"""What trains is what was asked, part by part, in a precision that can train; and the table says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import get_peft_model
from runs import Collate, rows

from vlm_sft.models.adapters import lora_config
from vlm_sft.models.freezing import check_precision, check_trainable, freeze, parameter_table, upcast_trainable
from vlm_sft.models.parts import PARTS, part_of, parts_of
from vlm_sft.models.quantization import int8_config, nf4_config
from vlm_sft.tools import tiny

nf4 = partial(nf4_config, compute_dtype=torch.float32)
ASKED = [("projector",), ("projector", "language", "head"), ("vision",)]


@pytest.mark.parametrize("train", ASKED, ids="+".join)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_named_parts_train_and_no_others(
    family: str, train: tuple[str, ...], tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(family)
    freeze(model, train=train)
    parts = parts_of(model)
    for name, weight in model.named_parameters():
        assert weight.requires_grad == (part_of(name, parts) in train), name
    assert check_trainable(model, train=train) == parameter_table(model)
    freeze(model, train=("head",) if family not in ("gemma3", "internvl") else ("language",))
    with pytest.raises(ValueError, match=r"parameters of other parts train \(.*call freeze"):
        check_trainable(model, train=("vision",))
    freeze(model, train=("projector",))
    with pytest.raises(ValueError, match=r"but 0 parameters of other parts train \(none\) and \d+ of these do not \("):
        check_trainable(model, train=("projector", "vision"))


def test_the_table(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llava15", quantization_config=nf4("llava"), dtype=torch.bfloat16)
    freeze(model, train=("projector",))
    lines = parameter_table(model).splitlines()
    assert lines[0].split() == ["part", "parameters", "trainable", "quantized", "dtypes"]
    table = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert table.keys() == {*PARTS, "total"}
    plain = tiny_model("llava15")
    parts = parts_of(plain)
    for part in PARTS:
        size = sum(weight.numel() for name, weight in plain.named_parameters() if part_of(name, parts) == part)
        assert table[part][0] == f"{size:,}"  # packed weights count as what they stand for
        assert table[part][1] == (f"{size:,}" if part == "projector" else "0")
    linears = sum(w.numel() for n, w in plain.named_parameters() if "language_model.layers" in n and w.ndim == 2)
    assert table["language"][2:] == [f"{linears:,}", "bfloat16,", "uint8"]
    assert table["vision"][2:] == ["0", "bfloat16"]
    assert table["total"][0] == f"{plain.num_parameters():,}"


def test_adapters_count_to_the_part_they_lie_in(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llava15")
    wrapped = get_peft_model(model, lora_config(model))
    size = sum(weight.numel() for weight in wrapped.parameters() if weight.requires_grad)
    table = {line.split()[0]: line.split()[2] for line in parameter_table(wrapped).splitlines()}
    assert table["language"] == table["total"] == f"{size:,}"


@pytest.mark.parametrize("train", [("tower",), (), "projector", ("projector", "adapter")])
def test_a_part_that_does_not_exist(train: Any, tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="one or more of vision, projector, language, head"):
        freeze(tiny_model("llava15"), train=train)


def test_a_head_that_shares_the_embedding_trains_with_the_language_model(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gemma3")
    with pytest.raises(ValueError, match=r"head has no parameters of its own.*trains with 'language'"):
        freeze(model, train=("head",))
    freeze(model, train=("language", "head"))
    assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize("pack", [nf4, partial(nf4, storage_dtype=torch.bfloat16), int8_config])
def test_quantized_weights_cannot_train(pack: Callable[..., Any], tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llava15", quantization_config=pack("llava"))
    with pytest.raises(ValueError, match=r"14 of these weights are quantized.*no --load_in_4bit"):
        freeze(model, train=("projector", "language"))
    freeze(model, train=("projector",))


def test_a_model_with_adapters_is_not_frozen(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llava15")
    with pytest.raises(ValueError, match="give lora_config parts= and projector="):
        freeze(get_peft_model(model, lora_config(model)))


def test_only_what_trains_is_put_into_float32(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llava15", dtype=torch.float16)
    freeze(model, train=("projector",))
    upcast_trainable(model)
    for weight in model.parameters():
        assert weight.dtype == (torch.float32 if weight.requires_grad else torch.float16)


@pytest.mark.parametrize(
    ("dtype", "fp16", "verdict"),
    [
        (torch.float16, True, "refused"),
        (torch.float16, False, "refused"),
        (torch.bfloat16, True, "refused"),
        (torch.bfloat16, False, "warned of"),
        (torch.float32, True, "right"),
        (torch.float32, False, "right"),
    ],
)
def test_a_precision_that_cannot_train(
    dtype: torch.dtype, fp16: bool, verdict: str, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model("llava15", dtype=dtype)
    freeze(model, train=("projector",))
    if verdict == "refused":
        with pytest.raises(ValueError, match=r"4 in b?float16 \(.*upcast_trainable"):
            check_precision(model, fp16=fp16)
        upcast_trainable(model)
    if verdict == "warned of":
        with pytest.warns(UserWarning, match="4 weights outside adapters train in bfloat16"):
            check_precision(model, fp16=fp16)
        upcast_trainable(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_precision(model, fp16=fp16)


def test_a_smolvlm_with_embeddings_in_another_dtype_than_its_tower(
    tiny_model: Callable[..., Any], tiny_processor: Callable[..., Any]
) -> None:
    model = tiny_model("smolvlm", dtype=torch.bfloat16)
    freeze(model, train=("language",))
    upcast_trainable(model)
    with pytest.raises(ValueError, match=r"tower is in torch.bfloat16 and the embeddings in torch.float32.*load_model"):
        check_precision(model, fp16=False)
    batch = Collate(tiny_processor("smolvlm"))(list(rows(1).remove_columns("row")))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="masked_scatter"):
        model(**batch)  # once it passes, the refusal above can go
    model.to(torch.float32)
    check_precision(model, fp16=False)


def test_adapters_in_bfloat16_are_fine_unless_a_scaler_has_to_unscale_them(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llava15", quantization_config=nf4("llava"), dtype=torch.bfloat16)
    wrapped = get_peft_model(model, lora_config(model))
    for weight in wrapped.parameters():  # as TRL 1.16 does on a quantized base
        if weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_precision(wrapped, fp16=False)
    with pytest.raises(ValueError, match="28 in bfloat16"):
        check_precision(wrapped, fp16=True)
    upcast_trainable(wrapped)
    check_precision(wrapped, fp16=True)
