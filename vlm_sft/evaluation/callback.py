"""How right a model's answers to held-out rows are, at every evaluation of a Trainer, with a page to look at."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from vlm_sft.chat.collator import ChatCollator
from vlm_sft.distributed import print_main
from vlm_sft.evaluation.generate import generate, split_reference
from vlm_sft.evaluation.metrics import Metric, Reference
from vlm_sft.evaluation.pages import Sample, make_samples, small_image, write_samples_html

TRACKED_IMAGES, TRACKED_PX = 8, 384
"""What an evaluation sends to a tracker at most, and their longer side, so that a tracker's files stay small."""


def evaluate_answers(
    trainer: Any,
    rows: Any,
    metrics: Mapping[str, Metric],
    *,
    references: Sequence[Reference] | None = None,
    num_rows: int = 32,
    max_new_tokens: int = 64,
) -> None:
    """Has `trainer` answer some of `rows` at each evaluation and log `eval_<name>` for each of `metrics`.

    The numbers join the evaluation's own before any other callback sees them, so each may be the
    `metric_for_best_model` (with `greater_is_better` set to match), or what an `EarlyStoppingCallback` waits for. At
    most `num_rows` rows are answered, spread evenly over all; `eval_generation_s` logs the seconds. Every answer is
    appended to `samples.jsonl` in the output folder; `samples.html` there shows the newest answers next to the oldest,
    those before training with `eval_on_start=True`. The trackers that the run reports to get some of the images.

    `metrics` are functions of (predictions, references); the first scores the rows of the page, where 1 is right.
    `references` has one entry per row, a text or several; default: each row's last answer. Rows are answered
    `--generation_batch_size` at a time, or 8 where the trainer's args have none.

    Adds nothing where nothing is held out, neither in `rows` nor in the trainer's evaluation. Raises `ValueError`
    naming all rows that have no reference."""
    if not isinstance(collator := trainer.data_collator, ChatCollator):
        raise ValueError(f"data_collator is a {type(collator).__name__}; pass data_collator=collator, the ChatCollator")
    if not len(rows) and not trainer.eval_dataset:  # nothing is held out
        return
    if len(rows) == 0 or num_rows < 1 or not metrics:
        raise ValueError(f"{len(rows)} rows, num_rows={num_rows}, {len(metrics)} metrics; each must be at least 1")
    if references is not None and len(references) != len(rows):
        raise ValueError(f"{len(references)} references for {len(rows)} rows; give one entry per row")
    count = min(num_rows, len(rows))
    numbers = [i * len(rows) // count for i in range(count)]
    asked: dict[int, Any] = {i: references[i] if references else split_reference(rows[i]).reference for i in numbers}
    if missing := [str(i) for i, reference in asked.items() if reference is None]:
        found = f"rows {', '.join(missing)} do not end with an assistant message"
        how = "leave them out or pass references=..."
        raise ValueError(f"{found}, so there is nothing to compare an answer with; {how}")
    size = getattr(trainer.args, "generation_batch_size", None) or 8
    evaluation = AnswerEvaluation(trainer, Subset(rows, numbers), asked, dict(metrics), size, max_new_tokens)
    trainer.callback_handler.callbacks.insert(0, evaluation)
    print_main(f"Each evaluation answers {count} of {len(rows)} rows, up to {max_new_tokens} tokens each.")


@dataclass(eq=False)
class AnswerEvaluation(TrainerCallback):
    """What `evaluate_answers` adds. `references` are those of the rows to answer, by their place in all rows."""

    trainer: Any
    rows: Subset[Any]
    references: Mapping[int, Reference]
    metrics: Mapping[str, Metric]
    batch_size: int
    max_new_tokens: int
    steps: dict[int, dict[int, str]] | None = None  # step -> place -> answer, all that samples.jsonl holds

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        started, references, metrics = time.perf_counter(), [*self.references.values()], given["metrics"]
        settings: Any = {"batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens}
        settings["progress"] = not args.disable_tqdm
        try:
            predictions = generate(given["model"], self.trainer.data_collator, self.rows, **settings)
        except torch.OutOfMemoryError as error:
            full = f"after step {state.global_step}: out of memory in answering {self.batch_size} rows at a time"
            ways = f"--generation_batch_size {max(1, self.batch_size // 2)}; --eval_on_start False"
            error.add_note(f"evaluation {full}.\nWays out: {ways}")
            raise
        scores = {f"eval_{name}": metric(predictions, references) for name, metric in self.metrics.items()}
        scores["eval_generation_s"] = round(time.perf_counter() - started, 3)
        if taken := scores.keys() & metrics.keys():
            raise ValueError(f"the evaluation reports {', '.join(sorted(taken))} itself; rename the metric")
        metrics.update(scores)
        self.trainer.log(scores)
        if not state.is_world_process_zero:
            return
        page, last = Path(str(args.output_dir), "samples.html"), state.global_step
        if self.steps is None:
            self.steps = _read_samples(page.with_suffix(".jsonl"))
        self.steps.setdefault(last, {}).update(zip(self.references, predictions, strict=True))
        self._append(page.with_suffix(".jsonl"), last, predictions)
        # The oldest to all of the same rows, maybe of an earlier run.
        first = min(n for n, said in self.steps.items() if n <= last and said.keys() >= self.references.keys())
        before = [self.steps[first][place] for place in self.references] if first < last else None
        samples = make_samples(self.rows, references, next(iter(self.metrics.values())), predictions, before)
        shown = f"before: step {first}, after: step {last}" if before else f"step {last}"
        write_samples_html(samples, page, title=f"Answers of {page.parent.name}", subtitle=shown)
        log_samples(self.trainer, samples)

    def _append(self, file: Path, step: int, predictions: Sequence[str]) -> None:
        with file.open("a", encoding="utf-8") as opened:
            for (place, reference), prediction in zip(self.references.items(), predictions, strict=True):
                scores = {name: metric([prediction], [reference]) for name, metric in self.metrics.items()}
                sample = {"step": step, "row": place, "prediction": prediction, "reference": reference}
                opened.write(json.dumps(sample | {"scores": scores}, ensure_ascii=False) + "\n")


def _read_samples(file: Path) -> dict[int, dict[int, str]]:
    """Answers by step and place. Lines that a killed run left torn, or that are not ours, are left out, and said."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as opened:
        opened.seek(0)
        lines = opened.read().split(b"\n")
        opened.write(b"\n" if lines[-1] else b"")
    steps: dict[int, dict[int, str]] = {}
    skipped = 0
    for line in filter(bytes.strip, lines):
        with suppress(ValueError):
            match json.loads(line):
                case {"step": int(step), "row": int(place), "prediction": str(prediction)}:
                    steps.setdefault(step, {})[place] = prediction
                    continue
        skipped += 1
    if skipped:
        print_main(f"{file}: {skipped} lines are not samples of an evaluation and were left out.")
    return steps


def log_samples(trainer: Any, samples: Sequence[Sample]) -> None:
    """Shows the first samples that have an image, with question, prediction and reference, under `samples/0`, ... at
    this step of the trackers that the run reports to: TensorBoard, Trackio, Weights & Biases. Call it on the main
    process after `trainer.log`, which opens a tracker's run."""
    captioned, step = {}, trainer.state.global_step
    for number, sample in enumerate([sample for sample in samples if sample.images][:TRACKED_IMAGES]):
        caption = f"{sample.question}\n\nprediction: {sample.after}\n\nreference: {sample.reference}"
        captioned[f"samples/{number}"] = small_image(sample.images[0], TRACKED_PX), caption
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and (writer := callback.tb_writer) is not None:
            for name, (image, caption) in captioned.items():
                writer.add_image(name, np.asarray(image), step, dataformats="HWC")
                writer.add_text(name, caption, step)
    for package in {"trackio", "wandb"} & {*trainer.args.report_to}:
        tracker = importlib.import_module(package)
        images = {name: tracker.Image(image, caption=caption) for name, (image, caption) in captioned.items()}
        tracker.log(images | {"train/global_step": step})  # as transformers' callbacks of both count their steps
