"""Each fault that vlm_sft/upstream.py works round, and each name that is used in place, on a small case.

Red when the name is gone, or the fault.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from runs import Collate, rows, trainer
from safetensors import safe_open
from together import together
from torch.distributed.fsdp._fully_shard import _fsdp_init, _fsdp_param_group
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    masking_utils,
)
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK, FLASH_ATTN_KERNEL_VERSIONS
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from transformers.training_args import OptimizerNames
from trl import SFTTrainer
from trl.trainer import utils as trl_utils

from vlm_sft import RecipeDefaults, load_model, upstream
from vlm_sft.models import hardware
from vlm_sft.models.quantization import nf4_config
from vlm_sft.tools import tiny
from vlm_sft.training.batches import _sampler_of


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


def train_two_steps(base: Path, output: Path, **settings: Any) -> None:
    still = {"eval_strategy": "no", "save_strategy": "no", "eval_on_start": False, "disable_tqdm": True}
    args = RecipeDefaults(str(output), max_length=None, max_steps=2, **still, **settings)
    processor = AutoProcessor.from_pretrained(base)
    given = {"train_dataset": rows(8), "processing_class": processor, "data_collator": Collate(processor)}
    SFTTrainer(load_model(base), args, **given).train()


def gathered(base: Path, output: Path, checkpointing: bool) -> int:
    """How often a layer or the rest of the model is gathered in two steps."""
    calls: list[int] = []
    plain = _fsdp_param_group.foreach_all_gather
    _fsdp_param_group.foreach_all_gather = lambda *given: (calls.append(1), plain(*given))[1]
    train_two_steps(base, output, activation_checkpointing=checkpointing)
    return len(calls)


@pytest.mark.slow
@pytest.mark.loopback
@pytest.mark.sweep
def test_fsdp2_gathers_no_layer_twice_for_checkpointing(tiny_dir: Any, tmp_path: Path) -> None:
    """Of FSDP's first version transformers 5.23 still warns that `activation_checkpointing` gathers once more than
    FSDP's own; under the second, which the configs take, it does not, so recipes have one flag for all launches."""
    with_it, without = (
        together(gathered, tiny_dir("llava15"), tmp_path, on, config="cpu_2proc_fsdp2") for on in (True, False)
    )
    assert with_it == without
    assert with_it[0] > 10


def step_with(base: Path, output: Path, optim: str) -> None:
    hardware.is_bitsandbytes_optimizer = lambda name: False
    train_two_steps(base, output, optim=optim)


@pytest.mark.slow
@pytest.mark.loopback
def test_an_optimizer_of_bitsandbytes_cannot_step_sharded_weights(tiny_dir: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"bitsandbytes\.\w+.*sharding strategy"):
        together(step_with, tiny_dir("llava15"), tmp_path, "lion_32bit", config="cpu_2proc_fsdp2")


def test_optimizers_of_bitsandbytes_are_known_by_name(tmp_path: Path) -> None:
    found = set()
    for name in OptimizerNames:
        with contextlib.suppress(ValueError, ImportError):  # not installed, or of a model
            args = TrainingArguments(str(tmp_path), optim=name, use_cpu=True, report_to="none")
            if Trainer.get_optimizer_cls_and_kwargs(args)[0].__module__.startswith("bitsandbytes"):
                found.add(name.value)
    assert found == {name.value for name in OptimizerNames if upstream.is_bitsandbytes_optimizer(name.value)}
    assert {"lion_32bit", "paged_adamw_32bit", "adamw_8bit"} <= found


def test_the_scales_of_packed_weights_move_with_them(tiny_model: Callable[..., Any]) -> None:
    """A 4-bit model is read onto the CPU for FSDP2, which moves each weight by `weight.data = weight.to(device)` to the
    GPU before it is split."""
    assert "tensor.data = tensor.to(device)" in inspect.getsource(_fsdp_init._move_states_to_device)
    layer = nf4(tiny_model).model.language_model.layers[0].mlp.up_proj
    state = layer.weight.quant_state
    moved = layer.weight.to("meta")
    assert moved.quant_state is state is layer.quant_state
    assert {t.device.type for t in (state.absmax, state.code, state.offset, state.state2.absmax)} == {"meta"}


def test_transformers_fetches_a_third_flash_attention_that_is_made_to_serve() -> None:
    third = FLASH_ATTN_KERNEL_FALLBACK["flash_attention_3"]
    assert third == "kernels-community/vllm-flash-attn3"
    assert FLASH_ATTN_KERNEL_VERSIONS.keys() >= {third, "kernels-community/flash-attn3"}
    assert LlavaForConditionalGeneration._supports_flash_attn


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


def test_trl_scores_all_positions_on_a_cpu(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses and gradients from the positions with a label; also where a batch has none."""
    monkeypatch.setattr(trl_utils, "_use_triton", trl_utils._use_triton)  # put back, whatever it was
    scored = []
    function = trl_utils._ChunkedLogProbFunction
    given = function.apply
    monkeypatch.setattr(function, "apply", lambda hidden, *rest: scored.append(len(hidden)) or given(hidden, *rest))
    ids = torch.randint(5, 90, (3, 40), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(40) > torch.tensor([[30], [20], [38]]), ids, -100)
    found = []
    for patched in (False, True):
        upstream.score_labelled_positions(patched)
        for of in (labels, torch.full_like(labels, -100)):
            model = tiny_model("llava15")
            trl_utils.add_fused_lm_head(model)
            out = model(input_ids=ids, labels=of, fused_lm_head=True)
            (-out.log_probs.sum()).backward()
            found.append([out.log_probs.detach(), *(weight.grad for weight in model.parameters())])
    trained = int((labels[:, 1:] != -100).sum())
    assert scored == [3 * 39, 3 * 39, trained, 0]
    for before, after in zip(found[:2], found[2:], strict=True):
        for one, other in zip(before, after, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, rtol=1e-5, atol=1e-7)


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


def test_transformers_saves_a_model_under_other_names(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    def saved(folder: Path) -> set[str]:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            return set(file.keys())

    model = tiny_model("llava15")
    model.save_pretrained(tmp_path / "hub")
    assert not saved(tmp_path / "hub") & set(model.state_dict())
    upstream.save_with_own_names(model, tmp_path / "checkpoint-1", max_shard_size="1GB")
    assert saved(tmp_path / "checkpoint-1") == set(model.state_dict())
    upstream.save_with_own_names(model, tmp_path / "final")
    assert saved(tmp_path / "final") == saved(tmp_path / "hub")


# -- what other modules use in place


def sampler_of(run: Any) -> Any:
    return _sampler_of(run.get_train_dataloader())


@pytest.mark.parametrize("accumulated", [1, 2])
def test_rows_of_one_length_come_in_an_order_of_the_global_random_state(
    accumulated: int, tiny_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    options = {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": accumulated}
    data = rows(12).add_column("length", [*range(12)])
    sampler = sampler_of(trainer(tiny_dir("llava15"), tmp_path, callbacks=(), dataset=data, **options))
    assert isinstance(sampler, LengthGroupedSampler)
    assert (sampler.generator, [*sampler.lengths], sampler.batch_size % 2) == (None, [*range(12)], 0)

    def orders() -> list[list[int]]:
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append([*sampler])
        return found

    assert len(set(map(tuple, orders()))) == 2  # once it is 1, GroupByLength can go
    sampler.lengths, found = [12 - length for length in sampler.lengths], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        sampler.generator = torch.Generator().manual_seed(0)
        found.append([*sampler])
    assert found[0] == found[1]
    assert found[0][0] == 0  # the longest comes first


def test_a_rebalanced_order_comes_from_seed_and_epoch(tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    data = rows(12).add_column("length", [7] * 12)
    options = {"train_sampling_strategy": "batch_rebalance", "callbacks": ()}
    sampler = sampler_of(trainer(tiny_dir("llava15"), tmp_path, dataset=data, **options))
    assert isinstance(sampler, BatchRebalanceSampler)
    found = {}
    for seed, epoch in ((0, 0), (0, 1), (5, 0)):
        sampler.seed = seed
        sampler.set_epoch(epoch)
        found[seed, epoch] = str([*sampler])
        assert found[seed, epoch] == str([*sampler])
    assert len({*found.values()}) == 3


def test_the_trainer_calls_what_is_not_an_optimizer_class(tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    asked: list[Any] = []

    def make(model: Any, **settings: Any) -> torch.optim.Optimizer:
        asked.append((model, settings))
        return torch.optim.SGD(model.parameters())

    run = trainer(tiny_dir("llava15"), tmp_path, callbacks=())
    run.optimizer_cls_and_kwargs = lambda: make, {"some": 1}
    assert type(run.create_optimizer()) is torch.optim.SGD
    assert asked == [(run.model, {"some": 1})]


def test_weight_decay_is_asked_of_the_model_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    assert Trainer.get_decay_parameter_names(None, model) == ["0.weight"]  # type: ignore[arg-type]


def test_trl_reports_the_log_probability_of_each_token(
    tiny_dir: Callable[[str], Path], tiny_processor: Callable[..., Any], tmp_path: Path
) -> None:
    run = trainer(tiny_dir("llava15"), tmp_path, callbacks=())
    batch = Collate(tiny_processor("llava15"))(list(rows(2).remove_columns("row")))
    found = []
    run.model.register_forward_hook(lambda module, inputs, output: found.append(output.log_probs.shape))
    run.compute_loss(run.model.train(), batch)
    count, width = batch["input_ids"].shape
    assert found == [(count, width - 1)]


def test_a_dataset_is_known_again_by_its_fingerprint() -> None:
    data = rows(3)
    assert data._fingerprint == copy.deepcopy(data)._fingerprint
    others = [data.select([1, 0]), data.add_column("length", [1, 2, 3]), data.with_transform(dict), rows(4)]
    assert len({data._fingerprint, *(other._fingerprint for other in others)}) == 5


def test_callbacks_run_in_the_order_of_a_list_and_evaluate_before_they_save(
    tiny_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    seen: list[str] = []

    class Note(TrainerCallback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_evaluate(self, *_: Any, **__: Any) -> None:
            seen.append(f"{self.name} evaluate")

        def on_save(self, *_: Any, **__: Any) -> None:
            seen.append(f"{self.name} save")

    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 1}
    notes = [Note("a"), Note("b")]
    run = trainer(tiny_dir("llava15"), tmp_path, callbacks=notes, eval_dataset=rows(1), **options)
    run.callback_handler.callbacks.insert(0, Note("first"))
    run.train()
    assert seen == [f"{name} {event}" for event in ("evaluate", "save") for name in ("first", "a", "b")]


# -- families


@pytest.fixture(scope="module")
def twin_of() -> Callable[[str], Any]:
    return lambda name: families.build(name)[0]


def test_peft_adapts_other_layers_of_some_mixtures(twin_of: Callable[[str], Any]) -> None:
    model = twin_of("glm4v_moe")
    attention = r"model\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj"
    dense = r"model\.language_model\.layers\.0\.mlp\.(gate|up|down)_proj"
    assert len(upstream.targets_of(LoraConfig(target_modules=attention), model)) == 8
    config = LoraConfig(target_modules=f"{attention}|{dense}")
    asked = {name for name, _ in model.named_modules() if re.fullmatch(f"{attention}|{dense}", name)}
    assert upstream.targets_of(config, model) != asked
    assert config.target_modules == f"{attention}|{dense}"
    with pytest.warns(RuntimeWarning, match="did not match any targeted module"):
        wrapped = get_peft_model(model, config)
    adapted = {name for name, module in wrapped.named_modules() if isinstance(module, LoraLayer)}
    assert not any(name.endswith(".0.mlp.up_proj") for name in adapted)


def test_peft_loses_the_adapters_of_some_families(twin_of: Callable[[str], Any], tmp_path: Path) -> None:
    config = LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    model = get_peft_model(twin_of("deepseek_ocr2"), config)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        again = PeftModel.from_pretrained(twin_of("deepseek_ocr2"), str(tmp_path))
    states = [get_peft_model_state_dict(each) for each in (model, again)]
    assert states[0].keys() == states[1].keys()
    assert not any(torch.equal(states[0][name], states[1][name]) for name in states[0] if "lora_B" in name)
    assert upstream.restore_adapter(again, tmp_path / "adapter_model.safetensors") == (set(), set())
    found = get_peft_model_state_dict(again)
    assert all(torch.equal(found[name], weight) for name, weight in states[0].items())


def test_hunyuan_numbers_the_images_of_a_batch_through(twin_of: Callable[[str], Any]) -> None:
    model = twin_of("hunyuan_vl")
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    types = torch.tensor([[0, *[1] * 6, 0]] * 2)  # two rows of two squares, each with its separator
    given = {"input_ids": types, "mm_token_type_ids": types, "image_grid_thw": grid}
    positions, _ = model.model.get_rope_index(**given, attention_mask=torch.ones_like(types))
    assert not torch.equal(positions[:, 0], positions[:, 1])
    upstream.number_images_by_row(model)
    positions, deltas = model.model.get_rope_index(**given, attention_mask=torch.ones_like(types))
    assert torch.equal(positions[:, 0], positions[:, 1])
    assert deltas.shape == (2, 1)


def test_flash_attention_takes_no_mask_of_images() -> None:
    """Its mask is that of padding, whatever else is asked for."""
    made = inspect.signature(masking_utils.flash_attention_mask).parameters
    assert "mask_function" in made
    assert "mask_function(" not in inspect.getsource(masking_utils.flash_attention_mask)


def test_trl_knows_the_number_of_experts_by_one_name() -> None:
    assert "text_config.num_experts" in inspect.getsource(trl_utils.add_fused_lm_head)
