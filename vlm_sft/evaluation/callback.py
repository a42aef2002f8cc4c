"""How right a model's answers to held-out rows are, at every evaluation of a Trainer, with a page to look at."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch.utils.data import Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm_sft.chat.messages import text_of
from vlm_sft.distributed import print_main
from vlm_sft.evaluation.generate import Rows, generate, question_of
from vlm_sft.evaluation.metrics import Metric, Reference, row_score
from vlm_sft.evaluation.pages import Sample, write_samples_html
from vlm_sft.evaluation.trackers import log_samples


class GenerationEvaluation(TrainerCallback):
    """At every evaluation of `trainer`, answers some of `rows` and logs `eval_<name>` for each of `metrics`.

    The numbers join the evaluation's own, so each may be the `metric_for_best_model` (with `greater_is_better` set to
    match). An `EarlyStoppingCallback` that waits for one must be added after this callback. The cost is bounded: at
    most `num_rows` rows, spread evenly over all, and `max_new_tokens` each; `eval_generation_s` logs the seconds it
    took. Every answer is appended to `samples_file` (default: `samples.jsonl` in the output folder); `samples.html`
    beside it shows the newest answers next to the oldest, those before training with `eval_on_start=True`. The
    trackers that the run reports to get some of the pictures (`vlm_sft.evaluation.trackers`).

    - `metrics`: name -> function of (predictions, references), from the metrics module or your own. The first one
      scores the rows of the page, where 1 is right.
    - `references`: the right answers, one entry per row (several for `vqa_accuracy`); default: each row's last answer.

    Raises `ValueError` at construction naming all rows that have no reference.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        rows: Rows,
        metrics: Mapping[str, Metric],
        references: Sequence[Reference] | None = None,
        num_rows: int = 100,
        batch_size: int = 8,
        max_new_tokens: int = 64,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        stop_token: str | None = "auto",
        samples_file: str | Path | None = None,
    ) -> None:
        if len(rows) == 0 or num_rows < 1 or not metrics:
            raise ValueError(f"{len(rows)} rows, num_rows={num_rows}, {len(metrics)} metrics; each must be at least 1")
        if references is not None and len(references) != len(rows):
            raise ValueError(f"{len(references)} references for {len(rows)} rows; give one entry per row")
        count = min(num_rows, len(rows))
        self.numbers = [i * len(rows) // count for i in range(count)]
        found = [question_of(rows[i]).reference if references is None else references[i] for i in self.numbers]
        if missing := [str(i) for i, reference in zip(self.numbers, found, strict=True) if reference is None]:
            raise ValueError(
                f"rows {', '.join(missing)} do not end with an assistant message, so there is nothing to compare an "
                "answer with; leave them out or pass references=..."
            )
        self.trainer = trainer
        self.rows = rows
        self.metrics = dict(metrics)
        self.references = [reference for reference in found if reference is not None]
        self.samples_file = Path(samples_file or Path(trainer.args.output_dir, "samples.jsonl"))
        self.settings: dict[str, Any] = {
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            "chat_template_kwargs": chat_template_kwargs,
            "stop_token": stop_token,
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        print_main(
            f"Each evaluation generates answers to {len(self.numbers)} of {len(self.rows)} rows, up to "
            f"{self.settings['max_new_tokens']} tokens each."
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any = None,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        started = time.perf_counter()
        predictions = generate(
            model,
            self.trainer.processing_class,
            Subset(cast(Any, self.rows), self.numbers),
            progress=not args.disable_tqdm,
            **self.settings,
        )
        scores = {f"eval_{name}": metric(predictions, self.references) for name, metric in self.metrics.items()}
        scores["eval_generation_s"] = round(time.perf_counter() - started, 3)
        if metrics is not None:
            if taken := scores.keys() & metrics.keys():
                raise ValueError(f"the evaluation reports {', '.join(sorted(taken))} itself; name the metric otherwise")
            metrics.update(scores)
        self.trainer.log(scores)
        if state.is_world_process_zero:
            self._append(state.global_step, predictions)
            samples, steps = self._samples(predictions)
            page = self.samples_file.with_suffix(".html")
            write_samples_html(samples, page, title=f"Answers of {page.parent.name}", subtitle=steps)
            log_samples(self.trainer, samples)

    def _append(self, step: int, predictions: Sequence[str]) -> None:
        self.samples_file.parent.mkdir(parents=True, exist_ok=True)
        with self.samples_file.open("a", encoding="utf-8") as file:
            for number, prediction, reference in zip(self.numbers, predictions, self.references, strict=True):
                sample = {
                    "step": step,
                    "row": number,
                    "prediction": prediction,
                    "reference": reference,
                    "scores": {name: metric([prediction], [reference]) for name, metric in self.metrics.items()},
                }
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")

    def _samples(self, predictions: Sequence[str]) -> tuple[list[Sample], str]:
        """The answers beside the oldest to all of the same rows, maybe of an earlier run; and their steps."""
        steps: dict[int, dict[int, str]] = {}
        for line in self.samples_file.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            steps.setdefault(sample["step"], {})[sample["row"]] = sample["prediction"]
        last = self.trainer.state.global_step
        first = min((step for step in steps if step < last and steps[step].keys() >= {*self.numbers}), default=None)
        metric = next(iter(self.metrics.values()))
        samples = []
        for number, after, reference in zip(self.numbers, predictions, self.references, strict=True):
            question = question_of(self.rows[number])
            before = None if first is None else steps[first][number]
            samples.append(
                Sample(
                    images=question.images,
                    question=text_of(question.messages[-1]),
                    reference=reference if isinstance(reference, str) else " | ".join(reference),
                    before=before,
                    after=after,
                    score_before=None if before is None else row_score(metric, before, reference),
                    score=row_score(metric, after, reference),
                )
            )
        return samples, f"step {last}" if first is None else f"before: step {first}, after: step {last}"
