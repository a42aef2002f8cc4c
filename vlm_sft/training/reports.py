"""What a finished run leaves beside its weights: the loss as an image, its record as JSON, a model card.

Every process may call `write_reports`; the main one writes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence, Sized
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import PartialState
from huggingface_hub import ModelCard
from jinja2 import StrictUndefined, Template

from vlm_sft.common import peak_memory
from vlm_sft.models.fingerprints import base_settings, data_settings, model_settings, plain, shareable

_COSTS = re.compile(r"_runtime$|_per_second$|_num_tokens$|_generation_s$|^epoch$")  # run.json holds them
_TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
_PACKAGES = ("vlm_sft", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "pillow")
_SECRET_NAME = re.compile(r"(^|_)(api_key|password|secret)$|^token$|(hub|auth|access)_token$")
_SECRET_VALUE = re.compile(r"\b(hf|sk|ghp|gho|github_pat|glpat|xoxb|xoxp)[-_][A-Za-z0-9_-]{16,}")


def write_reports(
    trainer: Any,
    *,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    facts: Mapping[str, Any],
    held_out: Mapping[str, Any] | None = None,
) -> None:
    """Writes `loss.png`, the model card and, last, `run.json` into the folder of a run that has come to its end.

    `settings` are the recipe's own, among them `dataset_name`; `facts` are what was proven before the first step;
    `held_out` tells which rows were not trained on. No token or other secret is written, and of a path outside the
    working directory only the last part. Call it after `trainer.save_model()`, where PEFT leaves a card of its own."""
    if not PartialState().is_main_process:
        return
    output, state = Path(trainer.args.output_dir), trainer.state
    if any({"loss", "eval_loss"} & entry.keys() for entry in state.log_history):  # not in one before logging_steps
        plot_loss(state.log_history, output / "loss.png", title=output.name)
    _write_model_card(trainer, settings.get("dataset_name"), results, facts)
    record = _machine() | {
        "data": {split: data_settings(rows) for split, rows in _splits(trainer).items()},
        "model": {
            **model_settings(trainer.model),
            "parameters": trainer.model.num_parameters(),
            "trainable_parameters": trainer.model.num_parameters(only_trainable=True),
        },
        "settings": {"recipe": dict(settings), "training": trainer.args.to_dict()},
        "proof": facts,
        "results": {n: v for entry in state.log_history for n, v in entry.items() if n in _TIMES} | dict(results),
        "held_out": held_out,
        "steps": min(state.global_step, state.max_steps),
    }
    text = json.dumps(_scrubbed(plain(record)), indent=2, ensure_ascii=False)
    (output / "run.json").write_text(f"{text}\n", encoding="utf-8")


def recorded_results(output: Path, steps: int) -> dict[str, Any] | None:
    """The results in the `run.json` of a run that ended after so many steps; None where there is none of it."""
    try:
        record = json.loads((output / "run.json").read_text("utf-8"))
        return dict(record["results"]) if record["steps"] == steps else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _splits(trainer: Any) -> dict[str, Any]:
    splits = {"train": trainer.train_dataset, "test": trainer.eval_dataset}
    return {name: rows for name, rows in splits.items() if rows is not None}


def _machine() -> dict[str, Any]:
    """When and with what this process has run, and the memory that it took."""
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    gpus = range(torch.cuda.device_count())
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "process_runtime_s": round(time.time() - psutil.Process().create_time(), 1),
        "versions": {"python": platform.python_version()} | {name: installed.get(name) for name in _PACKAGES},
        "git": _git_state(),
        "hardware": {
            "accelerators": [torch.cuda.get_device_name(i) for i in gpus],
            "cpu_cores": os.cpu_count(),
            "processes": PartialState().num_processes,
        },
        "peak_memory_bytes": {
            "process": peak_memory(),
            "accelerators": [torch.cuda.max_memory_allocated(i) for i in gpus],
        },
    }


def _git_state() -> str | None:
    """Commit of the folder that the running script lies in, `-dirty` where files differ; None outside of git."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    folder = str(Path(script).resolve().parent if script else Path.cwd())
    command = ["git", "-C", folder, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _scrubbed(value: Any, name: str = "") -> Any:
    """The value without secrets, told by name or by spelling, and without paths of the machine."""
    if value is not None and _SECRET_NAME.search(name.lower()):
        return "(hidden)"
    match value:
        case dict():
            return {key: _scrubbed(item, key) for key, item in value.items()}
        case list():
            return [_scrubbed(item) for item in value]
        case str() if name in ("prompt", "system_prompt"):  # words, such as /no_think, and no path
            return _SECRET_VALUE.sub("(hidden)", value)
        case str():
            return shareable(_SECRET_VALUE.sub("(hidden)", value)).replace(str(Path.home()), "~")
    return value


def plot_loss(log_history: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "Loss") -> None:
    """Draws training loss (raw, and smoothed over a fifteenth of the points), evaluation loss with its best step, and
    learning rate of `trainer.state.log_history`: on a logarithmic axis where the smoothed loss falls to a twentieth.
    Values that are not finite are marked on the upper edge. Raises `ValueError` for a history without any loss."""
    import pandas as pd  # half a second, and the next a third: no first step waits for them
    from matplotlib.figure import Figure

    def by_step(key: str) -> Any:  # of a step logged twice (resumed), the later value
        values = {float(entry["step"]): entry[key] for entry in log_history if key in entry and "step" in entry}
        return pd.Series(values, dtype=float).sort_index()

    train, evaluation = by_step("loss"), by_step("eval_loss")
    if train.empty and evaluation.empty:
        raise ValueError("log_history holds neither 'loss' nor 'eval_loss'; train or evaluate first")
    broken = [step for series in (train, evaluation) for step in series.index[~np.isfinite(series)]]
    train, evaluation = (series[np.isfinite(series)] for series in (train, evaluation))
    smooth = train.rolling(2 * (len(train) // 30) + 1, center=True, min_periods=1).mean()  # less at both ends
    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [5, 1]})
    if len(train):
        upper.plot(train, color="tab:blue", alpha=0.3, linewidth=1)
        upper.plot(smooth, color="tab:blue", label=f"training, {smooth.iloc[-1]:.3g} at the end")
    if len(evaluation):
        step, best = evaluation.idxmin(), evaluation.min()
        label = f"evaluation, best {best:.3g} at step {step:.0f}"
        upper.plot(evaluation, color="tab:orange", marker=".", label=label)
        upper.plot(step, best, color="tab:orange", marker="o", markersize=10, fillstyle="none")
    if broken:
        edge = {"transform": upper.get_xaxis_transform(), "clip_on": False}
        upper.plot(broken, [1] * len(broken), "x", color="tab:red", label=f"{len(broken)} not finite", **edge)
    values = pd.concat([smooth, evaluation])
    falls_far = 0 < values.min() < values.max() / 20
    upper.set(title=title, ylabel="loss", yscale="log" if falls_far else "linear")
    upper.legend()
    if len(epochs := by_step("epoch")) and (step := epochs.index[-1]):
        an_epoch = step / epochs.iloc[-1]
        upper.secondary_xaxis("top", functions=(lambda s: s / an_epoch, lambda e: e * an_epoch)).set_xlabel("epoch")
    lower.plot(by_step("learning_rate"), color="tab:gray")
    lower.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    figure.savefig(path)


def _write_model_card(trainer: Any, dataset: str | None, results: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Writes `README.md`: TRL's card with data, method, results and lines that run the model.

    TRL 1.16 calls every model a text generator and links what lies in a folder as if it were on the Hub; here the task
    is image-text-to-text, and of a folder only the name is told."""
    output, args = Path(trainer.args.output_dir), trainer.args
    adapters = getattr(trainer.model, "peft_config", {})
    names = {"base": base_settings(trainer.model)["base_model_name_or_path"], "data": dataset}
    on_hub = {f"{kind}_on_hub": _on_hub(name) for kind, name in names.items()}
    trainer.create_model_card(model_name=output.name, dataset_name=dataset if on_hub["data_on_hub"] else None)
    card = ModelCard.load(output / "README.md", repo_type="model")
    card.data.pop("licence", None)  # TRL's placeholder; the base's license holds
    card.data.pipeline_tag = "image-text-to-text"
    card.data.library_name = "peft" if adapters else "transformers"
    numbers = {name: value for name, value in results.items() if isinstance(value, (int, float))}
    template = Path(__file__).with_name("card.md.jinja").read_text("utf-8")
    card.text = Template(template, undefined=StrictUndefined).render(
        title=output.name,
        name=args.hub_model_id or output.name,
        version=next((found.version for found in importlib.metadata.distributions(name="vlm_sft")), ""),
        adapters=adapters,
        rows={name: len(rows) if isinstance(rows, Sized) else "streamed" for name, rows in _splits(trainer).items()},
        facts={"optimizer": getattr(args.optim, "value", args.optim), "seed": args.seed, **facts},
        results={name: f"{value:.4g}" for name, value in numbers.items() if not _COSTS.search(name)},
        procedure=card.text.partition("## Training procedure")[2],
        **{kind: name if on_hub[f"{kind}_on_hub"] or not name else Path(name).name for kind, name in names.items()},
        **on_hub,
    )
    card.save(output / "README.md")


def _on_hub(name: str | None) -> bool:
    return name is not None and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()
