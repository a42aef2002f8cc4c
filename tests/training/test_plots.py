"""The picture shows the history of the loss."""

from __future__ import annotations

import math

import matplotlib.figure
import pytest
from PIL import Image

from vlm_sft.training.reports import plot_loss

HISTORY = [
    {"step": 1, "loss": 4.0, "learning_rate": 1e-3},
    {"step": 2, "loss": 3.0, "learning_rate": 5e-4},
    {"step": 2, "eval_loss": 3.5},
    {"step": 3, "loss": 2.5, "learning_rate": 2e-4},
    {"step": 4, "loss": 2.0, "learning_rate": 0.0},
    {"step": 4, "eval_loss": 3.0},
    {"step": 4, "train_runtime": 9.0, "train_loss": 2.9},
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, path: (figures.append(self), save(self, path))
    )
    return figures


def test_plot_holds_the_history(tmp_path, drawn):
    plot_loss(HISTORY[::-1], tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size == (1350, 810)
    upper, lower = drawn[0].axes
    lines = {str(line.get_label()): line.get_xydata().tolist() for line in upper.lines}
    assert lines["training, 2 at the end"] == [[1, 4], [2, 3], [3, 2.5], [4, 2]]
    assert lines["evaluation, best 3 at step 4"] == [[2, 3.5], [4, 3]]
    assert lower.lines[0].get_xydata().tolist() == [[1, 1e-3], [2, 5e-4], [3, 2e-4], [4, 0]]
    assert upper.get_yscale() == "linear"


def test_plot_smooths_without_lag_and_goes_logarithmic_for_a_long_fall(tmp_path, drawn):
    falling = [{"step": step, "loss": 5 * math.exp(-step / 50) + 0.01 * (step % 2)} for step in range(300)]
    plot_loss(falling, tmp_path / "loss.png")
    upper = drawn[0].axes[0]
    raw, smooth = (line.get_ydata() for line in upper.lines)
    assert upper.get_yscale() == "log"
    assert smooth[150] == pytest.approx(sum(raw[140:161]) / 21)
    assert smooth[0] == pytest.approx(sum(raw[:11]) / 11)


def test_plot_marks_what_is_not_finite(tmp_path, drawn):
    plot_loss([*HISTORY, {"step": 5, "loss": math.nan}, {"step": 6, "loss": math.inf}], tmp_path / "loss.png")
    [marks] = [line for line in drawn[0].axes[0].lines if line.get_label() == "2 not finite"]
    assert list(marks.get_xdata()) == [5, 6]


def test_plot_takes_what_there_is_and_refuses_nothing(tmp_path, drawn):
    plot_loss([{"step": 1, "eval_loss": 2.0}], tmp_path / "loss.png")
    plot_loss([{"step": 1, "loss": math.nan}], tmp_path / "loss.png")
    assert len(drawn) == 2
    with pytest.raises(ValueError, match="neither 'loss' nor 'eval_loss'"):
        plot_loss([{"step": 1, "train_runtime": 3.0}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_plot_shows_epochs_as_well_as_steps(tmp_path, drawn):
    plot_loss([{**entry, "epoch": entry["step"] / 2} for entry in HISTORY], tmp_path / "loss.png")
    [above] = drawn[0].axes[0].child_axes
    assert above.get_xlabel() == "epoch"
    assert above.get_xlim() == pytest.approx([limit / 2 for limit in drawn[0].axes[0].get_xlim()])
