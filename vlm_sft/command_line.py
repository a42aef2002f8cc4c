"""A recipe's command line: TRL's parser, the nearest flag for an unknown one, and a mistake in its sentence alone."""

from __future__ import annotations

import gc
import inspect
import os
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from trl import TrlParser  # type: ignore[attr-defined]
from yaml import YAMLError

TRACEBACK = "VLM_SFT_TRACEBACK"  # the environment variable that shows where an error was raised
_PARTS = 'TRAINS at the top of the recipe, as in TRAINS = {"language": ["q_proj", "v_proj"]}'
_MEANT = {  # what other scripts, and older releases of transformers and TRL, call it
    "warmup_ratio": "--warmup_steps below 1, a share of all steps as in --warmup_steps 0.03",
    "evaluation_strategy": "--eval_strategy",
    "group_by_length": "--train_sampling_strategy group_by_length",
    **dict.fromkeys(("max_seq_length", "model_max_length", "cutoff_len"), "--max_length"),
    **dict.fromkeys(("dtype", "torch_dtype"), "--bf16 or --fp16 (by default what the machine computes in)"),
    **dict.fromkeys(("lora_target_modules", "target_modules", "lora_modules_to_save"), _PARTS),
    **{"lora_rank": "--lora_r", "epochs": "--num_train_epochs", "lr": "--learning_rate"},
    "batch_size": "--per_device_train_batch_size",
}


def run(main: Callable[..., Any], *kinds: Any) -> Any:
    """What a recipe's `main` returns, called with one instance of each dataclass, filled from the command line and from
    the YAML file of `--config`. `--help` lists what the recipe itself names.

    A wrong flag, setting, file or row (ValueError, OSError, ImportError) ends the process with exit code 1 and its
    sentence; where another package raised it, with the place. VLM_SFT_TRACEBACK=1 shows the frames."""
    if not gc.get_freeze_count():
        gc.freeze()  # so that no collection, and no data worker, goes through what imports have made
    # PEFT 0.21.2 and TRL 1.16 ask by a name that transformers 5.23 has replaced.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    try:
        return main(*_RecipeParser(kinds, description=inspect.getdoc(inspect.getmodule(main))).parse_args_and_config())
    except (ValueError, OSError, ImportError, YAMLError) as error:
        if os.environ.get(TRACEBACK):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = place.filename.startswith((str(Path(__file__).parent), sys.argv[0])) or isinstance(error, OSError)
        more = "" if ours else f" ({Path(place.filename).name}:{place.lineno}; {TRACEBACK}=1 shows more)"
        raise SystemExit(f"{error}{more}") from None


class OneLineErrors:
    """Mixin of a parser: a mistake in a command line is a ValueError of one line, with the nearest flag."""

    meant: Mapping[str, str] = {}

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}")  # type: ignore[attr-defined]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, left = super().parse_known_args(args, namespace)  # type: ignore[misc]
        self.refuse([word for word in left if word.startswith("-")] or left)
        return found, left

    def refuse(self, flags: Sequence[str]) -> None:
        """Raises ValueError unless there are none: the nearest known flag for each."""
        known, told = re.findall(r"--\w+", self.format_usage()), []  # type: ignore[attr-defined]
        for flag in (flag.partition("=")[0] for flag in flags):
            name = flag.strip("-").replace("-", "_")
            near = [self.meant[name]] if name in self.meant else get_close_matches(f"--{name}", known, n=1)
            told.append(f"{flag} is unknown; " + (f"use {near[0]}" if near else "--help lists the flags"))
        if told:
            self.error(". ".join(told))


class _RecipeParser(OneLineErrors, TrlParser):
    """TRL's; its help is one screen, and a switch such as `--bf16` may stand alone."""

    meant = _MEANT

    def add_argument(self, *names: Any, **settings: Any) -> Any:
        if getattr(settings.get("type"), "__name__", "") == "string_to_bool":  # transformers 5.23, for a bool or None
            settings = {"nargs": "?", "const": True} | settings
        return super().add_argument(*names, **settings)

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        self.refuse(super().set_defaults_with_config(**settings)[::2])
        return []

    def format_help(self) -> str:
        lines = [(self.description or "").partition("\n\n")[0], ""]
        for kind in self.dataclass_types:
            own = {
                f.name: (f.default if f.default_factory is MISSING else f.default_factory(), f)
                for f in fields(kind)
                if f.init
            }
            named = {name: own.pop(name) for name in inspect.get_annotations(kind)}  # the class's own come first
            if len(own) < 100:
                flags = (named | own).items()
                lines += [f"{f'--{n} {value}':52} {f.metadata.get('help', '')}".rstrip() for n, (value, f) in flags]
            else:
                chosen = ", ".join(f"--{name} {value}" for name, (value, _) in named.items())
                every = f"And every argument of TRL's SFTConfig, by its name. The recipe sets {chosen}."
                lines += ["", *textwrap.wrap(every, 118, break_on_hyphens=False)]
        return "\n".join([*lines, "--config FILE.yaml holds any of them; the command line wins.", ""])
