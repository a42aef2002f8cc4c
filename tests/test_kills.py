"""Runs killed with `kill -9` at points drawn at random: started again, each ends with the weights of one never stopped.

    VLM_SFT_KILLS=30 VLM_SFT_SEED=7 python -m pytest tests/test_kills.py -m faults

A point is a callback of the Trainer, or a file of the run being opened or renamed by Python.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from proven import pieces
from recipe_data import noise
from together import forks
from transformers import TrainerCallback

import vlm_sft
from vlm_sft.tools import tiny

pytestmark = [pytest.mark.slow, pytest.mark.faults]

KILLS, SEED = int(os.environ.get("VLM_SFT_KILLS", "1")), int(os.environ.get("VLM_SFT_SEED", "0"))
FAMILIES = ("llava15", "qwen2_5_vl", "smolvlm", "gemma3")
WHOLE = {"projector": "full", "language": "full"}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"lora_dropout": 0.1}},
    "dora": {"lora": {"lora_dropout": 0.1, "use_dora": True}},
    "full": {"trains": WHOLE},
    "4bit": {"lora": {"lora_dropout": 0.1}, "load": {"load_in_4bit": True}},
}


class Points(TrainerCallback):
    """Counts the points of a run in this process, and dies at one of them (0: at none)."""

    def __init__(self, output: Path, at: int) -> None:
        self.count, self.at, self.process = 0, at, os.getpid()
        for event in ("step_begin", "pre_optimizer_step", "step_end", "evaluate", "save", "epoch_end", "train_end"):
            setattr(self, f"on_{event}", lambda *_, **__: self.hit())

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("open", "os.rename") and str(output) in str(arguments[0]):
                self.hit()

        sys.addaudithook(hook)

    def hit(self) -> None:
        if os.getpid() == self.process:  # not in a worker
            self.count += 1
            if self.count == self.at:
                os.kill(self.process, signal.SIGKILL)


def train(base: Path, folder: Path, kind: str, at: int, result: Path) -> None:
    """Three epochs of four steps of two batches, with dropout, noise, accumulation, grouping and two workers."""
    torch.set_num_threads(1)
    points = Points(folder, at)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n}?"},
                {"role": "assistant", "content": "So. " * (1 + n % 4)},
            ],
            "images": [image],
            "row": n,
        }
        for n, image in enumerate(noise(10))
    ]
    settings: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}
    settings |= {"per_device_train_batch_size": 1, "neftune_noise_alpha": 5.0, "dataloader_num_workers": 2}
    settings["dataloader_multiprocessing_context"] = "fork"  # as in a run of its own, not in one from a fork server
    settings |= {"eval_on_start": False, "save_total_limit": 3, "load_best_model_at_end": False, "answers": False}
    how = KINDS[kind]
    data = {"train": vlm_sft.load_conversations(write(rows[:8], folder.parent / "rows"), eval_fraction=0)["train"]}
    data["test"] = vlm_sft.load_conversations(write(rows[8:], folder.parent / "held"), eval_fraction=0)["train"]
    run = pieces(base, folder, data=data, **settings, **how)
    run.prove(how.get("trains"), require_answers=False)
    run.trainer.add_callback(points)
    run.trainer.train(resume_from_checkpoint=vlm_sft.latest_checkpoint(run.trainer))
    torch.save({"weights": runs.weights(run.trainer.model), "points": points.count}, result)


def write(rows: list[Any], folder: Path) -> Path:
    from datasets import Dataset

    if not folder.exists():
        Dataset.from_list(rows).remove_columns("row").save_to_disk(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_killed_anywhere_ends_with_the_same_weights(
    family: str, kind: str, tmp_path: Path, record_property: Any
) -> None:
    base = tiny.save(family, tmp_path / family)

    def run(folder: Path, at: int = 0) -> Any:
        process, result = (
            forks().Process(target=train, args=(base, folder, kind, at, tmp_path / "result.pt")),
            tmp_path / "result.pt",
        )
        result.unlink(missing_ok=True)
        process.start()
        process.join(300)
        assert process.exitcode in ((0,) if not at else (0, -signal.SIGKILL)), process.exitcode
        return torch.load(result) if process.exitcode == 0 else None

    whole = run(tmp_path / "whole")
    draw = random.Random(f"{SEED} {family} {kind}")
    points = sorted(draw.sample(range(1, whole["points"] + 1), KILLS))
    for at in points:
        folder = tmp_path / f"killed-{at}"
        assert run(folder, at) is None, f"point {at} of {whole['points']} was not reached"
        again = run(folder)
        assert runs.same(whole["weights"], again["weights"]), f"killed at point {at} of {whole['points']}"
    record_property("shown", f"killed at points {points} of {whole['points']}")
