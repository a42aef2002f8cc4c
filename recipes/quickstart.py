"""A tiny LLaVA learns to read handwritten digits: offline, on a CPU, in two minutes.

Trained: the whole model, from random weights (CLIP tower, projector, Llama; some 0.9 million parameters). In the loss:
the answer and its stop token. Data: scikit-learn's 1,797 real handwritten digits, 1,500 to learn from, 297 held out.

    make quickstart                        # or: python recipes/quickstart.py

Writes to outputs/quickstart: model, processor, data, loss.png, samples.html, audit.html, metrics.json and run.json.
Edit: `DIGITS` and `to_conversation` for another question, the size of the model in `RecipeArguments`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits
from transformers import set_seed
from trl import SFTConfig, SFTTrainer, TrlParser

import vlm_sft
from vlm_sft.chat.audit import audit
from vlm_sft.evaluation.metrics import exact_match
from vlm_sft.tools import tiny

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "Which digit is this?"


@dataclass
class RecipeArguments:
    hidden_size: int = field(default=128, metadata={"help": "Width of tower and language model."})
    num_layers: int = field(default=2, metadata={"help": "Depth of tower and language model."})
    num_train_rows: int = field(default=1500, metadata={"help": "Digits to learn from."})
    num_eval_rows: int = field(default=297, metadata={"help": "Digits held out, to be read before and after."})


@dataclass
class RecipeConfig(SFTConfig):
    output_dir: str | None = "outputs/quickstart"
    num_train_epochs: float = 6
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 99
    learning_rate: float = 1e-3  # random weights; at 3e-3 this model diverges
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 50
    logging_steps: float = 10
    eval_strategy: str = "epoch"
    save_strategy: str = "no"  # two minutes: nothing to resume
    report_to: str = "none"
    activation_checkpointing: bool | None = False  # memory is no concern here
    remove_unused_columns: bool = False  # keeps `row`, by which errors name a row

    def __post_init__(self) -> None:
        vlm_sft.fit_to_hardware(self)
        super().__post_init__()


def to_conversation(image: Any, digit: int) -> dict[str, Any]:
    """A row as every recipe's data has it: `messages`, and `images` in the order of their parts."""
    picture = Image.fromarray((255 - image * 255 / 16).astype("uint8")).resize((64, 64), Image.Resampling.BICUBIC)
    question = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    answer = [{"type": "text", "text": DIGITS[digit]}]
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "images": [picture.convert("RGB")],
    }


def main(args: RecipeArguments, training_args: RecipeConfig) -> dict[str, float]:
    set_seed(training_args.seed)
    output = Path(training_args.output_dir)
    digits = load_digits()
    rows = [to_conversation(*row) | {"row": n} for n, row in enumerate(zip(digits.images, digits.target, strict=True))]
    data = Dataset.from_list(rows).train_test_split(
        train_size=args.num_train_rows, test_size=args.num_eval_rows, seed=training_args.seed
    )
    model, processor = tiny.build(
        "llava15", hidden_size=args.hidden_size, num_layers=args.num_layers, corpus=[QUESTION, *DIGITS]
    )
    print(vlm_sft.parameter_table(model))
    collator = vlm_sft.ChatCollator(processor, generation_config=model, name_rows=True)
    checked = audit(collator, data["train"], model)
    checked.to_html(output / "audit.html")

    references = [DIGITS[digits.target[row]] for row in data["test"]["row"]]
    before = vlm_sft.generate(model, processor, data["test"], batch_size=99, max_new_tokens=8)
    print(f"Held-out digits read correctly before training: {exact_match(before, references):.1%}")

    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=processor,
        data_collator=collator,
        callbacks=[vlm_sft.KeepGeneration(model), vlm_sft.StopOnNaN()],
    )
    trainer.train()

    after = vlm_sft.generate(model, processor, data["test"], batch_size=99, max_new_tokens=8)
    metrics = {"accuracy_before": exact_match(before, references), "accuracy": exact_match(after, references)}
    print(f"Held-out digits read correctly after training: {metrics['accuracy']:.1%}")
    trainer.save_model()
    data.save_to_disk(output / "data")
    samples = [
        vlm_sft.Sample(
            images=data["test"][n]["images"],
            question=QUESTION,
            reference=reference,
            before=before[n],
            after=after[n],
            score_before=exact_match([before[n]], [reference]),
            score=exact_match([after[n]], [reference]),
        )
        for n, reference in enumerate(references)
    ]
    vlm_sft.write_samples_html(samples, output / "samples.html", title="Quickstart: held-out digits", picture_px=64)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    vlm_sft.write_reports(trainer, settings=vars(args), datasets=data, results=metrics, audit=checked.facts())
    print(NEXT.format(output=output))
    return metrics


NEXT = """
Look at {output}/samples.html and {output}/loss.png. Then:
  python recipes/evaluate.py                         measure it again, from the folder
  python -m vlm_sft audit --help                     what a collator would train on, for your model and data
  python -m vlm_sft tiny llava15 outputs/tiny        a tiny twin to try a recipe on
  python recipes/llava15_sft.py --help               the recipe for a real model
"""

if __name__ == "__main__":
    main(*TrlParser((RecipeArguments, RecipeConfig)).parse_args_and_config())
