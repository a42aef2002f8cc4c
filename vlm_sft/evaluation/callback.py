"""How right a model's answers to held-out rows are, at every evaluation of a Trainer, with a page to look at.

vlm_sft.evaluate_answers(trainer, data["test"], {"anls": anls})
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Subset
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from vlm_sft.chat.collator import ChatCollator
from vlm_sft.distributed import print_main
from vlm_sft.evaluation.generate import Rows, generate, split_reference
from vlm_sft.evaluation.metrics import Metric, Reference
from vlm_sft.evaluation.pages import Sample, make_samples, small_image, write_samples_html

TRACKED_IMAGES, TRACKED_PX = 8, 384
"""What an evaluation sends to a tracker at most, and their longer side, so that a tracker's files stay small."""


def evaluate_answers(
    trainer: Any,
    rows: Rows,
    metrics: Mapping[str, Metric],
    *,
    references: Sequence[Reference] | None = None,
    num_rows: int = 32,
    batch_size: int | None = None,
    max_new_tokens: int = 64,
) -> None:
    """Has `trainer` answer some of `rows` at each evaluation and log `eval_<name>` for each of `metrics`.

    The numbers join the evaluation's own before any other callback sees them, so each may be the
    `metric_for_best_model` (with `greater_is_better` set to match), or what an `EarlyStoppingCallback` waits for. At
    most `num_rows` rows are answered, spread evenly over all; `eval_generation_s` logs the seconds. Every answer is
    appended to `samples.jsonl` in the output folder; `samples.html` there shows the newest answers next to the oldest,
    those before training with `eval_on_start=True`. The trackers that the run reports to get some of the images.

    Where nothing is held out, neither in `rows` nor in the trainer's evaluation, nothing is added.

    - `metrics`: name -> function of (predictions, references), of the metrics module or your own. The first one scores
      the rows of the page, where 1 is right.
    - `batch_size`: rows at a time; default: `--generation_batch_size`, or 8 where the trainer's args have none.
    - `references`: the right answers, one entry per row (several for `vqa_accuracy`); default: each row's last answer.

    Raises `ValueError` naming all rows that have no reference.
    """
    if not isinstance(trainer.data_collator, ChatCollator):
        kind = type(trainer.data_collator).__name__
        raise ValueError(f"data_collator is a {kind}; pass data_collator=collator, the ChatCollator")
    if not len(rows) and not trainer.eval_dataset:  # nothing is held out
        return
    if len(rows) == 0 or num_rows < 1 or not metrics:
        raise ValueError(f"{len(rows)} rows, num_rows={num_rows}, {len(metrics)} metrics; each must be at least 1")
    if references is not None and len(references) != len(rows):
        raise ValueError(f"{len(references)} references for {len(rows)} rows; give one entry per row")
    count = min(num_rows, len(rows))
    numbers = [i * len(rows) // count for i in range(count)]
    found = {i: split_reference(rows[i]).reference if references is None else references[i] for i in numbers}
    asked = {i: reference for i, reference in found.items() if reference is not None}
    if missing := [str(i) for i in numbers if i not in asked]:
        raise ValueError(
            f"rows {', '.join(missing)} do not end with an assistant message, so there is nothing to compare an answer "
            "with; leave them out or pass references=..."
        )
    size = batch_size or getattr(trainer.args, "generation_batch_size", None) or 8
    evaluation = AnswerEvaluation(trainer, rows, asked, dict(metrics), size, max_new_tokens)
    trainer.callback_handler.callbacks.insert(0, evaluation)
    print_main(f"Each evaluation answers {count} of {len(rows)} rows, up to {max_new_tokens} tokens each.")


@dataclass(eq=False)
class AnswerEvaluation(TrainerCallback):
    """What `evaluate_answers` adds. `references` are those of the rows to answer, by their place in `rows`."""

    trainer: Any
    rows: Rows
    references: Mapping[int, Reference]
    metrics: Mapping[str, Metric]
    batch_size: int
    max_new_tokens: int
    skipped: int = 0  # lines of samples.jsonl

    def on_evaluate(
        self, args: Any, state: Any, control: Any, *, model: Any = None, metrics: Any = None, **kwargs: Any
    ) -> None:
        started, references = time.perf_counter(), [*self.references.values()]
        asked = Subset(cast(Any, self.rows), [*self.references])
        settings = {"batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens}
        try:
            predictions = generate(model, self.trainer.data_collator, asked, progress=not args.disable_tqdm, **settings)
        except torch.OutOfMemoryError as error:
            error.add_note(
                f"evaluation after step {state.global_step}: out of memory in answering {self.batch_size} rows at a "
                f"time.\nWays out: --generation_batch_size {max(1, self.batch_size // 2)}; --eval_on_start False"
            )
            raise
        scores = {f"eval_{name}": metric(predictions, references) for name, metric in self.metrics.items()}
        scores["eval_generation_s"] = round(time.perf_counter() - started, 3)
        if metrics is not None:
            if taken := scores.keys() & metrics.keys():
                raise ValueError(f"the evaluation reports {', '.join(sorted(taken))} itself; rename the metric")
            metrics.update(scores)
        self.trainer.log(scores)
        if state.is_world_process_zero:
            page, last = Path(str(args.output_dir), "samples.html"), state.global_step
            steps = self._append(page.with_suffix(".jsonl"), last, predictions)
            # The oldest to all of the same rows, maybe of an earlier run.
            first = min((n for n in steps if n < last and steps[n].keys() >= self.references.keys()), default=None)
            before = None if first is None else [steps[first][number] for number in self.references]
            samples = make_samples(asked, references, next(iter(self.metrics.values())), predictions, before)
            shown = f"step {last}" if first is None else f"before: step {first}, after: step {last}"
            write_samples_html(samples, page, title=f"Answers of {page.parent.name}", subtitle=shown)
            log_samples(self.trainer, samples)

    def _append(self, file: Path, step: int, predictions: Sequence[str]) -> dict[int, dict[int, str]]:
        """Predictions by step and row, all that the file holds now. Lines that a killed run left torn, or that are not
        ours, are left out."""
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_bytes().split(b"\n") if file.exists() else []
        new = []
        for (number, reference), prediction in zip(self.references.items(), predictions, strict=True):
            scores = {name: metric([prediction], [reference]) for name, metric in self.metrics.items()}
            sample = {"step": step, "row": number, "prediction": prediction, "reference": reference, "scores": scores}
            new.append(json.dumps(sample, ensure_ascii=False).encode())
        torn = b"\n" if lines and lines[-1] else b""
        with file.open("ab") as opened:
            opened.write(torn + b"\n".join(new) + b"\n")
        steps: dict[int, dict[int, str]] = {}
        skipped = 0
        for line in filter(bytes.strip, [*lines, *new]):
            with suppress(ValueError):
                match json.loads(line):
                    case {"step": int(step), "row": int(row), "prediction": str(prediction)}:
                        steps.setdefault(step, {})[row] = prediction
                        continue
            skipped += 1
        if skipped > self.skipped:
            print_main(f"{file}: {skipped} lines are not samples of an evaluation and were left out.")
        self.skipped = skipped
        return steps


def log_samples(trainer: Any, samples: Sequence[Sample]) -> None:
    """Shows the first samples that have an image, with question, prediction and reference, under `samples/0`, ... at
    this step of the trackers that the run reports to: TensorBoard, Trackio, Weights & Biases. Call it on the main
    process after `trainer.log`, which opens a tracker's run."""
    captioned = {}
    for number, sample in enumerate([sample for sample in samples if sample.images][:TRACKED_IMAGES]):
        caption = f"{sample.question}\n\nprediction: {sample.after}\n\nreference: {sample.reference}"
        captioned[f"samples/{number}"] = small_image(sample.images[0], TRACKED_PX), caption
    step = trainer.state.global_step
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and (writer := callback.tb_writer) is not None:
            for name, (image, caption) in captioned.items():
                writer.add_image(name, np.asarray(image), step, dataformats="HWC")
                writer.add_text(name, caption, step)
    for package in {"trackio", "wandb"} & {*trainer.args.report_to}:
        tracker = importlib.import_module(package)
        images = {name: tracker.Image(image, caption=caption) for name, (image, caption) in captioned.items()}
        tracker.log(images | {"train/global_step": step})  # as transformers' callbacks of both count their steps
