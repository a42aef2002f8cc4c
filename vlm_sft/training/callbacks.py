"""What protects a run: generation settings are kept, a NaN stops it, an evaluation changes no number of it.

`explain_out_of_memory` wraps the trainer's own methods, because no callback sees an exception; the rest are callbacks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerState, TrainingArguments

from vlm_sft.common import base_of, eos_ids, restore_rng, rng_state
from vlm_sft.distributed import any_rank, print_main


class RestoreGenerationConfig(TrainerCallback):
    """Keeps `use_cache` and the generation config as loaded, in every checkpoint and in the model after training.

    Make it before the Trainer, which writes `use_cache=False` into the config and changes special tokens
    (transformers 5.23). End tokens that it adds stay, and so does a pad or start token where none was set: generation
    stops at the token that training taught. Raises ValueError at the start of training for a generation config that
    could not be saved at its end."""

    def __init__(self, model: Any) -> None:
        self.model: Any = base_of(model)
        self.loaded: Any = copy.deepcopy(self.model.generation_config)
        self.use_cache = getattr(self.model.config, "use_cache", None)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        restored, changed = copy.deepcopy(self.loaded), self.model.generation_config
        ends = eos_ids(restored.eos_token_id)
        if added := [token for token in eos_ids(changed.eos_token_id) if token not in ends]:
            restored.eos_token_id = [*ends, *added]
        for token in ("bos_token_id", "pad_token_id"):
            if getattr(restored, token) is None:
                setattr(restored, token, getattr(changed, token))
        self.model.generation_config = restored
        if self.use_cache is not None:
            self.model.config.use_cache = self.use_cache
        elif hasattr(self.model.config, "use_cache"):
            del self.model.config.use_cache
        try:
            with TemporaryDirectory() as folder:
                restored.save_pretrained(folder)
        except ValueError as error:
            found = f"This generation config could not be saved after training: {error}"
            how = "Change model.generation_config first, for instance do_sample=True where a temperature is set."
            raise ValueError(f"{found} {how}") from error


class KeepRandomState(TrainerCallback):
    """An evaluation changes no number of the training around it: the random state before it is put back after it.

    Without this, its loader draws a seed from the state that dropout and NEFTune draw from. Must be the last callback:
    it takes the state after all else has drawn from it, and puts it back after all else in `on_evaluate`, such as
    generated answers. The next checkpoint is saved after that (transformers 5.23), so a resume stays exact."""

    _state: tuple[Any, ...] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._state = rng_state() if args.eval_on_start else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._state = rng_state() if control.should_evaluate else None

    on_epoch_end = on_step_end

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # Kept until the next step: with several evaluation sets this comes once for each of them.
        if self._state is not None:
            restore_rng(self._state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._state = None


class StopOnNaN(TrainerCallback):
    """Stops before the optimizer steps on a loss or gradient that is NaN or infinite, and names the rows.

    The Trainer (transformers 5.23) takes that step, keeps its loss out of the log and saves the wreck. `max_skipped`
    such steps may be skipped instead, without an update. Rows are named by the batch's `rows` [B], numbers that are
    taken out before the model sees them; without, by their place in the step.

    With the fp16 gradient scaler an infinite gradient alone is not a fault as long as the scale is at least 1: the
    scaler skips the step and lowers its scale. DeepSpeed steps inside `backward`: there the stop comes after the step
    and before the next save."""

    def __init__(self, *, max_skipped: int = 0) -> None:
        if max_skipped < 0:
            raise ValueError(f"max_skipped={max_skipped}; give the number of steps that may be skipped")
        self.max_skipped = max_skipped
        self.skipped = 0
        self._rows: Tensor | None = None
        # For each batch of the step its rows, and which of them (or whether the batch) has no finite loss.
        self._seen: list[tuple[Tensor | None, Tensor]] = []

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        kwargs["model"].register_forward_pre_hook(self._take_rows, with_kwargs=True)
        kwargs["model"].register_forward_hook(self._look)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._seen.clear()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        parameters = [p for p in kwargs["model"].parameters() if p.grad is not None]
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        forgiven = scaler is not None and scaler.get_scale() >= 1
        bad_loss = any(bool(bad.any()) for _, bad in self._seen)
        if not any_rank(bad_loss or not (forgiven or _all_finite([p.grad for p in parameters]))):
            return
        named = gather_object(self._named(bad_only=True)) or gather_object(self._named(bad_only=False))
        what = f"step {state.global_step + 1}: the loss or the gradient is not finite, from {', '.join(named)}"
        if self.skipped == self.max_skipped:
            how = f"skip such steps with vlm_sft.guards(model, max_skipped={self.max_skipped + 1})"
            stands = "The optimizer did not step and the last checkpoint stands"
            raise FloatingPointError(f"{what}. {stands}. Look at these rows, or {how}.")
        self.skipped += 1
        print_main(f"{what}; skipped, {self.skipped} of at most {self.max_skipped}")
        for parameter in parameters:
            if scaler is None:
                parameter.grad = None
            else:  # the scaler has to find what it can skip
                parameter.grad.fill_(torch.nan)

    def _take_rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._rows = kwargs.get("rows")
        return args, {name: value for name, value in kwargs.items() if name != "rows"}

    def _look(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        # TRL's fused head (trl 1.16) gives log-probabilities [B, T - 1], so a row can be told; others give a loss.
        if (found := getattr(output, "log_probs", None)) is not None:
            self._seen.append((self._rows, ~torch.isfinite(found.detach()).all(dim=-1)))
        elif (found := getattr(output, "loss", None)) is not None:
            self._seen.append((self._rows, ~torch.isfinite(found.detach())))

    def _named(self, *, bad_only: bool) -> list[str]:
        names = []
        for place, (rows, bad) in enumerate(self._seen, 1):
            if bad_only and not bad.any():
                continue
            if rows is None:
                names.append(f"batch {place} of {len(self._seen)} (without the numbers of its rows)")
            else:
                told = rows[bad] if bad_only and bad.shape == rows.shape else rows
                names += [f"row {row}" for row in told.tolist() if row >= 0]  # below: the collator's own blank image
        return names


def _all_finite(gradients: list[Tensor]) -> bool:
    """One pass over the gradients; a second, slower one only where their sum of squares overflows."""
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    return any(bool(torch.isfinite(get_total_norm(local, norm_type=p))) for p in (2.0, torch.inf))


def explain_out_of_memory(trainer: Any) -> None:
    """Adds to an out-of-memory error of this trainer the batch, its longest row and the ways out.

    Wraps `training_step`, `prediction_step` and `train` (whose optimizer states and generated answers take memory too)
    of this one trainer. The error stays the same object, so `auto_find_batch_size` sees it."""

    def explained(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
                if full and ": out of memory" not in "".join(getattr(error, "__notes__", ())):
                    batch = {} if method.__name__ == "train" else args[1]  # (model, inputs, ...)
                    error.add_note(_note(batch, trainer, evaluates=method.__name__ == "prediction_step"))
                raise

        return call

    for name in ("training_step", "prediction_step", "train"):
        setattr(trainer, name, explained(getattr(trainer, name)))


def _note(batch: dict[str, Any], trainer: Any, *, evaluates: bool) -> str:
    args, step = trainer.args, trainer.state.global_step
    where = f"evaluation after step {step}" if evaluates else f"step {step + 1}"
    where += f", process {args.process_index}: out of memory"
    if (ids := batch.get("input_ids")) is not None:
        lengths = batch.get("attention_mask", torch.ones_like(ids)).reshape(len(ids), -1).sum(dim=1)
        rows, longest = batch.get("rows"), int(lengths.argmax())
        name = f"row {longest} of the batch" if rows is None or len(rows) != len(ids) else f"row {int(rows[longest])}"
        where += f" in a batch of {ids.shape[0]} rows of {ids.shape[1]} tokens. The longest is {name}, "
        where += f"{lengths[longest]} tokens of at most max_length={getattr(args, 'max_length', None)}"
    size = args.per_device_eval_batch_size if evaluates else args.per_device_train_batch_size
    twice = f" --gradient_accumulation_steps {2 * args.gradient_accumulation_steps} (the same step)"
    smaller = f"--per_device_{'eval' if evaluates else 'train'}_batch_size {size // 2}{'' if evaluates else twice}"
    last = "" if evaluates else "--activation_checkpointing (slower by some 20%); "
    first = f"{smaller}; " if size > 1 else last
    sharded = "the model sharded on several GPUs (accelerate_configs/fsdp2.yaml). What fits: python -m vlm_sft memory."
    return f"{where}.\nWays out: {first}a lower --max_length or smaller images; --load_in_4bit, or {sharded}"
