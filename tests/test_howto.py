"""Each change of docs/howto.md, made to a copy of llava15_sft.py as the page says, trains what the page says."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import recipe_runs
import transformers
from recipe_data import noise

from vlm_sft.models.parts import part_of, parts_of

pytestmark = pytest.mark.sweep

PAGE = (recipe_runs.ROOT / "docs" / "howto.md").read_text("utf-8")
CODE = re.findall(r"```(?:python|diff)\n(.*?)```", PAGE, re.S)
FLAGS = [shlex.split(line)[2:] for line in re.findall(r"```bash\n(.*?)```", PAGE, re.S)]
SMALL = (
    *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--num_eval_rows", "2"),
    *("--dataloader_num_workers", "0", "--warmup_steps", "0", "--max_steps", "2"),
)


def changed(source: str, code: str) -> str:
    """The recipe with this piece of the page in the place of its own."""
    if code.startswith("-"):
        lines = code.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
    else:
        pattern = r"TRAINS = [^\n]*\n" if code.startswith("TRAINS") else r"def to_conversation.*?\n(?=\n\n)"
        [old], new = re.findall(pattern, source, re.S), code
    assert source.count(old) == 1, code
    return source.replace(old, new)


def number(start: str) -> int:
    [found] = [n for n, code in enumerate(CODE) if code.startswith(start)]
    return found


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("howto")
    lines = []
    for n, image in enumerate(noise(8)):
        image.save(folder / f"{n}.png")
        messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": f"It is {n}."}]
        lines.append({"messages": messages, "images": [f"{n}.png"]})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder / "rows.jsonl"


@pytest.fixture
def train(rows: Path, tiny_dir: Callable[[str], Path], tmp_path: Path, own_cache: None) -> Callable[..., Any]:
    def trained(*codes: str, flags: list[str] | None = None) -> Any:
        """The trainer of a run of the recipe with these pieces."""
        source = (recipe_runs.ROOT / "recipes" / "llava15_sft.py").read_text("utf-8")
        for code in codes:
            source = changed(source, code)
        (tmp_path / "my_sft.py").write_text(source, encoding="utf-8")
        module = recipe_runs.module_of(tmp_path / "my_sft.py")
        module.__dict__.update(transformers=transformers, PIL=PIL)
        base = ["--model_name_or_path", str(tiny_dir("llava15")), "--dataset_name", str(rows), *SMALL]
        return recipe_runs.run_module(module, [*base, "--output_dir", str(tmp_path / "run"), *(flags or [])]).trainer

    return trained


def trainable(trainer: Any) -> dict[str, set[str]]:
    """Part -> the last names of its modules whose weights train."""
    found: dict[str, set[str]] = {}
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            bare = name.removeprefix("base_model.model.")
            module = bare.partition(".lora_")[0].rpartition(".")[2] if ".lora_" in bare else "full"
            found.setdefault(part_of(bare, parts_of(trainer.model)), set()).add(module)
    return found


def test_adapters_and_a_whole_projector_by_parts_of_their_own_rates(train: Callable[..., Any]) -> None:
    trainer = train(CODE[number('TRAINS = {"projector"')], CODE[number("-        peft_config")])
    found = trainable(trainer)
    assert found["projector"] == {"full"}
    assert "q_proj" in found["language"]
    assert found.keys() == {"projector", "language"}
    rates = {group["part"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates["projector"] == 2e-5
    assert rates["language"] == trainer.args.learning_rate == 2e-4


def test_some_layers_only(train: Callable[..., Any]) -> None:
    found = trainable(train(CODE[number('TRAINS = {"vision": [')], flags=["--no_load_in_4bit"]))
    assert found == {"vision": {"q_proj", "v_proj"}, "language": {"q_proj", "v_proj", "o_proj"}}


def test_nothing_is_frozen(train: Callable[..., Any]) -> None:
    trainer = train(CODE[number('TRAINS = {"vision": "full"')], flags=FLAGS[0])
    assert all(weight.requires_grad for weight in trainer.model.parameters())
    assert trainer.args.learning_rate == 2e-5


def test_it_stops_early_by_a_metric_of_answers(train: Callable[..., Any]) -> None:
    trainer = train(CODE[number("-        callbacks")], flags=[*FLAGS[1], "--max_steps", "20"])
    scores = [entry["eval_anls"] for entry in trainer.state.log_history if "eval_anls" in entry]
    assert trainer.args.metric_for_best_model == "eval_anls"
    assert trainer.state.best_metric == max(scores)
    if len(set(scores)) == 1:  # a random twin that never answers better: three evaluations after the first
        assert trainer.state.global_step < 20


def test_images_are_changed(train: Callable[..., Any]) -> None:
    [code] = [code for code in CODE if "PIL.Image.open" in code]
    row = train(code).train_dataset[0]
    assert [(image.size, image.mode) for image in row["images"]] == [((224, 224), "L")]


def test_a_system_prompt_is_added(train: Callable[..., Any]) -> None:
    row = train(flags=FLAGS[2]).train_dataset[0]
    assert row["messages"][0]["role"] == "system"
    assert "Answer in one word." in str(row["messages"][0]["content"])


def test_questions_are_changed(train: Callable[..., Any]) -> None:
    [code] = [code for code in CODE if "Be brief." in code]
    row = train(code).train_dataset[0]
    assert "What? Be brief." in str(row["messages"])


def test_every_piece_of_the_page_is_tried() -> None:
    """By the tests above, which find each by how it begins."""
    assert len(CODE) == 7
    assert len(FLAGS) == 3


def test_the_table_of_differences_says_what_the_recipe_has() -> None:
    recipe = recipe_runs.recipe("llava15_sft")
    table = PAGE.partition("## Where llava15_sft.py differs")[2]
    here = {cells[1]: cells[2] for line in table.splitlines() if len(cells := re.split(r" *\| *", line)) > 4}
    default = {field.name: field.default for field in dataclasses.fields(recipe.RecipeConfig)}
    lora = {field.name: field.default for field in dataclasses.fields(recipe.RecipeArguments)}
    rows, steps = default["per_device_train_batch_size"], default["gradient_accumulation_steps"]
    assert here["rows a step"] == f"{rows * steps} on one GPU: {rows}, {steps} steps"
    made = ("DoRA" if lora["use_dora"] else "LoRA", lora["lora_r"], lora["lora_alpha"], lora["lora_dropout"])
    assert here["adapters"] == "{}, rank {}, alpha {}, dropout {}".format(*made)
    for name, cell in {
        "max_grad_norm": "max_grad_norm",
        "lr_scheduler_type": "schedule",
        "optim": "optimizer",
    }.items():
        assert str(default[name]) == here[cell]
    assert here["noise"] == f"NEFTune {default['neftune_noise_alpha']}"
    assert recipe.TRAINS == {"language": "lora"}
    assert (here["projector"], here["adapters in CLIP"]) == ("frozen", "none")
    assert not default["save_only_model"]
    assert here["checkpoints"] == "with the optimizer"
