"""Qwen2.5-VL-7B on questions about charts: LoRA adapters on a 4-bit base.

Trained: LoRA adapters of rank 16 on every linear layer in the language model's blocks, whose weights are NF4 with
double quantization. Frozen in 16 bit: vision tower, merger, lm_head. In the loss: the assistant's words and <|im_end|>.
Pictures keep their shape and size; one token shows 28 x 28 pixels, so `max_pixels` bounds tokens and memory.

    accelerate launch recipes/qwen2_5_vl_sft.py

Needs, takes, reaches: not yet measured on a GPU. Run again to go on from the newest checkpoint in `output_dir`.
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
from vlm_sft.evaluation.metrics import exact_match

METRICS = {"exact_match": exact_match}  # of the answers to held-out rows: share of the answers that are right


@dataclass
class RecipeArguments:
    model_name_or_path: str = field(default="Qwen/Qwen2.5-VL-7B-Instruct", metadata={"help": "Hub id or folder."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the model."})
    dataset_name: str = field(default="HuggingFaceM4/ChartQA", metadata={"help": "Hub id or path."})
    columns: list[str] | None = field(default=None, metadata={"help": "Your columns, as in prompt=ask response=say."})
    image_folder: str | None = field(default=None, metadata={"help": "What file names are relative to, if elsewhere."})
    on_bad_rows: str = field(default="error", metadata={"help": "Bad rows are an error; or drop, or ignore them."})
    num_eval_rows: int = field(default=500, metadata={"help": "Held-out rows for eval_loss."})
    max_pixels: int = field(default=1_003_520, metadata={"help": "Larger pictures shrink: 1,280 tokens of 28 x 28."})
    load_in_4bit: bool = field(default=True, metadata={"help": "NF4 base; --no_load_in_4bit keeps 16 bit."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapters."})
    use_dora: bool = field(default=False, metadata={"help": "DoRA (arXiv 2402.09353): a slower step."})


@dataclass
class RecipeConfig(SFTConfig):
    output_dir: str | None = "outputs/qwen2_5_vl_sft"
    max_length: int | None = 2048  # a picture takes up to 1,280 of it. A longer row is an error
    num_train_epochs: float = 1  # many questions, several for each chart
    train_sampling_strategy: str = "group_by_length"  # rows of one length share a batch: little padding
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 4
    gradient_accumulation_steps: int = 4  # 16 rows a step on one GPU
    learning_rate: float = 2e-4  # QLoRA's rate for adapters of a 7B model
    lr_scheduler_type: str = "cosine"  # as LLaVA; TRL's is linear
    warmup_steps: float = 100  # steps at a lower rate, while Adam knows little
    optim: str = "paged_adamw_32bit"  # pages its states out when memory runs short; without a GPU adamw_torch
    max_grad_norm: float = 0.3  # QLoRA's (arXiv 2305.14314)
    activation_checkpointing: bool | None = True  # memory for some 20% of time
    eval_on_start: bool = True  # the answers before training, for samples.html
    eval_strategy: str = "steps"
    eval_steps: float | None = 100
    save_steps: float = 100  # as often, so that the best is there to load
    save_total_limit: int | None = 3  # the newest, the one before it, the best
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "eval_loss"
    dataloader_num_workers: int = field(default_factory=vlm_sft.best_worker_count)  # pictures are decoded there
    dataloader_persistent_workers: bool = field(default_factory=lambda: vlm_sft.best_worker_count() > 0)
    remove_unused_columns: bool = False  # keeps `row`, by which errors name a row

    def __post_init__(self) -> None:
        vlm_sft.fit_to_hardware(self)
        super().__post_init__()


def to_conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    """A ChartQA row, with `image`, `query` and a list of answers in `label`, as a conversation."""
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["query"]}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": row["label"][0]}]}
    return {"messages": [question, answer], "images": [row["image"]]}


def main(args: RecipeArguments, training_args: RecipeConfig) -> dict[str, Any]:
    source = {"revision": args.model_revision}
    processor = vlm_sft.load_processor(args.model_name_or_path, **source)
    processor.image_processor.size["longest_edge"] = args.max_pixels  # its name for pixels, saved with the model
    reading = {"columns": args.columns, "image_folder": args.image_folder, "max_eval_rows": args.num_eval_rows}
    data = vlm_sft.load_conversations(
        args.dataset_name, to_conversation=to_conversation, seed=training_args.seed, **reading
    )
    config = AutoConfig.from_pretrained(args.model_name_or_path, **source)
    quantization = vlm_sft.nf4_config(config, compute_dtype=vlm_sft.best_dtype()) if args.load_in_4bit else None
    model = vlm_sft.load_model(args.model_name_or_path, quantization_config=quantization, **source)
    if args.load_in_4bit:
        vlm_sft.print_main(vlm_sft.check_quantized(model))
    peft_config = vlm_sft.lora_config(
        model, r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, use_dora=args.use_dora
    )
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
        peft_config=peft_config,
        callbacks=[KeepGeneration(model), OrderByLength(), CheckFlatRows(), SafeCheckpoints(), StopOnNaN()],
    )
    trainer.add_callback(vlm_sft.GenerationEvaluation(trainer, rows=data["test"], metrics=METRICS, num_rows=32))
    vlm_sft.upcast_trainable(trainer.model)  # small updates vanish in bf16, and fp16 cannot train in itself
    vlm_sft.check_precision(trainer.model, fp16=training_args.fp16)
    vlm_sft.print_main(vlm_sft.check_adapters(trainer.model))
    with vlm_sft.explain_out_of_memory(trainer):
        trainer.train(resume_from_checkpoint=vlm_sft.latest_checkpoint(trainer))

    metrics = trainer.evaluate()
    trainer.save_model()
    vlm_sft.write_reports(trainer, settings=vars(args), datasets=data, results=metrics, audit=checked.facts())
    return metrics


if __name__ == "__main__":
    main(*TrlParser((RecipeArguments, RecipeConfig)).parse_args_and_config())
