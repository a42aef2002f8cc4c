"""Nothing in a recipe's `main` may be left out in silence: a copy with one thing less raises and says what is
missing, or trains the same weights on the same rows, writes the same files and starts a second time the same way.

`make test` sweeps llava15_sft.py, whose body the others share; `make test-sweep`, which CI runs too, sweeps them all.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from deletions import Deletion, deletions
from recipe_data import captions, llava_parts, noise
from recipe_runs import ROOT
from trl import TrlParser

SHARED = "llava15_sft"
OTHERS = sorted({path.stem for path in (ROOT / "recipes").glob("*.py")} - {SHARED, "chat", "evaluate"})
# What a copier may leave out or change without a word: it changes no trained number, and no reader is misled.
SETTINGS = {
    "vlm_sft.evaluate_answers: num_rows=": "how many held-out rows are answered and shown",
    "vlm_sft.load_conversations: eval_fraction=": "how many of the drawn rows are held out",
}
FAMILY = {
    "llava15_sft": "llava15",
    "llava_next_sft": "llava_next",
    "qwen2_5_vl_sft": "qwen2_5_vl",
    "qwen3_5_sft": "qwen3_5",
    "smolvlm_sft": "smolvlm",
    "gemma4_sft": "gemma4",
    "internvl_sft": "internvl",
    "table_to_markdown_sft": "qwen2_5_vl",
    "llava_finetune_full": "llava15",
}
STEPS = (
    *("--max_steps", "4", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"),
    *("--warmup_steps", "0", "--logging_steps", "1", "--learning_rate", "0.01", "--seed", "7"),
    *("--dataloader_num_workers", "0", "--disable_tqdm", "True"),
)
EVALUATED = ("--eval_steps", "2", "--save_steps", "2")


@dataclass(frozen=True)
class Outcome:
    """What is left of a run, or what it raised."""

    raised: str = ""
    weights: str = ""
    rows: tuple[tuple[int, ...], ...] = ()
    files: frozenset[str] = frozenset()
    second: str = ""


def cases(*names: str) -> list[Any]:
    return [pytest.param(n, d, id=f"{n}-{d}") for n in names for d in deletions(ROOT / "recipes" / f"{n}.py")]


@pytest.fixture(scope="session")
def flags_of(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Callable[[str], Path]) -> Callable[[str], list[str]]:
    """Every flag of a recipe off its default, on rows of its own: some long, some short, one bad, none held out yet."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "elsewhere").mkdir()
    rows = []
    for n, image in enumerate(noise(24)):
        image.save(folder / "elsewhere" / f"{n}.png")
        answer = "It is " + "very " * (n % 5) + f"{n}."
        rows.append({"ask": f"<image>\nWhat is {n}?", "say": answer if n != 5 else "", "file": f"{n}.png"})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = ["--dataset_name", folder / "rows.jsonl", "--columns", "prompt=ask", "response=say", "images=file"]
    data += ["--image_folder", folder / "elsewhere", "--on_bad_rows", "drop", "--num_eval_rows", 2]
    lora = ["--lora_r", 4, "--lora_alpha", 6, "--lora_dropout", 0.2]
    parts = llava_parts(tmp_path_factory.mktemp("parts"))
    pairs = captions(tmp_path_factory.mktemp("captions") / "data")

    def flags(name: str) -> list[str]:
        loaded = ["--model_name_or_path", tiny_dir(FAMILY.get(name, "llava15")), "--attn_implementation", "eager"]
        model = loaded if name in FAMILY else []
        revision = ["--model_revision", "a-revision"]
        match name:
            case "quickstart":
                own = ["--hidden_size", 64, "--num_layers", 1, "--num_train_rows", 40, "--num_eval_rows", 6]
                return [*map(str, [*own, "--max_new_tokens", 2]), *STEPS]
            case "llava_pretrain":
                source = ["--dataset_name", pairs, "--image_folder", pairs.parent / "images", "--num_eval_rows", 1]
                given = ["--model_name_or_path", parts[1], "--vision_tower", parts[0], *source, *revision]
            case "llava_finetune_full":
                given = [*model, *revision, *data, "--mm_projector_lr", 0.003]
            case "table_to_markdown_sft":
                given = [*model, "--num_tables", 100, "--max_new_tokens", 3, "--on_bad_rows", "drop"]
            case "smolvlm_sft":
                given = [*model, *revision, *data, *lora, "--load_in_4bit", "--use_dora", "--max_tiles_per_side", 1]
            case "qwen3_5_sft":
                given = [*model, *revision, *data, *lora, "--load_in_4bit", "--use_dora", "--enable_thinking"]
            case "llava15_sft":
                given = [*model, *revision, *data, *lora, "--no_load_in_4bit", "--no_use_dora"]
            case _:
                given = [*model, *revision, *data, *lora, "--no_load_in_4bit", "--use_dora"]
        pixels = {"qwen2_5_vl_sft": ["--max_pixels", 1600], "qwen3_5_sft": ["--max_pixels", 1600]}
        tiles = {"internvl_sft": ["--max_tiles", 2], "gemma4_sft": ["--image_tokens", 140]}
        return [*map(str, [*given, *pixels.get(name, []), *tiles.get(name, [])]), *STEPS, *EVALUATED]

    return flags


@pytest.fixture(scope="session")
def whole(flags_of: Callable[[str], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """The outcome of the recipe as it stands, once for the whole session."""
    outcomes: dict[str, Outcome] = {}

    def outcome(name: str) -> Outcome:
        if name not in outcomes:
            source = (ROOT / "recipes" / f"{name}.py").read_text("utf-8")
            outcomes[name] = started_twice(name, source, flags_of(name), tmp_path_factory.mktemp("whole") / name)
            assert not outcomes[name].raised, outcomes[name].raised
        return outcomes[name]

    return outcome


def started_twice(name: str, source: str, flags: list[str], output: Path) -> Outcome:
    try:
        trainer = start(name, source, flags, output)
    except Exception as error:
        return Outcome(raised=f"{type(error).__name__}: {error}")
    model = next(output.glob("*model.safetensors"))
    rows = tuple(tuple(data.with_format(None)["row"][:]) for data in (trainer.train_dataset, trainer.eval_dataset))
    first = {
        "weights": hashlib.sha256(model.read_bytes()).hexdigest(),
        "rows": rows,
        "files": frozenset(str(path.relative_to(output)) for path in output.rglob("*")),
    }
    try:
        second = start(name, source, flags, output).state.global_step
    except Exception as error:
        return Outcome(**first, second=f"{type(error).__name__}: {error}")
    return Outcome(**first, second=f"{second} steps")


def start(name: str, source: str, flags: list[str], output: Path) -> Any:
    """The trainer of a run of the recipe with this source."""
    module: Any = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader=None))
    sys.modules[name] = module
    exec(compile(source, f"{name}.py", "exec"), vars(module))
    made = []

    class Kept(module.SFTTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    module.SFTTrainer = Kept
    parser = TrlParser((module.RecipeArguments, module.RecipeConfig))
    module.main(*parser.parse_args_and_config([*flags, "--output_dir", str(output)]))
    return made[0]


def check(name: str, deletion: Deletion, flags: list[str], whole: Outcome, folder: Path) -> None:
    found = started_twice(name, deletion.source, flags, folder / name)
    if found.raised:
        assert names_what_is_missing(found.raised, deletion), found.raised
    elif found.second != whole.second:
        assert names_what_is_missing(found.second, deletion), found.second
    elif any(deletion.what.startswith(setting) for setting in SETTINGS):
        # Another share held out is another run; another number of answers is not.
        same = (found.weights, found.rows) == (whole.weights, whole.rows)
        assert same != ("eval_fraction" in deletion.what)
    else:
        assert found == whole


def names_what_is_missing(message: str, deletion: Deletion) -> bool:
    """Python's own sentence about a name or an argument, or one of ours, which names the call or the flag to give."""
    if message.startswith(("NameError", "UnboundLocalError", "TypeError")):
        return True
    if deletion.what.startswith("SFTTrainer: processing_class=") and "Repo id must use" in message:
        return True  # TRL's own error, for a model that was made and not loaded, whose processor it looks for
    words = {node.id for node in ast.walk(ast.parse(deletion.statement)) if isinstance(node, ast.Name)}
    words |= {node.attr for node in ast.walk(ast.parse(deletion.statement)) if isinstance(node, ast.Attribute)}
    words |= {k.arg for k in ast.walk(ast.parse(deletion.statement)) if isinstance(k, ast.keyword) and k.arg}
    # A file that nothing wrote is named by its own name.
    words |= {
        part for node in ast.walk(ast.parse(deletion.source)) if isinstance(node, ast.Constant) for part in _name(node)
    }
    return any(word in message for word in words if len(word) > 3)


def _name(node: ast.Constant) -> list[str]:
    return [node.value] if isinstance(node.value, str) and node.value.startswith("/") else []


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL's own, where it makes the config itself
@pytest.mark.parametrize(("name", "deletion"), cases(SHARED))
def test_each_deletion_is_heard(name, deletion, flags_of, whole, tmp_path):
    check(name, deletion, flags_of(name), whole(name), tmp_path)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("name", "deletion"), cases(*OTHERS))
def test_each_deletion_in_every_recipe_is_heard(name, deletion, flags_of, whole, tmp_path):
    check(name, deletion, flags_of(name), whole(name), tmp_path)
