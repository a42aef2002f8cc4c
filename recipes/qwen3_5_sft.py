"""Qwen3.5-4B reads images of formulas as LaTeX: LoRA adapters in 16 bit, answers without thinking.

Trains LoRA adapters of rank 16 on every linear layer in the language model's blocks, linear attention included. Frozen:
all else, in 16 bit. The loss covers the formula and the <|im_end|> that ends it, after an empty <think> </think>; with
--enable_thinking also the reasoning in the rows' answers.

    accelerate launch recipes/qwen3_5_sft.py --dataset_name my_data.jsonl

Not measured yet. Edit `to_conversation` and the defaults below; each default is a flag, or a line of --config run.yaml.
"""

from dataclasses import dataclass, field

import vlm_sft
from trl import SFTTrainer
from vlm_sft.evaluation.metrics import cer

TRAINS = {"language": "lora"}  # part -> "lora", "full" or names of layers; vision, projector and head stay frozen
METRICS = {"cer": cer}  # of generated answers to held-out rows: wrong characters for each right one
QUESTION = "Write this formula as LaTeX."


@dataclass
class RecipeArguments(vlm_sft.DataArguments):
    model_name_or_path: str = "Qwen/Qwen3.5-4B"
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the model."})
    dataset_name: str = "unsloth/LaTeX_OCR"
    max_pixels: int = field(default=1_048_576, metadata={"help": "Larger images shrink; a token is 32 x 32 pixels."})
    enable_thinking: bool = field(default=False, metadata={"help": "Answers begin with <think> ... </think>."})
    load_in_4bit: bool = field(default=False, metadata={"help": "NF4 base: less memory. Unsloth advises against it."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = 0.05
    use_dora: bool = field(default=False, metadata={"help": "DoRA (arXiv 2402.09353): a slower step."})


@dataclass
class RecipeConfig(vlm_sft.RecipeDefaults):
    output_dir: str | None = "outputs/qwen3_5_sft"
    max_length: int | None = 2048  # an image takes up to 1,024 of it. A longer row is an error
    num_train_epochs: float = 1  # there are many formulas
    train_sampling_strategy: str = "group_by_length"  # rows of one length share a batch: little padding
    per_device_train_batch_size: int = 8  # short rows: a formula is a small image
    gradient_accumulation_steps: int = 2  # 16 rows a step on one GPU
    learning_rate: float = 2e-4  # QLoRA's rate for adapters
    lr_scheduler_type: str = "cosine"  # as LLaVA; TRL's is linear
    warmup_steps: float = 0.03  # below 1, a share of all steps; LLaVA's
    optim: str = "paged_adamw_32bit"  # states leave the GPU where memory is short. No GPU: adamw_torch_fused
    eval_steps: float | None = 0.1  # a share of all steps: ten evaluations, and a checkpoint as often
    load_best_model_at_end: bool = True  # by eval_loss


def to_conversation(row: dict) -> dict:
    """A row with `image` and its formula in `text`, as a conversation."""
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": row["text"]}]
    return {"messages": messages, "images": [row["image"]]}


def main(args: RecipeArguments, training_args: RecipeConfig) -> dict[str, float]:
    name, revision, attention = args.model_name_or_path, args.model_revision, training_args.attn_implementation
    processor = vlm_sft.load_processor(name, revision=revision, max_pixels=args.max_pixels)
    # Saved with it, so inference does the same.
    processor.chat_template = f"{{%- set enable_thinking = {args.enable_thinking} %}}" + processor.chat_template
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
