"""Twenty mistakes of a newcomer: each ends in one sentence that says what to do, fifteen before the model is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from recipe_data import noise
from recipe_runs import ROOT, recipe

import vlm_sft
from vlm_sft.models import loading
from vlm_sft.models.fingerprints import loaded_from

# What is given beyond a command that works, and the sentence. {folder} holds rows.jsonl, its images and a twin.
BEFORE = {
    "an old name": (["--warmup_ratio", "0.1"], "--warmup_ratio is unknown; use --warmup_steps below 1, a share of all"),
    "another old name": (["--evaluation_strategy", "no"], "--evaluation_strategy is unknown; use --eval_strategy"),
    "a name of TRL's past": (["--max_seq_length", "99"], "--max_seq_length is unknown; use --max_length"),
    "a flag of other scripts": (["--group_by_length", "True"], "use --train_sampling_strategy group_by_length"),
    "what the recipe's text says": (["--lora_target_modules", "q_proj"], "use TRAINS at the top of the recipe, as in"),
    "a precision": (["--dtype", "bfloat16"], "--dtype is unknown; use --bf16 or --fp16"),
    "a typing error": (["--lerning_rate=1e-4"], "--lerning_rate is unknown; use --learning_rate"),
    "a word that no flag takes": (["rows.jsonl"], "rows.jsonl is unknown; --help lists the flags"),
    "no number": (["--lora_r", "many"], "argument --lora_r/--lora-r: invalid int value: 'many'"),
    "another word": (
        ["--on_bad_rows", "skip"],
        "invalid choice: 'skip' (choose from ",
    ),
    "a scheduler": (["--lr_scheduler_type", "cosin"], "cosin is not a valid SchedulerType, please select one of"),
    "no such config": (["--config", "run.yml"], "No such file or directory: 'run.yml'"),
    "a config's typing error": (["--config", "{folder}/typo.yaml"], "--lora_rnk is unknown; use --lora_r"),
    "an inert setting": (["--packing", "True"], "without effect here: --packing True. padding-free rows are"),
    "a folder's typing error": (["--model_name_or_path", "{folder}/twn"], "did you mean '{folder}/twin'?"),
    "no data": (["--dataset_name", "{folder}/row.jsonl"], "row.jsonl"),
    "another column": (["--columns", "prompt=question"], "question"),
    "no image folder": (["--image_folder", "{folder}/pictures"], "there is no such folder"),
    "too many held out": (["--num_eval_rows", "99"], "99"),
}
AFTER = {
    "rows too long": (["--max_length", "9"], "more than max_length=9; raise it"),
    "a warm-up longer than the run": (["--warmup_steps", "99"], "the warm-up takes 99 of the run's 1 steps"),
    "a metric that nobody reports": (["--metric_for_best_model", "accuracy"], "accuracy is reported by nothing"),
    "the folder of another run": (["--output_dir", "{folder}/other", "--lora_r", "2"], "belongs to another run"),
}
assert len(BEFORE) + len(AFTER) >= 20
assert len(BEFORE) >= 15


@pytest.fixture(scope="session")
def folder(tiny_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("mistakes")
    rows = []
    for n, image in enumerate(noise(8)):
        image.save(folder / f"{n}.png")
        rows.append({"ask": f"<image>What is {n}?", "say": f"It is {n}.", "photo": f"{n}.png"})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "typo.yaml").write_text("lora_rnk: 8\n", encoding="utf-8")
    shutil.copytree(tiny_dir("llava15"), folder / "twin")
    return folder


def flags(folder: Path, *more: str) -> list[str]:
    """A run of one step that works; what is given again wins."""
    small = ["--max_steps", "1", "--warmup_steps", "0", "--eval_steps", "1", "--per_device_train_batch_size", "2"]
    small += ["--gradient_accumulation_steps", "1", "--dataloader_num_workers", "0", "--num_eval_rows", "2"]
    rows = ["--dataset_name", f"{folder}/rows.jsonl", "--columns", "prompt=ask", "response=say", "images=photo"]
    return ["--model_name_or_path", f"{folder}/twin", *rows, *small, "--output_dir", f"{folder}/run", *more]


def ended(given: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the process would end with, by `SystemExit`."""
    module: Any = recipe("llava15_sft")
    monkeypatch.setattr(sys, "argv", ["llava15_sft.py", *given])
    with pytest.raises(SystemExit) as stop:
        vlm_sft.run(module.main, module.RecipeArguments, module.RecipeConfig)
    return str(stop.value.code)


@pytest.mark.parametrize("mistake", BEFORE)
def test_a_mistake_is_told_before_the_model_is_loaded(
    mistake: str, folder: Path, monkeypatch: pytest.MonkeyPatch, own_cache: None
) -> None:
    given, sentence = BEFORE[mistake]
    monkeypatch.setattr(vlm_sft, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    told = ended(flags(folder, *(word.format(folder=folder) for word in given)), monkeypatch)
    assert sentence.format(folder=folder) in told
    assert "\n" not in told


@pytest.mark.parametrize("mistake", AFTER)
def test_a_mistake_that_the_model_shows_is_told_before_the_first_step(
    mistake: str, folder: Path, monkeypatch: pytest.MonkeyPatch, own_cache: None
) -> None:
    given, sentence = AFTER[mistake]
    module: Any = recipe("llava15_sft")
    if "another run" in sentence:
        monkeypatch.setattr(sys, "argv", ["llava15_sft.py", *flags(folder, "--output_dir", f"{folder}/other")])
        vlm_sft.run(module.main, module.RecipeArguments, module.RecipeConfig)
    assert sentence in ended(flags(folder, *(word.format(folder=folder) for word in given)), monkeypatch)


def test_the_traceback_is_there_for_who_asks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = recipe("llava15_sft")
    monkeypatch.setenv("VLM_SFT_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["llava15_sft.py", "--lora_r", "many"])
    with pytest.raises(ValueError, match="invalid int value"):
        vlm_sft.run(module.main, module.RecipeArguments, module.RecipeConfig)


def test_an_error_of_ours_is_no_mistake_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a user can have meant is told without its frames."""
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    with pytest.raises(ZeroDivisionError):
        vlm_sft.run(lambda: 1 / 0)
    with pytest.raises(SystemExit, match=r"invalid literal .* \(test_mistakes\.py:\d+; VLM_SFT_TRACEBACK=1 shows more"):
        vlm_sft.run(lambda: int("x"))


@pytest.mark.parametrize("flag", ["--bf16", "--tf32", "--use_dora", "--load_best_model_at_end"])
def test_a_switch_stands_alone(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = recipe("llava15_sft")
    monkeypatch.setattr(sys, "argv", ["llava15_sft.py", flag, "--seed", "7"])
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    args, training = vlm_sft.run(lambda *both: both, module.RecipeArguments, module.RecipeConfig)
    assert {**vars(training), **vars(args)}[flag[2:]] is True
    assert training.seed == 7


@pytest.mark.slow
def test_help_is_one_screen_and_a_mistake_one_line() -> None:
    """As a program, where the recipe is `__main__`."""
    command = [sys.executable, str(ROOT / "recipes" / "llava15_sft.py")]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert shown[0].startswith("LLaVA-1.5-7B on instruction data")
    assert any(line.startswith("--lora_r 16 ") and line.endswith("Rank of the adapters.") for line in shown)
    assert any("--learning_rate 0.0002" in line for line in shown)
    assert len(shown) <= 40
    assert max(map(len, shown)) <= 130
    done = subprocess.run([*command, "--warmup_ratio", "0.1"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("llava15_sft.py: --warmup_ratio is unknown; use --warmup_steps")
    assert "Traceback" not in done.stderr


def test_a_model_that_is_nowhere_is_told_at_once_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after five tries for each of a processor's files."""
    asked = []

    def refuse(self: Any, name: str, **_: Any) -> None:
        asked.append(name)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(loading, "is_offline_mode", lambda: False)
    monkeypatch.setattr(loading, "resolve_revision", lambda name, revision, **_: revision)
    monkeypatch.setattr(loading.HfApi, "model_info", refuse)
    with pytest.raises(ValueError, match=r"'outputs/twn' \(no such folder.*the Hub is out of reach \(Name or service"):
        vlm_sft.load_processor("outputs/twn")
    assert asked == ["outputs/twn"]


def test_a_model_of_the_cache_is_read_without_a_network(
    tiny_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the computing nodes of a cluster, without HF_HUB_OFFLINE."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known")

    commit, cached = "a" * 40, Path(constants.HF_HUB_CACHE, "models--nobody--cached-twin")
    shutil.copytree(tiny_dir("llava15"), cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit, encoding="utf-8")
    resolve = loading.resolve_revision
    monkeypatch.setattr(loading, "is_offline_mode", lambda: False)
    monkeypatch.setattr(
        loading,
        "resolve_revision",
        lambda name, revision, local_files_only=False: resolve(name, revision) if local_files_only else revision,
    )
    monkeypatch.setattr(loading.HfApi, "model_info", refuse)
    model, processor = vlm_sft.load_model("nobody/cached-twin"), vlm_sft.load_processor("nobody/cached-twin")
    assert loaded_from(model) == loaded_from(processor) == ("nobody/cached-twin", commit)
