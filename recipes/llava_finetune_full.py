"""LLaVA-1.5, stage 2: projector and language model learn from instruction data, in full.

Trained: projector, language model and lm_head, at a rate of their own for the projector. Frozen: the CLIP tower. In the
loss: the assistant's words and the end token. The model is what stage 1 (llava_pretrain.py) left in its `output_dir`.

    accelerate launch recipes/llava_finetune_full.py --vision_tower openai/clip-vit-large-patch14-336

Needs, takes, reaches: not yet measured on a GPU. Weights, gradients and two Adam states of what is trained are kept in
float32, 16 bytes a parameter, under bf16 autocast: a 7B model has to be sharded over several GPUs.
Run again to go on from the newest checkpoint in `output_dir`. There is no 4-bit here: quantized weights cannot train.
Edit: `to_conversation` for your rows, the defaults below for your values. Each is a flag, or a line of --config X.yaml.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig
from trl import SFTConfig, SFTTrainer, TrlParser

import vlm_sft
from vlm_sft import CheckFlatRows, KeepGeneration, OrderByLength, SafeCheckpoints, StopOnNaN
from vlm_sft.chat.audit import audit
from vlm_sft.evaluation.metrics import anls
from vlm_sft.models.llava import check_tower

METRICS = {"anls": anls}  # of the answers to held-out rows: likeness to the reference, 0 to 1


@dataclass
class RecipeArguments:
    model_name_or_path: str = field(
        default="outputs/llava_pretrain", metadata={"help": "Stage 1's folder, or any LLaVA-1.5."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the model."})
    vision_tower: str | None = field(default=None, metadata={"help": "Stage 1's, to refuse a folder of another."})
    dataset_name: str = field(default="HuggingFaceH4/llava-instruct-mix-vsft", metadata={"help": "Hub id or path."})
    columns: list[str] | None = field(default=None, metadata={"help": "Your columns, as in prompt=ask response=say."})
    image_folder: str | None = field(default=None, metadata={"help": "What file names are relative to, if elsewhere."})
    on_bad_rows: str = field(default="error", metadata={"help": "Bad rows are an error; or drop, or ignore them."})
    num_eval_rows: int = field(default=500, metadata={"help": "Held-out rows for eval_loss."})
    mm_projector_lr: float = field(default=2e-5, metadata={"help": "Learning rate of the projector."})


@dataclass
class RecipeConfig(SFTConfig):
    output_dir: str | None = "outputs/llava_finetune_full"
    max_length: int | None = 2048  # LLaVA-1.5's own limit; an image takes 576 of it. A longer row is an error
    num_train_epochs: float = 1  # this and the rates: LLaVA-1.5's scripts/v1_5/finetune.sh
    train_sampling_strategy: str = "group_by_length"  # rows of one length share a batch: little padding
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 16  # 128 rows a step on one GPU; with eight GPUs set 2
    learning_rate: float = 2e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03  # below 1, a share of all steps
    activation_checkpointing: bool | None = True  # memory for some 20% of time
    eval_on_start: bool = True  # the answers before training, for samples.html
    eval_strategy: str = "steps"
    eval_steps: float | None = 500
    save_steps: float = 500  # a checkpoint holds the whole model and its optimizer
    save_total_limit: int | None = 2  # the newest and the one before it
    dataloader_num_workers: int = field(default_factory=vlm_sft.best_worker_count)  # pictures are decoded there
    dataloader_persistent_workers: bool = field(default_factory=lambda: vlm_sft.best_worker_count() > 0)
    remove_unused_columns: bool = False  # keeps `row`, by which errors name a row

    def __post_init__(self) -> None:
        vlm_sft.fit_to_hardware(self)
        super().__post_init__()


def to_conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    """The one function that depends on the dataset: `messages` with image parts, and their `images` in order."""
    return {"messages": row["messages"], "images": row["images"]}


def main(args: RecipeArguments, training_args: RecipeConfig) -> dict[str, Any]:
    source = {"revision": args.model_revision}
    if args.vision_tower:
        check_tower(AutoConfig.from_pretrained(args.model_name_or_path, **source), args.vision_tower)
    processor = vlm_sft.load_processor(args.model_name_or_path, **source)
    reading = {"columns": args.columns, "image_folder": args.image_folder, "max_eval_rows": args.num_eval_rows}
    data = vlm_sft.load_conversations(
        args.dataset_name, to_conversation=to_conversation, seed=training_args.seed, **reading
    )

    trained = ("projector", "language", "head")
    model = vlm_sft.load_model(args.model_name_or_path, **source)
    vlm_sft.freeze(model, train=trained)
    flat = vlm_sft.accept_flat_rows(model)  # with FlashAttention, rows need no padding
    collator = vlm_sft.ChatCollator(
        processor, max_length=training_args.max_length, generation_config=model, name_rows=True, padding_free=flat
    )
    data = vlm_sft.with_lengths(vlm_sft.sound_rows(data, collator, on_bad_rows=args.on_bad_rows), collator)
    checked = audit(collator, data["train"], model)

    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=processor,
        data_collator=collator,
        optimizer_cls_and_kwargs=vlm_sft.rates_by_part(
            training_args, learning_rates={"projector": args.mm_projector_lr}
        ),
        callbacks=[KeepGeneration(model), OrderByLength(), CheckFlatRows(), SafeCheckpoints(), StopOnNaN()],
    )
    trainer.add_callback(vlm_sft.GenerationEvaluation(trainer, rows=data["test"], metrics=METRICS, num_rows=32))
    vlm_sft.upcast_trainable(trainer.model)  # small updates vanish in bf16, and fp16 cannot train in itself
    vlm_sft.check_precision(trainer.model, fp16=training_args.fp16)
    vlm_sft.print_main(vlm_sft.check_trainable(trainer.model, train=trained))
    with vlm_sft.explain_out_of_memory(trainer):
        trainer.train(resume_from_checkpoint=vlm_sft.latest_checkpoint(trainer))

    metrics = trainer.evaluate()
    trainer.save_model()
    vlm_sft.write_reports(trainer, settings=vars(args), datasets=data, results=metrics, audit=checked.facts())
    return metrics


if __name__ == "__main__":
    main(*TrlParser((RecipeArguments, RecipeConfig)).parse_args_and_config())
