"""The commands of `python -m vlm_sft`: what they print, what they return, and one line for an error."""

from __future__ import annotations

import json
import runpy
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, get_args

import pytest
from digits import adapter

from vlm_sft.__main__ import _parser, main
from vlm_sft.tools import memory, merging, tiny

UNSET = {"prompt": None, "system_prompt": None, "allow_outside": False, "dataset_config": None}
COMMANDS = ("audit", "check", "copy", "merge", "memory", "tiny")


def parsed(*arguments: str) -> dict[str, Any]:
    options = vars(_parser().parse_args(arguments))
    options["command"] = options["command"].__name__
    return options


def test_audit_takes_what_it_took() -> None:
    rows = {"model": "m", "dataset": "d", "columns": ["prompt=a", "response=b"], "image_folder": "images"}
    given = ["--model", "m", "--dataset", "d", "--image_folder", "images", "--columns", "prompt=a", "response=b"]
    defaults = {"train_on": "assistant", "num_rows": 64, "html": None} | UNSET
    assert parsed("audit", *given) == {"command": "audit", **rows, **defaults}
    given += ["--train_on", "all", "--num_rows", "2", "--html", "page.html"]
    given += ["--prompt", "What?", "--system_prompt", "Brief.", "--allow_outside", "--dataset_config", "c"]
    set_too = {"prompt": "What?", "system_prompt": "Brief.", "allow_outside": True, "dataset_config": "c"}
    changed = {"train_on": "all", "num_rows": 2, "html": "page.html"} | set_too
    assert parsed("audit", *given) == {"command": "audit", **rows, **changed}


def test_check_takes_what_it_took() -> None:
    given = ["--dataset", "d", "--split", "s", "--model", "m"]
    given += ["--max_length", "99", "--num_proc", "2", "--to_jsonl", "faults.jsonl"]
    assert parsed("check", *given) == {
        "command": "check",
        "model": "m",
        "dataset": "d",
        "columns": None,
        "image_folder": None,
        "split": "s",
        "max_length": 99,
        "num_proc": 2,
        "to_jsonl": "faults.jsonl",
        **UNSET,
    }
    assert parsed("check", "--dataset", "d")["split"] == "train"


def test_choices_are_the_functions_own() -> None:
    def choices(command: str, flag: str, values: Any) -> None:
        needed = {"merge": ["a", "b"], "memory": ["--model", "m"]}[command]
        for value in values:
            assert parsed(command, *needed, f"--{flag}", value)[flag] == value
        with pytest.raises(ValueError, match="invalid choice"):
            parsed(command, *needed, f"--{flag}", "another")

    choices("merge", "base", get_args(merging.Base))
    choices("merge", "dtype", [str(dtype).removeprefix("torch.") for dtype in merging._TOLERANCES])
    choices("memory", "method", get_args(memory.Method))
    choices("memory", "strategy", get_args(memory.Strategy))
    choices("memory", "optimizer", memory._ADAM)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "vlm-sft: the following arguments are required: audit|check|copy|merge|memory|tiny"),
        (["scan"], "vlm-sft: argument audit|check|copy|merge|memory|tiny: invalid choice: 'scan'"),
        (["audit", "--dataset", "d"], "vlm-sft audit: the following arguments are required: --model"),
        (["check", "--dataset", "d", "--modle", "m"], "vlm-sft check: --modle is unknown; use --model"),
        (["memory", "--model", "m", "--lora-rank", "4"], "vlm-sft memory: --lora-rank is unknown; use --lora_r"),
    ],
)
def test_a_wrong_use_is_told_in_a_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(arguments) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(line)
    monkeypatch.setenv("VLM_SFT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="vlm-sft"):
        main(arguments)


def test_copy_writes_a_recipe_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["copy", "smolvlm"]) == 1
    assert "there are chat, evaluate, gemma4_sft, " in capsys.readouterr().err
    assert main(["copy", "smolvlm_sft"]) == 0
    assert "accelerate launch smolvlm_sft.py --dataset_name DATA" in capsys.readouterr().out
    recipes = Path(__file__).parents[1] / "recipes"
    assert Path("smolvlm_sft.py").read_text("utf-8") == (recipes / "smolvlm_sft.py").read_text("utf-8")
    assert Path("accelerate_configs/fsdp2.yaml").is_file()
    assert main(["copy", "smolvlm_sft"]) == 1
    assert "smolvlm_sft.py is here already" in capsys.readouterr().err


def test_tiny_writes_a_folder_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "twin"
    assert main(["tiny", "llava15", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    assert (folder / "config.json").is_file()
    assert main(["tiny", "gemma3", str(folder)]) == 1
    assert capsys.readouterr().err.startswith(f"tiny: {folder} exists and is not an empty folder")


def test_tiny_lists_the_families(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", "paligemma", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tiny: unknown family 'paligemma'")
    assert all(family in line for family in tiny.FAMILIES)


def test_memory_needs_a_config_alone_and_its_answer_is_the_exit_code(
    tiny_dir: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((tiny_dir("llava15") / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    command = ["memory", "--model", str(tmp_path), "--method", "full", "--gpus", "2", "--strategy", "zero3"]
    assert main([*command, "--gpu_memory", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("parameters  vision ")
    assert "fits on 2 x 2 GiB" in printed
    assert main([*command, "--gpu_memory", "0.001"]) == 1
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["check", "--dataset", "rows.jsonl", "--max_length", "9"], "check: --max_length counts tokens, so it needs"),
        (["merge", "none", "out"], "merge: none holds no adapter_config.json"),
        (["memory", "--model", "no/such-model"], "memory: "),
        (["tiny", "llava15"], "tiny: give FAMILY DIR, or --like MODEL DIR"),
    ],
)
def test_an_error_is_one_line(
    arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(line)


def test_merge(tiny_dir: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = adapter(tmp_path / "adapter", tiny_dir("llava15"), std=0.05)
    command = ["merge", str(folder), str(tmp_path / "out"), "--base", "original", "--dtype", "bfloat16"]
    assert main(command) == 0
    assert "out (bfloat16): logits differ from adapter on base by" in capsys.readouterr().out
    assert main(command) == 1
    assert "out exists already" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # this module has imported it
def test_as_a_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m` and the installed command are one; help lists all commands."""
    monkeypatch.setattr(sys, "argv", ["vlm_sft", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("vlm_sft", run_name="__main__")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(f"\n    {command} " in said for command in COMMANDS)
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    script = EntryPoint("vlm-sft", project["scripts"]["vlm-sft"], "console_scripts")
    assert script.load() is main
