"""A resume says everything that differs, an exact one is exact with any workers, and a finished run stays as it is."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from PIL import Image
from proven import Pieces, RecipeConfig, pieces
from recipe_data import noise
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import vlm_sft
from vlm_sft.chat.packing import pack
from vlm_sft.training import checkpoints
from vlm_sft.training.checkpoints import SafeCheckpoints

ROWS = 40
swept = pytest.mark.sweep


def write_rows(folder: Path, count: int = ROWS) -> Path:
    """Conversations whose images lie in files."""
    folder.mkdir(exist_ok=True)
    lines = []
    for n, image in enumerate(noise(count)):
        image.save(folder / f"{n}.bmp")
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What is {n}?"}]}
        words = {"role": "assistant", "content": f"It is {n}."}
        lines.append(json.dumps({"messages": [question, words], "images": [f"{n}.bmp"]}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def ended(tiny_dir: Any, tmp_path_factory: Any) -> tuple[Path, Path]:
    """A proven run that stands at step 2 of 4; its base, and the folder of its rows and output."""
    folder = tmp_path_factory.mktemp("ended")
    base = Path(shutil.copytree(tiny_dir("llava15"), folder / "llava"))
    run = make(base, folder, write_rows(folder / "rows"))
    run.prove()
    run.trainer.train()
    shutil.rmtree(folder / "output/checkpoint-4")
    return base, folder


def make(base: Path, folder: Path, rows: Path, **options: Any) -> Pieces:
    seed = options.get("seed", 42)
    data = vlm_sft.load_conversations(rows / "rows.jsonl", max_eval_rows=4, seed=seed)
    return pieces(base, folder, data=options.pop("data", data), **options)


def black(folder: Path, *, size: int | None = None) -> None:
    for file in folder.glob("*.bmp"):
        with Image.open(file) as image:
            Image.new("RGB", (size or image.width, size or image.height)).save(file)


def changed(rows: Path, row: Callable[[dict[str, Any], int], Any]) -> None:
    lines = [json.loads(line) for line in (rows / "rows.jsonl").read_text().splitlines()]
    told = [new for n, line in enumerate(lines) if (new := row(line, n)) is not None]
    (rows / "rows.jsonl").write_text("\n".join(map(json.dumps, told)))


def another_answer(row: dict[str, Any], n: int) -> dict[str, Any]:
    row["messages"][1]["content"] = "No." if n < 24 else row["messages"][1]["content"]
    return row


ARGUMENTS = [  # what is changed on purpose, and what is said of it
    ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: recorded None, now 5.0"),
    ({"max_grad_norm": 0.3}, "max_grad_norm: recorded 1.0, now 0.3"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: recorded 0.0, now 0.1"),
    ({"loss_type": "dft"}, "loss_type: recorded 'nll', now 'dft'"),
    ({"lr_scheduler_kwargs": {"min_lr": 1e-4}}, r"lr_scheduler_kwargs: recorded None, now \{'min_lr': 0.0001\}"),
    ({"optim_args": "amsgrad=True"}, "optim_args: recorded None, now 'amsgrad=True'"),
    ({"weight_decay": 0.1}, "weight_decay: recorded 0.0, now 0.1"),
    ({"adam_beta2": 0.95}, "adam_beta2: recorded 0.999, now 0.95"),
    ({"warmup_steps": 1}, "warmup_steps: recorded 0, now 1"),
    ({"seed": 7}, "seed: recorded 42, now 7"),
    ({"data_seed": 7}, "data_seed: recorded None, now 7"),
    ({"train_sampling_strategy": "random"}, "train_sampling_strategy: recorded 'group_by_length', now 'random'"),
    ({"max_length": 400}, "max_length: recorded 512, now 400"),
    ({"average_tokens_across_devices": False}, "average_tokens_across_devices: recorded True, now False"),
    ({"dataloader_drop_last": True}, "dataloader_drop_last: recorded False, now True"),
    ({"per_device_train_batch_size": 4}, "rows_per_step: recorded 2, now 4"),
    ({"gradient_accumulation_steps": 3}, "rows_per_step: recorded 2, now 6"),
]
COLLATORS = [
    ({"train_on": "last_assistant"}, "collator.train_on: recorded 'assistant', now 'last_assistant'"),
    ({"truncation": "trim"}, "collator.truncation: recorded 'error', now 'trim'"),
    ({"stop_token": None}, "collator.stop_token: recorded 'auto', now None"),
    ({"reserved_tokens": "escape"}, "collator.reserved_tokens: recorded 'error', now 'escape'"),
    (
        {"chat_template_kwargs": {"documents": []}},
        r"collator.chat_template_kwargs: recorded None, now \{'documents': \[\]\}",
    ),
]
PIECES = [
    ({"collator": {"train_on": "last_assistant"}}, COLLATORS[0][1]),
    ({"lora": {"lora_dropout": 0.5}}, "adapters.default.lora_dropout: recorded 0.05, now 0.5"),
    ({"load": {"load_in_4bit": True}}, "base.quantization_config"),
]
FILES: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "24 of 40 answers": (lambda base, rows: changed(rows, another_answer), "rows: recorded '.*', now '"),
    "one row less": (lambda base, rows: changed(rows, lambda row, n: row if n else None), "rows: recorded '.*', now '"),
    "two rows changed places": (
        lambda base, rows: changed(rows, lambda row, n: row | {"images": [f"{(1, 0)[n]}.bmp"]} if n < 2 else row),
        "rows: recorded '.*', now '",
    ),
    "black images": (lambda base, rows: black(rows), "image_files_written: recorded '.*', now '"),
    "smaller images": (lambda base, rows: black(rows, size=20), "rows: recorded '.*', now '"),
    "chat template": (
        lambda base, rows: replace(base / "chat_template.jinja", "'ASSISTANT:'", "'ASSISTANT: '"),
        "collator.processor.chat_template: recorded '.*', now '",
    ),
    "image normalisation": (
        lambda base, rows: replace(base / "processor_config.json", "0.48145466", "0.5"),
        r"collator.processor.image_processor.image_mean: recorded \[0.48.*\], now \[0.5",
    ),
    "image size": (
        lambda base, rows: replace(base / "processor_config.json", '"shortest_edge": 32', '"shortest_edge": 48'),
        "collator.processor.image_processor.size.shortest_edge: recorded 32, now 48",
    ),
    "base weights": (
        lambda base, rows: scale(base / "model.safetensors"),
        r"base weight \S+: recorded .* other values",
    ),
}


def replace(file: Path, old: str, new: str) -> None:
    assert old in file.read_text("utf-8")
    file.write_text(file.read_text("utf-8").replace(old, new), "utf-8")


def scale(file: Path) -> None:
    save_file({name: value * 1.5 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


def test_a_setting_changed_on_purpose_is_said(ended: Any, capsys: pytest.CaptureFixture[str]) -> None:
    base, folder = ended
    run = make(base, folder, folder / "rows")
    run.prove()
    (guard,) = [each for each in run.trainer.callback_handler.callbacks if isinstance(each, SafeCheckpoints)]
    proven = guard.made_of
    for changes, said in ARGUMENTS:
        before = {name: getattr(run.trainer.args, name) for name in changes}
        vars(run.trainer.args).update(changes)
        with pytest.raises(ValueError, match=rf"checkpoint-2 belongs to another run:(\n.*)*\n  {said}"):
            vlm_sft.latest_checkpoint(run.trainer)
        vars(run.trainer.args).update(before)
    for settings, said in COLLATORS:
        guard.made_of = proven | {"collator": run.collator.with_settings(**settings).made_of()}
        with pytest.raises(ValueError, match=rf"checkpoint-2 belongs to another run:\n  {said}\nPut"):
            vlm_sft.latest_checkpoint(run.trainer)
    guard.made_of = proven
    capsys.readouterr()
    assert vlm_sft.latest_checkpoint(run.trainer) == str(folder / "output/checkpoint-2")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("options", "said"), PIECES, ids=["collator", "adapter", "4bit"])
def test_a_piece_changed_on_purpose_is_said(options: dict[str, Any], said: str, ended: Any) -> None:
    base, folder = ended
    run = make(base, folder, folder / "rows", **options)
    run.prove()
    with pytest.raises(ValueError, match=rf"checkpoint-2 belongs to another run:(\n.*)*{said}"):
        vlm_sft.latest_checkpoint(run.trainer)


@pytest.mark.parametrize("what", FILES)
def test_a_file_changed_on_purpose_is_said(
    what: str, ended: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images of the same name and size that are newer may be a copy: they are said, and the run continues."""
    change, said = FILES[what]
    for name in ("llava", "rows", "output"):
        shutil.copytree(ended[1] / name, tmp_path / name)
    change(tmp_path / "llava", tmp_path / "rows")
    run = make(tmp_path / "llava", tmp_path, tmp_path / "rows")
    run.prove()
    capsys.readouterr()
    if what == "black images":
        assert vlm_sft.latest_checkpoint(run.trainer)
        assert pytest.approx(1) == len([line for line in capsys.readouterr().err.splitlines() if "resumed; " in line])
    else:
        with pytest.raises(ValueError, match=rf"checkpoint-2 belongs to another run:(\n.*)*{said}"):
            vlm_sft.latest_checkpoint(run.trainer)


def test_other_answers_of_held_out_rows_are_another_run(ended: Any, tmp_path: Path) -> None:
    """The best loss of before comes from them."""
    for name in ("llava", "rows", "output"):
        shutil.copytree(ended[1] / name, tmp_path / name)
    run = make(tmp_path / "llava", tmp_path, tmp_path / "rows")
    held_out = set(run.data["test"]["row"])
    changed(tmp_path / "rows", lambda row, n: another_answer(row, 0) if n in held_out else row)
    run = make(tmp_path / "llava", tmp_path, tmp_path / "rows")
    run.prove()
    with pytest.raises(ValueError, match=r"checkpoint-2 belongs to another run:\n  held-out rows: recorded \['.*\nPut"):
        vlm_sft.latest_checkpoint(run.trainer)


def test_a_run_whose_folders_have_moved_resumes(ended: Any, tmp_path: Path) -> None:
    for name in ("llava", "rows", "output"):
        shutil.copytree(ended[1] / name, tmp_path / name)
    run = make(tmp_path / "llava", tmp_path, tmp_path / "rows")
    run.prove()
    assert vlm_sft.latest_checkpoint(run.trainer) == str(tmp_path / "output/checkpoint-2")


def test_each_training_argument_is_compared_printed_or_known_to_change_nothing(tmp_path: Path) -> None:
    """By exclusion: one that a new release brings is compared."""
    args = RecipeConfig(output_dir=str(tmp_path))
    guard = SafeCheckpoints()
    guard._model_settings = {}
    before = guard.settings(args, [1]), guard.notes(args)
    silent = set()
    for name in args.to_dict():
        value = getattr(args, name)
        vars(args)[name] = "changed"
        try:
            after = guard.settings(args, [1]), guard.notes(args)
        except (TypeError, AttributeError):  # read, so not silent
            after = None
        vars(args)[name] = value
        if after == before:
            silent.add(name)
    unknown = {name for name in silent if not name.startswith(checkpoints._FREE)}
    assert unknown <= {"pad_token", "eos_token"}, unknown
    assert {"learning_rate", "neftune_noise_alpha", "dataloader_drop_last", "seed"}.isdisjoint(silent)
    assert "generation_batch_size" in silent  # what an evaluation that ran out of memory says to change


# Exact


class Dies(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def exact(base: Path, folder: Path, rows: Path, *, packed: bool = False, **options: Any) -> dict[str, torch.Tensor]:
    """The last weights of two epochs of six steps, or {} where they are stopped by `dies`."""
    dies = options.pop("dies", None)
    data = vlm_sft.load_conversations(rows / "rows.jsonl", max_eval_rows=2, seed=42)
    if packed:
        collator = vlm_sft.ChatCollator(vlm_sft.load_processor(base), max_length=512)
        data = vlm_sft.check_rows(data, collator)
        data["train"] = pack(data["train"], max_length=120)
        options |= {"checked": False, "collator": {"padding_free": True}}
    settings = {"max_steps": -1, "num_train_epochs": 2, "eval_on_start": False, "eval_steps": 4, "save_steps": 2}
    options |= settings | {"load_best_model_at_end": False, "answers": False}
    run = make(base, folder, rows, data=data, lora={"lora_dropout": 0.1}, neftune_noise_alpha=5.0, **options)
    run.prove(require_answers=False)
    if dies:
        run.trainer.add_callback(Dies(dies))
        with pytest.raises(KeyboardInterrupt):
            run.trainer.train()
        return {}
    run.trainer.train(resume_from_checkpoint=vlm_sft.latest_checkpoint(run.trainer))
    return runs.weights(run.trainer.model)


@pytest.mark.parametrize(
    ("workers", "persistent", "packed", "strategy"),
    [
        (2, True, False, "random"),
        pytest.param(1, False, True, "random", marks=swept),
        pytest.param(0, False, False, "group_by_length", marks=swept),
        pytest.param(1, True, False, "group_by_length", marks=swept),
        pytest.param(2, False, False, "batch_rebalance", marks=swept),
        pytest.param(2, True, True, "random", marks=swept),
    ],
)
def test_a_resume_is_exact_with_any_workers(
    workers: int, persistent: bool, packed: bool, strategy: str, tiny_dir: Any, tmp_path: Path
) -> None:
    """Stopped in the middle of the first of two epochs, with dropout, noise and evaluations between. And workers are no
    setting of a run: stopped without any, it resumes with them."""
    rows, base = write_rows(tmp_path / "rows", 14), tiny_dir("llava15")
    none = {"packed": packed, "train_sampling_strategy": strategy, "per_device_train_batch_size": 1 if packed else 2}
    options = none | {"dataloader_num_workers": workers, "dataloader_persistent_workers": persistent}
    reference = exact(base, tmp_path / "whole", rows, **options)
    exact(base, tmp_path / "stopped", rows, dies=3, **none)
    assert (tmp_path / "stopped/output/checkpoint-2").is_dir()
    assert runs.same(reference, exact(base, tmp_path / "stopped", rows, **options))


# Finished


def test_a_finished_run_says_so_and_leaves_its_record_alone(
    tiny_dir: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows")
    tmp_path = tmp_path / "Läufe"

    def run(**options: Any) -> dict[str, float]:
        made = make(tiny_dir("llava15"), tmp_path, rows, **options)
        proof = made.prove()
        made.trainer.train(resume_from_checkpoint=vlm_sft.latest_checkpoint(made.trainer))
        assert made.trainer.args.eval_on_start
        return vlm_sft.finish(made.trainer, proof)

    first = run()
    said = capsys.readouterr().err
    assert "resumes" not in said
    output = tmp_path / "output"
    left = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert not (output / "training_args.bin").exists()
    second = run()
    assert "output is finished: 4 of 4 steps are done, so nothing more is trained" in capsys.readouterr().err
    assert {name: value for name, value in second.items() if name in first} == pytest.approx(first)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == left
    # A run that ended before its record was written, or whose record is of fewer steps, ends it now.
    for damaged in (None, "{", (output / "run.json").read_text("utf-8").replace('"steps": 4', '"steps": 2')):
        (output / "run.json").unlink()
        if damaged:
            (output / "run.json").write_text(damaged, "utf-8")
        run()
        assert json.loads((output / "run.json").read_text("utf-8"))["steps"] == 4
    capsys.readouterr()
    run(max_steps=6)
    said = capsys.readouterr().err
    assert (
        "output: resumes after step 4 of 6, epoch 0.22; the rows of 4 steps of this epoch, 2 each, are skipped" in said
    )
    assert json.loads((output / "run.json").read_text("utf-8"))["steps"] == 6


def test_no_path_of_this_machine_is_left_for_others(ended: Any) -> None:
    """In nothing that an upload of the folder takes along: huggingface_hub leaves `.cache/huggingface` out."""
    base, folder = ended
    for file in (folder / "output").rglob("*"):
        if (
            file.is_file()
            and ".cache" not in file.parts
            and file.name not in ("training_args.bin", "trainer_state.json")
        ):
            assert os.fsencode(folder) not in file.read_bytes(), file
            assert os.fsencode(base.parent) not in file.read_bytes(), file
    assert vlm_sft.load_model(folder / "output")  # and yet the base is found


@pytest.mark.parametrize(
    "finished", [pytest.param(False, marks=swept, id="stopped"), pytest.param(True, id="finished")]
)
def test_a_flipped_bit_in_any_file_of_a_run_is_named_or_harmless(
    finished: bool, ended: Any, tiny_dir: Any, tmp_path: Path
) -> None:
    """Outside of checkpoints, whose files have their own test: started again, the run ends with the same weights."""
    base, folder = ended

    def again(place: Path) -> Any:
        run = make(base, place, folder / "rows")
        proof = run.prove()
        run.trainer.train(resume_from_checkpoint=vlm_sft.latest_checkpoint(run.trainer))
        vlm_sft.finish(run.trainer, proof)
        return runs.weights(run.trainer.model)

    shutil.copytree(folder / "output", tmp_path / "whole/output")
    weights, draw = again(tmp_path / "whole"), random.Random(0)
    run = tmp_path / "whole" / "output" if finished else folder / "output"
    inside = [path.relative_to(run) for path in run.rglob("*") if path.is_file()]
    files = sorted(path for path in inside if not path.parts[0].startswith("checkpoint-"))
    assert {"run.json", "samples.jsonl", "README.md", "adapter_model.safetensors"} <= {path.name for path in files}
    for number, file in enumerate(files):
        copy = Path(shutil.copytree(run, tmp_path / str(number) / "output"))
        content = bytearray((copy / file).read_bytes())
        if not content:
            continue
        at, bit = draw.randrange(len(content)), draw.randrange(8)
        content[at] ^= 1 << bit
        (copy / file).write_bytes(content)
        told, found = "", None
        try:
            found = again(copy.parent)
        except ValueError as error:
            told = str(error)
        assert file.name in told or runs.same(weights, found), (file, at, bit, told)
        shutil.rmtree(copy)
