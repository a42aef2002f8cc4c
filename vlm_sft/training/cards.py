"""The model card of a run: what was trained, on what, how, with which result, and lines that run it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import ModelCard

from vlm_sft.models.fingerprints import base_settings


def write_model_card(
    trainer: Any, *, dataset_name: str | None, datasets: Mapping[str, Any], results: Mapping[str, Any]
) -> None:
    """Writes `README.md` into the output folder: TRL's own card with data, method, results and lines that run it.

    TRL 1.16 calls every model a text generator and links what lies in a folder as if it were on the Hub; here the task
    is image-text-to-text, and of a folder only the name is told.
    """
    if not PartialState().is_main_process:
        return
    output, model, args = Path(trainer.args.output_dir), trainer.model, trainer.args
    adapters = getattr(model, "peft_config", {})
    data_id = dataset_name if _on_hub(dataset_name) else None
    trainer.create_model_card(model_name=output.name, dataset_name=data_id)
    card = ModelCard.load(output / "README.md", repo_type="model")
    card.data.pop("licence", None)  # TRL's placeholder; the base's license holds
    card.data.pipeline_tag = "image-text-to-text"
    card.data.library_name = "peft" if adapters else "transformers"
    base = base_settings(model)
    trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
    quantization = base["quantization_config"] or {}
    method = {
        "trained": f"{trained:,} of {total:,} parameters",
        "adapters": "; ".join(_adapter(config) for config in adapters.values()) or "none, the weights themselves",
        "base": quantization.get("bnb_4bit_quant_type", quantization.get("quant_method", base["dtype"])),
        "learning rate": f"{args.learning_rate:g}, {_text(args.lr_scheduler_type)}, warm-up {args.warmup_steps:g}",
        "optimizer": _text(args.optim),
        "rows a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "steps": f"{trainer.state.global_step:,} ({trainer.state.epoch or 0:.3g} epochs)",
        "seed": args.seed,
    }
    rows = {split: len(data) if isinstance(data, Sized) else "streamed" for split, data in datasets.items()}
    told = {name: value for name, value in results.items() if isinstance(value, (int, float))}
    numbers = {name: f"{value:.4g}" for name, value in told.items() if not _COSTS.search(name)}
    name, base_name = args.hub_model_id or output.name, base["base_model_name_or_path"]
    load = (_LOAD_ADAPTER if adapters else _LOAD).strip()
    _, _, rest = card.text.partition("## Training procedure")
    card.text = _CARD.format(
        title=output.name,
        base=_link(base_name, otherwise="random weights"),
        data=_link(dataset_name, "datasets/", otherwise="local data"),
        name=name,
        load=load.format(name=name, base=base_name if _on_hub(base_name) else Path(base_name).name),
        rows=_table("split", "rows", rows),
        method=_table("setting", "value", method),
        results=_table("metric", "value", numbers),
        rest=rest,
    )
    card.save(output / "README.md")


_COSTS = re.compile(r"_runtime$|_per_second$|_num_tokens$|_generation_s$|^epoch$")  # run.json holds them
_CARD = """
# {title}

Fine-tuned from {base} on {data} with [TRL](https://github.com/huggingface/trl).

## Quick start

```python
from PIL import Image
{load}
processor = AutoProcessor.from_pretrained("{name}")
question = [{{"type": "image", "image": Image.open("photo.jpg")}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": question}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

## Data

{rows}

## Method

{method}

## Results

{results}

`run.json` beside this file holds versions, all settings and a fingerprint of the data.

## Training procedure{rest}"""

_LOAD = """
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto")"""
# Not by transformers alone, which leaves out DoRA's magnitudes (5.23).
_LOAD_ADAPTER = """
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, "{name}")"""


def _table(left: str, right: str, lines: Mapping[str, Any]) -> str:
    return "\n".join([f"| {left} | {right} |", "|---|---|", *(f"| {key} | {value} |" for key, value in lines.items())])


def _adapter(config: Any) -> str:
    kind = "DoRA" if getattr(config, "use_dora", False) else config.peft_type.value
    parts = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    return ", ".join([kind, *(f"{name} {getattr(config, key)}" for key, name in parts.items() if hasattr(config, key))])


def _text(setting: Any) -> str:
    return str(getattr(setting, "value", setting))


def _on_hub(name: str | None) -> bool:
    return name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _link(name: str | None, kind: str = "", *, otherwise: str) -> str:
    """A link to the Hub; of what lies in a folder, its name alone."""
    if name is not None and _on_hub(name):
        return f"[{name}](https://huggingface.co/{kind}{name})"
    return f"`{Path(name).name}`" if name else otherwise
