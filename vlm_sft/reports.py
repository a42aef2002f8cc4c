"""What a finished run leaves to look at: the loss as a picture, answers as a page, the facts as JSON.

Every process may call these; the main one writes.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.resources
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import PartialState
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from vlm_sft.images import to_rgb
from vlm_sft.provenance import data_settings, model_settings, plain

_INK, _SOFT, _LINE = "#1f211f", "#6c6f6a", "#e5e3dc"
_TRAIN, _EVAL, _RATE = "#2f6fb2", "#c8622c", "#8a8d86"


def plot_loss(log_history: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "Loss") -> None:
    """Draws the training loss (raw and smoothed), the evaluation loss with its best step, and the learning rate.

    `log_history` is `trainer.state.log_history`. The smoothed line is a centred moving average over a fifteenth of the
    points. The axis is logarithmic where the smoothed loss falls to a twentieth. Values that are not finite are marked
    on the upper edge.

    Raises `ValueError` for a history without any loss.
    """
    if not PartialState().is_main_process:
        return
    train, evaluation, rate = (_series(log_history, key) for key in ("loss", "eval_loss", "learning_rate"))
    if not (len(train) or len(evaluation)):
        raise ValueError("log_history holds neither 'loss' nor 'eval_loss'; train or evaluate first")
    figure = Figure(figsize=(9, 5.4), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [5, 1], "hspace": 0.06})
    broken = [step for series in (train, evaluation) for step, value in series if not math.isfinite(value)]
    train, evaluation = (series[np.isfinite(series[:, 1])] for series in (train, evaluation))
    smooth = _smoothed(train[:, 1])
    if len(train):
        upper.plot(*train.T, color=_TRAIN, alpha=0.28, linewidth=1)
        upper.plot(train[:, 0], smooth, color=_TRAIN, linewidth=2.2, label=f"training, {smooth[-1]:.3g} at the end")
    if len(evaluation):
        best_step, best = min(evaluation.tolist(), key=lambda point: point[1])
        label = f"evaluation, best {best:.3g} at step {best_step:.0f}"
        upper.plot(*evaluation.T, color=_EVAL, linewidth=2, marker="o", markersize=4.5, label=label)
        upper.plot(best_step, best, color=_EVAL, marker="o", markersize=10, markerfacecolor="white", markeredgewidth=2)
    if broken:
        upper.plot(
            broken,
            [1] * len(broken),
            color="#a6223a",
            linestyle="",
            marker="x",
            markersize=7,
            label=f"{len(broken)} not finite",
            transform=upper.get_xaxis_transform(),
            clip_on=False,
        )
    _scale(upper, np.concatenate([smooth, evaluation[:, 1]]))
    upper.set_title(title, loc="left", fontsize=14, fontweight="bold", color=_INK, pad=12)
    upper.legend(frameon=False, labelcolor=_INK, fontsize=10, loc="upper right")
    lower.plot(*rate.T, color=_RATE, linewidth=1.8)
    peak = rate[:, 1].max(initial=0.0)
    lower.set_yticks([0, peak], ["0", f"{peak:.2g}"])
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    lower.set_ylabel("learning\nrate", color=_SOFT, fontsize=10)
    lower.set_xlabel("step", color=_SOFT, fontsize=10)
    for axes in (upper, lower):
        axes.grid(axis="y", color=_LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", colors=_SOFT, labelsize=9.5, length=0)
        axes.spines[:].set_visible(False)
        axes.spines["bottom"].set(visible=True, color=_LINE)
        axes.margins(x=0.015)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _series(log_history: Sequence[Mapping[str, Any]], key: str) -> Any:
    """Points [N, 2] of (step, value), by step; of a step logged twice (resumed), the later value."""
    points = {float(entry["step"]): float(entry[key]) for entry in log_history if key in entry and "step" in entry}
    return np.array(sorted(points.items())).reshape(-1, 2)


def _smoothed(values: Any) -> Any:
    """Centred moving average, over what there is of the window at both ends."""
    if not len(values):
        return values
    window = np.ones(2 * (len(values) // 30) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _scale(axes: Any, values: Any) -> None:
    if len(values) and 0 < values.min() < values.max() / 20:
        axes.set_yscale("log")
        axes.set_ylabel("loss, logarithmic", color=_SOFT, fontsize=10)
    else:
        axes.set_ylabel("loss", color=_SOFT, fontsize=10)
        axes.set_ylim(bottom=0)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row of the page. Scores run from 0 to 1; a score of 1 counts as right, any other as wrong."""

    images: Sequence[Any]
    question: str
    reference: str
    after: str
    score: float
    before: str | None = None
    score_before: float | None = None


def write_samples_html(
    samples: Sequence[Sample], path: str | Path, *, title: str = "Samples", subtitle: str = "", picture_px: int = 480
) -> None:
    """Writes the samples as one page that opens from disk: sortable columns, filters for right, wrong and changed rows.

    Pictures lie inside the file, at most `picture_px` on their longer side. Every text is escaped, and the page's
    policy lets no script run but its own.

    Raises `ValueError` for no samples, and for samples of which only some tell what was said before.
    """
    if not PartialState().is_main_process:
        return
    compared = {sample.before is not None and sample.score_before is not None for sample in samples}
    if len(compared) != 1:
        found = "some have it" if samples else "no samples"
        raise ValueError(f"expected samples that all have `before` and `score_before`, or none of them; found: {found}")
    before = compared.pop()
    kinds = [_kinds(sample) for sample in samples]
    counts = {kind: sum(kind in of for of in kinds) for kind in ("all", "right", "wrong", "fixed", "broken")}
    columns = ["#", "Picture", "Question", "Reference", *(["Before"] if before else []), "After", "Score"]
    template = importlib.resources.files("vlm_sft").joinpath("samples.html").read_text(encoding="utf-8")
    values = {
        "title": escape(title),
        "subtitle": escape(subtitle),
        "figures": _figures(samples, before),
        "filters": _filters(counts, before),
        "heads": "".join(map(_head, columns)),
        "rows": "\n".join(
            _row(number, sample, of, columns, picture_px)
            for number, (sample, of) in enumerate(zip(samples, kinds, strict=True), start=1)
        ),
        "style_hash": _csp_hash(template, "style"),
        "script_hash": _csp_hash(template, "script"),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, encoding="utf-8")


def _kinds(sample: Sample) -> list[str]:
    right, was_right = sample.score == 1, sample.score_before == 1
    changed = [] if sample.score_before is None or right == was_right else ["fixed" if right else "broken"]
    return ["all", "right" if right else "wrong", *changed]


def _figures(samples: Sequence[Sample], before: bool) -> str:
    scores = {"mean score after training": [sample.score for sample in samples]}
    if before:
        scores["before"] = [sample.score_before for sample in samples if sample.score_before is not None]
    shown = [(f"{sum(values) / len(values):.1%}", name) for name, values in scores.items()]
    shown.append((str(len(samples)), "rows"))
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for value, name in shown)


def _filters(counts: Mapping[str, int], before: bool) -> str:
    names = {"all": "All", "right": "Right", "wrong": "Wrong"}
    if before:
        names |= {"fixed": "Newly right", "broken": "Newly wrong"}
    return "".join(
        f'<button type="button" data-kind="{kind}" aria-pressed="{str(kind == "all").lower()}">{name}'
        f"<span>{counts[kind]}</span></button>"
        for kind, name in names.items()
    )


def _head(column: str) -> str:
    if column == "Picture":
        return "<th><span>Picture</span></th>"
    kind = "number" if column in ("#", "Score") else "text"
    return f'<th data-kind="{kind}"><button type="button">{column}</button></th>'


def _row(number: int, sample: Sample, kinds: Sequence[str], columns: Sequence[str], picture_px: int) -> str:
    pictures = "".join(_img(image, picture_px) for image in sample.images)
    cells = {
        "#": f'<td class="number">{number}</td>',
        "Picture": f'<td class="pictures"><div>{pictures}</div></td>',
        "Question": _text("Question", escape(sample.question)),
        "Reference": _text("Reference", escape(sample.reference)),
        "Before": _text("Before", _answer(sample.before or "", sample.score_before)),
        "After": _text("After", _answer(sample.after, sample.score)),
        "Score": f'<td class="number" data-label="Score">{sample.score:.3g}</td>',
    }
    return f'<tr data-kinds="{" ".join(kinds)}">{"".join(cells[column] for column in columns)}</tr>'


def _text(label: str, content: str) -> str:
    return f'<td class="text" data-label="{label}">{content}</td>'


def _answer(answer: str, score: float | None) -> str:
    text = escape(answer) or '<span class="nothing">(nothing)</span>'
    return f'<span class="mark {"right" if score == 1 else "wrong"}">{text}</span>'


def _img(image: Any, picture_px: int) -> str:
    """The picture as a data URI: exact if it is tiny (then shown with sharp pixels), else a small WebP."""
    picture = to_rgb(image)
    tiny = max(picture.size) <= 64
    if max(picture.size) > picture_px:
        picture = picture.copy()
        picture.thumbnail((picture_px, picture_px), Image.Resampling.LANCZOS)
    data = BytesIO()
    picture.save(data, "WEBP", lossless=tiny, quality=80)
    source = base64.b64encode(data.getvalue()).decode()
    kind = ' class="small"' if tiny else ""
    return f'<img{kind} src="data:image/webp;base64,{source}" alt="" loading="lazy">'


def _csp_hash(template: str, element: str) -> str:
    """What the page's policy allows: exactly the text between the tags of this element."""
    inside = template.split(f"<{element}>")[1].split(f"</{element}>")[0]
    return "sha256-" + base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()


def write_reports(
    trainer: Any, *, settings: Mapping[str, Any], datasets: Mapping[str, Any], results: Mapping[str, Any]
) -> None:
    """Writes `loss.png` and `run.json` into the output folder of a run that has come to its end: `plot_loss` of its
    history, and `write_run_json` of the recipe's own `settings`, those of the Trainer, and the rest."""
    output = Path(trainer.args.output_dir)
    plot_loss(trainer.state.log_history, output / "loss.png", title=output.name)
    settings = {"recipe": dict(settings), "training": trainer.args.to_dict()}
    write_run_json(output / "run.json", settings=settings, model=trainer.model, datasets=datasets, results=results)


def write_run_json(
    path: str | Path,
    *,
    settings: Mapping[str, Any],
    model: Any,
    datasets: Mapping[str, Any],
    results: Mapping[str, Any],
) -> None:
    """Writes what a run was: versions, git commit, settings, data, what was quantized and trained, results, memory.

    `settings` is any nesting of dicts, such as `{"recipe": vars(args), "training": training_args.to_dict()}`;
    `datasets` maps split to dataset; `results` holds metrics, times and counts. No token or other secret is written,
    and of a path outside the working directory only the last part.
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
