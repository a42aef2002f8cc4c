"""The model card of a run: TRL's own, corrected, with what was trained, on what, how, and with which result."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import ModelCard
from jinja2 import StrictUndefined, Template

from vlm_sft.models.fingerprints import base_settings

_COSTS = re.compile(r"_runtime$|_per_second$|_num_tokens$|_generation_s$|^epoch$")  # run.json holds them


def write_model_card(
    trainer: Any, *, dataset_name: str | None, datasets: Mapping[str, Any], results: Mapping[str, Any]
) -> None:
    """Writes `README.md` into the output folder: TRL's card with data, method, results and lines that run the model.

    TRL 1.16 calls every model a text generator and links what lies in a folder as if it were on the Hub; here the task
    is image-text-to-text, and of a folder only the name is told.
    """
    if not PartialState().is_main_process:
        return
    output, model, args = Path(trainer.args.output_dir), trainer.model, trainer.args
    adapters = getattr(model, "peft_config", {})
    base = base_settings(model)
    names = {"base": base["base_model_name_or_path"], "data": dataset_name}
    on_hub = {f"{kind}_on_hub": _on_hub(name) for kind, name in names.items()}
    trainer.create_model_card(model_name=output.name, dataset_name=dataset_name if on_hub["data_on_hub"] else None)
    card = ModelCard.load(output / "README.md", repo_type="model")
    card.data.pop("licence", None)  # TRL's placeholder; the base's license holds
    card.data.pipeline_tag = "image-text-to-text"
    card.data.library_name = "peft" if adapters else "transformers"
    trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
    quantization = base["quantization_config"] or {}
    method = {
        "trained": f"{trained:,} of {total:,} parameters",
        "adapters": "; ".join(map(_adapter, adapters.values())) or "none, the weights themselves",
        "base": quantization.get("bnb_4bit_quant_type", quantization.get("quant_method", base["dtype"])),
        "learning rate": f"{args.learning_rate:g}, {_text(args.lr_scheduler_type)}, warm-up {args.warmup_steps:g}",
        "optimizer": _text(args.optim),
        "rows a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "steps": f"{trainer.state.global_step:,} ({trainer.state.epoch or 0:.3g} epochs)",
        "seed": args.seed,
    }
    numbers = {name: value for name, value in results.items() if isinstance(value, (int, float))}
    template = Path(__file__).with_name("card.md.jinja").read_text("utf-8")
    card.text = Template(template, undefined=StrictUndefined).render(
        title=output.name,
        name=args.hub_model_id or output.name,
        adapters=adapters,
        rows={split: len(data) if isinstance(data, Sized) else "streamed" for split, data in datasets.items()},
        method=method,
        results={name: f"{value:.4g}" for name, value in numbers.items() if not _COSTS.search(name)},
        procedure=card.text.partition("## Training procedure")[2],
        **{kind: name if on_hub[f"{kind}_on_hub"] or not name else Path(name).name for kind, name in names.items()},
        **on_hub,
    )
    card.save(output / "README.md")


def _adapter(config: Any) -> str:
    kind = "DoRA" if getattr(config, "use_dora", False) else config.peft_type.value
    parts = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    return ", ".join([kind, *(f"{name} {getattr(config, key)}" for key, name in parts.items() if hasattr(config, key))])


def _text(setting: Any) -> str:
    return str(getattr(setting, "value", setting))


def _on_hub(name: str | None) -> bool:
    """Of what lies in a folder, only the name is told."""
    return name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
