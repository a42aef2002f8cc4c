"""Rows are batched by length, each once an epoch, in an order that processes share and a resumed run finds again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import rows as picture_rows
from together import together
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerControl, TrainerState
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from trl import SFTConfig, SFTTrainer

from vlm_sft import ChatCollator, check_rows, lora_config
from vlm_sft.training.batches import GroupByLength, Groups

STRATEGIES = {"group_by_length": LengthGroupedSampler, "batch_rebalance": BatchRebalanceSampler}
COUNT = 48
CPU = {"activation_checkpointing": False, "bf16": False, "use_cpu": True}


def talks(count: int = COUNT) -> Any:
    """Rows whose answers are of one to forty words, and one in four without a picture."""

    def longer(row: dict[str, Any], n: int) -> dict[str, Any]:
        words = " ".join(["yes"] * (1 + (n * 7) % 40))
        question = row["messages"][0] if n % 4 else {"role": "user", "content": [{"type": "text", "text": "Hello"}]}
        return {
            "row": n,
            "messages": [question, {"role": "assistant", "content": [{"type": "text", "text": words}]}],
            "images": row["images"] if n % 4 else [],
        }

    return picture_rows(count).map(longer, with_indices=True, load_from_cache_file=False)


class Recorded(ChatCollator):
    """Keeps the numbers and the shape of each batch of training."""

    def __call__(self, examples: Any) -> Any:
        batch = super().__call__(examples)
        self.__dict__.setdefault("seen", []).append([example["row"] for example in examples])
        self.__dict__.setdefault("shapes", []).append(tuple(batch["input_ids"].shape))
        return batch


def train(model: Any, processor: Any, output: Path, *, resume: bool = False, **options: Any) -> Any:
    """One run over `talks`; the Trainer, whose collator has recorded the batches."""
    collator = Recorded(processor)
    data = check_rows(talks(), collator, num_proc=0)
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "save_strategy": "no", **options}
    args = SFTConfig(
        output_dir=str(output),
        max_length=None,
        remove_unused_columns=False,
        activation_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        dataloader_num_workers=0,
        **options,
    )
    # Dropout draws from the random state, as training does.
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=processor,
        data_collator=collator,
        peft_config=lora_config(model, r=2, lora_dropout=0.1),
        callbacks=[GroupByLength()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture
def twin(tiny_model: Callable[..., Any], tiny_processor: Callable[..., Any]) -> Callable[[], tuple[Any, Any]]:
    return lambda: (tiny_model("llava15"), tiny_processor("llava15"))


def waste(shapes: list[tuple[int, int]], tokens: int) -> float:
    return 1 - tokens / sum(rows * length for rows, length in shapes)


def computed(order: list[int], lengths: list[int], rows: int) -> int:
    steps = [order[at : at + rows] for at in range(0, len(order), rows)]
    return sum(len(step) * max(lengths[n] for n in step) for step in steps)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 15, 333, 400, 401, 3000])
def test_steps_are_of_one_length_and_in_no_order_of_length(count: int) -> None:
    """Each row once; the longest first, what fills no step last; another order each epoch; less padding than in
    transformers' own order, which once it computes no more makes `Groups` needless."""
    draw, rows = random.Random(count), 8
    lengths = [round(draw.lognormvariate(5, 0.6)) for _ in range(count)]
    orders = [[*Groups(rows, lengths=lengths, generator=torch.Generator().manual_seed(seed))] for seed in (0, 0, 1)]
    order, full = orders[0], count // rows * rows
    assert orders[1] == order
    assert sorted(order) == sorted(orders[2]) == [*range(count)]
    assert (orders[2] == order) == (count <= rows)
    assert max(lengths[n] for n in order[:rows]) == max(lengths)
    if count > 300:
        theirs = LengthGroupedSampler(rows, lengths=lengths, generator=torch.Generator().manual_seed(0))
        ratio = computed(order, lengths, rows) / computed([*theirs], lengths, rows)
        assert ratio < (0.96 if count < 1000 else 1.01)
        assert computed(order, lengths, rows) < 1.15 * sum(lengths)
        longest = [max(lengths[n] for n in order[at : at + rows]) for at in range(rows, full, rows)]
        falls = sum(after < before for before, after in itertools.pairwise(longest)) / len(longest)
        assert 0.3 < falls < 0.7


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trl_batches_rows_of_one_length_and_each_once(strategy: str, twin: Any, tmp_path: Path) -> None:
    shapes, tokens = {}, 0
    for name in ("random", strategy):
        trainer = train(
            *twin(), tmp_path / name, train_sampling_strategy=name, num_train_epochs=1, gradient_accumulation_steps=4
        )
        assert sorted(n for batch in trainer.data_collator.seen for n in batch) == list(range(COUNT))
        shapes[name] = trainer.data_collator.shapes
        tokens = sum(trainer.train_dataset["length"])
    assert waste(shapes[strategy], tokens) < min(0.15, waste(shapes["random"], tokens) / 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_epoch_goes_on_in_its_own_order(strategy: str, twin: Any, tmp_path: Path) -> None:
    how = {"train_sampling_strategy": strategy, "seed": 3}
    whole = train(*twin(), tmp_path / "whole", **how).data_collator.seen
    first, second = whole[: len(whole) // 2], whole[len(whole) // 2 :]
    assert sorted(n for batch in second for n in batch) == list(range(COUNT))
    assert first != second
    train(*twin(), tmp_path / "cut", **how, save_strategy="steps", save_steps=17, max_steps=17)
    resumed = train(*twin(), tmp_path / "cut", **how, resume=True)
    assert resumed.state.global_step == len(whole)
    assert resumed.data_collator.seen == whole[17:]
    for seeds in ({"seed": 4}, {"data_seed": 4}):
        other = train(*twin(), tmp_path / "other", **{**how, **seeds, "max_steps": 2})
        assert other.data_collator.seen[:2] != whole[:2]
    # `data_seed` alone decides: with that of the first run, its order is there under another seed.
    same = train(*twin(), tmp_path / "same", **{**how, "seed": 4, "data_seed": 3, "max_steps": 2})
    assert same.data_collator.seen[:2] == whole[:2]


def test_evaluations_see_the_same_batches(twin: Any, tmp_path: Path) -> None:
    trainer = train(*twin(), tmp_path, train_sampling_strategy="group_by_length", max_steps=1)
    loader = trainer.get_eval_dataloader(trainer.train_dataset)  # persistent workers keep it for all evaluations
    trainer.callback_handler.eval_dataloader = loader
    orders = []
    for _ in range(2):
        orders.append([batch["input_ids"].tolist() for batch in loader])
        trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, {})
    assert orders[0] == orders[1]


def test_a_length_column_that_would_be_dropped_is_refused(tmp_path: Path) -> None:
    for strategy in STRATEGIES:
        args = SFTConfig(str(tmp_path), train_sampling_strategy=strategy, **CPU)
        with pytest.raises(ValueError, match=rf"{strategy} .*remove_unused_columns False"):
            GroupByLength().on_init_end(args, TrainerState(), TrainerControl())


def seen_in_a_launch(strategy: str, folder: str, output: str) -> dict[str, Any]:
    """The rows of each batch of this process: of a whole run, and of one that resumes after step 9."""
    seen = {}
    for name, options in (("whole", {}), ("cut", {"max_steps": 9, "save_steps": 9}), ("cut", {"resume": True})):
        options = {"save_strategy": "steps", "save_steps": 9} | options if name == "cut" else options
        model, processor = (kind.from_pretrained(folder) for kind in (AutoModelForImageTextToText, AutoProcessor))
        trainer = train(model, processor, Path(output, name), train_sampling_strategy=strategy, **options)
        seen["resumed" if "resume" in options else name] = trainer.data_collator.seen
    return seen


@pytest.mark.slow
@pytest.mark.loopback
@pytest.mark.parametrize("strategy", ["group_by_length", pytest.param("batch_rebalance", marks=pytest.mark.sweep)])
def test_two_processes_share_an_order(strategy: str, tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    ranks = together(seen_in_a_launch, strategy, str(tiny_dir("llava15")), str(tmp_path))
    whole = [rank["whole"] for rank in ranks]
    steps = len(whole[0])
    for epoch in (slice(0, steps // 2), slice(steps // 2, steps)):
        both = [n for rank in whole for batch in rank[epoch] for n in batch]
        assert sorted(both) == list(range(COUNT))
    assert [rank["resumed"] for rank in ranks] == [rank[9:] for rank in whole]
