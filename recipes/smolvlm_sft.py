"""SmolVLM2-2.2B on questions about medical images: LoRA adapters on a 16-bit base.

Trains LoRA adapters of rank 16 on every linear layer in the language model's blocks. Frozen: all the rest, in 16 bit
(4.5 GB, so quantizing saves little). The loss covers each assistant turn and the <end_of_utterance> that ends it.

    accelerate launch recipes/smolvlm_sft.py --dataset_name my_data.jsonl

Not measured yet. Edit `to_conversation` and the defaults below; each default is a flag, or a line of --config run.yaml.
"""

from dataclasses import dataclass, field

import vlm_sft
from trl import SFTTrainer
from vlm_sft.evaluation.metrics import exact_match

TRAINS = {"language": "lora"}  # part -> "lora", "full" or names of layers; vision, projector and head stay frozen
METRICS = {"exact_match": exact_match}  # of generated answers to held-out rows: share that equals the reference


@dataclass
class RecipeArguments(vlm_sft.DataArguments):
    model_name_or_path: str = "HuggingFaceTB/SmolVLM2-2.2B-Instruct"
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the model."})
    dataset_name: str = "flaviagiammarino/vqa-rad"
    max_tiles_per_side: int = field(default=2, metadata={"help": "2 x 2 and the whole, 81 tokens each; 4 for text."})
    load_in_4bit: bool = field(default=False, metadata={"help": "NF4 base instead of 16 bit."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = 0.05
    use_dora: bool = field(default=False, metadata={"help": "DoRA (arXiv 2402.09353): a slower step."})


@dataclass
class RecipeConfig(vlm_sft.RecipeDefaults):
    output_dir: str | None = "outputs/smolvlm_sft"
    max_length: int | None = 2048  # five tiles take 405 of it. A longer row is an error
    num_train_epochs: float = 3  # a small dataset
    train_sampling_strategy: str = "group_by_length"  # rows of one length share a batch: little padding
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 2  # 16 rows a step on one GPU
    learning_rate: float = 1e-4  # half of QLoRA's, since each row comes three times
    lr_scheduler_type: str = "cosine"  # as LLaVA; TRL's is linear
    warmup_steps: float = 0.03  # below 1, a share of all steps; LLaVA's
    optim: str = "paged_adamw_32bit"  # QLoRA's: states leave the GPU where memory is short. No GPU: adamw_torch_fused
    max_grad_norm: float = 0.3  # QLoRA's (arXiv 2305.14314)
    eval_steps: float | None = 0.1  # a share of all steps: ten evaluations, and a checkpoint as often
    load_best_model_at_end: bool = True  # by eval_loss


def to_conversation(row: dict) -> dict:  # columns `image`, `question`, `answer`
    messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    return {"messages": messages, "images": [row["image"]]}


def main(args: RecipeArguments, training_args: RecipeConfig) -> dict[str, float]:
    name, revision, attention = args.model_name_or_path, args.model_revision, training_args.attn_implementation
    processor = vlm_sft.load_processor(name, revision=revision)
    tiles = processor.image_processor  # its sizes are saved with it, so inference does the same
    tiles.size["longest_edge"] = args.max_tiles_per_side * tiles.max_image_size["longest_edge"]
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
