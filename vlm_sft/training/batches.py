"""Batches of rows of one length, in an order that is the same on every process and after a resume.

transformers groups by a column `length` (`with_lengths` adds it) where `train_sampling_strategy` says so. This callback
mends what it leaves to chance (5.23): the order of `"group_by_length"` comes from the global random state, which
differs between processes after an epoch and is not there again when an epoch is resumed, and `"batch_rebalance"`
resumes on several processes in the order of the first epoch. Rows would be skipped and others trained twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler


class OrderByLength(TrainerCallback):
    """Draws the order of each epoch from `data_seed` (else `seed`) and the epoch alone.

    Every row comes once an epoch. `longest_first` puts the longest rows of the dataset into the first batch of each
    process, so that a run that will not fit in memory fails at once; only with `"group_by_length"`. Without one of the
    two strategies nothing is changed. Raises `ValueError` where the Trainer would drop the lengths.
    """

    def __init__(self, *, longest_first: bool = False) -> None:
        self.longest_first = longest_first
        self._sampler: Any = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        strategy = args.train_sampling_strategy
        if strategy in ("group_by_length", "batch_rebalance") and args.remove_unused_columns:
            raise ValueError(
                f"train_sampling_strategy={strategy!r} needs the column {args.length_column_name!r}, which the Trainer "
                "drops; set remove_unused_columns=False, or train_sampling_strategy='random'"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loader = kwargs["train_dataloader"]
        self._sampler = _sampler_of(loader)
        if isinstance(self._sampler, LengthGroupedSampler):
            # All rows of a step, or the order would be another one on another number of processes.
            self._sampler.batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            # As a column, each length would be read from the dataset, with its whole row, each time it is compared.
            lengths = loader.dataset.with_format(None)[args.length_column_name][:]
            self._sampler.lengths = lengths
            if self.longest_first:
                loader.set_sampler(_LongestFirst(self._sampler, lengths, args.train_batch_size * args.world_size))
        elif self.longest_first:
            raise ValueError(
                f"OrderByLength(longest_first=True) with train_sampling_strategy={args.train_sampling_strategy!r}; "
                "expected 'group_by_length'"
            )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        epoch = int(state.epoch or 0)
        if isinstance(self._sampler, LengthGroupedSampler):
            self._sampler.generator = torch.Generator().manual_seed(_seed(args) + epoch)
        elif isinstance(self._sampler, BatchRebalanceSampler):
            self._sampler.seed = _seed(args)
            self._sampler.set_epoch(epoch)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # With persistent workers the same loader evaluates again: in the same order, for comparable losses.
        sampler = _sampler_of(kwargs["eval_dataloader"])
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator().manual_seed(_seed(args))


class _LongestFirst(Sampler[int]):
    """The order of a sampler, with the `count` longest rows taken to its front."""

    def __init__(self, sampler: Any, lengths: list[int], count: int) -> None:
        self.sampler = sampler
        self.longest = sorted(range(len(lengths)), key=lambda n: -lengths[n])[:count]

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        first = set(self.longest)
        yield from self.longest
        yield from (n for n in self.sampler if n not in first)


def _sampler_of(loader: Any) -> Any:
    """The sampler below what accelerate wrapped round it, or the batch sampler where that one chooses the rows."""
    found: Any = getattr(loader, "batch_sampler", None)
    while hasattr(found, "batch_sampler"):
        found = found.batch_sampler
    return found if isinstance(found, BatchRebalanceSampler) else getattr(found, "sampler", None)


def _seed(args: TrainingArguments) -> int:
    return args.seed if args.data_seed is None else args.data_seed
