"""LLaVA-1.5, stage 1: a CLIP tower and a text model become a LLaVA whose projector learns from captions.

Trained: the projector (a new MLP of two layers). Frozen: CLIP tower and language model, in 16 bit; any Llama, Vicuna,
Mistral or Qwen text model serves. In the loss: the caption and the line break behind it, right after the picture, in
LLaVA's plain format without roles and stop token. Saved is a whole LLaVA with the Vicuna chat template, for stage 2.

    accelerate launch recipes/llava_pretrain.py

Needs, takes, reaches: not yet measured on a GPU. Run again to go on from the newest checkpoint in `output_dir`.
Data: liuhaotian/LLaVA-Pretrain, images.zip unpacked beside the JSON or in --image_folder. Vicuna needs sentencepiece.
Edit: `to_conversation` for your rows, the defaults below for your values. Each is a flag, or a line of --config X.yaml.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import set_seed
from trl import SFTConfig, SFTTrainer, TrlParser

import vlm_sft
from vlm_sft import CheckFlatRows, KeepGeneration, OrderByLength, SafeCheckpoints, StopOnNaN
from vlm_sft.chat.audit import audit
from vlm_sft.evaluation.metrics import anls
from vlm_sft.models.llava import assemble_llava, plain_template

METRICS = {"anls": anls}  # of the answers to held-out rows: likeness to the reference, 0 to 1


@dataclass
class RecipeArguments:
    model_name_or_path: str = field(default="lmsys/vicuna-7b-v1.5", metadata={"help": "Text model, Hub id or folder."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the text model."})
    vision_tower: str = field(default="openai/clip-vit-large-patch14-336", metadata={"help": "CLIP: Hub id or folder."})
    dataset_name: str = field(
        default="LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", metadata={"help": "Hub id or path."}
    )
    columns: list[str] | None = field(default=None, metadata={"help": "Your columns, as in prompt=ask response=say."})
    on_bad_rows: str = field(default="error", metadata={"help": "Bad rows are an error; or drop, or ignore them."})
    image_folder: str | None = field(default=None, metadata={"help": "What file names are relative to, if elsewhere."})
    num_eval_rows: int = field(default=500, metadata={"help": "Held-out rows for eval_loss."})


@dataclass
class RecipeConfig(SFTConfig):
    output_dir: str | None = "outputs/llava_pretrain"
    max_length: int | None = 2048  # LLaVA-1.5's own limit; an image takes 576 of it. A longer row is an error
    num_train_epochs: float = 1  # this and the rates: LLaVA-1.5's scripts/v1_5/pretrain.sh
    train_sampling_strategy: str = "group_by_length"  # rows of one length share a batch: little padding
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 32
    gradient_accumulation_steps: int = 8  # 256 rows a step on one GPU; with eight GPUs set 1
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03  # below 1, a share of all steps
    activation_checkpointing: bool | None = True  # memory for some 20% of time
    eval_on_start: bool = True  # the answers before training, for samples.html
    eval_strategy: str = "steps"
    eval_steps: float | None = 500
    save_steps: float = 500  # a checkpoint holds the whole model
    save_total_limit: int | None = 2  # the newest and the one before it
    dataloader_num_workers: int = field(default_factory=vlm_sft.best_worker_count)  # pictures are decoded there
    dataloader_persistent_workers: bool = field(default_factory=lambda: vlm_sft.best_worker_count() > 0)
    remove_unused_columns: bool = False  # keeps `row`, by which errors name a row

    def __post_init__(self) -> None:
        vlm_sft.fit_to_hardware(self)
        super().__post_init__()


def to_conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of LLaVA-Pretrain as picture and caption: the plain format leaves the question out."""
    caption = [{"type": "text", "text": row["conversations"][-1]["value"] + "\n"}]
    question = {"role": "user", "content": [{"type": "image"}]}
    return {"messages": [question, {"role": "assistant", "content": caption}], "images": [row["image"]]}


def main(args: RecipeArguments, training_args: RecipeConfig) -> dict[str, Any]:
    set_seed(training_args.seed)  # for the projector's first weights
    model, processor = assemble_llava(args.vision_tower, args.model_name_or_path, language_revision=args.model_revision)
    vlm_sft.freeze(model, train=("projector",))
    reading = {"columns": args.columns, "image_folder": args.image_folder, "max_eval_rows": args.num_eval_rows}
    data = vlm_sft.load_conversations(
        args.dataset_name, to_conversation=to_conversation, eval_fraction=0.001, seed=training_args.seed, **reading
    )
    plain = {"chat_template": plain_template(processor.tokenizer)}  # in training only: saved is the processor's own
    collator = vlm_sft.ChatCollator(
        processor,
        max_length=training_args.max_length,
        chat_template_kwargs=plain,
        stop_token=None,
        name_rows=True,
    )
    data = vlm_sft.with_lengths(vlm_sft.sound_rows(data, collator, on_bad_rows=args.on_bad_rows), collator)
    checked = audit(collator, data["train"], model, require_stop_token=False)

    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=processor,
        data_collator=collator,
        callbacks=[KeepGeneration(model), OrderByLength(), CheckFlatRows(), SafeCheckpoints(), StopOnNaN()],
    )
    trainer.add_callback(
        vlm_sft.GenerationEvaluation(
            trainer, rows=data["test"], metrics=METRICS, num_rows=32, chat_template_kwargs=plain, stop_token=None
        )
    )
    vlm_sft.upcast_trainable(trainer.model)  # small updates vanish in bf16, and fp16 cannot train in itself
    vlm_sft.check_precision(trainer.model, fp16=training_args.fp16)
    vlm_sft.print_main(vlm_sft.check_trainable(trainer.model, train=("projector",)))
    with vlm_sft.explain_out_of_memory(trainer):
        trainer.train(resume_from_checkpoint=vlm_sft.latest_checkpoint(trainer))

    metrics = trainer.evaluate()
    trainer.save_model()
    vlm_sft.write_reports(trainer, settings=vars(args), datasets=data, results=metrics, audit=checked.facts())
    return metrics


if __name__ == "__main__":
    main(*TrlParser((RecipeArguments, RecipeConfig)).parse_args_and_config())
