"""A learning rate for each part, through the Trainer's own optimizers.

LLaVA's `mm_projector_lr`: stage 2 trains the projector at another rate than the language model (arXiv 2310.03744)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from vlm_sft.models.parts import PARTS, part_of, parts_of


def lr_by_part(args: TrainingArguments, learning_rates: Mapping[str, float]) -> tuple[Any, dict[str, Any]]:
    """What to pass as `optimizer_cls_and_kwargs=`, so that the named parts train at learning rates of their own.

        trainer = SFTTrainer(..., optimizer_cls_and_kwargs=lr_by_part(args, {"projector": 2e-5}))

    The optimizer is the one that `args.optim` names. A part that is not named has `args.learning_rate`, which is logged
    where any part keeps it; biases and norms have no weight decay; the scheduler scales every group from its own rate.

    Raises ValueError for an unknown part, a negative rate, and, when training starts, for a part that trains nothing
    and an optimizer that makes its own groups (GaLore, Apollo, LOMO, Muon)."""
    rates = dict(learning_rates)
    faults = [f"{part!r} is not a part" for part in rates if part not in PARTS]
    faults += [f"{part}: {rate} is negative" for part, rate in rates.items() if rate < 0]
    if faults:
        raise ValueError(f"lr_by_part: {'; '.join(sorted(faults))}; the parts are {', '.join(PARTS)}")
    # What is not an optimizer class the Trainer calls, for what makes the optimizer of the model it is about to train:
    # only then are adapters in place and parameters final.
    return lambda: partial(_build, args=args), {"lr_by_part": rates}


def _build(model: nn.Module, *, args: TrainingArguments, lr_by_part: dict[str, float]) -> torch.optim.Optimizer:
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(args, cast(Any, model))
    if not isinstance(optimizer_class, type) or {"params", "model", "optimizer_dict"} & settings.keys():
        name = getattr(args.optim, "value", args.optim)
        raise ValueError(f"--optim {name} makes its own parameter groups; choose another one for lr_by_part")
    optimizer: torch.optim.Optimizer = optimizer_class(_groups(model, args, lr_by_part), **settings)
    if settings.get("optim_bits") == 8:  # unstable for embeddings: the Trainer does so for optimizers that it makes
        from bitsandbytes.optim.optimizer import GlobalOptimManager

        manager: Any = GlobalOptimManager.get_instance()  # type: ignore[no-untyped-call]
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def _groups(model: nn.Module, args: TrainingArguments, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """One group for each part, with and without decay."""
    decaying = set(Trainer.get_decay_parameter_names(cast(Trainer, None), model))
    parts = parts_of(model)
    members: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[part_of(name, parts), name in decaying].append(parameter)
    if idle := rates.keys() - {part for part, _ in members}:
        raise ValueError(f"lr_by_part: nothing trains in {', '.join(sorted(idle))}; drop its rate, or train the part")
    return [
        {
            "params": members[part, decays],
            "lr": rates.get(part, args.learning_rate),
            "weight_decay": args.weight_decay if decays else 0.0,
            "part": part,
        }
        for part in sorted(PARTS, key=rates.__contains__)  # so that the rate of the first, logged, is `learning_rate`
        for decays in (True, False)
        if members[part, decays]
    ]
