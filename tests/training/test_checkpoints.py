"""A checkpoint is complete or absent, and a resumed run is the run that was interrupted."""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import runs
import torch
import transformers
from peft import LoraConfig
from proven import RecipeConfig, pieces
from safetensors.torch import load_file
from together import forks
from transformers import AutoModelForImageTextToText, TrainerCallback

from vlm_sft.models.adapters import lora_config
from vlm_sft.models.fingerprints import read_training_base
from vlm_sft.models.freezing import cast_trainable_to_fp32
from vlm_sft.models.loading import load_model
from vlm_sft.models.manifest import MANIFEST, read_manifest, verify_checkpoint, write_manifest
from vlm_sft.tools import tiny
from vlm_sft.training.checkpoints import (
    SafeCheckpoints,
    _checkpoints,
    _key_differences,
    latest_checkpoint,
)
from vlm_sft.training.optim import lr_by_part
from vlm_sft.upstream import save_with_own_names

FOUR = ("llava15", "qwen2_5_vl", "smolvlm", "gemma3")


class At(TrainerCallback):
    """Does something at one event of one step."""

    def __init__(self, event: str, step: int, act: Callable[[], None]) -> None:
        def react(args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                act()

        setattr(self, event, react)


def train(base: Path, output_dir: Path, *, callbacks: Any = (), guard: Any = None, **options: Any) -> dict[str, Any]:
    """The weights after a run that resumes by itself."""
    trainer = runs.trainer(base, output_dir, callbacks=[*callbacks, guard or SafeCheckpoints()], **options)
    trainer.train(resume_from_checkpoint=latest_checkpoint(trainer))
    return runs.weights(trainer.model)


def lora(**changes: Any) -> LoraConfig:
    settings = {"r": 4, "lora_dropout": 0.1, "target_modules": r".*language_model.*\.(q|v)_proj"}
    return LoraConfig(**settings | {"modules_to_save": ["model.multi_modal_projector"]} | changes)


@pytest.fixture(scope="module")
def llava(tiny_dir: Any) -> Path:
    return tiny_dir("llava15")


@pytest.fixture(scope="module")
def whole(llava: Path, tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    """A full fine-tune that nothing interrupted: its folder and its last weights."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, train(llava, folder)


@pytest.fixture(scope="module")
def adapted(llava: Path, tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("adapted") / "out"
    return folder, train(llava, folder, peft_config=lora())


@pytest.fixture
def broken(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of the whole run's folder, to be damaged."""
    return Path(shutil.copytree(whole[0], tmp_path / "out"))


def untrained(base: Path, output_dir: Path, *, guard: Any = None, **options: Any) -> Any:
    return runs.trainer(base, output_dir, callbacks=[guard or SafeCheckpoints()], **options)


# Full fine-tunes


@pytest.mark.parametrize("family", FOUR)
def test_a_resumed_full_fine_tune_is_bit_equal(family: str, tiny_dir: Any, tmp_path: Path) -> None:
    base = tiny_dir(family)
    reference = train(base, tmp_path / "a")
    shutil.rmtree(tmp_path / "a/checkpoint-4")
    trainer = untrained(base, tmp_path / "a")
    resumed = latest_checkpoint(trainer)
    assert resumed == str(tmp_path / "a/checkpoint-2")
    trainer.train(resume_from_checkpoint=resumed)
    assert runs.same(reference, runs.weights(trainer.model))
    trainer.save_model(tmp_path / "final")
    assert load_file(tmp_path / "final/model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "final")
    assert runs.same(reference, runs.weights(loaded))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_checkpoints_keep_the_names_that_the_trainer_looks_for(family: str, tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model(family)
    held = runs.weights(model)
    save_with_own_names(model, tmp_path / "checkpoint-1")
    assert _key_differences(tmp_path / "checkpoint-1", model) == []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    # What the Trainer does on resume and for the best model, without an error for what does not fit.
    model.load_state_dict(load_file(tmp_path / "checkpoint-1/model.safetensors"), strict=False)
    assert runs.same(held, runs.weights(model))
    assert runs.same(held, runs.weights(AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-1")))


@pytest.mark.parametrize("family", ["llava15", "llava_next", "qwen2_vl", "qwen2_5_vl", "gemma3", "internvl"])
def test_names_of_the_hub_are_noticed(family: str, tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model(family)
    save_with_own_names(model, tmp_path / "final")
    missing, unknown = _key_differences(tmp_path / "final", model)
    assert "of the model are not in it" in missing
    assert "in it are not the model's" in unknown


def test_the_best_model_is_loaded(llava: Path, tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "prediction_loss_only": True}
    # The loss falls, so with the sign turned the first checkpoint is the best.
    trainer = untrained(llava, tmp_path, eval_dataset=runs.rows(2), greater_is_better=True, **best)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    saved = {step: load_file(tmp_path / f"checkpoint-{step}/model.safetensors") for step in (2, 4)}
    assert not runs.same(saved[2], saved[4])
    assert runs.same(saved[2], runs.weights(trainer.model))


def test_a_copy_of_the_model_saves_its_own_weights(llava: Path, tmp_path: Path) -> None:
    copies: list[Any] = []
    trainer = untrained(llava, tmp_path)
    trainer.add_callback(At("on_step_end", 1, lambda: copies.append(copy.deepcopy(trainer.model))))
    trainer.train()
    copies[0].save_pretrained(tmp_path / "checkpoint-of-a-copy")
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-of-a-copy")
    assert runs.same(runs.weights(copies[0]), runs.weights(saved))
    assert not runs.same(runs.weights(trainer.model), runs.weights(saved))
    assert "save_pretrained" not in vars(trainer.model)


# Adapters


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_resumed_adapter_is_bit_equal(changes: dict[str, Any], llava: Path, tmp_path: Path) -> None:
    accumulated = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "dataloader_num_workers": 2}
    reference = train(llava, tmp_path, peft_config=lora(**changes), **accumulated)
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert runs.same(reference, train(llava, tmp_path, peft_config=lora(**changes), **accumulated))


def test_a_resumed_4_bit_run_is_bit_equal(llava: Path, tmp_path: Path) -> None:
    """As a recipe takes it: DoRA in float32 on NF4, and a projector in full."""

    def run() -> dict[str, torch.Tensor]:
        model = load_model(llava, load_in_4bit=True)
        config = lora_config(model, {"language": "lora", "projector": "full"}, r=4, use_dora=True, lora_dropout=0.1)
        trainer = untrained(llava, tmp_path, model=model, peft_config=config)
        cast_trainable_to_fp32(trainer.model)
        trainer.train(resume_from_checkpoint=latest_checkpoint(trainer))
        return runs.weights(trainer.model)

    reference = run()
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert runs.same(reference, run())


def test_an_adapter_has_its_base_beside_it(adapted: tuple[Path, dict[str, Any]], llava: Path) -> None:
    for folder in (adapted[0], adapted[0] / "checkpoint-2"):
        recorded = read_training_base(folder)
        assert recorded is not None
        assert recorded["base_model_name_or_path"] == f".../{llava.name}"
        assert (recorded["dtype"], recorded["quantization_config"]) == ("float32", None)
        assert len(recorded["weights"]) == len(load_file(llava / "model.safetensors"))
    assert "training_base.json" in json.loads((adapted[0] / f"checkpoint-2/{MANIFEST}").read_text())["files"]


# Saves that do not end


def killed(base: Path, output_dir: Path, point: str) -> None:
    """A run that dies while it saves its second checkpoint."""
    doomed, replace = "checkpoint-4", Path.replace
    for module, name, at in ((transformers.modeling_utils, "safe_save_file", 1), (torch, "save", 1)):
        original = getattr(module, name)

        def save(*args: Any, original: Any = original, at: int = at, **kwargs: Any) -> Any:
            path = str(args[at])
            return runs.half(path) if doomed in path and point in path else original(*args, **kwargs)

        setattr(module, name, save)
    if point == MANIFEST:
        Path.replace = lambda self, to: runs.half(self) if doomed in str(to) else replace(self, to)  # type: ignore
    train(base, output_dir)


@pytest.mark.parametrize(
    "point",
    ["model.safetensors", *(pytest.param(file, marks=pytest.mark.sweep) for file in ("optimizer.pt", MANIFEST))],
)
def test_kill_9_in_a_save_leaves_the_checkpoint_before(
    point: str, whole: tuple[Path, dict[str, Any]], llava: Path, tmp_path: Path
) -> None:
    process = forks().Process(target=killed, args=(llava, tmp_path, point))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "checkpoint-4").is_dir()
    assert verify_checkpoint(tmp_path / "checkpoint-2") == []
    assert verify_checkpoint(tmp_path / "checkpoint-4") == ["it has no manifest.json, so its save did not end"]
    assert runs.same(whole[1], train(llava, tmp_path))
    assert verify_checkpoint(tmp_path / "checkpoint-4") == []
    assert (tmp_path / "incomplete-checkpoint-4").is_dir()


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("optimizer.pt", RuntimeError),  # torch's own words, without the cause
        ("trainer_state.json", OSError),
        (f"{MANIFEST}.tmp", OSError),
    ],
)
def test_a_full_disk_leaves_the_checkpoint_before(
    name: str, error: type[Exception], llava: Path, tmp_path: Path
) -> None:
    def fill_disk() -> None:
        folder = tmp_path / "checkpoint-4"
        folder.mkdir()
        (folder / name).symlink_to("/dev/full")

    with pytest.raises(error):
        train(llava, tmp_path, callbacks=[At("on_step_begin", 3, fill_disk)])
    assert latest_checkpoint(untrained(llava, tmp_path)) == str(tmp_path / "checkpoint-2")


def limited(base: Path, output_dir: Path) -> None:
    """A run that cannot write more than 100 kB to a file from its third step on."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = At("on_step_begin", 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    train(base, output_dir, callbacks=[limit])


def test_weights_that_cannot_be_written_leave_the_checkpoint_before(
    whole: tuple[Path, dict[str, Any]], llava: Path, tmp_path: Path
) -> None:
    process = forks().Process(target=limited, args=(llava, tmp_path))
    process.start()
    process.join(60)
    assert process.exitcode == 1
    assert runs.same(whole[1], train(llava, tmp_path))


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_disk_without_room_for_another_is_noticed_before_the_save(
    strategy: str, llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    fill = At("on_step_begin", 3, lambda: monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10)))
    with pytest.raises(ValueError, match=r"no room for checkpoint-4: .*checkpoint-2 takes .*, 10 bytes are free"):
        train(llava, tmp_path, callbacks=[fill], save_strategy=strategy, dataset=runs.rows(4))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_rotation_waits_for_the_new_checkpoint(llava: Path, tmp_path: Path) -> None:
    def lose_power() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(llava, tmp_path, callbacks=[At("on_save", 3, lose_power)], save_steps=1, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    trainer = untrained(llava, tmp_path, save_steps=1, save_total_limit=2)
    assert latest_checkpoint(trainer) == str(tmp_path / "checkpoint-2")


def test_every_file_is_on_the_disk_before_the_manifest_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, flushed = tmp_path / "checkpoint-1", []
    (folder / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (folder / name).write_text(name)
    fsync, replace = os.fsync, Path.replace

    def flush(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path).as_posix())
        fsync(descriptor)

    def rename(old: Path, new: Path) -> None:
        flushed.append("renamed")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", rename)
    write_manifest(folder, {})
    at = flushed.index("renamed")
    inner = {
        "checkpoint-1/a",
        "checkpoint-1/inner/b",
        "checkpoint-1/inner",
        "checkpoint-1",
        "checkpoint-1/manifest.json.tmp",
    }
    assert {*flushed[:at]} == inner
    assert flushed[at + 1 :] == ["checkpoint-1", "."]
    assert verify_checkpoint(folder) == []


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (100, 9, 20, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-7").touch()
    (tmp_path / "checkpoint-best").mkdir()
    assert [*_checkpoints(tmp_path)] == [9, 10, 20, 100]


def test_sigterm_does_not_wait_for_an_evaluation(llava: Path, tmp_path: Path) -> None:
    evaluated: list[int] = []

    class Counts(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            evaluated.append(state.global_step)

    terminate = At("on_step_begin", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": runs.rows(2), "prediction_loss_only": True}
    with pytest.raises(SystemExit):
        train(llava, tmp_path, callbacks=[terminate, Counts()], **options)
    assert evaluated == [1, 2]
    assert verify_checkpoint(tmp_path / "checkpoint-3") == []


def test_sigterm_saves_and_leaves_with_0(whole: tuple[Path, dict[str, Any]], llava: Path, tmp_path: Path) -> None:
    former = signal.getsignal(signal.SIGTERM)
    terminate = At("on_step_begin", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        train(llava, tmp_path, callbacks=[terminate])
    assert left.value.code == 0
    assert signal.getsignal(signal.SIGTERM) == former
    assert verify_checkpoint(tmp_path / "checkpoint-3") == []
    assert runs.same(whole[1], train(llava, tmp_path))
    assert signal.getsignal(signal.SIGTERM) == former


# What is resumed


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("damage", "name", "said"),
    [
        (flip, "model.safetensors", "model.safetensors has changed"),
        (flip, "optimizer.pt", "optimizer.pt has changed"),
        (cut, "model.safetensors", r"model.safetensors has \d+ bytes instead of"),
        (cut, "optimizer.pt", r"optimizer.pt has \d+ bytes instead of"),
        (cut, "trainer_state.json", r"trainer_state.json has \d+ bytes instead of"),
        (cut, MANIFEST, "its manifest.json is damaged"),
        (Path.unlink, "optimizer.pt", "optimizer.pt is missing"),
        (Path.unlink, "scheduler.pt", "scheduler.pt is missing"),
        (Path.unlink, "rng_state.pth", "rng_state.pth is missing"),
        (Path.unlink, "trainer_state.json", "trainer_state.json is missing"),
        (Path.unlink, MANIFEST, "it has no manifest.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_damaged_checkpoint_is_skipped(
    damage: Any, name: str, said: str, broken: Path, llava: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(broken / "checkpoint-4" / name)
    trainer = untrained(llava, broken)
    assert latest_checkpoint(trainer) == str(broken / "checkpoint-2")
    assert re.search(f"checkpoint-4 is skipped: {said}", capfd.readouterr().err)
    damage(broken / "checkpoint-2" / name)
    assert latest_checkpoint(untrained(llava, broken)) is None


@pytest.mark.parametrize("kind", ["whole", "adapted"])
def test_a_flipped_bit_in_any_file_is_named_or_changes_nothing(kind: str, request: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(request.getfixturevalue(kind)[0], tmp_path / "out"))
    folder, random = run / "checkpoint-4", Random(0)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    known = read_manifest(folder)
    assert len(files) > 8
    for file in files:
        content = file.read_bytes()
        for _ in range(200 if file.name == MANIFEST else 3):
            damaged, at = bytearray(content), random.randrange(len(content))
            damaged[at] ^= 1 << random.randrange(8)
            file.write_bytes(damaged)
            said = "; ".join(verify_checkpoint(folder))
            # White space between the lines of the manifest is no content of it.
            assert file.name in said or (file.name == MANIFEST and read_manifest(folder) == known), (file, at)
        file.write_bytes(content)
    assert verify_checkpoint(folder) == []


def test_a_damaged_checkpoint_given_by_hand_is_refused(broken: Path, llava: Path) -> None:
    flip(broken / "checkpoint-2/optimizer.pt")
    (broken / "checkpoint-4" / MANIFEST).unlink()
    for step in (2, 4):
        with pytest.raises(ValueError, match=rf"cannot resume from .*checkpoint-{step}: (optimizer|it has no)"):
            untrained(llava, broken).train(resume_from_checkpoint=str(broken / f"checkpoint-{step}"))


@pytest.mark.parametrize(
    ("difference", "changes"),
    [
        (r"adapters.default.r: recorded 4, now 8", {"peft_config": lora(r=8)}),
        (r"adapters.default.lora_alpha: recorded 8, now 32", {"peft_config": lora(lora_alpha=32)}),
        (r"adapters.default.use_dora: recorded False, now True", {"peft_config": lora(use_dora=True)}),
        (r"adapters.default.target_modules: recorded .*, now", {"peft_config": lora(target_modules=["q_proj"])}),
        (r"adapters.default.modules_to_save: recorded \[.*\], now", {"peft_config": lora(modules_to_save=None)}),
        (r"adapters.default: recorded \{.*, now None", {"peft_config": None}),
        (r"rows_per_step: recorded 2, now 4", {"per_device_train_batch_size": 4}),
        (r"rows_per_step: recorded 2, now 6", {"gradient_accumulation_steps": 3}),
        (r"data.rows: recorded 8, now 6", {"dataset": runs.rows(6)}),
        (r"data.columns.images: recorded '\w+', now", {"dataset": runs.rows(seed=1)}),
        (r"data.columns.row: recorded '\w+', now None", {"dataset": runs.rows().remove_columns("row")}),
        (r"seed: recorded 42, now 7", {"seed": 7}),
        (r"learning_rate: recorded 0.001, now 0.01", {"learning_rate": 0.01}),
        (r"lr_scheduler_type: recorded 'linear', now 'cosine'", {"lr_scheduler_type": "cosine"}),
        (r"optim: recorded 'adamw_torch_fused', now 'sgd'", {"optim": "sgd"}),
    ],
)
def test_another_run_is_refused(
    difference: str, changes: dict[str, Any], adapted: tuple[Path, dict[str, Any]], llava: Path
) -> None:
    changes = {"peft_config": lora()} | changes
    with pytest.raises(ValueError, match=rf"checkpoint-4 belongs to another run:(\n.*)*{difference}"):
        latest_checkpoint(untrained(llava, adapted[0], **changes))


def test_the_same_rows_in_other_batches_are_the_same_run(adapted: tuple[Path, dict[str, Any]], llava: Path) -> None:
    accumulated = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer = untrained(llava, adapted[0], peft_config=lora(), **accumulated)
    assert latest_checkpoint(trainer) == str(adapted[0] / "checkpoint-4")


def test_another_order_of_rows_is_refused(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows would be trained twice, and others never."""
    rows = runs.rows().map(lambda row, n: {"length": 20 + n}, with_indices=True)
    how = {"dataset": rows, "train_sampling_strategy": "group_by_length"}
    train(llava, tmp_path, **how)
    assert latest_checkpoint(untrained(llava, tmp_path, **how)) == str(tmp_path / "checkpoint-4")
    monkeypatch.setattr("vlm_sft.training.checkpoints.ORDER", "another")
    with pytest.raises(ValueError, match=r"order_of_rows: recorded 'pools of 50 steps, .*', now 'another'"):
        latest_checkpoint(untrained(llava, tmp_path, **how))
    latest_checkpoint(untrained(llava, tmp_path / "new", dataset=runs.rows()))


def test_another_base_is_refused(broken: Path, llava: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(llava, tmp_path / "another")
    with pytest.raises(ValueError, match=r"base.base_model_name_or_path: recorded '.*', now '.*another'"):
        latest_checkpoint(untrained(moved, broken))


def test_other_rates_by_part_are_refused(llava: Path, tmp_path: Path) -> None:
    """Those of the checkpoint's optimizer would be used, without a word."""

    def run(rates: dict[str, float] | None) -> Any:
        held_out = {"eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False}
        optimizer = rates and lr_by_part(RecipeConfig(str(tmp_path), **held_out), rates)
        whole = {"projector": "full", "language": "full"}
        given = {"optimizer_cls_and_kwargs": optimizer}
        made = pieces(llava, tmp_path, trains=whole, answers=False, given=given, save_steps=2, **held_out)
        made.prove(whole, require_answers=False)
        return made.trainer

    first = run({"projector": 0.002})
    first.train()
    shutil.rmtree(tmp_path / "output/checkpoint-4")
    again = run({"projector": 0.002})
    again.train(resume_from_checkpoint=latest_checkpoint(again))
    assert runs.same(runs.weights(first.model), runs.weights(again.model))
    shutil.rmtree(tmp_path / "output/checkpoint-4")
    for rates, said in (
        ({"projector": 0.005}, "projector: recorded 0.002, now 0.005"),
        ({"projector": 0.002, "language": 0.1}, "language: recorded None, now 0.1"),
    ):
        with pytest.raises(ValueError, match=rf"belongs to another run:\n  lr_by_part\.{said}"):
            latest_checkpoint(run(rates))
    with pytest.raises(ValueError, match=r"lr_by_part\.projector: recorded 0\.002, now 0\.005"):
        run({"projector": 0.005}).train(resume_from_checkpoint=str(tmp_path / "output/checkpoint-2"))
    with pytest.raises(ValueError, match=r"lr_by_part: recorded \{.*, now None"):
        latest_checkpoint(run(None))


def test_other_parameters_are_refused(broken: Path, llava: Path, tiny_model: Any) -> None:
    model = tiny_model("llava15")
    model.model.vision_tower.requires_grad_(False)
    with pytest.raises(ValueError, match=r"trained.tensors: recorded \d+, now \d+"):
        latest_checkpoint(untrained(llava, broken, model=model))


def test_names_of_the_hub_are_refused(broken: Path, llava: Path) -> None:
    folder = broken / "checkpoint-4"
    shutil.copy(llava / "model.safetensors", folder)
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(ValueError, match="tensors of the model are not in it, such as"):
        latest_checkpoint(untrained(llava, broken))


def test_a_checkpoint_without_optimizer_is_refused(llava: Path, tmp_path: Path) -> None:
    train(llava, tmp_path, save_only_model=True)
    with pytest.raises(ValueError, match="no optimizer, no scheduler, no random state"):
        latest_checkpoint(untrained(llava, tmp_path, save_only_model=True))


def test_other_versions_and_a_longer_run_are_said(broken: Path, llava: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest = broken / "checkpoint-4" / MANIFEST
    content = read_manifest(manifest.parent)
    assert content["notes"]["versions"].keys() > {"vlm_sft", "trl", "torch"}
    content["notes"]["versions"] |= {"trl": "0.9.0", "vlm_sft": "0.0.1"}
    write_manifest(manifest.parent, content)
    assert latest_checkpoint(untrained(llava, broken, max_steps=8)) == str(broken / "checkpoint-4")
    said = capfd.readouterr().err
    assert "checkpoint-4 is resumed; versions.trl: recorded '0.9.0', now" in said
    assert "checkpoint-4 is resumed; versions.vlm_sft: recorded '0.0.1', now" in said
    assert "checkpoint-4 is resumed; max_steps: recorded 4, now 8" in said


def test_a_checkpoint_asked_for_by_flag_is_not_passed_over(broken: Path, llava: Path) -> None:
    trainer = untrained(llava, broken, resume_from_checkpoint=str(broken / "checkpoint-2"))
    with pytest.raises(ValueError, match=r"--resume_from_checkpoint .*checkpoint-2 has no effect"):
        latest_checkpoint(trainer)


def test_a_finished_run_is_not_overwritten(broken: Path, llava: Path) -> None:
    before = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="checkpoint-2, checkpoint-4, and a run that starts after step 0"):
        untrained(llava, broken).train()
    assert before == {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_finished_run_that_is_resumed_changes_nothing(strategy: str, llava: Path, tmp_path: Path) -> None:
    options = {"max_steps": 2, "lr_scheduler_type": "constant", "save_strategy": strategy, "save_steps": 2}
    reference = train(llava, tmp_path, **options)
    assert runs.same(reference, train(llava, tmp_path, **options))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def lock_and_tell(folder: Path, ready: Any, done: Any) -> None:
    guard = SafeCheckpoints()
    guard._lock(folder)
    ready.set()
    done.wait(60)


def test_two_runs_do_not_share_a_folder(llava: Path, tmp_path: Path) -> None:
    ready, done = forks().Event(), forks().Event()
    other = forks().Process(target=lock_and_tell, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(60)
    with pytest.raises(ValueError, match="another process is training in"):
        untrained(llava, tmp_path).train()
    done.set()
    other.join()
    untrained(llava, tmp_path).train()
    assert verify_checkpoint(tmp_path / "checkpoint-4") == []


def test_what_was_left_is_moved_only_once_it_is_in_the_way(broken: Path, llava: Path) -> None:
    flip(broken / "checkpoint-4/model.safetensors")
    trainer = untrained(llava, broken)
    resumed = latest_checkpoint(trainer)
    assert (broken / "checkpoint-4").is_dir()
    trainer.train(resume_from_checkpoint=resumed)
    assert verify_checkpoint(broken / "checkpoint-4") == []
    assert verify_checkpoint(broken / "incomplete-checkpoint-4") == ["model.safetensors has changed"]


# Settings that would defeat it


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hub_token": "hf_secret"}, "hub_token would be written in clear text"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint saves past"),
        ({"save_total_limit": 1}, "save_total_limit 1 .* at least 2"),
        ({"save_total_limit": 2, "metric_for_best_model": "loss"}, "save_total_limit 2 .* at least 3"),
    ],
)
def test_arguments_that_defeat_it_are_refused(options: dict[str, Any], said: str, llava: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        untrained(llava, tmp_path, **options)
    assert "hf_secret" not in str(refused.value)


def test_no_token_reaches_a_file(whole: tuple[Path, dict[str, Any]]) -> None:
    saved = torch.load(whole[0] / "checkpoint-2/training_args.bin", weights_only=False)
    assert saved.hub_token is None


def test_a_trainer_without_the_callback_is_refused(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no SafeCheckpoints\(\) among its callbacks"):
        latest_checkpoint(runs.trainer(llava, tmp_path, callbacks=[]))
