"""What trains is in a precision that can, and a frozen tower costs no backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TEN
from peft import get_peft_model
from runs import Collate, rows, trainer

from vlm_sft.models.adapters import lora_config
from vlm_sft.models.freezing import cast_trainable_to_fp32, detach_frozen_tower
from vlm_sft.models.loading import load_model
from vlm_sft.models.parts import part_of, parts_of
from vlm_sft.models.quantization import nf4_config
from vlm_sft.tools import tiny

nf4 = partial(nf4_config, compute_dtype=torch.float32)
PROJECTOR: Any = {"projector": "full"}


@pytest.fixture(scope="module")
def batch(tiny_processor: Callable[..., Any]) -> Callable[[str], dict[str, torch.Tensor]]:
    return lambda family: Collate(tiny_processor(family))(list(rows(2).remove_columns("row")))


def test_only_what_trains_is_put_into_float32(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llava15", dtype=torch.float16)
    lora_config(model, PROJECTOR)
    cast_trainable_to_fp32(model)
    for weight in model.parameters():
        assert weight.dtype == (torch.float32 if weight.requires_grad else torch.float16)


def test_a_smolvlm_with_embeddings_in_another_dtype_than_its_tower(
    tiny_model: Callable[..., Any], tiny_processor: Callable[..., Any]
) -> None:
    model = tiny_model("smolvlm", dtype=torch.bfloat16)
    lora_config(model, {"language": "full"})
    with pytest.raises(ValueError, match=r"tower is in torch.bfloat16 and the embeddings in torch.float32.*load_model"):
        cast_trainable_to_fp32(model)
    examples = list(rows(1).remove_columns("row"))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="masked_scatter"):
        model(**Collate(tiny_processor("smolvlm"))(examples))  # once it passes, the refusal above can go
    cast_trainable_to_fp32(model.to(torch.float32))


def test_adapters_that_trl_casts_come_back_to_float32(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llava15", quantization_config=nf4(tiny_model("llava15")), dtype=torch.bfloat16)
    wrapped = get_peft_model(model, lora_config(model))
    for weight in wrapped.parameters():  # as TRL 1.16 does on a quantized base
        if weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16)
    cast_trainable_to_fp32(wrapped)
    assert {weight.dtype for weight in wrapped.parameters() if weight.requires_grad} == {torch.float32}
    assert {weight.dtype for weight in wrapped.parameters() if not weight.requires_grad} == {
        torch.bfloat16,
        torch.uint8,
    }


# -- frozen tower


def spy(model: Any) -> tuple[list[bool], list[str]]:
    """For each pass through an innermost module of the tower: whether its output requires a gradient; its name."""
    requires: list[bool] = []
    passes: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            requires.append(output.requires_grad)
            passes.append(name)

        return hook

    parts = parts_of(model)
    for name, module in model.named_modules():
        innermost = isinstance(module, (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Conv2d, torch.nn.Conv3d))
        if innermost and name != "lm_head" and part_of(name, parts) == "vision":
            module.register_forward_hook(note(name))
    return requires, passes


def gradients(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    """One step with checkpointing, as the Trainer does it."""
    model.train()
    model.enable_input_require_grads()  # TRL
    model.activation_checkpointing_enable()  # the Trainer
    torch.manual_seed(0)
    model(**batch, use_cache=False).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("family", TEN)
def test_a_frozen_tower_is_out_of_autograd_and_the_gradients_are_the_same(
    family: str, tiny_dir: Callable[[str], Path], tiny_model: Callable[..., Any], batch: Callable[[str], Any]
) -> None:
    found = {}
    for name, model in (("ours", load_model(tiny_dir(family))), ("plain", tiny_model(family))):
        torch.manual_seed(0)
        wrapped = get_peft_model(model, lora_config(model, {"language": "lora", "projector": "full"}, lora_dropout=0.1))
        requires, passes = spy(model)
        found[name] = gradients(wrapped, batch(family)), any(requires), max(passes.count(p) for p in passes)
    (ours, in_graph, passes_of_ours), (plain, in_graph_of_plain, passes_of_plain) = found["ours"], found["plain"]
    assert not in_graph
    # Qwen3-VL's tower names its patch embedding in a way that transformers 5.23 does not find.
    assert in_graph_of_plain == (family != "qwen3_vl")
    assert passes_of_plain == (1 if family == "qwen3_vl" else 2) * passes_of_ours
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in ours)
    assert all(gradient.abs().sum() > 0 for name, gradient in ours.items() if "lora_A" not in name)


def test_it_holds_through_a_run_of_the_trainer(
    tiny_dir: Callable[[str], Path], tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    counts = {}
    for name, model in (("ours", load_model(tiny_dir("llava15"))), ("plain", tiny_model("llava15"))):
        requires, passes = spy(model)
        trainer(
            tiny_dir("llava15"),
            tmp_path / name,
            callbacks=(),
            model=model,
            peft_config=lora_config(model),
            activation_checkpointing=True,
            max_steps=2,
            save_strategy="no",
        ).train()
        counts[name] = sum(requires), passes.count("model.vision_tower.encoder.layers.1.mlp.fc1")
    assert counts["ours"] == (0, 2)
    assert counts["plain"][0] > 0
    assert counts["plain"][1] == 4


def test_a_tower_that_trains_stays_in_the_graph(tiny_dir: Callable[[str], Path], batch: Callable[[str], Any]) -> None:
    model = load_model(tiny_dir("qwen2_5_vl"))
    wrapped = get_peft_model(model, lora_config(model, {"language": "lora", "vision": "lora"}))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    requires, _ = spy(model)
    found = gradients(wrapped, batch("qwen2_5_vl"))
    assert any(requires)
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


def test_marking_can_be_undone_and_a_copy_marks_itself(tiny_dir: Callable[[str], Path]) -> None:
    def hooks(of: Any) -> int:
        return sum(len(module._forward_hooks) for module in of.modules())

    model = load_model(tiny_dir("llava15"))
    assert hooks(model) == 0
    for weight in model.parameters():
        weight.requires_grad_(False)
    twin = copy.deepcopy(model)
    twin.enable_input_require_grads()
    twin.enable_input_require_grads()
    assert (hooks(twin), hooks(model)) == (1, 0)
    twin.disable_input_require_grads()
    assert hooks(twin) == 0
    twin.model.vision_tower.requires_grad_(True)
    twin.enable_input_require_grads()
    assert hooks(twin) > 1
    twin.disable_input_require_grads()
    assert hooks(twin) == 0


@pytest.mark.parametrize("trains", ["language", "vision"])
def test_in_a_tower_what_trains_alone_is_in_training_mode(tiny_model: Callable[..., Any], trains: str) -> None:
    model = tiny_model("llava15")
    detach_frozen_tower(model)
    get_peft_model(model, lora_config(model, {trains: "lora"}, lora_dropout=0.1)).train()
    tower = model.model.vision_tower
    weights = {module: [weight.requires_grad for weight in module.parameters()] for module in tower.modules()}
    modes = {module.training for module, those in weights.items() if those and not any(those)}
    assert modes == {False}
    adapting = [module.training for name, module in tower.named_modules() if name.endswith("lora_dropout.default")]
    assert adapting == [True] * len(adapting)
    assert bool(adapting) == tower.training == (trains == "vision")
    assert not any(module.training for module in model.eval().modules())


def test_without_its_parts_a_tower_cannot_be_detached(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava15")[0]
    monkeypatch.setattr(model, "get_decoder", lambda: None)
    with pytest.raises(ValueError, match="it has no language model"):
        detach_frozen_tower(model)
    assert "enable_input_require_grads" not in vars(model)
