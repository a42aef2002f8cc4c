"""The house: arrows point down, no recipe imports another, and every room says what belongs there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Facts and pure functions. Every other module composes these, and no module of its own kind.
FLOOR_0 = {
    *("answers", "cards", "families", "formats", "hardware", "images", "labels", "manifests", "messages", "metrics"),
    *("picture_tokens", "plots", "provenance", "ranks", "rows", "samples", "sharding", "sources", "spans"),
    *("trackers", "towers", "weights"),
}
MODULES = sorted(path.stem for path in (ROOT / "vlm_sft").glob("*.py") if path.stem != "__init__")
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
TRAIN_NOTHING = {"chat", "evaluate"}  # so they have no config and read rows as they are


def imported(path: Path) -> set[str]:
    """Modules of vlm_sft that are imported at the module's own level: a command's `main` may reach further."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module == "vlm_sft":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlm_sft."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module):
    assert imported(ROOT / "vlm_sft" / f"{module}.py") <= FLOOR_0


def test_floor_0_has_no_circle():
    needs = {module: imported(ROOT / "vlm_sft" / f"{module}.py") for module in FLOOR_0}
    while ready := {module for module, others in needs.items() if not others & needs.keys()}:
        needs = {module: others for module, others in needs.items() if module not in ready}
    assert not needs


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_single_files_of_one_shape(path):
    source = path.read_text("utf-8")
    body = ast.parse(source).body
    names = [node.name for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    training = set() if path.stem in TRAIN_NOTHING else {"RecipeConfig", "to_conversation"}
    assert training | {"RecipeArguments", "main"} <= set(names)
    assert names[-1] == "main"
    assert "import recipes" not in source
    assert len(source.splitlines()) <= 140
    assert not (ROOT / "recipes" / "__init__.py").exists()


@pytest.mark.parametrize("path", [*RECIPES, *(ROOT / "vlm_sft").glob("*.py")], ids=lambda path: path.stem)
def test_each_file_says_what_belongs_there(path):
    assert ast.get_docstring(ast.parse(path.read_text("utf-8")))
