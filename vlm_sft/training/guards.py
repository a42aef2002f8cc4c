"""Training stops before the optimizer takes a step that would destroy the model, and says what filled the memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm_sft.distributed import any_rank, print_main


class StopOnNaN(TrainerCallback):
    """Stops before the optimizer steps on a loss or gradient that is NaN or infinite, and names the rows.

    The Trainer (transformers 5.23) takes that step, keeps its loss out of the log and saves the wreck. `max_skipped`
    such steps may be passed over instead, without an update; `skipped` counts them.

    Rows are named by the batch's `rows` [B], numbers that are taken out before the model sees them; without, by their
    place in the step. With the fp16 gradient scaler an infinite gradient alone is no fault as long as the scale is
    at least 1: the scaler skips the step and lowers its scale. DeepSpeed steps inside `backward`: there the stop comes
    after the step and before the next save.
    """

    def __init__(self, *, max_skipped: int = 0) -> None:
        if max_skipped < 0:
            raise ValueError(f"StopOnNaN: max_skipped={max_skipped}; give the number of steps that may be passed over")
        self.max_skipped = max_skipped
        self.skipped = 0
        self._rows: Tensor | None = None
        # For each batch of the step its rows, and which of them (or whether the batch) has no finite loss.
        self._seen: list[tuple[Tensor | None, Tensor]] = []

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        kwargs["model"].register_forward_pre_hook(self._take_rows, with_kwargs=True)
        kwargs["model"].register_forward_hook(self._look)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seen.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        parameters = [p for p in kwargs["model"].parameters() if p.grad is not None]
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        bad_loss = any(bool(bad.any()) for _, bad in self._seen)
        forgiven = scaler is not None and scaler.get_scale() >= 1
        if not any_rank(bad_loss or not (forgiven or _all_finite([p.grad for p in parameters]))):
            return
        named = gather_object(self._named(bad_only=True)) or gather_object(self._named(bad_only=False))
        what = f"step {state.global_step + 1}: the loss or the gradient is not finite, from {', '.join(named)}"
        if self.skipped == self.max_skipped:
            raise FloatingPointError(
                f"{what}. The optimizer did not step and the last checkpoint stands. Look at these rows, or pass "
                f"over such steps with StopOnNaN(max_skipped={self.max_skipped + 1})."
            )
        self.skipped += 1
        print_main(f"{what}; passed over, {self.skipped} of at most {self.max_skipped}")
        for parameter in parameters:
            if scaler is None:
                parameter.grad = None
            else:  # the scaler has to find what it can skip
                parameter.grad.fill_(torch.nan)

    def _take_rows(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._rows = kwargs.get("rows")
        return args, {name: value for name, value in kwargs.items() if name != "rows"}

    def _look(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        # TRL's fused head (trl 1.16) gives log-probabilities [B, T - 1], so a row can be told; others give a loss.
        if (log_probs := getattr(output, "log_probs", None)) is not None:
            bad = ~torch.isfinite(log_probs.detach()).all(dim=-1)
        elif (loss := getattr(output, "loss", None)) is not None:
            bad = ~torch.isfinite(loss.detach())
        else:
            return
        self._seen.append((self._rows, bad))

    def _named(self, *, bad_only: bool) -> list[str]:
        names = []
        for place, (rows, bad) in enumerate(self._seen):
            if bad_only and not bad.any():
                continue
            if rows is None:
                names.append(f"batch {place + 1} of {len(self._seen)} (without the numbers of its rows)")
                continue
            some = bad_only and bad.shape == rows.shape
            # Below zero: the collator's own row with a blank picture.
            names += [f"row {row}" for row in (rows[bad] if some else rows).tolist() if row >= 0]
        return names


@contextmanager
def explain_out_of_memory(trainer: Any) -> Iterator[None]:
    """Adds to an out-of-memory error the batch, its longest row and the ways out, and lets the error through.

    with explain_out_of_memory(trainer):
        trainer.train()
    """
    seen: dict[str, Any] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    hook = trainer.model.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error):
            batch = {name: value for name, value in seen.items() if isinstance(value, Tensor)}
            error.add_note(_explained(batch, trainer.args, trainer.state.global_step))
        raise
    finally:
        hook.remove()


def _explained(batch: dict[str, Tensor], args: TrainingArguments, step: int) -> str:
    where = f"step {step + 1}, process {args.process_index}: out of memory"
    if (ids := batch.get("input_ids")) is not None:
        mask = batch.get("attention_mask", torch.ones_like(ids))
        lengths = mask.reshape(len(ids), -1).sum(dim=1).tolist()
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        rows = batch.get("rows")
        name = (
            f"row {int(rows[longest])}" if rows is not None and len(rows) == len(ids) else f"row {longest} of the batch"
        )
        where += (
            f" in a batch of {ids.shape[0]} rows of {ids.shape[1]} tokens. The longest is {name}, {lengths[longest]} "
            f"tokens of at most max_length={getattr(args, 'max_length', None)}"
        )
    half, twice = max(1, args.per_device_train_batch_size // 2), 2 * args.gradient_accumulation_steps
    smaller = (
        f"--per_device_train_batch_size {half} --gradient_accumulation_steps {twice} (the same step)"
        if args.per_device_train_batch_size > 1
        else "--activation_checkpointing (slower by some 20%)"
    )
    return (
        f"{where}.\nThree ways out: {smaller}; a lower --max_length or smaller pictures; --load_in_4bit, or "
        "the model in shares on several GPUs (accelerate_configs/fsdp2.yaml). What fits: vlm_sft.tools.memory."
    )


def _all_finite(gradients: list[Tensor]) -> bool:
    """One pass over the gradients; a second, slower one only where their sum of squares overflows."""
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    return any(bool(torch.isfinite(get_total_norm(local, norm_type=p))) for p in (2.0, torch.inf))
