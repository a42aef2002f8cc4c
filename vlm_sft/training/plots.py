"""The loss of a run as an image. Every process may call it; the main one writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


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
    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [5, 1]})
    broken = [step for series in (train, evaluation) for step, value in series if not math.isfinite(value)]
    train, evaluation = (series[np.isfinite(series[:, 1])] for series in (train, evaluation))
    smooth = _smoothed(train[:, 1])
    if len(train):
        upper.plot(*train.T, color="tab:blue", alpha=0.3, linewidth=1)
        upper.plot(train[:, 0], smooth, color="tab:blue", label=f"training, {smooth[-1]:.3g} at the end")
    if len(evaluation):
        step, best = min(evaluation.tolist(), key=lambda point: point[1])
        label = f"evaluation, best {best:.3g} at step {step:.0f}"
        upper.plot(*evaluation.T, color="tab:orange", marker=".", label=label)
        upper.plot(step, best, color="tab:orange", marker="o", markersize=10, fillstyle="none")
    if broken:
        edge = {"transform": upper.get_xaxis_transform(), "clip_on": False}
        upper.plot(broken, [1] * len(broken), "x", color="tab:red", label=f"{len(broken)} not finite", **edge)
    values = np.concatenate([smooth, evaluation[:, 1]])
    falls_far = len(values) and 0 < values.min() < values.max() / 20
    upper.set(title=title, ylabel="loss", yscale="log" if falls_far else "linear")
    if not falls_far:
        upper.set_ylim(bottom=0)
    upper.legend(frameon=False)
    lower.plot(*rate.T, color="tab:gray")
    lower.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
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
