"""LLaVA-1.5, stage 2: projector and language model learn from instruction data, in full.

Trains projector, language model and lm_head, the projector at a rate of its own. Frozen: the CLIP tower. The loss
covers each assistant turn and the end token. The model is what stage 1 (llava_pretrain.py) left in its `output_dir`.

    accelerate launch recipes/llava_finetune_full.py --vision_tower openai/clip-vit-large-patch14-336

Not measured yet. Weights, gradients and two Adam states of what trains are float32, 16 bytes a parameter, under bf16
autocast: a 7B model has to be sharded over several GPUs. No 4-bit here: quantized weights cannot train.
Edit `to_conversation` and the defaults below; each default is a flag, or a line of --config run.yaml.
"""

from dataclasses import dataclass, field

import vlm_sft
from trl import SFTTrainer
from vlm_sft.evaluation.metrics import anls
from vlm_sft.models.llava import check_tower

TRAINS = {"projector": "full", "language": "full", "head": "full"}  # the vision tower is not named, so it stays frozen
METRICS = {"anls": anls}  # of generated answers to held-out rows: similarity to the reference, 0 to 1


@dataclass
class RecipeArguments(vlm_sft.DataArguments):
    model_name_or_path: str = field(default="outputs/llava_pretrain", metadata={"help": "Stage 1's, or a LLaVA-1.5."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the model."})
    vision_tower: str | None = field(default=None, metadata={"help": "Stage 1's, to refuse a folder of another."})
    dataset_name: str = "HuggingFaceH4/llava-instruct-mix-vsft"
    mm_projector_lr: float = field(default=2e-5, metadata={"help": "Learning rate of the projector."})


@dataclass
class RecipeConfig(vlm_sft.RecipeDefaults):
    output_dir: str | None = "outputs/llava_finetune_full"
    max_length: int | None = 2048  # LLaVA-1.5's own limit; an image takes 576 of it. A longer row is an error
    num_train_epochs: float = 1  # this and the rates: LLaVA-1.5's scripts/v1_5/finetune.sh
    train_sampling_strategy: str = "group_by_length"  # rows of one length share a batch: little padding
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 16  # 128 rows a step on one GPU; with eight GPUs set 2
    learning_rate: float = 2e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03  # below 1, a share of all steps
    eval_steps: float | None = 0.2  # a share of all steps; and a checkpoint as often, of model and optimizer
    save_total_limit: int | None = 2  # the newest and the one before it


def to_conversation(row: dict) -> dict:
    """A row of any format that the library knows (docs/data.md); of another, return its `messages` and `images`."""
    return row


def main(args: RecipeArguments, training_args: RecipeConfig) -> dict[str, float]:
    name, revision, attention = args.model_name_or_path, args.model_revision, training_args.attn_implementation
    check_tower(name, args.vision_tower, revision=revision)
    processor = vlm_sft.load_processor(name, revision=revision)
    data = vlm_sft.load_conversations(
        args.dataset_name, to_conversation=to_conversation, seed=training_args.seed, **args.reading
    )
    model = vlm_sft.load_model(name, revision=revision, attn_implementation=attention)
    peft_config = vlm_sft.lora_config(model, TRAINS)  # None: no part takes adapters
    padding_free = vlm_sft.enable_padding_free(model)  # with FlashAttention, rows need no padding
    collator = vlm_sft.ChatCollator(processor, max_length=training_args.max_length, padding_free=padding_free)
    data = vlm_sft.check_rows(data, collator, **args.checking)  # opens and encodes each row once
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=processor,
        data_collator=collator,
        peft_config=peft_config,
        optimizer_cls_and_kwargs=vlm_sft.lr_by_part(training_args, {"projector": args.mm_projector_lr}),
        callbacks=vlm_sft.guards(model),
    )
    vlm_sft.evaluate_answers(trainer, data["test"], METRICS)
    proof = vlm_sft.prove(trainer, TRAINS, args)  # what trains, in one table; train() refuses to start without it
    trainer.train(resume_from_checkpoint=vlm_sft.latest_checkpoint(trainer))
    return vlm_sft.finish(trainer, proof)


if __name__ == "__main__":
    vlm_sft.run(main, RecipeArguments, RecipeConfig)
