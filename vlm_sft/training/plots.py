"""The loss of a run as a picture, readable at a glance. Every process may call it; the main one writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

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
    layout: Any = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(9, 5.4), dpi=150, facecolor="white", layout=layout)
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
