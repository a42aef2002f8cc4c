"""What a short run of the quickstart leaves: a tiny model that reads most digits, its data, what it printed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import load_from_disk
from filelock import FileLock
from peft import get_peft_model
from recipe_runs import recipe

import vlm_sft
from vlm_sft.tools import tiny


class Quickstart(NamedTuple):
    """Never write to its folders: every process of the tests reads them."""

    folder: Path
    base: Path  # the model as it was before training
    printed: dict[str, float]

    @property
    def rows(self) -> Any:
        """Held-out digits."""
        return load_from_disk(self.folder / "data")["test"]


def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """One run for the whole session, whichever process of pytest-xdist comes first."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, base, printed = root / "quickstart", root / "quickstart-base", root / "quickstart.json"
    with FileLock(root / "quickstart.lock"):
        if not printed.is_file():
            module = recipe("quickstart")
            args = module.RecipeArguments(num_train_rows=400, num_eval_rows=40)
            corpus = [module.QUESTION, *module.DIGITS]
            tiny.save("llava15", base, hidden_size=args.hidden_size, num_layers=args.num_layers, corpus=corpus)
            training_args = module.RecipeConfig(
                output_dir=str(folder),
                num_train_epochs=4,
                per_device_train_batch_size=16,
                warmup_steps=10,
                disable_tqdm=True,
            )
            printed.write_text(json.dumps(module.main(args, training_args)), encoding="utf-8")
    return Quickstart(folder, base, json.loads(printed.read_text("utf-8")))


def adapter(folder: Path, base: Path, *, std: float = 0.5) -> Path:
    """A LoRA on `base` whose weights are random, so that it answers otherwise; saved with its processor."""
    model = vlm_sft.load_model(base)
    torch.manual_seed(0)
    tuned = get_peft_model(model, vlm_sft.lora_config(model, r=4))
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=std)
    tuned.save_pretrained(folder)
    vlm_sft.load_processor(base).save_pretrained(folder)
    return folder


def without_base(adapter: Path, folder: Path) -> Path:
    """A copy of the adapter that says that it was trained on a folder which is no more."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = str(folder / "gone")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
