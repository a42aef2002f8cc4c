"""A tiny LLaVA learns to read handwritten digits: offline, on a CPU, in two minutes.

Trains the whole model from random weights (CLIP tower, projector, Llama; some 0.9 million parameters). The loss covers
the answer and its stop token. Data: scikit-learn's 1,797 real handwritten digits, 1,500 to learn from, 297 held out.
Differs from the other recipes in that it makes its model and its data.

    make quickstart                        # or: python recipes/quickstart.py

Writes to outputs/quickstart: model, processor, data, loss.png, samples.html, audit.html and run.json.
Edit `QUESTION`, `DIGITS` and `to_conversation` for another task, the size of the model in `RecipeArguments`.
"""

from dataclasses import dataclass, field
from typing import Any

import vlm_sft
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits
from trl import SFTTrainer
from vlm_sft.evaluation.metrics import exact_match
from vlm_sft.tools import tiny

TRAINS = {"vision": "full", "projector": "full", "language": "full", "head": "full"}
METRICS = {"exact_match": exact_match}  # of generated answers to held-out rows: share that equals the reference
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "Which digit is this?"


@dataclass
class RecipeArguments(vlm_sft.Arguments):
    hidden_size: int = field(default=128, metadata={"help": "Width of tower and language model."})
    num_layers: int = field(default=2, metadata={"help": "Depth of tower and language model."})
    num_train_rows: int = field(default=1500, metadata={"help": "Digits to learn from."})
    num_eval_rows: int = field(default=297, metadata={"help": "Digits held out, to be read before and after."})
    max_new_tokens: int = field(default=8, metadata={"help": "Longest answer."})


@dataclass
class RecipeConfig(vlm_sft.RecipeDefaults):
    output_dir: str | None = "outputs/quickstart"
    num_train_epochs: float = 6
    per_device_train_batch_size: int = 32
    learning_rate: float = 1e-3  # random weights; at 3e-3 this model diverges
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.175  # below 1, a share of all steps
    eval_strategy: str = "no"  # but before training and after it
    save_strategy: str = "no"  # two minutes: nothing to resume
    activation_checkpointing: bool | None = False  # memory is no concern here


def to_conversation(row: dict) -> dict:
    """A row of scikit-learn's digits (8 x 8 values from 0 to 16) as a conversation."""
    image = Image.fromarray((255 - row["image"] * 255 / 16).astype("uint8")).resize((64, 64), Image.Resampling.BICUBIC)
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": DIGITS[row["digit"]]}]
    return {"messages": messages, "images": [image.convert("RGB")]}


def write_digits(folder: str, args: RecipeArguments, *, seed: int) -> None:
    digits = load_digits()
    pairs = zip(digits.images, digits.target, strict=True)
    rows = Dataset.from_list([to_conversation({"image": image, "digit": digit}) for image, digit in pairs])
    sizes = {"train_size": args.num_train_rows, "test_size": args.num_eval_rows}
    rows.train_test_split(**sizes, seed=seed).save_to_disk(folder)


def tiny_llava(args: RecipeArguments) -> tuple[Any, Any]:
    return tiny.build("llava15", hidden_size=args.hidden_size, num_layers=args.num_layers, corpus=[QUESTION, *DIGITS])


def main(args: RecipeArguments, training_args: RecipeConfig) -> dict[str, float]:
    folder = f"{training_args.output_dir}/data"
    write_digits(folder, args, seed=training_args.seed)
    model, processor = tiny_llava(args)
    peft_config = vlm_sft.lora_config(model, TRAINS)  # None: no part takes adapters
    collator = vlm_sft.ChatCollator(processor, max_length=training_args.max_length)
    data = vlm_sft.check_rows(vlm_sft.load_conversations(folder), collator)
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
    vlm_sft.evaluate_answers(
        trainer, data["test"], METRICS, num_rows=args.num_eval_rows, max_new_tokens=args.max_new_tokens
    )
    proof = vlm_sft.prove(trainer, TRAINS, args)  # what trains, in one table; train() refuses to start without it
    trainer.train(resume_from_checkpoint=vlm_sft.latest_checkpoint(trainer))
    results = vlm_sft.finish(trainer, proof)
    print(f"Held-out digits read correctly: {results['eval_exact_match']:.1%}. Look at {training_args.output_dir}.")
    return results


if __name__ == "__main__":
    vlm_sft.run(main, RecipeArguments, RecipeConfig)
