"""Checkpoints that are complete or absent, and resume only the run they belong to.

trainer = SFTTrainer(..., callbacks=[SafeCheckpoints()])
trainer.train(resume_from_checkpoint=latest_checkpoint(trainer))
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import shutil
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, extract_model_from_parallel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vlm_sft.distributed import any_rank, on_main, print_main
from vlm_sft.models.fingerprints import (
    RATES,
    TRAINING_BASE,
    data_settings,
    differences,
    model_settings,
    plain,
    training_base,
)
from vlm_sft.training.manifests import MANIFEST, read_manifest, verify_checkpoint, write_manifest

# What a checkpoint's optimizer and scheduler bring along whatever the flags say, and what decides the order of rows.
_SETTINGS = (
    *("optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("lr_scheduler_type", "warmup_steps", "bf16", "fp16"),
    *("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last"),
)
# What may change on purpose, and is said.
_NOTES = ("num_train_epochs", "max_steps", "world_size")
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


class SafeCheckpoints(TrainerCallback):
    """Makes each checkpoint of the Trainer complete or absent, and refuses to resume one of another run.

    - The last file of a save is `manifest.json`, with size and sha256 of every other. Without it, or where a file
      differs, a checkpoint does not count; the next run moves it to `incomplete-checkpoint-N`.
    - Checkpoints of a full fine-tune keep the names of its parameters. The Trainer (transformers 5.23) writes the
      Hub's names, finds none of them on resume or for `load_best_model_at_end`, and goes on with the weights it has.
      The final `save_model` writes the Hub's names.
    - SIGTERM: the step is finished and saved, and the process exits with 0. Two runs never share an `output_dir`.
    - Beside an adapter lies `training_base.json`: the base it was trained on, as merging needs it.

    `fingerprint` holds values of your own that must be equal on resume. `allow_mismatch` says what differs and goes
    on. Raises `ValueError` for training arguments that defeat this, and for a resume of what does not belong here.
    """

    def __init__(self, *, fingerprint: Mapping[str, Any] | None = None, allow_mismatch: bool = False) -> None:
        self.fingerprint = fingerprint or {}
        self.allow_mismatch = allow_mismatch
        self._checked: Path | None = None
        self._terminated = False
        self._former_handler: Any = None
        self._locked: Any = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _check_arguments(args)
        self._model_settings = model_settings(kwargs["model"])
        self._base = training_base(kwargs["model"]) if hasattr(kwargs["model"], "peft_config") else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        output_dir, model = _output_dir(args), extract_model_from_parallel(kwargs["model"])
        on_main(lambda: self._lock(output_dir))
        rates = getattr(kwargs["optimizer"], "defaults", {}).get(RATES)
        self._settings = self.settings(args, kwargs["train_dataloader"].dataset, rates)
        if state.global_step:
            resumed = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            on_main(lambda: self.check(resumed, self._settings, model))
        on_main(lambda: _move_incomplete(output_dir, state.global_step))
        if isinstance(model, PreTrainedModel):
            # On this one instance, because no argument of the Trainer reaches `save_original_format`.
            model.save_pretrained = MethodType(_save_pretrained, model)  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread():
            self._former_handler = signal.signal(signal.SIGTERM, self._on_sigterm)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            # A finished run, resumed in the middle of an epoch, takes one more step (transformers 5.23).
            for group in kwargs["optimizer"].param_groups:
                group["lr"] = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if any_rank(self._terminated):
            self._terminated = control.should_save = True
            control.should_evaluate = False
        self._before_save(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before_save(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = _output_dir(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        PartialState().wait_for_everyone()
        if args.should_save:
            self._write_base(folder)
            resumable = not args.save_only_model
            write_manifest(folder, {"resumable": resumable, "settings": self._settings, "notes": _notes(args)})
        PartialState().wait_for_everyone()
        if self._terminated:
            print_main(f"SIGTERM: saved {folder}; stopped after {state.global_step} of {state.max_steps} steps")
            raise SystemExit(0)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        vars(extract_model_from_parallel(kwargs["model"])).pop("save_pretrained", None)
        if args.should_save:
            self._write_base(_output_dir(args))
        if self._locked is not None:
            self._locked.close()
        if self._former_handler is not None:
            signal.signal(signal.SIGTERM, self._former_handler)

    def settings(self, args: TrainingArguments, dataset: Any, rates: Mapping[str, Any] | None) -> dict[str, Any]:
        """All that must be equal between a checkpoint and the run that resumes it."""
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        own = {"rows_per_step": rows, "data": data_settings(dataset), "fingerprint": self.fingerprint, RATES: rates}
        own["sharding"] = _sharding(args)
        return plain({**{name: getattr(args, name) for name in _SETTINGS}, **self._model_settings, **own})

    def check(self, folder: Path, settings: dict[str, Any], model: nn.Module) -> None:
        """Raises `ValueError` for a checkpoint that is not complete or not of this run, with all that differs."""
        if folder == self._checked:
            return
        if faults := verify_checkpoint(folder):
            raise ValueError(f"cannot resume from {folder}: {'; '.join(faults)}")
        manifest = read_manifest(folder)
        # The Trainer drops the columns that nothing reads, so a checkpoint may know fewer than the dataset has.
        columns = {name: settings["data"]["columns"].get(name) for name in manifest["settings"]["data"]["columns"]}
        found = differences(manifest["settings"], settings | {"data": settings["data"] | {"columns": columns}})
        if not manifest["resumable"]:
            found.append("it was saved with save_only_model=True: no optimizer, no scheduler, no random state")
        found += _key_differences(folder, model)
        if found and not self.allow_mismatch:
            listed = "".join(f"\n  {line}" for line in found)
            raise ValueError(
                f"{folder} belongs to another run:{listed}\nPut the settings back, choose another output_dir, or pass "
                "SafeCheckpoints(allow_mismatch=True) to go on all the same."
            )
        for line in found:
            print_main(f"{folder} is resumed although {line}")
        self._checked = folder

    def _lock(self, output_dir: Path) -> None:
        """Keeps other runs out of the folder, such as processes of one launch that did not join."""
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._locked = (output_dir / ".lock").open("a")  # free again when it is closed or the process ends
        except OSError as error:
            raise ValueError(f"output_dir={str(output_dir)!r} cannot be written: {error}; choose another") from error
        try:
            fcntl.lockf(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"another process is training in {output_dir}; wait for it or choose another output_dir. Processes of "
                "one launch that did not join train alone, each: on a CPU they need use_cpu"
            ) from None

    def _before_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        if state.global_step > state.max_steps:
            control.should_save = control.should_evaluate = False
        if control.should_save:
            on_main(lambda: _check_room(_output_dir(args), state.global_step))

    def _write_base(self, folder: Path) -> None:
        if self._base is not None:
            (folder / TRAINING_BASE).write_text(json.dumps(self._base, indent=1) + "\n", encoding="utf-8")

    def _on_sigterm(self, *_: Any) -> None:
        self._terminated = True
        signal.signal(signal.SIGTERM, self._former_handler)  # a second one acts as it always did
        print_main("SIGTERM: the running step is finished and saved first")


def latest_checkpoint(trainer: Any) -> str | None:
    """The newest complete checkpoint in the trainer's `output_dir`, or None; says which it skipped, and why.

    Raises `ValueError` where that checkpoint does not belong to this run, with all that differs, for a trainer without
    `SafeCheckpoints`, and where `resume_from_checkpoint` asks for another choice than the newest.
    """
    guard = next((c for c in trainer.callback_handler.callbacks if isinstance(c, SafeCheckpoints)), None)
    if guard is None:
        raise ValueError("latest_checkpoint: the trainer has no SafeCheckpoints() among its callbacks; add it")
    if (asked := trainer.args.resume_from_checkpoint) is not None:
        raise ValueError(
            f"resume_from_checkpoint={asked!r} has no effect: a run goes on from the newest complete checkpoint in "
            f"output_dir={trainer.args.output_dir!r} by itself; leave it out (to go on from an older one, move the "
            "newer ones away)"
        )

    optimizer_kwargs: dict[str, Any] = (trainer.optimizer_cls_and_kwargs or (None, {}))[1]

    def find() -> str | None:
        for folder in reversed(_checkpoints(_output_dir(trainer.args))):
            if faults := verify_checkpoint(folder):
                print_main(f"{folder} is skipped: {'; '.join(faults)}")
                continue
            settings = guard.settings(trainer.args, trainer.train_dataset, optimizer_kwargs.get(RATES))
            guard.check(folder, settings, trainer.model)
            for line in differences(read_manifest(folder)["notes"], _notes(trainer.args)):
                print_main(f"{folder} is resumed; {line}")
            return str(folder)
        return None

    return on_main(find)


def _notes(args: TrainingArguments) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return plain({**{name: getattr(args, name) for name in _NOTES}, "versions": versions})


def _sharding(args: TrainingArguments) -> str | None:
    """Whose files a checkpoint holds: FSDP and DeepSpeed read no others, DeepSpeed none of another number."""
    if (kind := PartialState().distributed_type) == DistributedType.DEEPSPEED:
        return f"DeepSpeed on {args.world_size} processes"
    return "FSDP" if kind == DistributedType.FSDP else None


def _output_dir(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir))


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _checkpoints(output_dir: Path) -> list[Path]:
    """Complete or not, by step."""
    folders = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    return sorted((path for path in folders if path.name.rpartition("-")[2].isdigit()), key=_step)


def _check_room(output_dir: Path, step: int) -> None:
    """Raises before a save that the disk cannot take, going by the last one: torch's own error names no cause."""
    last = max((f for f in _checkpoints(output_dir) if (f / MANIFEST).is_file()), key=_step, default=None)
    if last is None:
        return
    needed = sum(file["size"] for file in read_manifest(last)["files"].values())
    if (free := shutil.disk_usage(output_dir).free) < needed:
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        raise ValueError(f"no room for {name}: {last} takes {needed} bytes, and {free} bytes are free; make room")


def _move_incomplete(output_dir: Path, step: int) -> None:
    """Clears what broken saves left beyond this step. Raises for a complete checkpoint that would be overwritten."""
    beyond = {folder: verify_checkpoint(folder) for folder in _checkpoints(output_dir) if _step(folder) > step}
    if complete := [folder.name for folder, faults in beyond.items() if not faults]:
        raise ValueError(
            f"{output_dir} holds {', '.join(complete)}, and a run that starts after step {step} would overwrite it: "
            "train with resume_from_checkpoint=latest_checkpoint(trainer), choose another output_dir, or move it away"
        )
    for folder, faults in beyond.items():
        aside = folder.with_name(f"incomplete-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        print_main(f"{folder} is moved to {aside.name} ({'; '.join(faults)}); delete it when you do not need it")


def _key_differences(folder: Path, model: nn.Module) -> list[str]:
    """What the Trainer would leave as it is in the model, or in the file, without an error."""
    if hasattr(model, "peft_config"):
        return []
    if PartialState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return []  # they load files of their own, strictly
    held = model.state_dict()
    saved: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            saved |= set(tensors.keys())
    there = {tensor.data_ptr() for name, tensor in held.items() if name in saved}
    # A tied weight is saved under one of its names.
    missing = [name for name, tensor in held.items() if name not in saved and tensor.data_ptr() not in there]
    unknown = sorted(saved - held.keys())
    return [
        f"{len(names)} tensors {where}, such as {names[0]}"
        for names, where in ((missing, "of the model are not in it"), (unknown, "in it are not the model's"))
        if names
    ]


def _save_pretrained(model: PreTrainedModel, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    if Path(save_directory).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        kwargs["save_original_format"] = False
    type(model).save_pretrained(model, save_directory, **kwargs)


def _check_arguments(args: TrainingArguments) -> None:
    faults = []
    if args.hub_token is not None:
        faults.append(
            "hub_token would be written in clear text into training_args.bin of every checkpoint; log in with "
            "`hf auth login` or set HF_TOKEN instead"
        )
    if args.enable_jit_checkpoint:
        faults.append("enable_jit_checkpoint saves past this callback, which saves on SIGTERM itself; leave it out")
    # The Trainer deletes old checkpoints before the manifest of the new one is written.
    least = 3 if args.metric_for_best_model is not None else 2
    if args.save_total_limit is not None and 0 < args.save_total_limit < least:
        faults.append(
            f"save_total_limit={args.save_total_limit} deletes the last good checkpoint before the new one is proven; "
            f"at least {least} here (the new one, the last one{', the best one' if least == 3 else ''}), or None"
        )
    if faults:
        raise ValueError("SafeCheckpoints: " + "; ".join(faults))
