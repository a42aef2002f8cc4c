"""What `prove` compares before training: the recipe's flags, the pieces given to the Trainer, and its rows."""

from __future__ import annotations

from typing import Any

import torch

from vlm_sft.chat.audit import AuditReport
from vlm_sft.chat.collator import ChatCollator
from vlm_sft.chat.messages import text_of
from vlm_sft.common import base_of, listed
from vlm_sft.data.check_rows import Checked, rows_checked
from vlm_sft.data.rows import drawn_seed, unpacked
from vlm_sft.distributed import print_main
from vlm_sft.models.fingerprints import loaded_from
from vlm_sft.tools.memory import of_run
from vlm_sft.training.config import Arguments, RecipeDefaults, flags_of, refuse_inert_settings, unread_flags
from vlm_sft.upstream import is_sharded


def check_flags(trainer: Any, args: Any) -> dict[str, Any]:
    """The recipe's flags. Raises for one that nothing has read, and for settings without effect."""
    refuse_inert_settings(trainer.args)
    asked, runs = getattr(trainer.args, "attn_implementation", None), base_of(trainer.model).config._attn_implementation
    if asked and asked != runs and not {asked, runs} == {"flash_attention_2", "kernels-community/flash-attn2"}:
        raise ValueError(
            f"--attn_implementation {asked} has no effect, the model runs {runs}: pass attn_implementation="
            "training_args.attn_implementation to load_model"
        )
    if args is None:
        return {}
    if not isinstance(args, Arguments):
        raise ValueError(
            f"prove(trainer, TRAINS, args): args is a {type(args).__name__}; expected the recipe's RecipeArguments, a "
            "dataclass derived from vlm_sft.Arguments, or None"
        )
    if not isinstance(trainer.args, RecipeDefaults):
        raise ValueError(
            f"the trainer's args are a {type(trainer.args).__name__}, so the flags of the recipe's RecipeConfig, which "
            "derives from vlm_sft.RecipeDefaults, would have no effect: pass args=training_args to SFTTrainer"
        )
    if unread := unread_flags(args):
        raise ValueError(
            f"nothing has read {', '.join(f'--{name}' for name in unread)}, so it has no effect: pass it on where it "
            f"belongs ({', '.join(f'args.{name}' for name in unread)}), or remove the field from RecipeArguments"
        )
    return flags_of(args)


def costs(model: Any) -> dict[str, str]:
    """A line on adapters that cost more than they need to, where the model has such."""
    dropout = max((c.lora_dropout for c in getattr(model, "peft_config", {}).values() if c.use_dora), default=0)
    said = (
        "DoRA with dropout multiplies each adapted matrix twice: a step of some 1.7 times LoRA's; with lora_dropout 0"
    )
    return {"costs": f"{said} (here {dropout:g}) it costs about as much as LoRA"} if dropout else {}


def memory_of(trainer: Any) -> str:
    """A line on what the run takes of its GPU; for a model whose config reads like no other, why there is none."""
    rows = trainer.train_dataset
    known = "length" in (rows.column_names or ())
    longest = max(rows.with_format(None)["length"][:]) if known else trainer.args.max_length or 2048
    try:
        return of_run(trainer, longest)
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"not estimated for this model: {error}"


def check_storage(trainer: Any, packing: Any) -> None:
    """Raises where FSDP would cast packed 4-bit weights, as it casts all floats to the run's precision: of other bits
    than they are stored in, they would be other weights."""
    if not is_sharded():
        return
    stored = getattr(packing, "bnb_4bit_quant_storage", None)
    computed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision, stored)
    if stored != computed:
        raise ValueError(
            f"under FSDP the 4-bit weights are stored as {stored}, and would be cast to {computed} bit by bit: pass "
            f"the flag of what they are stored in (--bf16, --fp16), or nf4_config(..., compute_dtype={computed})"
        )


def check_pieces(trainer: Any, collator: Any) -> None:
    """Raises unless collator, processor and model are those of one recipe."""
    if not isinstance(collator, ChatCollator):
        raise ValueError(
            f"the trainer's data_collator is a {type(collator).__name__}, which would train other tokens than those "
            "checked; pass data_collator=collator, the ChatCollator, to SFTTrainer"
        )
    if trainer.processing_class is not collator.processor:
        raise ValueError(
            "the trainer's processing_class, which is saved with the model, is another processor than the collator's; "
            "pass processing_class=processor to SFTTrainer"
        )
    if collator.settings.max_length != trainer.args.max_length:
        raise ValueError(
            f"the collator has max_length={collator.settings.max_length}, the trainer --max_length "
            f"{trainer.args.max_length}: pass max_length=training_args.max_length to ChatCollator"
        )
    (processor_name, processor_revision), (name, revision) = map(loaded_from, (collator.processor, trainer.model))
    if processor_name == name and processor_revision != revision:
        raise ValueError(
            f"{name}: the processor is of revision {processor_revision}, the model of {revision}; pass "
            "revision=args.model_revision to load_processor and load_model alike"
        )


def check_router_loss(trainer: Any) -> None:
    """Raises where TRL 1.16 would fail at the first step: it knows the number of experts by one name alone."""
    texts = base_of(trainer.model).config.get_text_config()
    if getattr(trainer, "aux_loss_enabled", False) and not hasattr(texts, "num_experts"):
        raise ValueError(
            f"TRL cannot weigh the routers of {texts.model_type!r}, whose config has no num_experts; set "
            "--router_aux_loss_coef 0"
        )


def check_pass(trainer: Any, collator: Any, rows: Any) -> Checked:
    """What `check_rows` said of the training rows. Raises where they, or the held-out rows, did not pass through it."""
    splits = {"train_dataset": rows} | ({"eval_dataset": trainer.eval_dataset} if trainer.eval_dataset else {})
    for name, split in splits.items():
        if (checked := rows_checked(split)) is None:
            raise ValueError(
                f"the rows of {name} were not checked: data = vlm_sft.check_rows(data, collator, "
                "on_bad_rows=args.on_bad_rows), and give its result to SFTTrainer as it is"
            )
        if (checked.collator, checked.max_length) != (collator.fingerprint(), collator.settings.max_length):
            raise ValueError(
                f"the rows of {name} were checked with a collator of other settings than the trainer's; make one "
                "collator, and give it to check_rows and to SFTTrainer"
            )
    seed = drawn_seed(rows)
    if seed is not None and seed != trainer.args.seed:
        raise ValueError(
            f"the held-out rows were drawn with seed={seed}, and the run has --seed {trainer.args.seed}: pass "
            "seed=training_args.seed to load_conversations"
        )
    if trainer.args.train_sampling_strategy != "random" and "length" not in (rows.column_names or ()):
        trainer.args.train_sampling_strategy = "random"
        print_main("rows come in random order: without the check of all rows their lengths are not known")
    first = rows_checked(rows)
    assert first is not None
    return first


def check_captions(report: AuditReport) -> None:
    """Raises for a row that asks something: without a stop token, only captions of an image alone are trained."""
    for row in report.rows:
        asked = [
            text for message in row.conversation.messages if message["role"] == "user" and (text := text_of(message))
        ]
        if asked:
            raise ValueError(
                f"{row.name} asks {asked[0][:60]!r}, and a caption without stop token is trained after its image alone:"
                " return just the image in the user message (to_conversation), or leave out require_stop_token=False"
            )


def row_facts(trainer: Any, checked: Checked, report: AuditReport) -> dict[str, str]:
    """Lines on rows, tokens and lengths: of all training rows where they were checked, else of the audited ones."""
    rows, held_out = trainer.train_dataset, trainer.eval_dataset
    audited = report.facts()
    sizes = {"to train on": rows, "held out": held_out}
    counts = [
        f"{len(split):,} {what}" if _sized(split) else f"a stream {what}" for what, split in sizes.items() if split
    ]
    left_out = f", {checked.bad:,} bad ones left out" if checked.on_bad_rows == "drop" and checked.bad else ""
    unseen = "" if checked.on_bad_rows != "ignore" and _sized(rows) else "; not checked before, each is when it comes"
    facts = {"rows": f"{', '.join(counts)}{left_out}{unseen}", "audited": audited["rows"]}
    if "length" in (rows.column_names or ()):
        lengths, images, trained = (
            unpacked(rows).with_format(None)[name][:] for name in ("length", "image_tokens", "trained_tokens")
        )
        if not any(images):
            raise ValueError(
                "no training row has an image, so the vision tower would see nothing: name the column that holds them, "
                "as in --columns images=image_path, or return them from to_conversation"
            )
        total, ordered = sum(lengths), sorted(lengths)
        kinds = {"trained": sum(trained), "image": sum(images), "prompt": total - sum(trained) - sum(images)}
        facts["tokens"] = f"{total:,}: " + ", ".join(f"{kind} {count / total:.1%}" for kind, count in kinds.items())
        median = ordered[len(ordered) // 2]
        facts["lengths"] = f"{ordered[0]:,} to {ordered[-1]:,}, median {median:,}; max_length {trainer.args.max_length}"
    else:
        facts |= {name: audited[name] for name in ("tokens", "lengths")}
    return facts | {name: audited[name] for name in ("answers", "prompts")}


def _sized(rows: Any) -> bool:
    return hasattr(rows, "__len__")


def check_optimizer(optimizer: Any, model: Any) -> None:
    """Raises unless the optimizer's groups hold the trainable weights, all of them and no others. DeepSpeed's hold flat
    copies, which cannot be told apart."""
    if type(optimizer).__name__.startswith("DeepSpeed"):
        return
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    asked = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    forgotten = {name for name, weight in asked.items() if id(weight) not in held}
    others = len(held - {id(weight) for weight in asked.values()})
    if forgotten or others:
        raise ValueError(
            f"the optimizer holds {others} tensors that do not train, and lacks {len(forgotten)} that should "
            f"({listed(forgotten)}): let the Trainer make it, or give it exactly the weights with requires_grad"
        )
