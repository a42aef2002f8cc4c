"""Rates by part through the Trainer's own optimizers: the right groups, the right steps, scaled by the scheduler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from runs import Collate, rows
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from vlm_sft.models.adapters import lora_config
from vlm_sft.models.parts import part_of, parts_of
from vlm_sft.training.optim import lr_by_part

OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "sgd",
    "rmsprop",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion_32bit",
    "paged_lion_8bit",
    "ademamix",
    "rmsprop_bnb_8bit",
)


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    usual = {"learning_rate": 1e-3, "weight_decay": 0.1, "use_cpu": True, "report_to": "none", "max_steps": 4}
    return TrainingArguments(str(folder), **usual | settings)


def groups_of(model: Any, args: TrainingArguments, rates: dict[str, float]) -> Any:
    trainer = Trainer(model, args, optimizer_cls_and_kwargs=lr_by_part(args, rates))
    return trainer.create_optimizer()


def test_each_part_has_its_rate_and_the_rest_is_the_trainers_choice(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_model("llava15")
    lora_config(model, {"projector": "full", "language": "full", "head": "full"})
    args = arguments(tmp_path)
    plain = Trainer(model, args).create_optimizer()
    ours = groups_of(model, args, {"projector": 2e-5})
    parts = parts_of(model)
    names = {id(weight): name for name, weight in model.named_parameters()}
    decay_by_trainer = {id(weight): group["weight_decay"] for group in plain.param_groups for weight in group["params"]}
    seen = []
    for group in ours.param_groups:
        for weight in group["params"]:
            part = part_of(names[id(weight)], parts)
            assert group["part"] == part
            assert group["lr"] == (2e-5 if part == "projector" else 1e-3)
            assert group["weight_decay"] == decay_by_trainer[id(weight)]
            seen.append(id(weight))
    assert sorted(seen) == sorted(decay_by_trainer)
    assert ours.param_groups[0]["lr"] == 1e-3  # the one that is logged
    assert type(ours) is type(plain)


def test_without_rates_the_groups_hold_what_the_trainers_hold(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("qwen2_5_vl")
    args = arguments(tmp_path)

    def held(optimizer: Any) -> set[tuple[int, float, float]]:
        return {
            (id(w), group["lr"], group["weight_decay"]) for group in optimizer.param_groups for w in group["params"]
        }

    assert held(groups_of(model, args, {})) == held(Trainer(model, args).create_optimizer())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_every_optimizer_name_works_and_the_scheduler_scales_every_group(
    name: str, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_model("llava15")
    lora_config(model, {"projector": "full", "language": "full"})
    args = arguments(tmp_path, optim=name, lr_scheduler_type="linear", warmup_steps=0)
    trainer = Trainer(model, args, optimizer_cls_and_kwargs=lr_by_part(args, {"projector": 1e-2}))
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    assert type(trainer.optimizer) is Trainer.get_optimizer_cls_and_kwargs(args, model)[0]
    before = {n: weight.clone() for n, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    assert {group["part"]: group["lr"] for group in trainer.optimizer.param_groups} == pytest.approx(
        {"projector": 0.75e-2, "language": 0.75e-3}
    )
    moved = {n for n, weight in model.named_parameters() if not torch.equal(weight, before[n])}
    assert moved == {n for n, weight in model.named_parameters() if weight.requires_grad}
    state = trainer.optimizer.state_dict()
    again = groups_of(model, args, {"projector": 1e-2})
    again.load_state_dict(state)
    assert [group["lr"] for group in again.param_groups] == [group["lr"] for group in trainer.optimizer.param_groups]


def test_8_bit_states_leave_embeddings_in_32_bit(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("llava15")
    optimizer = groups_of(model, arguments(tmp_path, optim="adamw_8bit"), {"projector": 1e-4})
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    embedding = model.get_input_embeddings().weight
    assert embedding.numel() > 4096  # below, bitsandbytes keeps 32 bit anyway
    assert optimizer.state[embedding]["state1"].dtype == torch.float32
    assert optimizer.state[model.lm_head.weight]["state1"].dtype == torch.uint8


def test_a_run_with_adapters_and_a_projector_at_its_own_rate(
    tiny_dir: Callable[[str], Path],
    tiny_model: Callable[..., Any],
    tiny_processor: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model = tiny_model("llava15")
    processor = tiny_processor("llava15")
    args = SFTConfig(
        str(tmp_path),
        learning_rate=1e-3,
        max_steps=2,
        activation_checkpointing=True,
        per_device_train_batch_size=2,
        max_length=None,
        remove_unused_columns=False,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=rows(4),
        processing_class=processor,
        data_collator=Collate(processor),
        peft_config=lora_config(model, {"language": "lora", "projector": "full"}),
        optimizer_cls_and_kwargs=lr_by_part(args, {"language": 0.0}),
    )
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if ".multi_modal_projector.modules_to_save." in name}
    assert len(moved) == 4


def test_a_rate_that_cannot_be_meant(tmp_path: Path) -> None:
    complaint = "'tower' is not a part; vision: -1.0 is negative; the parts are vision, projector, language, head"
    with pytest.raises(ValueError, match=complaint):
        lr_by_part(arguments(tmp_path), {"vision": -1.0, "tower": 1e-4})


def test_a_rate_for_a_part_that_is_frozen(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("llava15")
    wrapped = get_peft_model(model, lora_config(model))
    with pytest.raises(ValueError, match="nothing trains in projector"):
        groups_of(wrapped, arguments(tmp_path), {"projector": 1e-4})


def test_an_optimizer_that_makes_its_own_groups(
    tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = staticmethod(lambda args, model: (torch.optim.AdamW, {"params": [{"params": list(model.parameters())}]}))
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", own)
    with pytest.raises(ValueError, match="--optim adamw_torch_fused makes its own parameter groups"):
        groups_of(tiny_model("llava15"), arguments(tmp_path), {"projector": 1e-4})
