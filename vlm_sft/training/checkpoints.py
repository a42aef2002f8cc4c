"""Checkpoints that are complete or absent, and resume only the run they belong to."""

from __future__ import annotations

import math
import shutil
import signal
import threading
from collections.abc import Mapping, Sized
from importlib.metadata import distributions
from pathlib import Path
from types import MethodType
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, extract_model_from_parallel
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vlm_sft.common import base_of, listed, lock_file
from vlm_sft.distributed import any_rank, on_main, print_main
from vlm_sft.models import fingerprints
from vlm_sft.models.fingerprints import differences
from vlm_sft.models.loading import ADAPTER_WEIGHTS
from vlm_sft.models.manifest import MANIFEST, read_manifest, verify_checkpoint, write_manifest
from vlm_sft.training.batches import ORDER, rows_per_step
from vlm_sft.upstream import restore_adapter, save_with_own_names

# What changes no trained number, by how its name begins: how is logged, evaluated, saved and reported, where, by how
# many workers. What is to be equal is all else. The rows of a step, however split, are compared as `rows_per_step`.
_FREE = (
    *("logging_", "log_", "eval_", "save_", "hub_", "trackio_", "ddp_", "include_", "do_", "dataloader_", "fsdp"),
    *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "push_to_hub", "debug", "local_rank"),
    *("per_device_eval_batch_size", "generation_batch_size", "batch_eval_metrics", "prediction_loss_only"),
    *("bf16_full_eval", "fp16_full_eval", "auto_find_batch_size", "label_names", "skip_memory_metrics", "use_cache"),
    *("resume_from_checkpoint", "restore_callback_states_from_checkpoint", "remove_unused_columns", "deepspeed"),
    *("trust_remote_code", "torch_empty_cache_steps", "enable_jit_checkpoint", "gradient_checkpointing"),
)
# What may change on purpose, and is printed.
_NOTES = (
    *("num_train_epochs", "max_steps", "world_size", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "activation_offloading", "tf32", "use_cpu"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "ignore_data_skip"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)
_LIBRARIES = ("vlm_sft", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


class SafeCheckpoints(TrainerCallback):
    """Makes each checkpoint of the Trainer complete or absent, and refuses to resume one of another run.

    - The last file of a save is `manifest.json`, with size and xxh3 hash of every other. Without it, or where a file
      differs, a checkpoint does not count; the next run moves it to `incomplete-checkpoint-N`.
    - A resume compares all that the run is made of but what changes no trained number (`_FREE`).
    - SIGTERM: the step is finished and saved, and the process exits with 0. Two runs never share an `output_dir`.
    - Beside an adapter lies `training_base.json`: the base it was trained on, as merging needs it.

    Raises `ValueError` for training arguments that defeat this, and for a resume of what does not belong here."""

    made_of: Mapping[str, Any] = {}  # further settings that must be equal, which `prove` knows
    noted: Mapping[str, Any] = {}  # further ones that may change, and are printed
    _checked: Path | None = None
    _terminated = False
    _former_handler: Any = None
    _locked: Any = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        _check_arguments(args)
        model = kwargs["model"]
        self._model_settings = fingerprints.model_settings(model)
        self._base = fingerprints.training_base(model) if hasattr(model, "peft_config") else None
        self._place = str(base_of(model).config.name_or_path)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        output_dir, model = Path(str(args.output_dir)), extract_model_from_parallel(kwargs["model"])
        on_main(lambda: self._lock(output_dir))
        self._settings = self.settings(args, kwargs["train_dataloader"].dataset)
        if state.global_step:
            on_main(lambda: self.check(_folder(args, state), self._settings, model))
            _restore_adapter(model, _folder(args, state))
            print_main(_announcement(args, state, kwargs["train_dataloader"]))
        if state.global_step >= state.max_steps:
            # A finished run, resumed in the middle of an epoch, takes one more step (transformers 5.23).
            for group in kwargs["optimizer"].param_groups:
                group["lr"] = 0.0
        on_main(lambda: _move_incomplete(output_dir, state.global_step))
        if isinstance(model, PreTrainedModel):
            model.save_pretrained = MethodType(save_with_own_names, model)  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread():
            self._former_handler = signal.signal(signal.SIGTERM, self._on_sigterm)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if any_rank(self._terminated):
            self._terminated = control.should_save = True
            control.should_evaluate = False
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step > state.max_steps:
            control.should_save = control.should_evaluate = False
        if control.should_save:
            on_main(lambda: _check_room(_folder(args, state)))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        folder = _folder(args, state)
        PartialState().wait_for_everyone()
        if args.should_save:
            self.write_base(folder)
            resumable = not args.save_only_model
            write_manifest(folder, {"resumable": resumable, "settings": self._settings, "notes": self.notes(args)})
        PartialState().wait_for_everyone()
        if self._terminated:
            print_main(f"SIGTERM: saved {folder}; stopped after {state.global_step} of {state.max_steps} steps")
            raise SystemExit(0)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        model = extract_model_from_parallel(kwargs["model"])
        vars(model).pop("save_pretrained", None)
        if args.load_best_model_at_end and state.best_model_checkpoint:
            _restore_adapter(model, Path(state.best_model_checkpoint))
        if args.should_save:
            self.write_base(Path(str(args.output_dir)))
        if self._locked is not None:
            self._locked.close()
        if self._former_handler is not None:
            signal.signal(signal.SIGTERM, self._former_handler)

    def write_base(self, folder: Path) -> None:
        """Writes beside an adapter which base it was trained on."""
        if self._base is not None:
            fingerprints.write_training_base(folder, self._base, self._place)

    def settings(self, args: TrainingArguments, dataset: Any) -> dict[str, Any]:
        """All that must be equal between a checkpoint and the run that resumes it."""
        own = {
            "rows_per_step": rows_per_step(args),
            "order_of_rows": ORDER if args.train_sampling_strategy == "group_by_length" else None,
            "data": fingerprints.data_settings(dataset),
            "sharding": _sharding(),
            "dataloader_drop_last": args.dataloader_drop_last,  # the rest of the loader changes no number
        }
        everything: dict[str, Any] = args.to_dict()  # type: ignore[no-untyped-call]
        asked = {n: v for n, v in everything.items() if n not in _NOTES and not n.startswith(_FREE)}
        return fingerprints.plain({**asked, **self._model_settings, **own, **self.made_of})

    def notes(self, args: TrainingArguments) -> dict[str, Any]:
        """What may differ, and is then printed."""
        versions = {name: next((found.version for found in distributions(name=name)), None) for name in _LIBRARIES}
        return fingerprints.plain({**{n: getattr(args, n, None) for n in _NOTES}, **self.noted, "versions": versions})

    def check(self, folder: Path, settings: dict[str, Any], model: nn.Module, *, complete: bool = False) -> None:
        """Raises `ValueError` for a checkpoint that is not `complete`, or not of this run with all that differs; once,
        since a large one takes minutes to read."""
        if folder == self._checked:
            return
        if not complete and (faults := verify_checkpoint(folder)):
            raise ValueError(f"cannot resume from {folder}: {'; '.join(faults)}")
        manifest = read_manifest(folder)
        if not manifest["resumable"]:
            raise ValueError(
                f"{folder} was saved with --save_only_model: no optimizer, no scheduler, no random state to resume "
                "with; move it away to train anew, or choose another --output_dir"
            )
        # The Trainer drops the columns that nothing reads, so a checkpoint may know fewer than the dataset has.
        columns = {name: settings["data"]["columns"].get(name) for name in manifest["settings"]["data"]["columns"]}
        found = differences(manifest["settings"], settings | {"data": settings["data"] | {"columns": columns}})
        if self._base is not None:
            recorded = (fingerprints.read_training_base(folder) or {}).get("weights", {})
            lines = fingerprints.weight_differences(recorded, self._base["weights"])
            found += [f"base weight {line}" for line in lines[:6]]
        found += _key_differences(folder, model)
        if found:
            told = "\n  ".join([f"{folder} belongs to another run:", *found])
            raise ValueError(f"{told}\nPut these settings back, or choose another --output_dir.")
        self._checked = folder

    def _lock(self, output_dir: Path) -> None:
        """Keeps other runs out of the folder, such as processes of one launch that did not join."""
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._locked = (output_dir / ".lock").open("a")  # free again when it is closed or the process ends
        except OSError as error:
            raise ValueError(f"--output_dir {output_dir} cannot be written: {error}; choose another") from error
        try:
            lock_file(self._locked)
        except (BlockingIOError, PermissionError):
            found = f"another process is training in {output_dir}; wait for it or choose another --output_dir"
            how = "Processes of one launch that did not join train alone, each: on a CPU they need --use_cpu"
            raise ValueError(f"{found}. {how}") from None

    def _on_sigterm(self, *_: Any) -> None:
        self._terminated = True
        signal.signal(signal.SIGTERM, self._former_handler)  # a second one acts as it always did
        print_main("SIGTERM: the running step is finished and saved first")


def latest_checkpoint(trainer: Any) -> str | None:
    """The newest complete checkpoint in the trainer's `output_dir`, or None; prints which it skipped, and why.

    Raises `ValueError` where it does not belong to this run, with all that differs, for a trainer without
    `SafeCheckpoints`, and where `resume_from_checkpoint` asks for another choice."""
    guard = next((c for c in trainer.callback_handler.callbacks if isinstance(c, SafeCheckpoints)), None)
    if guard is None:
        raise ValueError("latest_checkpoint: the trainer has no SafeCheckpoints() among its callbacks; add it")
    args = trainer.args
    if args.resume_from_checkpoint is not None:
        found = f"--resume_from_checkpoint {args.resume_from_checkpoint} has no effect"
        why = f"a run resumes from the newest complete checkpoint in --output_dir {args.output_dir} by itself"
        raise ValueError(f"{found}: {why}; leave it out (to resume from an older one, move the newer ones away)")

    def find() -> str | None:
        for folder in reversed(_checkpoints(Path(str(args.output_dir))).values()):
            if faults := verify_checkpoint(folder):
                print_main(f"{folder} is skipped: {'; '.join(faults)}")
                continue
            guard.check(folder, guard.settings(args, trainer.train_dataset), trainer.model, complete=True)
            for line in differences(read_manifest(folder)["notes"], guard.notes(args)):
                print_main(f"{folder} is resumed; {line}")
            return str(folder)
        return None

    return on_main(find)


def _announcement(args: TrainingArguments, state: TrainerState, loader: Any) -> str:
    """The line that a resume begins with."""
    done = f"{state.global_step} of {state.max_steps}"
    if state.global_step >= state.max_steps:
        what = f"{args.output_dir} is finished: {done} steps are done, so nothing more is trained"
        return f"{what}; for more, raise --max_steps or --num_train_epochs"
    sized = isinstance(loader.dataset, Sized)
    epoch = math.ceil(len(loader) / args.gradient_accumulation_steps) if sized else state.max_steps
    skipped = 0 if args.ignore_data_skip else state.global_step % epoch
    where = f"{args.output_dir}: resumes after step {done}, epoch {state.epoch or 0:.2f}"
    return f"{where}; the rows of {skipped} steps of this epoch, {rows_per_step(args)} each, are skipped"


def _sharding() -> str | None:
    """Whose own files a checkpoint holds, loaded strictly and by names: FSDP and DeepSpeed read no others, DeepSpeed
    none of another number of processes."""
    state = PartialState()
    if state.distributed_type == DistributedType.DEEPSPEED:
        return f"DeepSpeed on {state.num_processes} processes"
    return "FSDP" if state.distributed_type == DistributedType.FSDP else None


def _checkpoints(output_dir: Path) -> dict[int, Path]:
    """Step -> folder, complete or not, the oldest first."""
    folders = [(path.name.rpartition("-")[2], path) for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    return dict(sorted((int(step), path) for step, path in folders if step.isdigit() and path.is_dir()))


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _check_room(folder: Path) -> None:
    """Raises before a save that the disk cannot take, going by the last one: torch's own error names no cause."""
    saved = [former for former in _checkpoints(folder.parent).values() if (former / MANIFEST).is_file()]
    needed = sum(file.stat().st_size for file in saved[-1].rglob("*")) if saved else 0
    if (free := shutil.disk_usage(folder.parent).free) < needed:
        raise ValueError(f"no room for {folder.name}: {saved[-1]} takes {needed} bytes, {free} bytes are free")


def _move_incomplete(output_dir: Path, step: int) -> None:
    """Clears what broken saves left beyond this step. Raises for a complete checkpoint that would be overwritten."""
    beyond = {folder: verify_checkpoint(folder) for at, folder in _checkpoints(output_dir).items() if at > step}
    if complete := [folder.name for folder, faults in beyond.items() if not faults]:
        raise ValueError(
            f"{output_dir} holds {', '.join(complete)}, and a run that starts after step {step} would overwrite it: "
            "train with resume_from_checkpoint=latest_checkpoint(trainer), choose another --output_dir, or move it away"
        )
    for folder, faults in beyond.items():
        aside = folder.with_name(f"incomplete-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        print_main(f"{folder} is moved to {aside.name} ({'; '.join(faults)}); delete it when you do not need it")


def _restore_adapter(model: nn.Module, folder: Path) -> None:
    """What the Trainer has loaded by PEFT, which loses some families' adapters."""
    if isinstance(model, PeftModel) and not _sharding():
        missing, left = restore_adapter(model, folder / ADAPTER_WEIGHTS)
        if missing or left:
            raise ValueError(f"{folder / ADAPTER_WEIGHTS} lacks {listed(missing)}, and {listed(left)} fit nowhere")


def _key_differences(folder: Path, model: nn.Module) -> list[str]:
    """What the Trainer would leave as it is in the model, or in the file, without an error."""
    if _sharding() or hasattr(model, "peft_config"):
        return []
    saved = set[str]()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            saved |= set(tensors.keys())
    held = model.state_dict().keys()
    tied = getattr(model, "all_tied_weights_keys", {}).keys()  # saved under the other name
    found = {"of the model are not in it": held - saved - tied, "in it are not the model's": saved - held}
    return [f"{len(names)} tensors {where}, such as {min(names)}" for where, names in found.items() if names]


def _check_arguments(args: TrainingArguments) -> None:
    # The Trainer deletes old checkpoints before the manifest of the new one is written.
    least = 3 if args.metric_for_best_model is not None else 2
    faults = []
    if args.hub_token is not None:
        found = "--hub_token would be written in clear text into training_args.bin of every checkpoint"
        faults.append(f"{found}; log in with `hf auth login` or set HF_TOKEN instead")
    if args.enable_jit_checkpoint:
        faults.append("--enable_jit_checkpoint saves past this callback, which saves on SIGTERM itself; leave it out")
    if 0 < (args.save_total_limit or 0) < least:
        found = f"--save_total_limit {args.save_total_limit} deletes the last good checkpoint before the new is proven"
        faults.append(f"{found}; at least {least} here (the new one, the last one, the best one), or None")
    if faults:
        raise ValueError("SafeCheckpoints: " + "; ".join(faults))
