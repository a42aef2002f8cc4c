"""LLaVA-NeXT (LLaVA-1.6 with Mistral-7B) on instruction data: LoRA adapters on a 4-bit base.

Trains LoRA adapters of rank 16 on every linear layer in the language model's blocks. Frozen: the NF4 base; CLIP tower,
projector, `image_newline` and lm_head in 16 bit. The loss covers each assistant turn and the </s> that ends it. Images
keep their shape: up to four tiles and the whole, five times the tokens of LLaVA-1.5.

    accelerate launch recipes/llava_next_sft.py --dataset_name my_data.jsonl

Not measured yet. Edit `to_conversation` and the defaults below; each default is a flag, or a line of --config run.yaml.
"""

from dataclasses import dataclass, field

import vlm_sft
from trl import SFTTrainer
from vlm_sft.evaluation.metrics import anls

TRAINS = {"language": "lora"}  # part -> "lora", "full" or names of layers; vision, projector and head stay frozen
METRICS = {"anls": anls}  # of generated answers to held-out rows: similarity to the reference, 0 to 1


@dataclass
class RecipeArguments(vlm_sft.DataArguments):
    model_name_or_path: str = "llava-hf/llava-v1.6-mistral-7b-hf"
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the model."})
    dataset_name: str = "HuggingFaceH4/llava-instruct-mix-vsft"
    load_in_4bit: bool = field(default=True, metadata={"help": "NF4 base; --no_load_in_4bit keeps 16 bit."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = 0.05
    use_dora: bool = field(default=False, metadata={"help": "DoRA (arXiv 2402.09353): a slower step."})


@dataclass
class RecipeConfig(vlm_sft.RecipeDefaults):
    output_dir: str | None = "outputs/llava_next_sft"
    max_length: int | None = 4096  # an image takes up to 2,928 tokens of it. A longer row is an error
    num_train_epochs: float = 1  # as LLaVA: one pass over instruction data
    train_sampling_strategy: str = "group_by_length"  # rows of one length share a batch: little padding
    per_device_train_batch_size: int = 2  # long rows
    gradient_accumulation_steps: int = 8  # 16 rows a step on one GPU
    learning_rate: float = 2e-4  # LLaVA's and QLoRA's rate for adapters; full fine-tuning takes 2e-5
    lr_scheduler_type: str = "cosine"  # as LLaVA; TRL's is linear
    warmup_steps: float = 0.03  # below 1, a share of all steps; LLaVA's
    optim: str = "paged_adamw_32bit"  # QLoRA's: states leave the GPU where memory is short. No GPU: adamw_torch_fused
    max_grad_norm: float = 0.3  # QLoRA's (arXiv 2305.14314)
    eval_steps: float | None = 0.1  # a share of all steps: ten evaluations, and a checkpoint as often
    load_best_model_at_end: bool = True  # by eval_loss


def to_conversation(row: dict) -> dict:
    """A row of any format that the library knows (docs/data.md); of another, return its `messages` and `images`."""
    return row


def main(args: RecipeArguments, training_args: RecipeConfig) -> dict[str, float]:
    name, revision, attention = args.model_name_or_path, args.model_revision, training_args.attn_implementation
    processor = vlm_sft.load_processor(name, revision=revision)
    data = vlm_sft.load_conversations(
        args.dataset_name, to_conversation=to_conversation, seed=training_args.seed, **args.reading
    )
    model = vlm_sft.load_model(name, revision=revision, load_in_4bit=args.load_in_4bit, attn_implementation=attention)
    peft_config = vlm_sft.lora_config(
        model, TRAINS, r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, use_dora=args.use_dora
    )
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
        callbacks=vlm_sft.guards(model),
    )
    vlm_sft.evaluate_answers(trainer, data["test"], METRICS)
    proof = vlm_sft.prove(trainer, TRAINS, args)  # what trains, in one table; train() refuses to start without it
    trainer.train(resume_from_checkpoint=vlm_sft.latest_checkpoint(trainer))
    return vlm_sft.finish(trainer, proof)


if __name__ == "__main__":
    vlm_sft.run(main, RecipeArguments, RecipeConfig)
