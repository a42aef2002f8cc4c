"""Generation settings are kept, a NaN stops a run, an evaluation changes no number of it, full memory is explained."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, TrainerCallback

from vlm_sft.chat.collator import ChatCollator
from vlm_sft.models.adapters import lora_config
from vlm_sft.models.loading import load_model, load_processor
from vlm_sft.training.callbacks import KeepRandomState, RestoreGenerationConfig, StopOnNaN, explain_out_of_memory
from vlm_sft.training.checkpoints import SafeCheckpoints, latest_checkpoint


@pytest.fixture(scope="module")
def llava(tiny_dir: Any) -> Path:
    return tiny_dir("llava15")


# StopOnNaN


class Spoil(runs.Collate):
    """The image of one row comes out as NaN."""

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


def test_steps_can_be_skipped(
    llava: Path, tmp_path: Path, tiny_processor: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    guard = StopOnNaN(max_skipped=1)
    trainer, _ = spoiled(llava, tmp_path, tiny_processor, guard=guard)
    trainer.train()
    assert guard.skipped == 1
    assert trainer.state.global_step == 4
    assert "from row 105; skipped, 1 of at most 1" in capfd.readouterr().err
    assert all(torch.isfinite(value).all() for value in runs.weights(trainer.model).values())


def test_a_skipped_step_changes_nothing(llava: Path, tmp_path: Path, tiny_processor: Any) -> None:
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


def test_too_many_skipped_steps_stop(llava: Path, tmp_path: Path, tiny_processor: Any) -> None:
    guard = StopOnNaN(max_skipped=1)
    trainer, _ = spoiled(llava, tmp_path, tiny_processor, guard=guard, max_steps=8)  # two epochs: the row comes twice
    with pytest.raises(FloatingPointError, match=r"from row 105\. .*guards\(model, max_skipped=2\)"):
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


# RestoreGenerationConfig


@pytest.mark.parametrize("family", ["llava15", "gemma3"])
def test_checkpoints_and_model_keep_the_settings_they_were_loaded_with(
    family: str, tiny_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_model(tiny_dir(family))
    model.generation_config.max_new_tokens = 99
    loaded = model.generation_config.to_dict()
    keep = RestoreGenerationConfig(model)
    run = runs.trainer(tiny_dir(family), tmp_path, callbacks=[keep], model=model)
    assert model.config.use_cache is False  # what the Trainer does, and what this is for
    run.train()
    run.save_model(str(tmp_path / "final"))
    assert not hasattr(model.config, "use_cache")
    assert model.generation_config.to_dict() == loaded
    for folder in ("checkpoint-2", "checkpoint-4", "final"):
        saved = json.loads((tmp_path / folder / "config.json").read_text())
        assert "use_cache" not in saved
        assert saved["text_config"]["use_cache"] is True
        assert GenerationConfig.from_pretrained(tmp_path / folder).max_new_tokens == 99


def test_a_setting_of_use_cache_is_put_back(tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_model(tiny_dir("llava15"))
    model.config.use_cache = True
    keep = RestoreGenerationConfig(get_peft_model(model, lora_config(model)))
    runs.trainer(tiny_dir("llava15"), tmp_path, callbacks=[keep], model=keep.model, max_steps=1).train()
    assert model.config.use_cache is True


def test_end_tokens_of_training_are_added_and_unset_tokens_filled(
    tiny_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    model, processor = load_model(tiny_dir("qwen2_5_vl")), load_processor(tiny_dir("qwen2_5_vl"))
    end, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=7, temperature=0.5, do_sample=True)
    keep = RestoreGenerationConfig(model)
    runs.trainer(tiny_dir("qwen2_5_vl"), tmp_path, callbacks=[keep], model=model, max_steps=1).train()
    assert model.generation_config.eos_token_id == [7, end]
    assert model.generation_config.pad_token_id == pad
    assert model.generation_config.temperature == 0.5


def test_a_config_that_could_not_be_saved_stops_the_run_before_its_first_step(
    tiny_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_model(tiny_dir("llava15"))
    model.generation_config.temperature = 0.9  # without do_sample
    keep = RestoreGenerationConfig(model)
    run = runs.trainer(tiny_dir("llava15"), tmp_path, callbacks=[keep], model=model)
    with pytest.raises(ValueError, match=r"(?s)could not be saved after training.*temperature.*do_sample=True"):
        run.train()
    assert run.state.global_step == 0
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_saved_model_generates_what_it_learnt_and_stops(tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    model, processor = load_model(tiny_dir("llava15")), load_processor(tiny_dir("llava15"))
    data = runs.rows(1)
    run = runs.trainer(
        tiny_dir("llava15"),
        tmp_path,
        callbacks=[RestoreGenerationConfig(model)],
        model=model,
        dataset=data,
        collator=ChatCollator(processor),
        max_steps=40,
        save_strategy="no",
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=1,
    )
    run.train()
    run.save_model(str(tmp_path / "final"))
    again, processor = load_model(tmp_path / "final"), load_processor(tmp_path / "final")
    turn: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many are there?"}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[data[0]["images"]], return_tensors="pt")
    lengths: list[int] = []
    again.get_input_embeddings().register_forward_hook(lambda module, ids, out: lengths.append(ids[0].shape[1]))
    ids = again.generate(**inputs, do_sample=False, max_new_tokens=30)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(ids, skip_special_tokens=True).strip() == "There are 0."
    assert ids[-1] == processor.tokenizer.eos_token_id
    assert len(ids) < 30
    assert lengths[1:] == [1] * (len(ids) - 1)  # the cache is used


# KeepRandomState


class Draw(TrainerCallback):
    """Draws random numbers in an evaluation, as a metric or sampled answers may."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        torch.rand(3)


def noisy(base: Path, folder: Path, *, guard: bool = True, resume: bool = False, **options: Any) -> dict[str, Any]:
    """The weights after six steps (of two epochs) with dropout and NEFTune, evaluated as the options say."""
    callbacks = [SafeCheckpoints(), Draw(), *([KeepRandomState()] if guard else [])]
    lora = LoraConfig(r=4, lora_dropout=0.3, target_modules=r".*language_model.*q_proj")
    settings = {"dataset": runs.rows(6), "eval_dataset": runs.rows(3, seed=1), "peft_config": lora, "max_steps": 6}
    settings |= {"neftune_noise_alpha": 5, "learning_rate": 1e-2, **options}
    trainer = runs.trainer(base, folder, callbacks=callbacks, **settings)
    trainer.train(resume_from_checkpoint=latest_checkpoint(trainer) if resume else None)
    return runs.weights(trainer.model)


EVALUATIONS: dict[str, dict[str, Any]] = {
    "every step": {"eval_strategy": "steps", "eval_steps": 1},
    "every second step": {"eval_strategy": "steps", "eval_steps": 2},
    "each epoch": {"eval_strategy": "epoch"},
    "on start": {"eval_on_start": True, "eval_strategy": "epoch"},
    "two sets": {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": {"a": runs.rows(2), "b": runs.rows(1)}},
}


@pytest.mark.parametrize(
    "workers",
    [
        {},
        pytest.param({"dataloader_num_workers": 2}, marks=pytest.mark.sweep),
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    ],
    ids=["0", "2", "2 persistent"],
)
def test_an_evaluation_changes_no_number_of_training(workers: dict[str, Any], llava: Path, tmp_path: Path) -> None:
    reference = noisy(llava, tmp_path / "never", **workers)
    for name, options in EVALUATIONS.items():
        assert runs.same(reference, noisy(llava, tmp_path / name, **options, **workers)), name


@pytest.mark.parametrize("name", ["every step", "on start"])
def test_keeping_the_random_state_is_needed(name: str, llava: Path, tmp_path: Path) -> None:
    """What happens without; if this fails, the Trainer has learnt it."""
    weights = [noisy(llava, tmp_path / str(n), guard=False, **o) for n, o in enumerate(({}, EVALUATIONS[name]))]
    assert not runs.same(*weights)


@pytest.mark.parametrize("name", EVALUATIONS)
@pytest.mark.parametrize(  # within an epoch, and at its end
    ("at", "workers"), [(2, 0), (3, 2), *(pytest.param(*at, marks=pytest.mark.sweep) for at in ((2, 2), (3, 0)))]
)
def test_a_resume_stays_exact_with_evaluations(name: str, at: int, workers: int, llava: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**EVALUATIONS[name], "save_steps": at, "dataloader_num_workers": workers}
    reference = noisy(llava, tmp_path, **options)
    for folder in tmp_path.glob("checkpoint-*"):
        if folder.name != f"checkpoint-{at}":
            shutil.rmtree(folder)
    assert runs.same(reference, noisy(llava, tmp_path, resume=True, **options))


def test_an_evaluation_after_training_is_left_alone(llava: Path, tmp_path: Path) -> None:
    options = {"eval_dataset": runs.rows(2), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    trainer = runs.trainer(llava, tmp_path, callbacks=[KeepRandomState()], **options)
    trainer.train()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    trainer.add_callback(Draw())
    trainer.evaluate()
    assert not torch.equal(state, torch.get_rng_state())


# explain_out_of_memory


def full(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def explained(base: Path, folder: Path, **options: Any) -> Any:
    trainer = runs.trainer(base, folder, callbacks=[], **options)
    explain_out_of_memory(trainer)
    return trainer


def test_out_of_memory_names_the_longest_row_and_three_ways_out(llava: Path, tmp_path: Path) -> None:
    trainer = explained(llava, tmp_path, per_device_train_batch_size=4)
    trainer.model.register_forward_hook(full)
    with pytest.raises(torch.OutOfMemoryError) as stopped:
        trainer.train()
    (note,) = stopped.value.__notes__
    assert re.match(
        r"step 1, process 0: out of memory in a batch of 4 rows of \d+ tokens\. The longest is row 10\d, ", note
    )
    assert note.count("; ") == 2
    assert "--per_device_train_batch_size 2 --gradient_accumulation_steps 2" in note
    assert "--max_length" in note
    assert "--load_in_4bit" in note


@pytest.mark.parametrize("bare", [False, True])
def test_out_of_memory_in_an_evaluation_advises_its_own_batch_size(bare: bool, llava: Path, tmp_path: Path) -> None:
    evaluation = {"eval_dataset": runs.rows(4), "eval_strategy": "steps", "eval_steps": 1}
    trainer = explained(llava, tmp_path, per_device_eval_batch_size=4, **evaluation)
    trainer.model.register_forward_hook(lambda module, args, output: None if module.training else full())
    with pytest.raises(torch.OutOfMemoryError) as stopped:
        trainer.evaluate() if bare else trainer.train()
    (note,) = stopped.value.__notes__
    assert note.startswith(
        f"evaluation after step {0 if bare else 1}, process 0: out of memory in a batch of 4 rows of"
    )
    assert "--per_device_eval_batch_size 2" in note
    assert "train" not in note


def test_out_of_memory_in_the_optimizer_is_explained(llava: Path, tmp_path: Path) -> None:
    """Its states are made in the first step."""
    trainer = explained(llava, tmp_path)
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError) as stopped:
        trainer.train()
    (note,) = stopped.value.__notes__
    assert note.startswith("step 1, process 0: out of memory.\nWays out: --per_device_train_batch_size 1 ")


def test_auto_find_batch_size_finds_it_all_the_same(llava: Path, tmp_path: Path) -> None:
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "max_steps": 2}
    trainer = explained(llava, tmp_path, **options)
    trainer.model.register_forward_pre_hook(
        lambda module, args, inputs: full() if len(inputs["input_ids"]) > 1 else None, with_kwargs=True
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer._train_batch_size == 1


def test_other_errors_are_left_as_they_are(llava: Path, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("something else")

    trainer = explained(llava, tmp_path)
    trainer.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="something else") as stopped:
        trainer.train()
    assert not hasattr(stopped.value, "__notes__")
