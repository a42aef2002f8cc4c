"""Each fault that vlm_sft/upstream.py works round, shown on a small case: red when the name, or the fault, is gone."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from runs import Collate, rows
from safetensors import safe_open
from together import together
from transformers import AutoConfig, TrainingArguments
from trl.trainer import utils as trl_utils

from vlm_sft import upstream
from vlm_sft.models.quantization import nf4_config
from vlm_sft.tools import tiny


def nf4(tiny_model: Callable[..., Any]) -> Any:
    config = nf4_config(tiny_model("llava15"), compute_dtype=torch.float32)
    return tiny_model("llava15", quantization_config=config)


# -- FSDP


@pytest.mark.parametrize(("value", "sharded"), [(None, False), ("", False), ("false", False), ("true", True)])
def test_a_launch_with_fsdp_sets_the_variable(
    value: str | None, sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    if value is not None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", value)
    assert upstream.is_sharded() == sharded


def kinds() -> tuple[str, str, str]:
    """What a process takes its run for: as launched, as accelerate settles it, and after `shard_on_cpu`."""
    assert upstream.is_sharded()
    plain = Accelerator(cpu=True).distributed_type
    AcceleratorState._reset_state()
    args = SimpleNamespace(use_cpu=True, accelerator_config=None)
    upstream.shard_on_cpu(args)  # type: ignore[arg-type]
    assert args.accelerator_config == {"use_configured_state": True}
    return os.environ["ACCELERATE_USE_FSDP"], str(plain), str(Accelerator().distributed_type)


@pytest.mark.slow
@pytest.mark.loopback
def test_accelerate_does_not_shard_on_cpus() -> None:
    found = together(kinds, config="cpu_2proc_fsdp2", limit_s=120)
    assert found == [("true", str(DistributedType.MULTI_CPU), str(DistributedType.FSDP))] * 2


def test_any_other_run_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    before, kind = copy.deepcopy(args.accelerator_config), PartialState().distributed_type
    upstream.shard_on_cpu(args)
    assert (str(args.accelerator_config), PartialState().distributed_type) == (str(before), kind)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_names_the_layers_it_has(family: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(family)
    upstream.name_own_layers(model)
    kinds = [type(module).__name__ for module in model.modules()]
    assert all(name in kinds for name in model._no_split_modules)
    assert any(kinds.count(name) >= 2 and "Decoder" in name for name in model._no_split_modules)


def test_accelerate_refuses_layers_that_a_model_names_and_has_not(tiny_model: Callable[..., Any]) -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    model = tiny_model("llava15")
    with pytest.raises(ValueError, match="Could not find the transformer layer class CLIP"):
        fsdp2_prepare_auto_wrap_policy(plugin, model)
    upstream.name_own_layers(model)
    assert fsdp2_prepare_auto_wrap_policy(plugin, model)(model.model.language_model.layers[0])


def test_trl_reads_the_head_past_fsdp() -> None:
    """The gradient of one process for that of all: tests/test_distributed.py compares whole runs."""
    assert inspect.getsource(trl_utils).count("weight = weight.full_tensor()") == 1


def test_the_head_is_gathered_before_it_is_read(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llava15")
    gathered = []
    monkeypatch.setattr(upstream, "FSDPModule", torch.nn.Linear)
    monkeypatch.setattr(model.lm_head, "unshard", lambda: gathered.append(1), raising=False)
    upstream.gather_head(model)
    ids = torch.tensor([[1, 5, 6]])
    model(input_ids=ids)
    assert gathered == [1]
    with torch.no_grad():
        model(input_ids=ids)
    assert gathered == [1]
    copied = copy.deepcopy(model)
    copied.lm_head.unshard = lambda: gathered.append(2)
    copied(input_ids=ids)
    assert gathered == [1, 2]


def test_bitsandbytes_lists_the_scales_of_a_weight_in_the_state(tiny_model: Callable[..., Any]) -> None:
    model = nf4(tiny_model)
    names = {name for name, _ in model.named_parameters()}
    scales = {name for name in model.state_dict() if name.startswith(tuple(f"{own}." for own in names))}
    assert len(scales) > 14
    upstream.leave_out_scales(model)
    assert set(model.state_dict()) & names == names
    assert not set(model.state_dict()) & scales


@pytest.mark.parametrize("launched", ["", "true"])
def test_a_model_is_fitted_to_shards_where_it_will_be_sharded(
    launched: str, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", launched)
    model = nf4(tiny_model)
    hooks = len(model.base_model._forward_hooks)
    upstream.fit_to_shards(model)
    assert not any("CLIPText" in name for name in model._no_split_modules)
    assert len(model.base_model._forward_hooks) - hooks == bool(launched)
    assert any(".absmax" in name for name in model.state_dict()) == (not launched)


# -- weights


@pytest.mark.parametrize("kept", [False, True])
def test_bitsandbytes_packs_weights_again_in_an_evaluation(
    kept: bool, tiny_model: Callable[..., Any], tiny_processor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = nf4(tiny_model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True  # the fixture has kept them already
    if kept:
        upstream.keep_packing(model)
    before = {name: value.clone() for name, value in model.named_parameters()}
    batch = Collate(tiny_processor("llava15"))(list(rows(1).remove_columns("row")))
    with torch.no_grad():
        model.eval()(**batch)
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert bool(changed) != kept


def test_transformers_keeps_no_commit_in_the_config(tiny_dir: Callable[[str], Path]) -> None:
    class Resolved(str):
        resolved = "0123456789abcdef"

    config = AutoConfig.from_pretrained(tiny_dir("llava15"))
    assert not hasattr(config, "_commit_hash")
    assert upstream.commit_of(config) is None
    upstream.set_commit(config, Resolved("v1"))
    assert upstream.commit_of(config) == upstream.commit_of(copy.deepcopy(config)) == "0123456789abcdef"
    assert "0123456789abcdef" not in config.to_json_string()
    upstream.set_commit(config, "v2")
    assert upstream.commit_of(config) == "v2"


def test_transformers_saves_a_model_under_other_names(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    def saved(folder: Path) -> set[str]:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            return set(file.keys())

    model = tiny_model("llava15")
    model.save_pretrained(tmp_path / "hub")
    assert not saved(tmp_path / "hub") & set(model.state_dict())
    upstream.save_with_own_names(model, tmp_path / "own", max_shard_size="1GB")
    assert saved(tmp_path / "own") == set(model.state_dict())
