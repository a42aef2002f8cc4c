"""A recipe's command line: TRL's parser, an unknown flag with the nearest known one, and a mistake in its sentence.

if __name__ == "__main__":
    vlm_sft.run(main, RecipeArguments, RecipeConfig)
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from trl import TrlParser  # type: ignore[attr-defined]
from yaml import YAMLError

TRACEBACK = "VLM_SFT_TRACEBACK"
"""The environment variable that shows where an error was raised."""

_PARTS = 'TRAINS at the top of the recipe, as in TRAINS = {"language": ["q_proj", "v_proj"]}'
# What other scripts, and older releases of transformers and TRL, call it.
_MEANT = {
    "warmup_ratio": "--warmup_steps below 1, a share of all steps as in --warmup_steps 0.03",
    "evaluation_strategy": "--eval_strategy",
    "group_by_length": "--train_sampling_strategy group_by_length",
    **dict.fromkeys(("max_seq_length", "model_max_length", "cutoff_len"), "--max_length"),
    **dict.fromkeys(("dtype", "torch_dtype"), "--bf16 or --fp16 (by default what the machine computes in)"),
    **dict.fromkeys(("lora_target_modules", "target_modules", "lora_modules_to_save"), _PARTS),
    "lora_rank": "--lora_r",
    "epochs": "--num_train_epochs",
    "lr": "--learning_rate",
    "batch_size": "--per_device_train_batch_size",
}


def run(main: Callable[..., Any], *kinds: Any) -> Any:
    """What `main` returns, called with one instance of each dataclass, filled from the command line and from the YAML
    file of `--config`.

    A wrong flag, setting, file or row (ValueError, OSError, ImportError) ends the process with exit code 1 and its
    sentence alone; VLM_SFT_TRACEBACK=1 shows the frames. `--help` lists what the recipe itself names.
    """
    with errors_in_a_sentence():
        return main(*_RecipeParser(kinds, description=inspect.getdoc(inspect.getmodule(main))).parse_args_and_config())


@contextmanager
def errors_in_a_sentence() -> Iterator[None]:
    """Ends the process with the error's own text; where another package raised it, with the place as well."""
    try:
        yield
    except (ValueError, OSError, ImportError, YAMLError) as error:
        if os.environ.get(TRACEBACK):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        file = Path(place.filename).resolve()
        ours = file.is_relative_to(Path(__file__).resolve().parent) or file == Path(sys.argv[0]).resolve()
        told = "" if ours or isinstance(error, OSError) else f" ({file.name}:{place.lineno}; {TRACEBACK}=1 shows more)"
        raise SystemExit(f"{error}{told}") from None


class OneLineErrors:
    """Mixin of argparse's parsers: a mistake in a command line is a ValueError of one line, with the nearest flag."""

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
            nearest = get_close_matches(f"--{name}", known, n=1)
            meant = self.meant.get(name) or (nearest[0] if nearest else "")
            told.append(f"{flag} is unknown; " + (f"use {meant}" if meant else "--help lists the flags"))
        if told:
            self.error(". ".join(told))


class _RecipeParser(OneLineErrors, TrlParser):
    """TRL's; `--help` is one screen, with the flags that the recipe names itself, and `--bf16` may stand alone."""

    meant = _MEANT

    def add_argument(self, *names: Any, **settings: Any) -> Any:
        if getattr(settings.get("type"), "__name__", "") == "string_to_bool":  # transformers 5.23, for a bool or None
            settings = {"nargs": "?", "const": True} | settings
        return super().add_argument(*names, **settings)

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        left: list[str] = super().set_defaults_with_config(**settings)
        self.refuse(left[::2])
        return left

    def format_help(self) -> str:
        flags, *configs = self.dataclass_types
        own = inspect.get_annotations(flags)
        named = sorted((f for f in fields(flags) if f.init), key=lambda f: f.name not in own)
        lines = [(self.description or "").partition("\n\n")[0], ""]
        lines += [f"{f'--{f.name} {_default(f)}':52} {f.metadata.get('help', '')}".rstrip() for f in named]
        for config in configs:
            chosen = [f"--{f.name} {_default(f)}" for f in fields(config) if f.name in inspect.get_annotations(config)]
            more = "And every argument of TRL's SFTConfig, by its name. The recipe sets"
            lines += ["", *textwrap.wrap(f"{more} {', '.join(chosen)}.", 118, break_on_hyphens=False)]
        return "\n".join([*lines, "--config FILE.yaml holds any of them; the command line wins.", ""])


def _default(field: Any) -> Any:
    return field.default_factory() if field.default is MISSING else field.default
