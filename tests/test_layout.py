"""The house: arrows point down, no recipe imports another, and every room says what belongs there."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vlm_sft"
TOP = {"distributed", "common", "upstream"}
MAY_IMPORT = {
    "chat": TOP,
    "models": TOP,
    "data": {*TOP, "chat"},
    "evaluation": {*TOP, "chat"},
    "training": {*TOP, "models"},
    "tools": {*TOP, "models"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
TRAIN_NOTHING = {"chat", "evaluate"}  # so they have no config and read rows as they are


def imported(path: Path) -> set[str]:
    """Rooms, and modules of the top, that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "vlm_sft":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlm_sft."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows_point_down(room):
    for path in (PACKAGE / room).glob("*.py"):
        assert imported(path) <= {room, *MAY_IMPORT[room]}, path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_single_files_of_one_shape(path):
    source = path.read_text("utf-8")
    body = ast.parse(source).body
    names = [node.name for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    trains = path.stem not in TRAIN_NOTHING
    assert {"RecipeArguments", "main"} | ({"RecipeConfig", "to_conversation"} if trains else set()) <= set(names)
    assert names[-1] == "main"
    assert "import recipes" not in source
    assert len(source.splitlines()) <= (100 if trains else 140)
    constants = [ast.unparse(node.targets[0]) for node in body if isinstance(node, ast.Assign)]
    assert not trains or constants[0] == "TRAINS"
    assert not (ROOT / "recipes" / "__init__.py").exists()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_a_reader_will_read(path):
    assert len(path.read_text("utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", [*RECIPES, *MODULES], ids=lambda path: str(path.relative_to(ROOT)))
def test_each_file_says_what_belongs_there(path):
    assert ast.get_docstring(ast.parse(path.read_text("utf-8")))


def test_the_top_level_holds_what_the_project_is_made_of():
    """A run that is started here may leave its data here, and a commit take it along."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    folders = {name.split("/")[0] for name in listed.stdout.splitlines() if "/" in name}
    assert folders == {".ci", ".github", "accelerate_configs", "benchmarks", "docs", "recipes", "tests", "vlm_sft"}
