"""Batches in an order that is the same on every process and after a resume, also where they are of one length.

transformers groups by the column `length`, which `check_rows` adds. Left to itself (5.23) it draws the order of
`group_by_length` from the global random state, which differs between processes after an epoch and is not there again
when an epoch is resumed, and resumes `batch_rebalance` on several processes in the order of the first epoch: rows would
be skipped and others trained twice. And each start of a loader draws a seed for its workers from the state that dropout
draws from, persistent workers at the first start alone, so that a resumed run would draw once more."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from vlm_sft.upstream import seed_workers

_POOL = 50  # steps, as many as transformers sorts together at most
ORDER = f"pools of {_POOL} steps, in a drawn order"  # what a run can only be resumed in: other words for another order


class GroupByLength(TrainerCallback):
    """Draws the order of each epoch from `data_seed` (else `seed`) and the epoch alone; every row comes once an epoch,
    and where they do not divide among processes, accelerate repeats some of the first ones to fill up the last step.
    Raises `ValueError` where the Trainer would drop the lengths."""

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        strategy = args.train_sampling_strategy
        if strategy in ("group_by_length", "batch_rebalance") and args.remove_unused_columns:
            found = f"the column {args.length_column_name!r}, which the Trainer drops"
            how = "set --remove_unused_columns False, or --train_sampling_strategy random"
            raise ValueError(f"--train_sampling_strategy {strategy} needs {found}; {how}")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        loader = kwargs["train_dataloader"]
        if isinstance(_sampler_of(loader), LengthGroupedSampler):
            # As a column, each length would be read from the dataset, with its whole row, each time it is compared.
            lengths = loader.dataset.with_format(None)[args.length_column_name][:]
            _batches_of(loader).sampler = Groups(rows_per_step(args), lengths=lengths)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        epoch = int(state.epoch or 0)
        seed_workers(kwargs["train_dataloader"], _seed(args) + epoch)
        sampler = _sampler_of(kwargs["train_dataloader"])
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator().manual_seed(_seed(args) + epoch)
        elif isinstance(sampler, BatchRebalanceSampler):
            sampler.seed = _seed(args)
            sampler.set_epoch(epoch)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # With persistent workers the same loader evaluates again: in the same order, for comparable losses.
        if isinstance(sampler := _sampler_of(kwargs["eval_dataloader"]), LengthGroupedSampler):
            sampler.generator = torch.Generator().manual_seed(_seed(args))


class Groups(LengthGroupedSampler):
    """Indices of rows, those of a step, `batch_size` of them, of about one length. An epoch draws pools of up to fifty
    steps, sorts each by length, cuts it into steps, and draws the order of all steps; the step of the longest row comes
    first, so that memory runs out early, and one that is not full last. transformers' own order (5.23) has pools of a
    quarter of a small dataset, where it computes much padding, and in each goes from long rows to short ones."""

    def __iter__(self) -> Iterator[int]:
        lengths, rows = self.lengths, self.batch_size
        order = torch.randperm(len(lengths), generator=self.generator).tolist()
        longest = max(order, key=lengths.__getitem__, default=0)
        order.sort(key=lambda n: n != longest)  # into a full step, if there is one
        count = len(order) // rows
        full, rest = order[: count * rows], order[count * rows :]
        pool = rows * -(-count // max(1, -(-count // _POOL)))
        pools = [full[at : at + pool] for at in range(0, len(full), pool or 1)]
        ordered = [n for cut in [*pools, rest] for n in sorted(cut, key=lengths.__getitem__)]
        steps = [ordered[at : at + rows] for at in range(0, len(full), rows)]
        drawn = torch.randperm(count, generator=self.generator).tolist()
        drawn.sort(key=lambda step: longest not in steps[step])
        return chain(*(steps[step] for step in drawn), ordered[count * rows :])


def rows_per_step(args: TrainingArguments) -> int:
    """All rows of a step, or the order would be another one on another number of processes."""
    rows: int = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return rows


def _batches_of(loader: Any) -> Any:
    """The batch sampler below accelerate's wrappers."""
    while hasattr(loader, "batch_sampler"):
        loader = loader.batch_sampler
    return loader


def _sampler_of(loader: Any) -> Any:
    """What chooses the rows: the sampler, or the batch sampler where that one does."""
    found = _batches_of(loader)
    return found if isinstance(found, BatchRebalanceSampler) else getattr(found, "sampler", None)


def _seed(args: TrainingArguments) -> int:
    return args.seed if args.data_seed is None else args.data_seed
