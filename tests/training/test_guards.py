"""No optimizer step on a loss or gradient that is not finite, and the rows are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from vlm_sft.training.guards import StopOnNaN


@pytest.fixture(scope="module")
def llava(tiny_dir: Any) -> Path:
    return tiny_dir("llava15")


class Spoil(runs.Collate):
    """The picture of one row comes out as NaN."""

    def __init__(self, processor: Any, *, row: int = 105) -> None:
        super().__init__(processor)
        self.row = row

    def __call__(self, examples: Any) -> Any:
        batch = super().__call__(examples)
        for place, example in enumerate(examples):
            if example["row"] == self.row:
                batch["pixel_values"][place, 0, 0, 0] = torch.nan
        return batch


class Unnamed(Spoil):
    def __call__(self, examples: Any) -> Any:
        batch = super().__call__(examples)
        del batch["rows"]
        return batch


class Before(TrainerCallback):
    """Changes the gradients ahead of the guard, and keeps the weights as they were before the step."""

    def __init__(self, change: Any = None, *, step: int = 2) -> None:
        self.change, self.step = change, step
        self.weights: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights = runs.weights(kwargs["model"])
        if self.change and state.global_step + 1 == self.step:
            self.change([p for p in kwargs["model"].parameters() if p.grad is not None])


def spoiled(
    base: Path, folder: Path, tiny_processor: Any, *, kind: Any = Spoil, guard: Any = None, **options: Any
) -> Any:
    before = options.pop("before", Before())
    collator = kind(tiny_processor("llava15"))
    callbacks = [before, guard or StopOnNaN()]
    return runs.trainer(base, folder, callbacks=callbacks, collator=collator, **options), before


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dataloader_num_workers": 2},
        {"gradient_accumulation_steps": 2, "max_steps": 2},
        {"peft_config": LoraConfig(target_modules=r".*language_model.*q_proj")},
        {"activation_checkpointing": True},
    ],
    ids=["plain", "workers", "accumulation", "lora", "checkpointing"],
)
def test_the_row_is_named_and_no_step_taken(
    options: dict[str, Any], llava: Path, tmp_path: Path, tiny_processor: Any
) -> None:
    trainer, before = spoiled(llava, tmp_path, tiny_processor, save_steps=1, **options)
    with pytest.raises(FloatingPointError, match=r"^step \d: .* not finite, from row 105\. The optimizer did not step"):
        trainer.train()
    assert runs.same(before.weights, runs.weights(trainer.model))
    assert all(torch.isfinite(value).all() for value in before.weights.values())
    assert not (tmp_path / f"checkpoint-{trainer.state.global_step + 1}").exists()


def test_without_numbers_the_batch_is_named(llava: Path, tmp_path: Path, tiny_processor: Any) -> None:
    trainer, _ = spoiled(llava, tmp_path, tiny_processor, kind=Unnamed, gradient_accumulation_steps=2)
    with pytest.raises(FloatingPointError, match=r"from batch [12] of 2 \(without the numbers of its rows\)"):
        trainer.train()


def test_it_is_needed(llava: Path, tmp_path: Path, tiny_processor: Any) -> None:
    """What happens without; if this fails, the Trainer has learnt it."""
    trainer = runs.trainer(llava, tmp_path, callbacks=[], collator=Spoil(tiny_processor("llava15")))
    trainer.train()
    assert any(torch.isnan(value).any() for value in runs.weights(trainer.model).values())


def test_steps_can_be_passed_over(
    llava: Path, tmp_path: Path, tiny_processor: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    guard = StopOnNaN(max_skipped=1)
    trainer, _ = spoiled(llava, tmp_path, tiny_processor, guard=guard)
    trainer.train()
    assert guard.skipped == 1
    assert trainer.state.global_step == 4
    assert "from row 105; passed over, 1 of at most 1" in capfd.readouterr().err
    assert all(torch.isfinite(value).all() for value in runs.weights(trainer.model).values())


def test_a_passed_step_changes_nothing(llava: Path, tmp_path: Path, tiny_processor: Any) -> None:
    """Not even by momentum or weight decay."""
    trainer, before = spoiled(
        llava,
        tmp_path,
        tiny_processor,
        guard=StopOnNaN(max_skipped=9),
        weight_decay=0.1,
        max_steps=2,
        before=Before(lambda parameters: parameters[0].grad.fill_(torch.inf)),
    )
    trainer.train()
    assert runs.same(before.weights, runs.weights(trainer.model))


def test_too_many_passed_steps_stop(llava: Path, tmp_path: Path, tiny_processor: Any) -> None:
    guard = StopOnNaN(max_skipped=1)
    trainer, _ = spoiled(llava, tmp_path, tiny_processor, guard=guard, max_steps=8)  # two epochs: the row comes twice
    with pytest.raises(FloatingPointError, match=r"from row 105\. .*StopOnNaN\(max_skipped=2\)"):
        trainer.train()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_gradient_alone_names_all_rows_of_the_step(
    value: float, llava: Path, tmp_path: Path, tiny_processor: Any
) -> None:
    def spoil(parameters: list[Any]) -> None:
        parameters[-1].grad.view(-1)[-1] = value

    options = {"gradient_accumulation_steps": 2, "before": Before(spoil), "max_steps": 2}
    trainer, _ = spoiled(llava, tmp_path, tiny_processor, kind=runs.Collate, **options)
    with pytest.raises(FloatingPointError, match=r"^step 2: .* from row \d+, row \d+, row \d+, row \d+\. ") as stopped:
        trainer.train()
    named = str(stopped.value).count("row 10")
    assert named == 4


def test_large_gradients_are_no_fault(llava: Path, tmp_path: Path, tiny_processor: Any) -> None:
    """Their sum of squares overflows; they are finite."""

    def enlarge(parameters: list[Any]) -> None:
        for parameter in parameters:
            parameter.grad.fill_(1e30)

    trainer, _ = spoiled(llava, tmp_path, tiny_processor, kind=runs.Collate, before=Before(enlarge))
    trainer.train()


def test_an_infinite_loss_with_finite_gradients_stops(llava: Path, tmp_path: Path, tiny_processor: Any) -> None:
    def make_infinite(module: Any, args: Any, output: Any) -> None:
        output.log_probs.data[1, -1] = -torch.inf

    trainer, _ = spoiled(llava, tmp_path, tiny_processor, kind=runs.Collate)
    trainer.model.register_forward_hook(make_infinite, prepend=True)
    with pytest.raises(FloatingPointError, match=r"^step 1: .* from row \d+\. "):
        trainer.train()


def test_evaluation_is_left_alone(llava: Path, tmp_path: Path, tiny_processor: Any) -> None:
    """A NaN there harms nothing, and nothing of it is kept."""
    guard = StopOnNaN()
    rows = {"dataset": runs.rows(4), "eval_dataset": runs.rows(8)}
    trainer, _ = spoiled(llava, tmp_path, tiny_processor, guard=guard, max_steps=1, **rows)
    trainer.evaluate()
    assert guard._seen == []
    trainer.train()


def test_the_model_never_sees_the_numbers(llava: Path, tmp_path: Path, tiny_processor: Any) -> None:
    seen: list[set[str]] = []
    trainer, _ = spoiled(llava, tmp_path, tiny_processor, kind=runs.Collate, eval_dataset=runs.rows(2), max_steps=1)
    trainer.model.register_forward_pre_hook(lambda _module, _args, kwargs: seen.append({*kwargs}), with_kwargs=True)
    trainer.train()
    trainer.evaluate()
    assert len(seen) == 2
    assert all("input_ids" in names and "rows" not in names for names in seen)


class Scaler:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale


@pytest.mark.parametrize(("scale", "stops"), [(65536.0, False), (0.5, True)])
def test_the_gradient_scaler_may_overflow_until_its_scale_is_spent(scale: float, stops: bool) -> None:
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.full_like(model.weight, torch.inf)
    optimizer = type("Prepared", (), {"scaler": Scaler(scale)})()
    state = type("State", (), {"global_step": 6})()
    arguments = {"model": model, "optimizer": optimizer}
    if stops:
        with pytest.raises(FloatingPointError, match="step 7"):
            StopOnNaN().on_pre_optimizer_step(None, state, None, **arguments)
    else:
        StopOnNaN().on_pre_optimizer_step(None, state, None, **arguments)
        assert model.weight.grad.isinf().all()


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="max_skipped=-1"):
        StopOnNaN(max_skipped=-1)
