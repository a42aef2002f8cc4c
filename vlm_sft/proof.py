"""The gate between what a recipe says and what its Trainer holds.

    trainer = SFTTrainer(..., callbacks=vlm_sft.guards(model))
    proof = vlm_sft.prove(trainer, TRAINS, args)     # judges what the trainer holds; prints one table
    trainer.train(...)                               # judged again in `on_train_begin`, on what the loop holds
    return vlm_sft.finish(trainer, proof)

`train()` without `prove`, `prove` without `guards`, and anything exchanged between the two is an error.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import IntervalStrategy
from transformers.utils.generic import is_flash_attention_requested

from vlm_sft.chat.audit import AuditReport, audit, check_embedding, check_forward, check_stops, draw_mask
from vlm_sft.chat.packing import check_padding_free
from vlm_sft.checks import (
    check_captions,
    check_flags,
    check_optimizer,
    check_pass,
    check_pieces,
    check_router_loss,
    check_storage,
    costs,
    memory_of,
    row_facts,
)
from vlm_sft.common import base_of, listed, restore_rng, rng_state
from vlm_sft.data.rows import held_out_record
from vlm_sft.distributed import on_main, print_main
from vlm_sft.evaluation.callback import AnswerEvaluation
from vlm_sft.evaluation.pages import write_audit_html
from vlm_sft.models.adapters import check_trains
from vlm_sft.models.freezing import cast_trainable_to_fp32
from vlm_sft.models.manifest import write_manifest
from vlm_sft.models.parts import parts_of
from vlm_sft.models.quantization import check_quantized
from vlm_sft.training.batches import GroupByLength
from vlm_sft.training.callbacks import KeepRandomState, RestoreGenerationConfig, StopOnNaN, explain_out_of_memory
from vlm_sft.training.checkpoints import SafeCheckpoints
from vlm_sft.training.neftune import noise_by_conversation
from vlm_sft.training.plan import Plan, plan_of
from vlm_sft.training.reports import recorded_results, write_reports
from vlm_sft.upstream import widen_once

Trains = Mapping[str, str | Sequence[str]]


def guards(model: Any, *, max_skipped: int = 0) -> list[TrainerCallback]:
    """The callbacks of every recipe, always the same. Make them before the Trainer, which changes the model's
    generation config. `max_skipped` steps without a finite loss or gradient are passed over before the run stops."""
    return [
        RestoreGenerationConfig(model),
        GroupByLength(),
        SafeCheckpoints(),
        StopOnNaN(max_skipped=max_skipped),
        Gate(),
        KeepRandomState(),  # last, since it captures what the others have left
    ]


@dataclass(frozen=True)
class Proof:
    """What `prove` found: `facts` for the run record (subject -> sentence; "changed" is what the library changed on
    model and trainer) and the `report` of the audited rows (no images once it trains). `results` fills at the end."""

    facts: dict[str, str]
    report: AuditReport
    flags: Mapping[str, Any]
    held: Mapping[str, Any]  # by identity or value, to be found again when training begins
    results: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        wrapped = [
            textwrap.wrap(f"{name:<11}{text}", 120, subsequent_indent=" " * 11) for name, text in self.facts.items()
        ]
        return "\n".join([self.facts["trains"], *(line for lines in wrapped[1:] for line in lines)])


class Gate(TrainerCallback):
    """Lets a training begin once, and only as `prove` saw it; ends it with evaluation, weights and reports.

    A beginning at another batch size (`auto_find_batch_size`) is the same training, and is judged again.
    """

    trainer: Any = None
    proof: Proof | None = None
    batch_size: int | None = None  # of the training that has begun
    eval_on_start: bool = False
    ended: bool = False
    recorded: dict[str, Any] | None = None  # the results of a run that is finished, whose record stays as it is

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, proof, size = self.trainer, self._proven("train()"), state.train_batch_size
        if self.ended or (self.batch_size is not None and (not args.auto_find_batch_size or size == self.batch_size)):
            raise ValueError(
                "train() was called a second time, and what prove() saw has been trained: make a new model and trainer "
                "(or run the recipe again, which resumes from the newest checkpoint)"
            )
        self.batch_size = size
        random = rng_state()  # nothing below may change a trained number
        _refuse_exchanged(trainer, proof, state)
        check_optimizer(kwargs["optimizer"], trainer.model)
        noise_by_conversation(trainer)
        proof.facts["forward"] = _forward(trainer, proof)
        print_main(f"{'forward':<11}{proof.facts['forward']}")
        output, steps = Path(str(args.output_dir)), state.global_step
        self.recorded = on_main(lambda: recorded_results(output, steps) if steps >= state.max_steps else None)
        self.eval_on_start, args.eval_on_start = args.eval_on_start, args.eval_on_start and self.recorded is None
        if self.recorded is None:
            write_audit_html(proof.report, output / "audit.html")
        if not args.auto_find_batch_size:  # which may begin again, and is then judged again
            for row in proof.report.rows:
                row.conversation.images.clear()  # decoded, 64 photos of 12 million pixels take 2.3 GB
        restore_rng(random)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        proof = self._proven("evaluate()")
        if self.trainer.data_collator is not proof.held["collator"]:
            raise ValueError("evaluate(): the trainer's data_collator was exchanged after prove(); make a new trainer")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.ended = True
        trainer, proof = self.trainer, self._proven("train()")
        args.eval_on_start = self.eval_on_start
        if self.recorded is not None:
            proof.results.update(self.recorded)
            return
        if trainer.eval_dataset is not None:
            proof.results.update(trainer.evaluate())
        trainer.save_model()
        if args.should_save:
            output = Path(str(args.output_dir))
            _callbacks(trainer, SafeCheckpoints)[0].write_base(output)
            (output / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle with paths
            write_manifest(output, {}, files="*.safetensors")
        splits = {"train": trainer.train_dataset, "test": trainer.eval_dataset}
        write_reports(
            trainer,
            settings=proof.flags,
            datasets={name: rows for name, rows in splits.items() if rows is not None},
            results=proof.results,
            facts=proof.facts,
            held_out=None if trainer.eval_dataset is None else held_out_record(trainer.eval_dataset),
        )

    def _proven(self, what: str) -> Proof:
        if self.proof is None:
            raise ValueError(
                f"{what} before prove(): nothing has been proven of this run. Once the trainer is made, call "
                "vlm_sft.prove(trainer, TRAINS, args), and trainer.train() after that"
            )
        return self.proof


def prove(
    trainer: Any,
    trains: Trains,
    args: Any,
    *,
    num_rows: int = 64,
    require_stop_token: bool = True,
    require_answers: bool = True,
) -> Proof:
    """Facts about what this trainer is about to train, once each agrees with `trains` and `args`; prints them.

    Judged is what the trainer holds: that rows were checked with its collator; labels of `num_rows` real rows; that
    exactly the parts of `trains` train, per parameter; what is quantized; dtypes; the plan of steps, warm-up,
    evaluations and the metric that chooses the best; that each flag of `args` (a dataclass derived from
    `vlm_sft.Arguments`, or None without a recipe) was read, and that no setting is without effect. The model's own
    forward, the optimizer's groups, and that nothing was exchanged since, are judged when training begins.

    `require_stop_token=False` for captions, which end without one and answer no question; `require_answers=False` for a
    run that answers no held-out rows (`evaluate_answers`). Trainable weights are cast to float32 here, and the
    trainer's steps are wrapped to explain an out-of-memory error; the last line lists all that the library changed.

    Raises `ValueError` with what was found, what was expected, and the line or flag to change.
    """
    gate = _gate_of(trainer, "prove()")
    if gate.proof is not None or trainer.state.global_step:
        raise ValueError(
            "prove() was called already for this trainer, or it has trained: prove a trainer once, before train(); for "
            "other settings make a new model and trainer"
        )
    if not any(c.model is base_of(trainer.model) for c in _callbacks(trainer, RestoreGenerationConfig)):
        raise ValueError("prove(): vlm_sft.guards(model) was given another model than SFTTrainer; give both the same")
    collator, rows = trainer.data_collator, trainer.train_dataset
    nothing_held_out = isinstance(trainer.eval_dataset, Sized) and not len(trainer.eval_dataset)
    flags = check_flags(trainer, args)
    check_pieces(trainer, collator)
    check_router_loss(trainer)
    checked = check_pass(trainer, collator, rows)
    changes = list(getattr(trainer.args, "hardware_changes", ()))
    if nothing_held_out:
        trainer.eval_dataset, trainer.args.eval_on_start, trainer.args.load_best_model_at_end = None, False, False
        trainer.args.eval_strategy = IntervalStrategy.NO
        changes.append("no row is held out (--num_eval_rows 0), so nothing is evaluated")
    model = trainer.model
    narrow = [weight for weight in model.parameters() if weight.requires_grad and weight.dtype != torch.float32]
    widen_once(model)
    cast_trainable_to_fp32(model)
    if narrow:
        changes.append(f"{len(narrow)} trainable tensors cast to float32")
    parts = check_trains(model, trains)
    if (packing := getattr(base_of(model).config, "quantization_config", None)) is not None:
        quantized = str(check_quantized(model))
        check_storage(trainer, packing)
    else:
        quantized = "nothing"
    if require_answers and not nothing_held_out and not _callbacks(trainer, AnswerEvaluation):
        raise ValueError(
            "no held-out row is answered, so samples.html and the metrics of answers would be missing: call "
            "vlm_sft.evaluate_answers(trainer, data['test'], METRICS) before prove, or pass require_answers=False"
        )
    if _callbacks(trainer, AnswerEvaluation) and trainer.eval_dataset is None:
        raise ValueError("held-out rows are to be answered, but none are evaluated: pass eval_dataset=data['test']")
    report = audit(collator, rows, num_rows, require_stop_token=require_stop_token)
    if not require_stop_token:
        check_captions(report)
    check_embedding(report.rows, model)
    check_stops(collator, report.rows, base_of(model).generation_config)
    random = rng_state()
    plan = plan_of(trainer, _answer_metrics(trainer))
    restore_rng(random)
    changes += _library_changes(trainer, model)
    explain_out_of_memory(trainer)
    facts = {
        "trains": "\n".join(parts.lines()),
        "parts": str(parts_of(model)),
        "quantized": quantized,
        **costs(model),
        **row_facts(trainer, checked, report),
        **plan.facts,
        "changed": "; ".join(changes) or "nothing",
    }
    if torch.accelerator.is_available() and not trainer.args.use_cpu:
        facts["memory"] = memory_of(trainer)
    (saver,) = _callbacks(trainer, SafeCheckpoints)
    saver.made_of = {"collator": collator.made_of(), "rows": checked.content}
    saver.noted = {"image_files_written": checked.written}
    shortest = report.shortest
    proof = Proof(facts, report, flags, _held(trainer, collator, plan))
    gate.trainer, gate.proof = trainer, proof
    print_main(f"{proof}\n{shortest.name:<11}{draw_mask(shortest, collator.processor.tokenizer)}")
    return proof


def finish(trainer: Any, proof: Proof) -> dict[str, float]:
    """The results of the last evaluation; ends trackers and the group of processes.

    Evaluation, weights with processor, `loss.png`, `run.json` and the model card are already written when `train()`
    returns, so a run that ends before this line loses none of them. Raises `ValueError` for a trainer that has not
    trained, or a proof of another one.
    """
    gate = _gate_of(trainer, "finish()")
    if gate.proof is not proof:
        raise ValueError(
            "finish(trainer, proof): the proof is of another trainer; pass what prove(trainer, ...) returned"
        )
    if not gate.ended:
        raise ValueError(
            "finish() before the training has ended, so there is nothing to finish: call trainer.train("
            "resume_from_checkpoint=vlm_sft.latest_checkpoint(trainer)) before it"
        )
    trainer.accelerator.wait_for_everyone()  # or a process would leave while the main one still writes
    trainer.end()
    return proof.results


def _gate_of(trainer: Any, what: str) -> Gate:
    """The trainer's gate. Raises unless all guards are among its callbacks."""
    needed = (RestoreGenerationConfig, GroupByLength, SafeCheckpoints, StopOnNaN, Gate, KeepRandomState)
    if missing := [kind.__name__ for kind in needed if not _callbacks(trainer, kind)]:
        raise ValueError(
            f"{what}: {', '.join(missing)} missing among the trainer's callbacks; pass callbacks=vlm_sft.guards(model) "
            "to SFTTrainer (your own may follow: [*vlm_sft.guards(model), EarlyStoppingCallback()])"
        )
    gate: Gate = _callbacks(trainer, Gate)[0]
    return gate


def _callbacks(trainer: Any, kind: type) -> list[Any]:
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind)]


def _answer_metrics(trainer: Any) -> dict[str, bool]:
    """Metric of generated answers -> whether less is better."""
    return {
        name: getattr(metric, "lower_is_better", False)
        for evaluation in _callbacks(trainer, AnswerEvaluation)
        for name, metric in evaluation.metrics.items()
    }


def _library_changes(trainer: Any, model: Any) -> list[str]:
    """What the library changed on these instances, beside what `prove` itself casts."""
    base = base_of(model)
    changes = []
    if "enable_input_require_grads" in vars(base):
        changes.append("the frozen tower stays out of autograd")
    if trainer.args.train_sampling_strategy == "group_by_length":
        changes.append("batches of rows of one length, in an order drawn from --seed and the epoch")
    if trainer.args.neftune_noise_alpha is not None:
        changes.append("NEFTune's noise is scaled by each conversation's own length")
    if is_flash_attention_requested(base.config):
        changes.append(f"attention is {base.config._attn_implementation}")
    if trainer.data_collator.settings.padding_free:
        changes.append("rows come without padding")
    return [
        *changes,
        "checkpoints keep the names of parameters and end with a manifest",
        "the random state and the generation config are kept over evaluations",
        "a step that runs out of memory says why",
    ]


def _held(trainer: Any, collator: Any, plan: Plan) -> dict[str, Any]:
    """What must be the same when training begins; compared by identity, but for what is a value."""
    return {
        "model": extract_model_from_parallel(trainer.model, keep_torch_compile=False),
        "collator": collator,
        "settings": collator.settings,
        "processor": collator.fingerprint(),
        "train_dataset": trainer.train_dataset,
        "eval_dataset": trainer.eval_dataset,
        "rows": [getattr(rows, "_fingerprint", None) for rows in (trainer.train_dataset, trainer.eval_dataset)],
        "trainable": _trainable(trainer.model),
        "args": _settings(trainer.args),
        "steps": plan.steps,
        "batch_size": trainer.args.train_batch_size,
    }


def _trainable(model: Any) -> frozenset[str]:
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    return frozenset(name for name, weight in bare.named_parameters() if weight.requires_grad)


def _settings(args: Any) -> dict[str, str]:
    return {name: str(value) for name, value in args.to_dict().items()}


def _refuse_exchanged(trainer: Any, proof: Proof, state: TrainerState) -> None:
    """Raises where the loop is about to train something else than `prove` saw."""
    held = proof.held
    faults = []
    if extract_model_from_parallel(trainer.model, keep_torch_compile=False) is not held["model"]:
        faults.append("trainer.model is another model")
    trainable = _trainable(trainer.model)
    if trainable != held["trainable"]:
        faults.append(
            f"other weights train: {listed(trainable - held['trainable'])} now, "
            f"{listed(held['trainable'] - trainable)} no longer"
        )
    if trainer.data_collator is not held["collator"]:
        faults.append("trainer.data_collator is another collator")
    elif (trainer.data_collator.settings, trainer.data_collator.fingerprint()) != (held["settings"], held["processor"]):
        faults.append("the collator or its processor has other settings")
    for name, fingerprint in zip(("train_dataset", "eval_dataset"), held["rows"], strict=True):
        rows = getattr(trainer, name)
        if rows is not held[name] or getattr(rows, "_fingerprint", None) != fingerprint:
            faults.append(f"trainer.{name} is another dataset")
    now = _settings(trainer.args)
    faults += [f"--{name} is {now[name]} and was {was}" for name, was in held["args"].items() if now[name] != was]
    if state.max_steps != held["steps"] and state.train_batch_size == held["batch_size"]:
        faults.append(f"{state.max_steps} steps would run, {held['steps']} were planned")
    if faults:
        raise ValueError(
            f"exchanged after prove(): {'; '.join(faults)}. Change it before prove(trainer, ...), which comes last"
        )


def _forward(trainer: Any, proof: Proof) -> str:
    """What the model, placed as it trains, says to one short row; and that padding-free rows change no loss."""
    sentence = check_forward(trainer.data_collator, proof.report.shortest, trainer.model)
    if not trainer.data_collator.settings.padding_free:
        return sentence
    conversations = [row.conversation._asdict() for row in sorted(proof.report.rows, key=len)]
    difference = check_padding_free(trainer.model, trainer.data_collator, conversations)
    return f"{sentence}; without padding the loss of a token changes by {difference:.1g}"
