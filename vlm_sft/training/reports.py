"""What a finished run leaves beside its weights: the loss as a picture, the facts as JSON, a model card.

Every process may call these; the main one writes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
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

from vlm_sft.models.fingerprints import data_settings, model_settings, plain
from vlm_sft.training.cards import write_model_card
from vlm_sft.training.plots import plot_loss


def write_reports(
    trainer: Any,
    *,
    settings: Mapping[str, Any],
    datasets: Mapping[str, Any],
    results: Mapping[str, Any],
    audit: Mapping[str, Any] | None = None,
) -> None:
    """Writes `loss.png`, `run.json` and the model card into the output folder of a run that has come to its end.

    `settings` are the recipe's own; those of the Trainer join them. `audit` is what `AuditReport.facts()` tells. The
    dataset's name on the card is `settings["dataset_name"]`. It is a recipe's last call: after `trainer.save_model()`,
    where PEFT leaves a card of its own, and the group of processes ends with it.
    """
    output = Path(trainer.args.output_dir)
    history = trainer.state.log_history
    plot_loss(history, output / "loss.png", title=output.name)
    times = {name: value for entry in history for name, value in entry.items() if name in _TIMES}
    write_run_json(
        output / "run.json",
        settings={"recipe": dict(settings), "training": trainer.args.to_dict()},
        model=trainer.model,
        datasets=datasets,
        results=times | dict(results),
        audit=audit,
    )
    write_model_card(trainer, dataset_name=settings.get("dataset_name"), datasets=datasets, results=results)
    trainer.end()


_TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def write_run_json(
    path: str | Path,
    *,
    settings: Mapping[str, Any],
    model: Any,
    datasets: Mapping[str, Any],
    results: Mapping[str, Any],
    audit: Mapping[str, Any] | None = None,
) -> None:
    """Writes what a run was: versions, git commit, settings, data, what was quantized and trained, results, memory.

    `settings` is any nesting of dicts, such as `{"recipe": vars(args), "training": training_args.to_dict()}`;
    `datasets` maps split to dataset; `results` holds metrics, times and counts; `audit` is `AuditReport.facts()`. No
    token or other secret is written, and of a path outside the working directory only the last part.
    """
    if not PartialState().is_main_process:
        return
    facts = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "process_runtime_s": round(time.time() - psutil.Process().create_time(), 1),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "git": _git_state(),
        "hardware": {
            "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "cpu_cores": os.cpu_count(),
            "processes": PartialState().num_processes,
        },
        "settings": settings,
        "data": {split: data_settings(dataset) for split, dataset in datasets.items()},
        "model": model_settings(model)
        | {
            "parameters": model.num_parameters(),
            "trainable_parameters": model.num_parameters(only_trainable=True),
            "trained": _patterns(name for name, weight in model.named_parameters() if weight.requires_grad),
            "quantized": _patterns(name for name, weight in model.named_parameters() if _is_quantized(weight)),
        },
        "audit": audit,
        "results": results,
        "peak_memory_bytes": _peak_memory(),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(_scrubbed(plain(facts)), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def _is_quantized(weight: torch.nn.Parameter) -> bool:
    from bitsandbytes.nn.modules import Int8Params, Params4bit  # seconds to import

    return isinstance(weight, (Params4bit, Int8Params))


def _peak_memory() -> dict[str, int | list[int] | None]:
    """Bytes: of this process, and allocated by torch on each accelerator."""
    gpu = [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())]
    if sys.platform == "win32":
        return {"process": None, "accelerators": gpu}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "accelerators": gpu}


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
