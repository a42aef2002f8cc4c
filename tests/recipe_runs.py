"""Recipes run in this process through their own `main`, as their flags say."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from trl import SFTTrainer, TrlParser

ROOT = Path(__file__).parent.parent


@dataclass
class Run:
    """What `main` returned, the Trainer it made, the steps that were taken in this run, and the folder."""

    metrics: dict[str, Any]
    trainer: Any
    steps: int
    output: Path


def recipe(name: str) -> ModuleType:
    return module_of(ROOT / "recipes" / f"{name}.py")


def module_of(path: Path) -> ModuleType:
    """The module in this file, known by its name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


def run(name: str, flags: Sequence[object]) -> Run:
    return run_module(recipe(name), flags)


def run_module(module: Any, flags: Sequence[object]) -> Run:
    made = []

    class Kept(SFTTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.steps = 0
            made.append(self)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.steps += 1
            return super().training_step(*args, **kwargs)

    module.SFTTrainer = Kept
    parser = TrlParser((module.RecipeArguments, module.RecipeConfig))
    args, training_args = parser.parse_args_and_config([str(flag) for flag in flags])
    metrics = module.main(args, training_args)
    return Run(metrics, made[0], made[0].steps, Path(training_args.output_dir))
