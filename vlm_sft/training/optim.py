"""Learning rate and weight decay by part, through the Trainer's own optimizers.

LLaVA's `mm_projector_lr`: stage 2 trains the projector at another rate than the language model (arXiv 2310.03744).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from vlm_sft.models.fingerprints import RATES
from vlm_sft.models.parts import PARTS, ModelParts, part_of, parts_of


def rates_by_part(
    args: TrainingArguments,
    *,
    learning_rates: Mapping[str, float] | None = None,
    weight_decays: Mapping[str, float] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """What to pass as `optimizer_cls_and_kwargs=`, so that the named parts train at rates of their own.

        trainer = SFTTrainer(..., optimizer_cls_and_kwargs=rates_by_part(args, learning_rates={"projector": 2e-5}))

    The optimizer is the one that `args.optim` names, with its settings. A part that is not named has
    `args.learning_rate` and `args.weight_decay`; biases and norms have no decay, as with the Trainer. The scheduler
    scales every group from its own rate. Logged is the rate of the first group, `args.learning_rate` where any part
    keeps it.

    Raises ValueError for an unknown part, a negative value, and, when training starts, for a part that trains
    nothing and an optimizer that makes its own groups (GaLore, Apollo, LOMO, Muon).
    """
    rates, decays = dict(learning_rates or {}), dict(weight_decays or {})
    faults = [f"{part!r} is no part" for part in {*rates, *decays} if part not in PARTS]
    faults += [f"{part}: {value} is negative" for part, value in (*rates.items(), *decays.items()) if value < 0]
    if faults:
        raise ValueError(f"rates_by_part: {'; '.join(sorted(faults))}; the parts are {', '.join(PARTS)}.")
    build = partial(_build, args=args)
    # A callable that is no optimizer class is one the Trainer calls, with the model it is about to train, to get
    # what makes the optimizer: only then are adapters in place and parameters final.
    return lambda: build, {RATES: {"learning_rates": rates, "weight_decays": decays}}


def _build(
    model: nn.Module,
    *,
    args: TrainingArguments,
    rates_by_part: dict[str, dict[str, float]],
) -> torch.optim.Optimizer:
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(args, cast(Any, model))
    if not isinstance(optimizer_class, type) or {"params", "model", "optimizer_dict"} & settings.keys():
        raise ValueError(f"optim={args.optim!r} makes its own parameter groups; take another one for rates by part.")
    groups = _groups(model, args, **rates_by_part, parts=parts_of(model))
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **settings)
    # Where `SafeCheckpoints` finds them: the groups of a resumed run are those of its checkpoint.
    optimizer.defaults[RATES] = rates_by_part
    if settings.get("optim_bits") == 8:
        _keep_embeddings_in_32_bit(model)
    return optimizer


def _groups(
    model: nn.Module,
    args: TrainingArguments,
    *,
    learning_rates: Mapping[str, float],
    weight_decays: Mapping[str, float],
    parts: ModelParts,
) -> list[dict[str, Any]]:
    """One group for each part and for with and without decay, those at `args.learning_rate` first."""
    # Reads nothing of the Trainer that it belongs to (transformers 5.23).
    decaying = set(Trainer.get_decay_parameter_names(cast(Trainer, None), model))
    members: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[part_of(name, parts), name in decaying].append(parameter)
    if idle := {*learning_rates, *weight_decays} - {part for part, _ in members}:
        raise ValueError(
            f"A rate or decay is set for {', '.join(sorted(idle))}, where nothing trains; drop it, or train the part."
        )
    return [
        {
            "params": members[part, decays_],
            "lr": learning_rates.get(part, args.learning_rate),
            "weight_decay": weight_decays.get(part, args.weight_decay) if decays_ else 0.0,
            "part": part,
        }
        for part in sorted(PARTS, key=lambda part: (part in learning_rates, PARTS.index(part)))
        for decays_ in (True, False)
        if members[part, decays_]
    ]


def _keep_embeddings_in_32_bit(model: nn.Module) -> None:
    """As the Trainer does for the optimizers it makes itself: 8-bit states of embeddings are unstable."""
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    manager: Any = GlobalOptimManager.get_instance()  # type: ignore[no-untyped-call]
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
