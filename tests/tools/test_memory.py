"""The estimate counts what a model has, and agrees with what a run holds where that can be measured on a CPU."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from peft import LoraConfig, get_peft_model
from proven import pieces
from together import together
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModel, TrainerCallback

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


def test_bitsandbytes_does_not_step_what_fsdp_shards(tiny_dir: Any) -> None:
    model = on_meta(AutoConfig.from_pretrained(tiny_dir("llava15")))
    with pytest.raises(ValueError, match="bitsandbytes steps no sharded weights"):
        memory.estimate(model, method="lora", gpus=2, strategy="fsdp2", optimizer="adamw_8bit")


SETTINGS = [(None, 0.0, False), (4, 0.0, False), (4, 0.05, False), (4, 0.0, True), (4, 0.05, True)]


@pytest.mark.parametrize(("lora_r", "dropout", "dora"), SETTINGS)
def test_a_layer_keeps_what_autograd_keeps_of_a_real_one(
    lora_r: int | None, dropout: float, dora: bool, tiny_model: Any
) -> None:
    """In bfloat16 by autocast on a CPU, all of whose weights count as they come: of a model of two layers, of one."""
    rows, tokens, found = 2, 96, []
    adapters = LoraConfig(r=lora_r, lora_dropout=dropout, use_dora=dora) if lora_r else None
    model = tiny_model("llava15")
    for count in (1, 2):
        config = copy.deepcopy(model.get_decoder().config)
        config.num_hidden_layers = count
        decoder: Any = AutoModel.from_config(config, dtype=torch.bfloat16).requires_grad_(False).train()
        if adapters is not None:
            adapters.target_modules = [n for n, m in decoder.named_modules() if isinstance(m, torch.nn.Linear)]
            decoder = get_peft_model(decoder, adapters, autocast_adapter_dtype=False).to(torch.bfloat16)
        own = {weight.data_ptr() for weight in decoder.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, own: set[int] = own, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            given = torch.rand(rows, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
            decoder(inputs_embeds=given, use_cache=False)
        found.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
    expected = memory._kept(model, rows, tokens, adapters, trains=False)
    assert expected == pytest.approx(found[1] - found[0], rel=0.1)


def test_what_costs_more_is_said_to_cost_more(tiny_dir: Any) -> None:
    model = on_meta(AutoConfig.from_pretrained(tiny_dir("llava15")))

    def peak(**changed: Any) -> float:
        return memory.estimate(model, **{"method": "qlora", "rows": 4, "tokens": 2048} | changed)["peak"]

    plain = peak()
    for dearer in (
        {"lora_dropout": 0.05},
        {"use_dora": True},
        {"rows": 8},
        {"tokens": 4096},
        {"method": "lora"},
        {"method": "full"},
        {"checkpointing": False},
        {"gpus": 2},
        {"generation_batch_size": 64, "tokens": 4096, "rows": 1},
    ):
        assert peak(**dearer) > plain, dearer
    assert peak(use_dora=True, lora_dropout=0.05) > peak(use_dora=True) > peak(lora_dropout=0.05)
    assert peak(rows=1, generation_batch_size=64) > peak(rows=1, generation_batch_size=32)
    four_bit, full = (
        memory.estimate(model, method=method, gpus=8, strategy="fsdp2")["host"] for method in ("qlora", "full")
    )
    sizes = memory._sizes(model)
    assert full == 4 * (sizes.total() - sizes["vision"])
    assert four_bit > 8 * 0.5 * sizes["language"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "smolvlm", "internvl"])
def test_every_kind_of_model_is_estimated(family: str, tiny_dir: Any) -> None:
    found = memory.estimate(on_meta(AutoConfig.from_pretrained(tiny_dir(family))), method="lora", rows=2, tokens=64)
    assert found["peak"] > found["context"] + found["weights"]
    assert min(found["activations"], found["tower"], found["answers"]) > 0


@pytest.mark.parametrize(("settings", "lora"), [({"load_in_4bit": True}, {"use_dora": True}), ({}, {})])
def test_a_run_on_a_gpu_is_estimated_beside_what_is_free(
    settings: Any, lora: Any, tiny_dir: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pieces(tiny_dir("llava15"), tmp_path, load=settings, lora=lora)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (2 * memory.GIB, 24 * memory.GIB))
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda: memory.GIB)
    said = memory.of_run(run.trainer, 64)
    assert re.fullmatch(r"1\.\d GiB at the peak, estimated \(weights .*\); 4\.0 GiB of 24\.0 are free", said)
    monkeypatch.setattr(memory, "_CONTEXT", 40 * memory.GIB)
    assert "it may not fit: halve the batch" in memory.of_run(run.trainer, 64)


@pytest.mark.slow
def test_the_tables_of_the_documents_are_what_the_program_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    spec: Any = importlib.util.spec_from_file_location("memory_tables", root / "benchmarks/memory.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.methods() in (root / "docs/scaling.md").read_text("utf-8")
    assert tables.cards() in (root / "docs" / "scaling.md").read_text("utf-8")
