"""The plan of a run, worked out without changing it: steps, warm-up, evaluations, saves, and how the best is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any

# What an evaluation of SFTTrainer reports by itself (trl 1.16, transformers 5.23).
_REPORTED = (
    "loss",
    "mean_token_accuracy",
    "entropy",
    "num_tokens",
    "runtime",
    "samples_per_second",
    "steps_per_second",
)


@dataclass(frozen=True)
class Plan:
    """Optimizer steps of the whole run, and lines for the table of `prove`."""

    steps: int
    facts: Mapping[str, str]


def plan_of(trainer: Any, answer_metrics: Mapping[str, bool]) -> Plan:
    """The plan of this trainer's run. `answer_metrics`: name -> whether less is better, of generated answers.

    Raises `ValueError` for a plan that cannot be meant: a warm-up as long as the run, a best-model metric that nothing
    reports or whose wrong end is taken for the best, one held-out row to choose the best weights by.
    """
    args = trainer.args
    epochs, per_epoch, _, _, rows_a_step, _, steps = trainer.set_initial_training_values(
        args, trainer.get_train_dataloader()
    )
    faults = [*_warmup_faults(args, steps), *_choice_faults(trainer, answer_metrics)]
    if faults:
        raise ValueError("this run cannot be meant so: " + "; ".join(faults))
    whole = "" if args.max_steps > 0 else f" ({epochs} x {per_epoch} an epoch)"
    scheduler = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    evaluations, saves = (
        _times(getattr(args, f"{what}_strategy"), getattr(args, f"{what}_steps"), steps, epochs)
        for what in ("eval", "save")
    )
    held_out = len(trainer.eval_dataset) if isinstance(trainer.eval_dataset, Sized) else 0
    best = f"; best by {_metric(args)}" if args.load_best_model_at_end else "; the last weights are kept"
    return Plan(
        steps,
        {
            "steps": f"{steps:,}{whole} of {rows_a_step} rows; warm-up {args.get_warmup_steps(steps):,}, {scheduler}, "
            f"peak learning rate {args.learning_rate:g}",
            "checks": f"{evaluations} evaluations on {held_out:,} held-out rows, {saves} saves{best}",
        },
    )


def _warmup_faults(args: Any, steps: int) -> list[str]:
    warmup = args.get_warmup_steps(steps)
    if warmup == 0 or warmup < steps:
        return []
    return [
        f"the warm-up takes {warmup} of the run's {steps} steps, so the learning rate never reaches --learning_rate "
        f"{args.learning_rate:g}: --warmup_steps 0, or a share of the steps as in --warmup_steps 0.03"
    ]


def _choice_faults(trainer: Any, answer_metrics: Mapping[str, bool]) -> list[str]:
    args, rows = trainer.args, trainer.eval_dataset
    if not args.load_best_model_at_end or rows is None:
        return []
    faults = []
    if isinstance(rows, Sized) and len(rows) < 2:
        faults.append(
            "one held-out row would choose the best weights: hold out more (--num_eval_rows), or "
            "--load_best_model_at_end False"
        )
    name = _metric(args).removeprefix("eval_")
    if trainer.compute_metrics is None and name not in (*_REPORTED, *answer_metrics):
        known = ", ".join(f"eval_{metric}" for metric in ("loss", *answer_metrics))
        faults.append(f"--metric_for_best_model {_metric(args)} is reported by nothing; reported are {known}")
    elif answer_metrics.get(name) is not None and bool(args.greater_is_better) == answer_metrics[name]:
        meant = not answer_metrics[name]
        faults.append(
            f"--greater_is_better {not meant} takes the worst {_metric(args)} for the best: --greater_is_better {meant}"
        )
    return faults


def _metric(args: Any) -> str:
    name = args.metric_for_best_model or "loss"
    return name if name.startswith("eval_") else f"eval_{name}"


def _times(strategy: Any, every: float | None, steps: int, epochs: int) -> int:
    """How often something happens in a run."""
    match getattr(strategy, "value", strategy):
        case "no":
            return 0
        case "epoch":
            return epochs
    every = every or 1
    return steps // max(1, math.ceil(steps * every) if every < 1 else int(every))
