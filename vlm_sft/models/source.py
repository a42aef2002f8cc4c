"""Where a model comes from: a folder or a Hub name, its commit, its config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, PreTrainedConfig

_SOURCE = "_vlm_sft_source"  # where a model or processor keeps what `loaded_from` returns; saved by neither


def loaded_from(model_or_processor: Any) -> tuple[str, str | None]:
    """The name or folder that `load_model` or `load_processor` was given, and the commit that the revision was.

    Of what they did not load, the name that transformers knows, and None.
    """
    named = getattr(model_or_processor, "config", None) or getattr(model_or_processor, "tokenizer", None)
    known = (str(getattr(named, "name_or_path", "")), None)
    source: tuple[str, str | None] = getattr(model_or_processor, _SOURCE, known)
    return source


def record_source(model_or_processor: Any, name: str, revision: str | None) -> None:
    """Keeps what `loaded_from` returns."""
    setattr(model_or_processor, _SOURCE, (name, getattr(revision, "resolved", revision)))


def read_config(
    name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The config of a vision-language model. Raises ValueError where there is none, and for a text-only model."""
    name = existing(name_or_path)
    at = place(name, revision)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except OSError as error:
        raise ValueError(f"No model in {at}: {first_line(error)}. Give its folder or Hub name.") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not trust_remote_code:
        raise ValueError(
            f"{at} is a {config.model_type!r} model, which takes no images; give a vision-language model such as "
            "llava-hf/llava-1.5-7b-hf."
        )
    return config


def existing(name_or_path: str | Path | None) -> str:
    """The folder or Hub name as given; ValueError where it can be neither."""
    name = str(name_or_path)
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"No folder {name!r} (from {Path.cwd()}), and no Hub name is written so.")
    return name


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def place(name: str, revision: str | None) -> str:
    """The name for an error, and what it was taken for: a slip in a folder's name makes a Hub name of it."""
    if Path(name).is_dir():
        return repr(name)
    return f"{name!r} (no such folder; treated as a Hub name, revision {revision or 'main'})"
