"""What `prove` compares before training: the recipe's flags, the pieces given to the Trainer, and its rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sized
from dataclasses import fields
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import get_scheduler
from transformers.trainer_utils import has_length

from vlm_sft.chat.audit import AuditReport
from vlm_sft.chat.collator import ChatCollator
from vlm_sft.chat.messages import text_of
from vlm_sft.common import base_of, listed
from vlm_sft.data.check_rows import Checked, rows_checked
from vlm_sft.data.rows import drawn_seed, unpacked
from vlm_sft.distributed import print_main
from vlm_sft.models.fingerprints import differences, loaded_from, plain
from vlm_sft.models.quantization import check_quantized
from vlm_sft.tools.memory import of_run
from vlm_sft.training.config import Arguments, RecipeDefaults, refuse_inert_settings, unread_flags
from vlm_sft.upstream import is_sharded

# What an evaluation of SFTTrainer reports by itself (trl 1.16, transformers 5.23), and whether less of it is better;
# None where neither is.
_REPORTED: dict[str, bool | None] = {"loss": True, "mean_token_accuracy": False}
_REPORTED |= dict.fromkeys(("entropy", "num_tokens", "runtime", "samples_per_second", "steps_per_second"))

# Of a config: how a model was loaded, and what Trainer and SFTTrainer set.
_LOADED = {"_name_or_path", "transformers_version", "dtype", "quantization_config", "use_cache"}
_LOADED |= {"pad_token_id", "bos_token_id", "eos_token_id", "output_router_logits", "router_aux_loss_coef"}


def check_flags(trainer: Any, args: Any) -> dict[str, Any]:
    """The recipe's flags. Raises for one that nothing has read, and for settings without effect."""
    refuse_inert_settings(trainer.args)
    asked, runs = getattr(trainer.args, "attn_implementation", None), base_of(trainer.model).config._attn_implementation
    if asked and asked != runs and {asked, runs} != {"flash_attention_2", "kernels-community/flash-attn2"}:
        found = f"--attn_implementation {asked} has no effect, the model runs {runs}"
        raise ValueError(f"{found}: pass attn_implementation=training_args.attn_implementation to load_model")
    bf16, fp16 = trainer.args.bf16, trainer.args.fp16
    asked = "bf16" if bf16 else "fp16" if fp16 else "no"
    if (runs := trainer.accelerator.mixed_precision) != asked and not trainer.is_deepspeed_enabled:
        found = f"--bf16 {bf16} --fp16 {fp16}, but the run would be in mixed precision {runs!r}"
        where = "in the config of accelerate, its --mixed_precision, or ACCELERATE_MIXED_PRECISION"
        raise ValueError(f"{found}: leave mixed_precision to the flags ({where}), or set the flag")
    if args is None:
        return {}
    if not isinstance(args, Arguments):
        found = f"prove(trainer, TRAINS, args): args is a {type(args).__name__}; expected the recipe's RecipeArguments"
        raise ValueError(f"{found}, a dataclass derived from vlm_sft.Arguments, or None")
    if not isinstance(trainer.args, RecipeDefaults):
        raise ValueError(
            f"the trainer's args are a {type(trainer.args).__name__}, so the flags of the recipe's RecipeConfig, which "
            "derives from vlm_sft.RecipeDefaults, would have no effect: pass args=training_args to SFTTrainer"
        )
    if unread := unread_flags(args):
        flags, names = (", ".join(f"{before}{name}" for name in unread) for before in ("--", "args."))
        found = f"nothing has read {flags}, so it has no effect"
        raise ValueError(f"{found}: pass it on where it belongs ({names}), or remove the field from RecipeArguments")
    # By `vars`, which notes none of them as read.
    return {each.name: vars(args)[each.name] for each in fields(args)}  # type: ignore[arg-type]


def costs(model: Any) -> dict[str, str]:
    """A line on adapters that cost more than they need to, where the model has such."""
    dropout = max((c.lora_dropout for c in getattr(model, "peft_config", {}).values() if c.use_dora), default=0)
    told = f"a step of some 1.6 times LoRA's; with lora_dropout 0 (here {dropout:g}) it costs about as much as LoRA"
    return {"costs": f"DoRA with dropout multiplies each adapted matrix twice: {told}"} if dropout else {}


def memory_of(trainer: Any) -> dict[str, str]:
    """A line on what the run takes of its GPU, where it has one; for a model whose config reads like no other, why
    there is no estimate."""
    if trainer.args.use_cpu or not torch.accelerator.is_available():
        return {}
    lengths = _column(trainer.train_dataset, "length") or [trainer.args.max_length or 2048]
    try:
        return {"memory": of_run(trainer, max(lengths))}
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return {"memory": f"not estimated for this model: {error}"}


def _column(rows: Any, name: str) -> list[int]:
    """The column, without the rest of its rows; empty where `check_rows` did not add it."""
    return list(rows.with_format(None)[name][:]) if name in (rows.column_names or ()) else []


def check_storage(trainer: Any) -> str:
    """What is quantized. Raises unless that is what should be, and where FSDP would cast packed weights, as it casts
    all floats to the run's precision: of other bits than they are stored in, they would be other weights."""
    packing = getattr(base_of(trainer.model).config, "quantization_config", None)
    if packing is None:
        return "nothing"
    stored = getattr(packing, "bnb_4bit_quant_storage", None)
    computed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision, stored)
    if is_sharded() and stored != computed:
        found = f"under FSDP the 4-bit weights are stored as {stored}, and would be cast to {computed} bit by bit"
        how = f"pass the flag of what they are stored in (--bf16, --fp16), or nf4_config(..., compute_dtype={computed})"
        raise ValueError(f"{found}: {how}")
    return check_quantized(trainer.model)[1]


def check_pieces(trainer: Any, collator: Any) -> None:
    """Raises unless collator, processor and model are those of one recipe."""
    if not isinstance(collator, ChatCollator):
        found = f"the trainer's data_collator is a {type(collator).__name__}, which would train other tokens than those"
        raise ValueError(f"{found} checked; pass data_collator=collator, the ChatCollator, to SFTTrainer")
    if getattr(trainer, "_formatting_func", None) is not None:
        found = "the trainer's formatting_func is not called: ChatCollator makes the text of a row's messages"
        how = "Leave formatting_func out of SFTTrainer, and pass to_conversation= to load_conversations"
        raise ValueError(f"{found}. {how}")
    if trainer.processing_class is not collator.processor:
        found = "the trainer's processing_class, which is saved with the model, is another processor"
        raise ValueError(f"{found} than the collator's; pass processing_class=processor to SFTTrainer")
    if (its := collator.settings.max_length) != (asked := trainer.args.max_length):
        found = f"the collator has max_length={its}, the trainer --max_length {asked}"
        raise ValueError(f"{found}: pass max_length=training_args.max_length to ChatCollator")
    (processor_name, processor_revision), (name, revision) = map(loaded_from, (collator.processor, trainer.model))
    if processor_name == name and processor_revision != revision:
        found = f"{name}: the processor is of revision {processor_revision}, the model of {revision}"
        raise ValueError(f"{found}; pass revision=args.model_revision to load_processor and load_model alike")
    if any(module.merged for module in trainer.model.modules() if isinstance(module, BaseTunerLayer)):
        found = "the adapters are merged, and no gradient would reach them"
        raise ValueError(f"{found}: call model.unmerge_adapter() first")
    if changed := _changed_config(trainer.model):
        found = f"the base was changed in memory ({'; '.join(changed)}), and adapters are loaded onto the one in {name}"
        how = "save the changed one (model.save_pretrained, processor.save_pretrained), and load that"
        raise ValueError(f"{found}: {how}")
    # TRL 1.16 knows the number of experts by one name alone, and would fail at the first step.
    texts = base_of(trainer.model).config.get_text_config()
    if getattr(trainer, "aux_loss_enabled", False) and not hasattr(texts, "num_experts"):
        found = f"TRL cannot weigh the routers of {texts.model_type!r}, whose config has no num_experts"
        raise ValueError(f"{found}; set --router_aux_loss_coef 0")


def _changed_config(model: Any) -> list[str]:
    """What an adapter's base has in its config otherwise than where it was loaded from, but for how it was loaded."""
    config = base_of(model).config
    if not hasattr(model, "peft_config"):
        return []
    try:
        revision = loaded_from(base_of(model))[1] or getattr(config, "_commit_hash", None)
        stored = type(config).from_pretrained(config.name_or_path, revision=revision, local_files_only=True)
    except (OSError, ValueError):  # made in memory
        return []
    found = differences(*(plain(each.to_dict()) for each in (stored, config)))
    return [line for line in found if _LOADED.isdisjoint(line.partition(":")[0].split("."))]


def check_pass(trainer: Any, collator: Any, answered: Iterable[Any]) -> list[Checked]:
    """What `check_rows` said of the training rows, and of the held-out ones. Raises where they did not pass through it,
    and where they, or those that are `answered`, are the training rows."""
    rows, passed = trainer.train_dataset, list[Checked]()
    held_out = {"eval_dataset": [trainer.eval_dataset], "evaluate_answers": answered}
    for name in [name for name, those in held_out.items() if any(each is rows for each in those)]:
        found = f"{name} is given the rows to train on, which say nothing of new ones, nor which weights are the best"
        raise ValueError(f"{found}: pass data['test'] (--num_eval_rows holds rows out)")
    splits = {"train_dataset": rows} | ({"eval_dataset": trainer.eval_dataset} if trainer.eval_dataset else {})
    for name, split in splits.items():
        if (checked := rows_checked(split)) is None:
            raise ValueError(
                f"the rows of {name} were not checked: data = vlm_sft.check_rows(data, collator, "
                "on_bad_rows=args.on_bad_rows), and give its result to SFTTrainer as it is"
            )
        if (checked.collator, checked.max_length) != (collator.fingerprint(), collator.settings.max_length):
            found = f"the rows of {name} were checked with a collator of other settings than the trainer's"
            raise ValueError(f"{found}; make one collator, and give it to check_rows and to SFTTrainer")
        passed.append(checked)
    if (seed := drawn_seed(rows)) not in (None, trainer.args.seed):
        found = f"the held-out rows were drawn with seed={seed}, and the run has --seed {trainer.args.seed}"
        raise ValueError(f"{found}: pass seed=training_args.seed to load_conversations")
    if trainer.args.train_sampling_strategy != "random" and "length" not in (rows.column_names or ()):
        trainer.args.train_sampling_strategy = "random"
        print_main("rows come in random order: without the check of all rows their lengths are not known")
    return passed


def check_captions(report: AuditReport) -> None:
    """Raises for a row that asks something: without a stop token, only captions of an image alone are trained."""
    for row in report.rows:
        if asked := "".join(text_of(each) for each in row.conversation.messages if each["role"] == "user"):
            found = f"{row.name} asks {asked[:60]!r}, and a caption without stop token is trained after its image alone"
            how = "return just the image in the user message (to_conversation), or leave out require_stop_token=False"
            raise ValueError(f"{found}: {how}")


def row_facts(trainer: Any, checked: Checked, report: AuditReport) -> dict[str, str]:
    """Lines on rows, tokens and lengths: of all training rows where they were checked, else of the audited ones."""
    rows, audited = trainer.train_dataset, report.facts()
    sizes = {"to train on": rows, "held out": trainer.eval_dataset}
    counts = [f"{len(n):,} {what}" if isinstance(n, Sized) else f"a stream {what}" for what, n in sizes.items() if n]
    if checked.on_bad_rows == "drop" and checked.bad:
        counts.append(f"{checked.bad:,} bad ones left out")
    if checked.on_bad_rows == "ignore" or not isinstance(rows, Sized):
        counts[-1] += "; not checked before, each is when it comes"
    facts = {"rows": ", ".join(counts), "audited": audited.pop("rows"), **audited}
    if lengths := _column(unpacked(rows), "length"):
        images, trained = (_column(unpacked(rows), name) for name in ("image_tokens", "trained_tokens"))
        if not any(images):
            raise ValueError(
                "no training row has an image, so the vision tower would see nothing: name the column that holds them, "
                "as in --columns images=image_path, or return them from to_conversation"
            )
        total, ordered = sum(lengths), sorted(lengths)
        kinds = {"trained": sum(trained), "image": sum(images), "prompt": total - sum(trained) - sum(images)}
        shares = ", ".join(f"{kind} {count / total:.1%}" for kind, count in kinds.items())
        spread = f"{ordered[0]:,} to {ordered[-1]:,}, median {ordered[len(ordered) // 2]:,}"
        facts |= {"tokens": f"{total:,}: {shares}", "lengths": f"{spread}; max_length {trainer.args.max_length}"}
    return facts


def plan_of(trainer: Any, answers: Mapping[str, Any]) -> tuple[int, dict[str, str]]:
    """Optimizer steps of the whole run, and lines on them and on its evaluations. `answers`: name -> metric of answers.

    Raises `ValueError` for a plan that cannot be meant: no step, a learning rate or a warm-up that is never reached, a
    best-model metric that nothing reports or whose wrong end is taken for the best, one held-out row to choose by."""
    args, held_out, loader = trainer.args, trainer.eval_dataset, trainer.get_train_dataloader()
    length = "num_train_epochs" if args.max_steps < 0 else "max_steps"
    settings = {name: getattr(args, name) for name in (length, "gradient_accumulation_steps")}
    settings["learning_rate"] = max([args.learning_rate, *part_rates(trainer).values()])
    wrong = [f"--{name} {value:g} (expected more than 0)" for name, value in settings.items() if value <= 0]
    if has_length(loader) and not len(loader):
        rows = f"all {len(trainer.train_dataset)} rows, less than one batch"
        wrong.append(f"--dataloader_drop_last leaves out {rows} (set it to False, or take smaller batches)")
    if wrong:
        raise ValueError(f"this run would train nothing: {'; '.join(wrong)}")
    epochs, per_epoch, _, _, rows_a_step, _, steps = trainer.set_initial_training_values(args, loader)
    warmup, scheduler = args.get_warmup_steps(steps), getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    chosen = "eval_" + (args.metric_for_best_model or "loss").removeprefix("eval_")
    faults = _choice_faults(trainer, chosen, answers) if args.load_best_model_at_end and held_out is not None else []
    faults += _schedule_faults(args, scheduler, warmup, steps)
    if faults:
        raise ValueError("this run cannot be meant so: " + "; ".join(faults))
    rates = f"{args.learning_rate:g}" + "".join(f", {part} {rate:g}" for part, rate in part_rates(trainer).items())
    whole = "" if args.max_steps > 0 else f" ({epochs} x {per_epoch} an epoch)"
    evaluations, saves = (_times(args, what, steps, epochs) for what in ("eval", "save"))
    count = f"{len(held_out) if isinstance(held_out, Sized) else 0:,}"
    best = f"best by {chosen}" if args.load_best_model_at_end else "the last weights are kept"
    return steps, {
        "steps": f"{steps:,}{whole} of {rows_a_step} rows; warm-up {warmup:,}, {scheduler}, peak learning rate {rates}",
        "checks": f"{evaluations} evaluations on {count} held-out rows, {saves} saves; {best}",
    }


def part_rates(trainer: Any) -> dict[str, float]:
    """The learning rates of parts that `lr_by_part` gave the trainer."""
    given: Any = trainer.optimizer_cls_and_kwargs or (None, {})
    return given[1].get("lr_by_part") or {}


def _schedule_faults(args: Any, scheduler: str, warmup: int, steps: int) -> list[str]:
    """A warm-up that never ends or that the schedule leaves out, or a peak that is not the learning rate."""
    if warmup >= max(steps, 1):
        found = f"the warm-up takes {warmup} of the run's {steps} steps, so the learning rate never reaches"
        how = "--warmup_steps 0, a share of more steps as in --warmup_steps 0.03, or more --num_train_epochs"
        return [f"{found} --learning_rate {args.learning_rate:g}: {how}"]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    made = get_scheduler(scheduler, optimizer, warmup, steps, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    if not (shares := getattr(made, "lr_lambdas", None)):  # it waits for losses
        return []
    highest = max(shares[0](step) for step in {*range(0, steps, max(1, steps // 1000)), warmup})
    # One of them counts from 1, so that its peak lies between two steps.
    if highest > 1.001 or (highest < 0.999 and scheduler != "cosine_warmup_with_min_lr"):
        found = f"--lr_scheduler_type {scheduler} with --lr_scheduler_kwargs {args.lr_scheduler_kwargs}"
        return [f"{found} has its peak at {highest:g} times --learning_rate {args.learning_rate:g}: change the kwargs"]
    own = str(getattr(args.optim, "value", args.optim)).startswith("schedule_free")  # warms up by itself
    if warmup > 1 and shares[0](0) == highest and not own:
        return [f"--lr_scheduler_type {scheduler} has no warm-up, and --warmup_steps asks for {warmup}: set it to 0"]
    return []


def _choice_faults(trainer: Any, chosen: str, answers: Mapping[str, Any]) -> list[str]:
    faults, name = [], chosen.removeprefix("eval_")
    if isinstance(trainer.eval_dataset, Sized) and len(trainer.eval_dataset) < 2:
        found = "one held-out row would choose the best weights"
        faults.append(f"{found}: hold out more (--num_eval_rows), or --load_best_model_at_end False")
    less = _REPORTED | {name: getattr(metric, "lower_is_better", False) for name, metric in answers.items()}
    known = ", ".join(f"eval_{metric}" for metric in ("loss", *answers))
    if trainer.compute_metrics is None and name not in less:
        faults.append(f"--metric_for_best_model {chosen} is reported by nothing; reported are {known}")
    elif name in _REPORTED and less[name] is None:
        faults.append(f"--metric_for_best_model {chosen} is no better for being more or less; choose among {known}")
    elif name in less and bool(trainer.args.greater_is_better) == less[name]:
        said = f"--greater_is_better {not less[name]}"
        faults.append(f"--greater_is_better {less[name]} takes the worst {chosen} for the best: {said}")
    return faults


def _times(args: Any, what: str, steps: int, epochs: int) -> int:
    """How often the run evaluates or saves."""
    strategy, every = getattr(args, f"{what}_strategy"), getattr(args, f"{what}_steps") or 1
    if strategy in ("no", "epoch"):
        return 0 if strategy == "no" else epochs
    return steps // max(1, math.ceil(steps * every) if every < 1 else int(every))


def check_optimizer(optimizer: Any, model: Any, rates: Mapping[str, float], rate: float) -> None:
    """Raises unless the optimizer's groups hold the trainable weights, all of them and no others, and train at `rate`,
    or that of their part in `rates`. DeepSpeed's hold flat copies, which cannot be told apart."""
    if type(optimizer).__name__.startswith("DeepSpeed"):
        return
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    asked = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    forgotten = {name for name, weight in asked.items() if id(weight) not in held}
    others = len(held - {id(weight) for weight in asked.values()})
    if forgotten or others:
        found = f"the optimizer holds {others} tensors that do not train, and lacks {len(forgotten)} that should"
        how = "let the Trainer make it, or give it exactly the weights with requires_grad"
        raise ValueError(f"{found} ({listed(forgotten)}): {how}")
    for group in optimizer.param_groups:
        meant, runs = rates.get(group.get("part"), rate), float(group.get("initial_lr", group["lr"]))
        if not math.isclose(meant, runs, rel_tol=1e-6):  # torchao keeps it in float32
            raise ValueError(
                f"the optimizer was made with a learning rate of {runs:g}, and the run has --learning_rate {meant:g}: "
                "leave its rate to the flag, or pass optimizer_cls_and_kwargs=vlm_sft.lr_by_part(...)"
            )
