"""The gate between what a recipe says and what its Trainer holds.

    trainer = SFTTrainer(..., callbacks=vlm_sft.guards(model))
    proof = vlm_sft.prove(trainer, TRAINS, args)     # judges what the trainer holds; prints one table
    trainer.train(...)                               # judged again in `on_train_begin`, on what the loop holds
    return vlm_sft.finish(trainer, proof)

`train()` without `prove`, `prove` without `guards`, and anything exchanged between the two is an error."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import IntervalStrategy
from transformers.utils.generic import is_flash_attention_requested

from vlm_sft import checks
from vlm_sft.chat.audit import AuditReport, audit, check_embedding, check_forward, check_stops, draw_mask
from vlm_sft.chat.collator import ChatCollator
from vlm_sft.chat.packing import check_padding_free
from vlm_sft.common import base_of, listed, restore_rng, rng_state
from vlm_sft.data.rows import held_out_record
from vlm_sft.distributed import on_main, print_main
from vlm_sft.evaluation.callback import AnswerEvaluation
from vlm_sft.evaluation.pages import write_audit_html
from vlm_sft.models.adapters import Trains, check_trains
from vlm_sft.models.freezing import cast_trainable_to_fp32
from vlm_sft.models.manifest import write_manifest
from vlm_sft.models.parts import parts_of
from vlm_sft.training.batches import GroupByLength
from vlm_sft.training.callbacks import KeepRandomState, RestoreGenerationConfig, StopOnNaN, explain_out_of_memory
from vlm_sft.training.checkpoints import SafeCheckpoints
from vlm_sft.training.neftune import noise_by_conversation
from vlm_sft.training.reports import recorded_results, write_reports
from vlm_sft.upstream import score_labelled_positions, widen_once


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
    """What `prove` found: `facts` for the run record (subject -> sentence) and the `report` of the audited rows,
    without their images once it trains. `results` fills when training has ended."""

    facts: dict[str, str]
    report: AuditReport
    flags: Mapping[str, Any]
    held: Mapping[str, Any]  # what must be found again when training begins
    steps: int
    results: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        rest = [f"{name:<11}{text}" for name, text in self.facts.items() if name != "trains"]
        lines = [line for text in rest for line in textwrap.wrap(text, 120, subsequent_indent=" " * 11)]
        return "\n".join([self.facts["trains"], *lines])


class Gate(TrainerCallback):
    """Lets a training begin once (another batch size of `auto_find_batch_size` is the same one), and only as `prove`
    saw it; ends it with evaluation, weights and reports."""

    trainer: Any = None
    proof: Proof | None = None
    batch_size: int | None = None  # of the training that has begun
    eval_on_start: bool = False
    ended: bool = False
    recorded: dict[str, Any] | None = None  # the results of a run that is finished, whose record stays as it is

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        trainer, proof, size = self.trainer, self._proven("train()"), state.train_batch_size
        if self.ended or (self.batch_size is not None and (not args.auto_find_batch_size or size == self.batch_size)):
            found = "train() was called a second time, and what prove() saw has been trained"
            how = "make a new model and trainer (or run the recipe again, which resumes from the newest checkpoint)"
            raise ValueError(f"{found}: {how}")
        self.batch_size = size
        random = rng_state()  # nothing below may change a trained number
        _refuse_exchanged(trainer, proof, state)
        checks.check_optimizer(kwargs["optimizer"], trainer.model, checks.part_rates(trainer), args.learning_rate)
        noise_by_conversation(trainer)
        proof.facts["forward"] = _forward(trainer, proof)
        print_main(f"{'forward':<11}{proof.facts['forward']}")
        output, steps = Path(str(args.output_dir)), state.global_step
        self.recorded = on_main(lambda: recorded_results(output, steps) if steps >= state.max_steps else None)
        self.eval_on_start, args.eval_on_start = args.eval_on_start, args.eval_on_start and self.recorded is None
        if self.recorded is None:
            write_audit_html(proof.report, output / "audit.html")
        if not args.auto_find_batch_size:  # which may begin again, and is then judged again
            for row in proof.report.shortest_of_kinds:
                row.conversation.images.clear()
        restore_rng(random)

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        proof = self._proven("evaluate()")
        if self.trainer.data_collator is not proof.held["trainer.data_collator"]:
            raise ValueError("evaluate(): the trainer's data_collator was exchanged after prove(); make a new trainer")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
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
        held_out = None if trainer.eval_dataset is None else held_out_record(trainer.eval_dataset)
        write_reports(trainer, settings=proof.flags, results=proof.results, facts=proof.facts, held_out=held_out)

    def _proven(self, what: str) -> Proof:
        if self.proof is None:
            found = f"{what} before prove(): nothing has been proven of this run"
            how = "Once the trainer is made, call vlm_sft.prove(trainer, TRAINS, args), and trainer.train() after that"
            raise ValueError(f"{found}. {how}")
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

    Judged is what the trainer holds: that rows were checked with its collator; labels of `num_rows` real rows; which
    parts train, per parameter; what is quantized; the plan of steps, evaluations and the choice of the best; that each
    flag of `args` (a dataclass derived from `vlm_sft.Arguments`, or None without a recipe) was read, and no setting is
    without effect. When training begins: the model's forward, the optimizer's groups, and that nothing was exchanged.

    `require_stop_token=False` for captions, which end without one and answer no question; `require_answers=False` for a
    run that answers no held-out rows (`evaluate_answers`). Trainable weights are cast to float32 here; the last line
    lists all that the library changed. Raises `ValueError` with what was found and the line or flag to change."""
    gate = _gate_of(trainer, "prove()")
    if gate.proof is not None or trainer.state.global_step:
        found = "prove() was called already for this trainer, or it has trained: prove a trainer once, before train()"
        raise ValueError(f"{found}; for other settings make a new model and trainer")
    model, collator, rows = trainer.model, trainer.data_collator, trainer.train_dataset
    if not any(c.model is base_of(model) for c in _callbacks(trainer, RestoreGenerationConfig)):
        raise ValueError("prove(): vlm_sft.guards(model) was given another model than SFTTrainer; give both the same")
    flags = checks.check_flags(trainer, args)
    checks.check_pieces(trainer, collator)
    answers = _callbacks(trainer, AnswerEvaluation)
    checked, *held_out = checks.check_pass(trainer, collator, [each.rows.dataset for each in answers])
    changes = list(getattr(trainer.args, "hardware_changes", ()))
    if own := _own_loss(trainer):
        changes.append(f"the loss is {own}, not TRL's")
    if isinstance(trainer.eval_dataset, Sized) and not len(trainer.eval_dataset):
        trainer.eval_dataset, trainer.args.eval_on_start, trainer.args.load_best_model_at_end = None, False, False
        trainer.args.eval_strategy = IntervalStrategy.NO
        changes.append("no row is held out (--num_eval_rows 0), so nothing is evaluated")
    elif require_answers and not answers:
        raise ValueError(
            "no held-out row is answered, so samples.html and the metrics of answers would be missing: call "
            "vlm_sft.evaluate_answers(trainer, data['test'], METRICS) before prove, or pass require_answers=False"
        )
    if answers and trainer.eval_dataset is None:
        raise ValueError("held-out rows are to be answered, but none are evaluated: pass eval_dataset=data['test']")
    narrow = [weight for weight in model.parameters() if weight.requires_grad and weight.dtype != torch.float32]
    widen_once(model)
    cast_trainable_to_fp32(model)
    if narrow:
        changes.append(f"{len(narrow)} trainable tensors cast to float32")
    parts = check_trains(model, trains)
    quantized = checks.check_storage(trainer)
    report = audit(collator, rows, num_rows, require_stop_token=require_stop_token)
    if not require_stop_token:
        checks.check_captions(report)
    check_embedding(report.rows, model)
    check_stops(collator, report.rows, base_of(model).generation_config)
    random, metrics = rng_state(), {name: metric for each in answers for name, metric in each.metrics.items()}
    steps, plan = checks.plan_of(trainer, metrics)
    restore_rng(random)
    explain_out_of_memory(trainer)
    score_labelled_positions(not trainer.args.torch_compile)
    facts = {
        "trains": "\n".join(parts.lines()),
        "parts": str(parts_of(model)),
        "quantized": quantized,
        **checks.costs(model),
        **checks.row_facts(trainer, checked, report),
        **plan,
        "changed": "; ".join([*changes, *_library_changes(trainer)]),
        **checks.memory_of(trainer),
    }
    (saver,) = _callbacks(trainer, SafeCheckpoints)
    saver.made_of = {
        "collator": collator.made_of(),
        "rows": checked.content,
        "held-out rows": [each.content for each in held_out] or None,
        "lr_by_part": checks.part_rates(trainer) or None,
        "loss": _own_loss(trainer),
    }
    saver.noted = {"image_files_written": checked.written}
    proof = Proof(facts, report, flags, _held(trainer), steps)
    gate.trainer, gate.proof = trainer, proof
    print_main(f"{proof}\n{report.shortest.name:<11}{draw_mask(report.shortest, collator.processor.tokenizer)}")
    return proof


def finish(trainer: Any, proof: Proof) -> dict[str, float]:
    """The results of the last evaluation; ends trackers and the group of processes. All else is written when `train()`
    returns. Raises `ValueError` for a trainer that has not trained, or a proof of another one."""
    gate = _gate_of(trainer, "finish()")
    if gate.proof is not proof:
        found = "finish(trainer, proof): the proof is of another trainer"
        raise ValueError(f"{found}; pass what prove(trainer, ...) returned")
    if not gate.ended:
        found = "finish() before the training has ended, so there is nothing to finish"
        how = "call trainer.train(resume_from_checkpoint=vlm_sft.latest_checkpoint(trainer)) before it"
        raise ValueError(f"{found}: {how}")
    trainer.accelerator.wait_for_everyone()  # or a process would leave while the main one still writes
    trainer.end()
    return proof.results


def _gate_of(trainer: Any, what: str) -> Gate:
    """The trainer's gate. Raises unless all guards are among its callbacks."""
    needed = (RestoreGenerationConfig, GroupByLength, SafeCheckpoints, StopOnNaN, Gate, KeepRandomState)
    if missing := [kind.__name__ for kind in needed if not _callbacks(trainer, kind)]:
        found = f"{what}: {', '.join(missing)} missing among the trainer's callbacks"
        how = "your own may follow: [*vlm_sft.guards(model), EarlyStoppingCallback()]"
        raise ValueError(f"{found}; pass callbacks=vlm_sft.guards(model) to SFTTrainer ({how})")
    gate: Gate = _callbacks(trainer, Gate)[0]
    return gate


def _callbacks(trainer: Any, kind: type) -> list[Any]:
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind)]


def _library_changes(trainer: Any) -> list[str]:
    """What the library changed on these instances, beside what `prove` itself changes."""
    base, args = base_of(trainer.model), trainer.args
    grouped = args.train_sampling_strategy == "group_by_length"
    changes = {
        "the frozen tower stays out of autograd": "enable_input_require_grads" in vars(base),
        "batches of rows of one length, in an order drawn from --seed and the epoch": grouped,
        "NEFTune's noise is scaled by each conversation's own length": args.neftune_noise_alpha is not None,
        f"attention is {base.config._attn_implementation}": is_flash_attention_requested(base.config),
        "rows come without padding": trainer.data_collator.settings.padding_free,
        "checkpoints keep the names of parameters and end with a manifest": True,
        "the random state and the generation config are kept over evaluations": True,
        "the loss scores trained positions alone": args.device.type == "cpu"
        and not (args.torch_compile or _own_loss(trainer)),
        "a step that runs out of memory says why": True,
    }
    return [change for change, is_so in changes.items() if is_so]


def _own_loss(trainer: Any) -> str | None:
    """The name of the function that gives the loss, where it is not TRL's."""
    func = trainer.compute_loss_func or getattr(trainer.compute_loss, "__func__", trainer.compute_loss)
    while isinstance(func, partial):
        func = func.func
    name = getattr(func, "__qualname__", type(func).__qualname__)
    return None if func.__module__.startswith("trl.") else f"{func.__module__}.{name}"


def _held(trainer: Any) -> dict[str, Any]:
    """What must be the same when training begins, by name: objects (compared by identity) and settings."""
    model = extract_model_from_parallel(trainer.model, keep_torch_compile=False)
    collator, train, held_out = trainer.data_collator, trainer.train_dataset, trainer.eval_dataset
    weights, adapters = dict(model.named_parameters()), [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    return {
        "trainer.model": model,
        "trainable weights": frozenset(name for name, weight in weights.items() if weight.requires_grad),
        "dtypes of trainable weights": not trainer.is_deepspeed_enabled  # which casts them as it begins
        and frozenset(f"{name} in {weight.dtype}" for name, weight in weights.items() if weight.requires_grad),
        "scales of adapters": [({**getattr(each, "scaling", {})}, each.merged) for each in adapters],
        "trainer.processing_class": trainer.processing_class,
        "the loss": _own_loss(trainer),
        "trainer.data_collator": collator,
        "settings of the collator or its processor": isinstance(collator, ChatCollator)
        and (collator.settings, collator.fingerprint()),
        "trainer.train_dataset": (train, getattr(train, "_fingerprint", None)),
        "trainer.eval_dataset": (held_out, getattr(held_out, "_fingerprint", None)),
        "trainer.optimizer_cls_and_kwargs": trainer.optimizer_cls_and_kwargs,
        **{f"--{name}": str(value) for name, value in trainer.args.to_dict().items()},
    }


def _refuse_exchanged(trainer: Any, proof: Proof, state: TrainerState) -> None:
    """Raises where the loop is about to train something else than `prove` saw."""
    found, faults = _held(trainer), []
    for name, was in proof.held.items():
        if (now := found[name]) == was:
            continue
        if isinstance(was, frozenset):
            name += f": {listed(now - was)} now, {listed(was - now)} no longer"
        faults.append(f"{name} {now}, was {was}" if name.startswith("--") else name)
    if state.max_steps != proof.steps and state.train_batch_size == trainer.args.train_batch_size:
        faults.append(f"{state.max_steps} steps would run, {proof.steps} were planned")
    if faults:
        told = "; ".join(faults)
        raise ValueError(f"exchanged after prove(): {told}. Change it before prove(trainer, ...), which comes last")


def _forward(trainer: Any, proof: Proof) -> str:
    """What the model, placed as it trains, says to one short row; and that padding-free rows change no loss."""
    sentence = check_forward(trainer.data_collator, proof.report.shortest, trainer.model)
    if not trainer.data_collator.settings.padding_free:
        return sentence
    conversations = [row.conversation._asdict() for row in sorted(proof.report.shortest_of_kinds, key=len)]
    difference = check_padding_free(trainer.model, trainer.data_collator, conversations)
    return f"{sentence}; without padding the loss of a token changes by {difference:.1g}"
