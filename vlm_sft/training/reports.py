"""What a finished run leaves beside its weights: the loss as an image, its record as JSON, a model card.

Every process may call these; the main one writes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState

from vlm_sft.common import is_quantized
from vlm_sft.models.fingerprints import data_settings, model_settings, plain
from vlm_sft.training.cards import write_model_card
from vlm_sft.training.plots import plot_loss


def write_reports(
    trainer: Any,
    *,
    settings: Mapping[str, Any],
    datasets: Mapping[str, Any],
    results: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Writes `loss.png`, `run.json` and the model card into the output folder of a run that has come to its end.

    `settings` are the recipe's own; those of the Trainer join them. `facts` are what was proven before the first step.
    The dataset's name on the card is `settings["dataset_name"]`. Call it after `trainer.save_model()`, where PEFT
    leaves a card of its own.
    """
    output, history = Path(trainer.args.output_dir), trainer.state.log_history
    plot_loss(history, output / "loss.png", title=output.name)
    times = {name: value for entry in history for name, value in entry.items() if name in _TIMES}
    recorded = {"recipe": dict(settings), "training": trainer.args.to_dict()}
    everything = {"settings": recorded, "proof": facts, "results": times | dict(results)}
    write_run_json(output / "run.json", model=trainer.model, datasets=datasets, **everything)
    write_model_card(trainer, dataset_name=settings.get("dataset_name"), datasets=datasets, results=results)


def write_run_json(path: str | Path, *, model: Any, datasets: Mapping[str, Any], **facts: Any) -> None:
    """Writes what a run was: versions, git commit, data, what was quantized and trained, memory, and the `facts`.

    `datasets` maps split to dataset; `facts` are any nesting of dicts. No token or other secret is written, and of a
    path outside the working directory only the last part.
    """
    if not PartialState().is_main_process:
        return
    parameters = dict(model.named_parameters())
    record = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "process_runtime_s": round(time.time() - psutil.Process().create_time(), 1),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "git": _git_state(),
        "hardware": {
            "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "cpu_cores": os.cpu_count(),
            "processes": PartialState().num_processes,
        },
        "data": {split: data_settings(dataset) for split, dataset in datasets.items()},
        "model": model_settings(model)
        | {
            "parameters": model.num_parameters(),
            "trainable_parameters": model.num_parameters(only_trainable=True),
            "trained": _patterns(name for name, weight in parameters.items() if weight.requires_grad),
            "quantized": _patterns(name for name, weight in parameters.items() if is_quantized(weight)),
        },
        "peak_memory_bytes": {
            "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            "accelerators": [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())],
        },
        **facts,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(_scrubbed(plain(record)), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
_PACKAGES = ("vlm_sft", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "pillow")
_SECRET_NAME = re.compile(r"(^|_)(api_key|password|secret)$|^token$|(hub|auth|access)_token$")
_SECRET_VALUE = re.compile(r"\b(hf|sk|ghp|gho|github_pat|glpat|xoxb|xoxp)[-_][A-Za-z0-9_-]{16,}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of the folder that the running script lies in, and whether files differ from it; None outside of git."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    command = ["git", "-C", str(Path(script).resolve().parent if script else Path.cwd())]
    try:
        commit, changes = (
            subprocess.run([*command, *verb], capture_output=True, text=True, check=True).stdout.strip()
            for verb in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "changed_files": len(changes.splitlines())}


def _patterns(names: Iterable[str]) -> dict[str, int]:
    """How many parameters have each name, layer numbers written as `*`."""
    return dict(sorted(Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names).items()))


def _scrubbed(value: Any) -> Any:
    """The value without secrets, told by name or by spelling, and without paths of the machine."""
    match value:
        case dict():
            return {
                key: "(hidden)" if item is not None and _SECRET_NAME.search(key.lower()) else _scrubbed(item)
                for key, item in value.items()
            }
        case list():
            return [_scrubbed(item) for item in value]
        case str():
            return _without_folders(_SECRET_VALUE.sub("(hidden)", value))
    return value


def _without_folders(text: str) -> str:
    if not text.startswith("~") and not Path(text).is_absolute():
        return text.replace(str(Path.home()), "~")
    path = Path(text).expanduser()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else f".../{path.name}"
