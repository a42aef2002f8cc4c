"""Images of tables become Markdown: LoRA adapters on Qwen2.5-VL-3B, the best kept by the tables they write.

Trains LoRA adapters of rank 16; the rest is frozen in 16 bit. The loss covers the table. Draws its data, unlike others.

    accelerate launch recipes/table_to_markdown_sft.py

Not measured yet. Edit `to_conversation` and the defaults below; each default is a flag, or a line of --config run.yaml.
"""

import itertools
import random
from dataclasses import dataclass, field
from pathlib import Path

import vlm_sft
from datasets import Dataset
from PIL import Image, ImageDraw, ImageFont
from trl import SFTTrainer
from vlm_sft.evaluation.metrics import anls

TRAINS = {"language": "lora"}  # part -> "lora", "full" or names of layers; vision, projector and head stay frozen
WORDS = ("north", "apples", "total", "2024", "7", "0.5", "12.75", "1,204", "18%", "-3", "open", "Ada", "Li Wei")
LOOKS = (("white", "white", "black", "black"), ("#eee", "#ccc", "#224", "#eee"), ("#222", "#444", "#fff", "#777"))


@dataclass
class RecipeArguments(vlm_sft.Arguments):
    model_name_or_path: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, folder or file; drawn unless given."})
    on_bad_rows: str = field(default="error", metadata={"help": "Bad rows are an error; or drop, or ignore them."})
    num_tables: int = field(default=2000, metadata={"help": "Tables to draw; one in fifty is held out."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Longest table to write out."})


@dataclass
class RecipeConfig(vlm_sft.RecipeDefaults):
    output_dir: str | None = "outputs/table_to_markdown_sft"
    max_length: int | None = 4096  # for large tables. A longer row is an error
    num_train_epochs: float = 1  # drawn tables cost nothing: rather more of them than the same ones again
    train_sampling_strategy: str = "group_by_length"  # rows of one length share a batch: little padding
    gradient_accumulation_steps: int = 2  # 16 rows a step on one GPU, with TRL's 8 at a time
    learning_rate: float = 2e-4  # LoRA's usual rate
    warmup_steps: float = 0.03  # below 1, a share of all steps
    eval_steps: float | None = 0.1  # a share of all steps: ten evaluations, and a checkpoint as often
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "eval_anls"  # what the loss only stands for


def write_tables(folder: str, *, count: int, seed: int) -> None:
    chance, fonts, rows = random.Random(seed), [*map(ImageFont.load_default, (12, 16, 22))], []
    for _ in range(count):
        columns = chance.randint(2, 6)
        cells = [chance.choices(WORDS, k=columns) for _ in range(chance.randint(2, 9))]
        font, gap, (paper, header, ink, ruling) = chance.choice(fonts), chance.choice((8, 16)), chance.choice(LOOKS)
        high, widths = int(font.size) + gap, [int(max(map(font.getlength, c))) + gap for c in zip(*cells, strict=True)]
        image = Image.new("RGB", (sum(widths) + 1, high * len(cells) + 1))
        for y, x in itertools.product(range(len(cells)), range(columns)):
            x0, y0, draw = sum(widths[:x]), y * high, ImageDraw.Draw(image)
            draw.rectangle((x0, y0, x0 + widths[x], y0 + high), paper if y else header, ruling)
            draw.text((x0 + gap // 2, y0 + gap // 2), cells[y][x], ink, font)
        lines = [f"| {' | '.join(line)} |" for line in (cells[0], ["---"] * columns, *cells[1:])]
        rows.append({"image": image, "markdown": "\n".join(lines)})
    Dataset.from_list(rows).save_to_disk(folder)


def to_conversation(row: dict) -> dict:
    question = {"role": "user", "content": "Write this table as Markdown."}
    return {"messages": [question, {"role": "assistant", "content": row["markdown"]}], "images": [row["image"]]}


def main(args: RecipeArguments, training_args: RecipeConfig) -> dict[str, float]:
    drawn = f"{training_args.output_dir}/tables-{args.num_tables}-{training_args.seed}"
    with training_args.main_process_first():
        if not (args.dataset_name or Path(drawn).exists()):
            write_tables(drawn, count=args.num_tables, seed=training_args.seed)
    processor = vlm_sft.load_processor(args.model_name_or_path)
    source, seed = args.dataset_name or drawn, training_args.seed
    data = vlm_sft.load_conversations(source, to_conversation=to_conversation, eval_fraction=0.02, seed=seed)
    model = vlm_sft.load_model(args.model_name_or_path, attn_implementation=training_args.attn_implementation)
    collator = vlm_sft.ChatCollator(processor, max_length=training_args.max_length)
    data = vlm_sft.check_rows(data, collator, on_bad_rows=args.on_bad_rows)  # opens and encodes each row once
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=processor,
        data_collator=collator,
        peft_config=vlm_sft.lora_config(model, TRAINS, r=16, lora_alpha=16),
        callbacks=vlm_sft.guards(model),
    )
    vlm_sft.evaluate_answers(trainer, data["test"], {"anls": anls}, num_rows=100, max_new_tokens=args.max_new_tokens)
    proof = vlm_sft.prove(trainer, TRAINS, args)  # what trains, in one table; train() refuses to start without it
    trainer.train(resume_from_checkpoint=vlm_sft.latest_checkpoint(trainer))
    return vlm_sft.finish(trainer, proof)


if __name__ == "__main__":
    vlm_sft.run(main, RecipeArguments, RecipeConfig)
