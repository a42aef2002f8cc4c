"""Writes docs/api.md: each public name of vlm_sft with its signature, its docstring and an example.

    python docs/api.py

An example is the shortest statement of a recipe that uses the name, or else one of those below.
"""

import ast
import inspect
import re
import textwrap
from pathlib import Path

import vlm_sft

ROOT = Path(__file__).parents[1]
EXAMPLES = {
    "AutoModelForVision2Seq": "model = vlm_sft.AutoModelForVision2Seq.from_pretrained(name)",
    "ChatTemplate": "template = vlm_sft.ChatTemplate(processor)",
    "IGNORE_INDEX": 'trained = batch["labels"] != vlm_sft.IGNORE_INDEX',
    "ReadingArguments": "class RecipeArguments(vlm_sft.ReadingArguments): ...",
    "Arguments": "class RecipeArguments(vlm_sft.Arguments): ...",
    "DataArguments": "class RecipeArguments(vlm_sft.DataArguments): ...",
    "RecipeDefaults": "class RecipeConfig(vlm_sft.RecipeDefaults): ...",
    "Sample": 'vlm_sft.Sample(images=[image], question="What?", reference="A cat.", after="A dog.", score=0.0)',
    "best_dtype": "dtype = vlm_sft.best_dtype()",
    "generate": 'answers = vlm_sft.generate(model, vlm_sft.ChatTemplate(processor), data["test"])',
    "load_model": 'model = vlm_sft.load_model("llava-hf/llava-1.5-7b-hf", load_in_4bit=True)',
    "lora_config": 'peft_config = vlm_sft.lora_config(model, {"language": "lora"}, r=16, use_dora=True)',
    "merge": 'vlm_sft.merge("outputs/llava15_sft", "outputs/merged")',
    "nf4_config": "model = vlm_sft.load_model(name, quantization_config=vlm_sft.nf4_config(config))",
    "pack": 'data["train"] = vlm_sft.pack(data["train"], max_length=8192)',
    "lr_by_part": 'optimizer_cls_and_kwargs=vlm_sft.lr_by_part(training_args, {"projector": 2e-5})',
    "guards": "callbacks=vlm_sft.guards(model)",
    "register_parts": 'vlm_sft.register_parts("mine", vision="eyes", projector="bridge", language="text", head="head")',
    "scale_boxes": 'boxes = vlm_sft.scale_boxes(row["boxes"], row["image"], processor, given="pixels")',
}
DESCRIBED = {
    "AutoModelForVision2Seq": "`AutoModelForImageTextToText` of transformers, by the name that transformers 5 dropped.",
    "IGNORE_INDEX": "-100, the label of a token that is not trained.",
}


def used() -> dict[str, str]:
    """Name -> the shortest statement of a recipe that calls it."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "recipes").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.Assign, ast.Expr, ast.Return)):
                for call in (inner for inner in ast.walk(node) if isinstance(inner, ast.Call)):
                    name = ast.unparse(call.func).removeprefix("vlm_sft.")
                    found.setdefault(name, []).append(ast.unparse(node))
    return {name: min(statements, key=len) for name, statements in found.items()}


def signature(name: str) -> str:
    """As it is written, without the 130 arguments of TRL's SFTConfig."""
    if name in DESCRIBED:
        return ""
    written = re.sub(r"""(: |-> )(['"])(.*?)\2""", r"\1\3", str(inspect.signature(getattr(vlm_sft, name))))
    return "(output_dir, **settings of SFTConfig)" if len(written) > 2000 else written.replace("self, ", "")


def page() -> str:
    """The text of docs/api.md."""
    examples = used() | EXAMPLES
    lines = ["# Public names", "", "Made from the docstrings by `python docs/api.py`. All are `vlm_sft.<name>`.", ""]
    for name in vlm_sft.__all__:
        text = DESCRIBED.get(name) or inspect.getdoc(getattr(vlm_sft, name)) or ""
        lines += [f"## {name}", "", "```python", *textwrap.wrap(name + signature(name), 118, subsequent_indent="    ")]
        lines += ["```", "", text, "", "```python", examples[name], "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(page(), encoding="utf-8")
