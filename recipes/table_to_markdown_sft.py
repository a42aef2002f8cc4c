"""Pictures of tables become Markdown: LoRA adapters on Qwen2.5-VL-3B, measured cell by cell on held-out tables.

Trained: LoRA adapters of rank 16 on every linear layer in the language model's blocks. Frozen in 16 bit: all the rest.
In the loss: the table and the stop token. Data: tables drawn on the spot in several looks and sizes, or --dataset_name.

    accelerate launch recipes/table_to_markdown_sft.py

Needs, takes, reaches: not yet measured on a GPU. Run again to go on from the newest checkpoint in `output_dir`.
Edit: `to_conversation` for your rows, the defaults below for your values. Each is a flag, or a line of --config X.yaml.
"""

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image, ImageDraw, ImageFont
from trl import SFTConfig, SFTTrainer, TrlParser

import vlm_sft
from vlm_sft import ChatCollator, GenerationEvaluation, KeepGeneration, OrderByLength, SafeCheckpoints, StopOnNaN
from vlm_sft.chat.audit import audit
from vlm_sft.evaluation.metrics import table_cell_match, table_structure_match

METRICS = {"table_cell_match": table_cell_match, "table_structure_match": table_structure_match}
QUESTION = "Write this table as Markdown."
WORDS = ("north", "apples", "total", "2024", "7", "0.5", "12.75", "1,204", "18%", "-3", "open", "Ada", "Li Wei")
LOOKS = (("white", "white", "black", "black"), ("#eee", "#ccc", "#224", "#eee"), ("#222", "#444", "#fff", "#777"))


@dataclass
class RecipeArguments:
    model_name_or_path: str = field(default="Qwen/Qwen2.5-VL-3B-Instruct", metadata={"help": "Hub id or folder."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, folder or file; drawn unless given."})
    on_bad_rows: str = field(default="error", metadata={"help": "Bad rows are an error; or drop, or ignore them."})
    num_tables: int = field(default=2000, metadata={"help": "Tables to draw; one in fifty is held out."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Longest table to write out."})


@dataclass
class RecipeConfig(SFTConfig):
    output_dir: str | None = "outputs/table_to_markdown_sft"
    max_length: int | None = 4096  # for large tables. A longer row is an error
    num_train_epochs: float = 1  # drawn tables cost nothing: rather more of them than the same ones again
    train_sampling_strategy: str = "group_by_length"  # rows of one length share a batch: little padding
    gradient_accumulation_steps: int = 2  # 16 rows a step on one GPU, with TRL's 8 at a time
    learning_rate: float = 2e-4  # LoRA's usual rate
    warmup_steps: float = 0.03  # below 1, a share of all steps
    activation_checkpointing: bool | None = True  # memory for some 20% of time
    eval_on_start: bool = True  # the answers before training, for samples.html
    eval_strategy: str = "steps"
    eval_steps: float | None = 100
    save_steps: float = 100
    save_total_limit: int | None = 3  # the newest, the one before it, the best
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "eval_table_cell_match"  # what the loss only stands for
    dataloader_num_workers: int = field(default_factory=vlm_sft.best_worker_count)  # pictures are decoded there
    remove_unused_columns: bool = False  # keeps `row`, by which errors name a row

    def __post_init__(self) -> None:
        vlm_sft.fit_to_hardware(self)
        super().__post_init__()


def draw_table(cells: list[list[str]], font: ImageFont.FreeTypeFont, chance: random.Random) -> Image.Image:
    pad, (paper, header, ink, ruling) = chance.choice((4, 8)), chance.choice(LOOKS)
    widths = [int(max(map(font.getlength, column))) + 2 * pad for column in zip(*cells, strict=True)]
    height = int(font.size) + 2 * pad
    picture = Image.new("RGB", (sum(widths) + 1, height * len(cells) + 1))
    draw = ImageDraw.Draw(picture)
    for y, x in itertools.product(range(len(cells)), range(len(widths))):
        left, top = sum(widths[:x]), y * height
        draw.rectangle((left, top, left + widths[x], top + height), fill=paper if y else header, outline=ruling)
        draw.text((left + pad, top + pad), cells[y][x], ink, font)
    return picture


def write_tables(path: Path, *, count: int, seed: int) -> None:
    """A Parquet file with `image` and `markdown` of tables drawn at random."""
    chance, fonts, rows = random.Random(seed), [ImageFont.load_default(size) for size in (12, 16, 22)], []
    for _ in range(count):
        columns = chance.randint(2, 6)
        cells = [chance.choices(WORDS, k=columns) for _ in range(chance.randint(2, 9))]
        lines = [f"| {' | '.join(row)} |" for row in cells]
        markdown = "\n".join([lines[0], "|" + " --- |" * columns, *lines[1:]])
        rows.append({"image": draw_table(cells, chance.choice(fonts), chance), "markdown": markdown})
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(path)


def to_conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the picture of a table in `image` and its text in `markdown`, as a conversation."""
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": row["markdown"]}]}
    return {"messages": [question, answer], "images": [row["image"]]}


def main(args: RecipeArguments, training_args: RecipeConfig) -> dict[str, Any]:
    output, seed = Path(training_args.output_dir), training_args.seed
    processor = vlm_sft.load_processor(args.model_name_or_path)
    drawn = output / f"tables-{args.num_tables}-{seed}.parquet"
    with training_args.main_process_first():
        if not (args.dataset_name or drawn.exists()):
            write_tables(drawn, count=args.num_tables, seed=seed)
    data = vlm_sft.load_conversations(args.dataset_name or drawn, to_conversation=to_conversation, seed=seed)
    model = vlm_sft.load_model(args.model_name_or_path)
    collator = ChatCollator(processor, max_length=training_args.max_length, generation_config=model, name_rows=True)
    data = vlm_sft.with_lengths(vlm_sft.sound_rows(data, collator, on_bad_rows=args.on_bad_rows), collator)
    checked = audit(collator, data["train"], model)

    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=processor,
        data_collator=collator,
        peft_config=vlm_sft.lora_config(model, r=16, lora_alpha=16),
        callbacks=[KeepGeneration(model), OrderByLength(), SafeCheckpoints(), StopOnNaN()],
    )
    answers = GenerationEvaluation(trainer, rows=data["test"], metrics=METRICS, max_new_tokens=args.max_new_tokens)
    trainer.add_callback(answers)
    vlm_sft.upcast_trainable(trainer.model)  # small updates vanish in bf16, and fp16 cannot train in itself
    vlm_sft.print_main(vlm_sft.check_adapters(trainer.model))
    with vlm_sft.explain_out_of_memory(trainer):
        trainer.train(resume_from_checkpoint=vlm_sft.latest_checkpoint(trainer))

    metrics = trainer.evaluate()
    trainer.save_model()
    vlm_sft.write_reports(trainer, settings=vars(args), datasets=data, results=metrics, audit=checked.facts())
    return metrics


if __name__ == "__main__":
    main(*TrlParser((RecipeArguments, RecipeConfig)).parse_args_and_config())
