"""A recipe's settings read as they run, and what could only fail later is refused at once."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import ROOT, recipe
from trl import TrlParser

from vlm_sft import RecipeDefaults

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py") if path.stem not in ("chat", "evaluate"))
CPU = {"use_cpu": True, "bf16": False}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_reads_as_it_runs(name: str) -> None:
    """Field by field, what the class says is what an empty command line parses to: `HfArgumentParser` (transformers
    5.23) reads a `default_factory` of a bool as False."""
    module: Any = recipe(name)
    kinds = (module.RecipeArguments, module.RecipeConfig)
    for kind, parsed in zip(kinds, TrlParser(kinds).parse_args_and_config([]), strict=True):
        read = kind()
        differ = {f.name: (vars(read)[f.name], vars(parsed)[f.name]) for f in fields(kind) if f.init}
        unlike = {name: pair for name, pair in differ.items() if str(pair[0]) != str(pair[1])}
        assert not unlike
        assert len(differ) > 4


@pytest.mark.parametrize("what", ["eval", "save"])
def test_no_evaluation_or_no_save_needs_no_second_flag(what: str, tmp_path: Path) -> None:
    config: Any = recipe("llava15_sft").RecipeConfig
    args = config(output_dir=str(tmp_path), **{f"{what}_strategy": "no"}, **CPU)
    assert not args.load_best_model_at_end
    assert f"the last weights are kept, as --{what}_strategy is no" in args.hardware_changes
    assert config(output_dir=str(tmp_path), **CPU).load_best_model_at_end


def test_a_run_is_named_after_its_folder(tmp_path: Path) -> None:
    assert RecipeDefaults(output_dir=str(tmp_path / "digits"), **CPU).run_name == "digits"
    assert RecipeDefaults(output_dir=str(tmp_path), run_name="mine", **CPU).run_name == "mine"


def test_a_push_that_could_not_be_made_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--push_to_hub: the Hub .* Log in with `hf auth login` or set HF_TOKEN"):
        RecipeDefaults(output_dir=str(tmp_path), push_to_hub=True, **CPU)


def test_an_output_folder_that_the_locale_cannot_spell_is_refused(tmp_path: Path) -> None:
    """As Python decodes the bytes of `L\u00e4ufe` under an ASCII locale."""
    folder = f"{tmp_path}/L" + "\u00e4".encode().decode("ascii", "surrogateescape") + "ufe"
    with pytest.raises(ValueError, match=r"--output_dir '.*L\\udcc3\\udca4ufe' is not spelled .*: set PYTHONUTF8=1"):
        RecipeDefaults(output_dir=folder, **CPU)
    assert RecipeDefaults(output_dir=f"{tmp_path}/L\u00e4ufe", **CPU)
