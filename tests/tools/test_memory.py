"""The estimate counts what a model has, and agrees with what a run holds where that can be measured on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from together import together
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, TrainerCallback

from vlm_sft.common import on_meta
from vlm_sft.models.adapters import lora_config
from vlm_sft.models.loading import load_model
from vlm_sft.tools import memory, tiny

REST = ("projector", "language", "head")


def nbytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def held(base: Path, output: Path, method: str, options: dict[str, Any]) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer states in this process before the second step."""
    from test_distributed import Settings

    runs.SFTConfig = Settings
    model = load_model(base)
    peft_config = None
    if method == "full":
        lora_config(model, dict.fromkeys(REST, "full"))
    else:
        peft_config = lora_config(model, r=16, lora_alpha=16, lora_dropout=0.0, use_dora=False)
    found: dict[str, int] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                parameters = list(kwargs["model"].parameters())
                states = kwargs["optimizer"].state.values()
                tensors = [value for state_ in states for value in state_.values() if value.ndim]
                found["weights"] = sum(map(nbytes, parameters))
                found["gradients"] = sum(nbytes(p.grad) for p in parameters if p.grad is not None)
                found["optimizer"] = sum(map(nbytes, tensors))

    given = {"model": model, "peft_config": peft_config, "max_steps": 2, "save_strategy": "no"}
    runs.trainer(base, output, callbacks=[Look()], **given, **options).train()
    return found


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parameters_are_counted_as_they_are(family: str, tiny_dir: Any, tiny_model: Any) -> None:
    counted = on_meta(AutoConfig.from_pretrained(tiny_dir(family)))
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (counted, tiny_model(family))]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_gradients_and_optimizer_are_those_of_a_run(
    method: Any, tiny_dir: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_BF16", 4)  # a twin on a CPU is in float32
    base = tiny_dir("llava15")
    found = held(base, tmp_path, method, {})
    expected = memory.estimate(on_meta(AutoConfig.from_pretrained(base)), method=method)
    assert found == {name: expected[name] for name in found}


@pytest.mark.slow
@pytest.mark.loopback
def test_two_processes_hold_what_is_estimated(tiny_dir: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_BF16", 4)
    base = tiny_dir("llava15")
    found = together(held, base, tmp_path, "full", {}, config="cpu_2proc_fsdp2")
    model = on_meta(AutoConfig.from_pretrained(base))
    expected = memory.estimate(model, method="full", gpus=2, strategy="fsdp2")
    for name in ("weights", "gradients", "optimizer"):
        assert [held[name] for held in found] == [pytest.approx(expected[name], rel=0.01)] * 2


def test_packed_weights_take_what_bitsandbytes_takes(tmp_path: Path) -> None:
    """The tables of NF4 and of its scales, 1 kB a layer, weigh only in layers as small as these."""
    base = tiny.save("llava15", tmp_path / "base", hidden_size=256)
    model = load_model(base, load_in_4bit=True)
    packed = [m for m in model.modules() if hasattr(getattr(m, "weight", None), "quant_state")]
    states = [layer.weight.quant_state.as_dict(packed=True).values() for layer in packed]
    found = sum(nbytes(layer.weight) for layer in packed)
    found += sum(nbytes(value) for state in states for value in state if isinstance(value, torch.Tensor))
    config = AutoConfig.from_pretrained(base)
    sizes = [memory.estimate(on_meta(config), method=m, lora_r=0)["weights"] for m in ("lora", "qlora")]
    assert sizes[1] < sizes[0]
    weights = sum(layer.in_features * layer.out_features for layer in packed)
    assert sizes[0] - sizes[1] == pytest.approx(weights * 2 - found, rel=0.05)


@pytest.mark.parametrize(
    ("strategy", "parts"), [("fsdp2", ("weights", "gradients", "optimizer")), ("zero2", ("optimizer",))]
)
def test_more_gpus_share_more(strategy: Any, parts: tuple[str, ...], tiny_dir: Any) -> None:
    model = on_meta(AutoConfig.from_pretrained(tiny_dir("qwen2_5_vl")))
    one, eight = (memory.estimate(model, method="full", gpus=n, strategy=strategy) for n in (1, 8))
    assert all(eight[part] == one[part] / 8 for part in parts)


def test_four_bit_weights_are_not_shared_out_by_deepspeed(tiny_dir: Any) -> None:
    model = on_meta(AutoConfig.from_pretrained(tiny_dir("llava15")))
    with pytest.raises(ValueError, match="take fsdp2"):
        memory.estimate(model, method="qlora", gpus=2, strategy="zero3")


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_the_command_prints() -> None:
    text = (Path(__file__).parents[2] / "docs/scaling.md").read_text("utf-8")
    assert memory.table() in text
