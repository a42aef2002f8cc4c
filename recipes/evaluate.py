"""How right are a model's answers to held-out rows? Metrics and a page of answers, on request beside the base's.

Trains nothing. Takes a model, a checkpoint or an adapter, whose base is found and answers again without the adapter.
The rows are the dataset's own test split, or else those that the run's record says it held out; --split names others.
They are asked with the --system_prompt that it was trained with.

    python recipes/evaluate.py                             # what the quickstart left
    python recipes/evaluate.py --model_name_or_path outputs/quickstart --metrics exact_match cer --num_rows 100
    accelerate launch recipes/evaluate.py --model_name_or_path outputs/llava15_sft --base --dataset_name my_data.jsonl

Writes samples.html and metrics.json to `output_dir`. Under accelerate launch several GPUs share the rows.
Edit: `METRICS` for one of your own, and `load_conversations`, which takes your `to_conversation`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import vlm_sft
from accelerate import PartialState
from peft import PeftModel
from vlm_sft.data.rows import recorded_prompt, recorded_rows
from vlm_sft.evaluation.metrics import anls, cer, exact_match
from vlm_sft.evaluation.pages import make_samples

METRICS = {metric.__name__: metric for metric in (exact_match, anls, cer)}
PAGE_ROWS = 300  # a page holds its images, and a browser holds the page


@dataclass
class RecipeArguments(vlm_sft.ReadingArguments):
    model_name_or_path: str = field(default="outputs/quickstart", metadata={"help": "Folder or Hub id."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the model."})
    base: bool = field(default=False, metadata={"help": "Let the model as it was before training answer as well."})
    base_model: str | None = field(default=None, metadata={"help": "Its folder or Hub id, if not recorded or moved."})
    dataset_name: str = field(default="outputs/quickstart/data", metadata={"help": "Hub id or path."})
    split: str | None = field(default=None, metadata={"help": "Split to answer instead of the held-out rows."})
    run: str | None = field(
        default=None, metadata={"help": "Folder of the run that held rows out, if not the model's."}
    )
    num_rows: int | None = field(default=None, metadata={"help": "Only the first rows."})
    metrics: list[str] = field(
        default_factory=lambda: ["exact_match"],
        metadata={"help": f"Of {', '.join(METRICS)}. The first one scores the rows of the page."},
    )
    batch_size: int = field(default=8, metadata={"help": "Rows at a time, on each device."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer."})
    output_dir: str = field(default="outputs/evaluate", metadata={"help": "Where the page and the numbers go."})

    def __post_init__(self) -> None:
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"no metric is called {', '.join(unknown)}; there are {', '.join(METRICS)}")
        for name in ("num_rows", "batch_size", "max_new_tokens"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"--{name} {number}: expected at least 1, or leave it out")


def table(scores: Mapping[str, Mapping[str, float]], *, rows: int) -> str:
    columns = sorted(scores)  # base, tuned
    lines = [[f"{rows} rows", *columns]]
    lines += [[metric, *(f"{scores[name][metric]:.4f}" for name in columns)] for metric in scores["tuned"]]
    return "\n".join(f"{first:24}" + "".join(f"{cell:>10}" for cell in cells) for first, *cells in lines)


def samples(rows: Any, references: list[str], answers: Mapping[str, list[str]], metric: str) -> list[vlm_sft.Sample]:
    """Rows for the page, spread evenly over all, each answer scored from 0 (wrong) to 1."""
    some = slice(0, None, -(-len(rows) // PAGE_ROWS))
    shown = {name: predictions[some] for name, predictions in answers.items()}
    chosen = [rows[n] for n in range(len(rows))[some]]
    return make_samples(chosen, references[some], METRICS[metric], shown["tuned"], shown.get("base"))


def held_out_rows(args: RecipeArguments) -> Any:
    data = vlm_sft.load_conversations(args.dataset_name, split=args.split or "train", eval_fraction=0, **args.reading)
    if args.split or "test" in data:
        return data["train" if args.split else "test"]
    return recorded_rows(data["train"], Path(args.run or args.model_name_or_path))


def main(args: RecipeArguments) -> dict[str, dict[str, float]]:
    run = Path(args.run or args.model_name_or_path)
    args = replace(args, system_prompt=recorded_prompt(run, args.system_prompt))  # asked as it was trained
    process, rows = PartialState(), held_out_rows(args)
    rows = rows.select(range(min(args.num_rows or len(rows), len(rows))))
    references = [vlm_sft.split_reference(row).reference for row in rows]
    if missing := [str(row) for row, reference in zip(rows["row"], references, strict=True) if reference is None]:
        raise ValueError(
            f"{len(missing)} rows ({', '.join(missing[:9])}) do not end with an assistant message, so there is nothing "
            "to compare an answer with; write the right answers there, or leave these rows out"
        )

    template = vlm_sft.ChatTemplate(vlm_sft.load_processor(args.model_name_or_path, revision=args.model_revision))
    generate = partial(vlm_sft.generate, rows=rows, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens)
    model = vlm_sft.load_model(args.model_name_or_path, revision=args.model_revision, base_model=args.base_model)
    is_adapter = isinstance(model, PeftModel)
    if args.base and not (is_adapter or args.base_model):
        raise ValueError(
            f"--base: {args.model_name_or_path} is a full model, which does not know what it was before training; add "
            "--base_model and the folder or Hub id"
        )
    answers = {"tuned": generate(model.to(process.device), template)}
    if is_adapter and args.base:
        with model.disable_adapter():
            answers["base"] = generate(model, template)
    elif args.base_model and not is_adapter:
        del model  # where one has room, two may not
        base = vlm_sft.load_model(args.base_model).to(process.device)
        answers["base"] = generate(base, vlm_sft.ChatTemplate(vlm_sft.load_processor(args.base_model)))

    scores = {
        name: {key: METRICS[key](predictions, references) for key in args.metrics}
        for name, predictions in answers.items()
    }
    output = Path(args.output_dir)
    shown = samples(rows, references, answers, args.metrics[0])
    vlm_sft.write_samples_html(shown, output / "samples.html", title=f"Answers of {Path(args.model_name_or_path).name}")
    if process.is_main_process:
        print(f"{args.model_name_or_path} on {args.dataset_name}\n{table(scores, rows=len(rows))}")
        found = {
            "rows": len(rows),
            "metrics": scores,
            "settings": {name: value for name, value in vars(args).items() if name[0] != "_"},
        }
        (output / "metrics.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return scores


if __name__ == "__main__":
    vlm_sft.run(main, RecipeArguments)
