"""What is installed is useful by itself: a wheel, in an environment without the repository, copies a recipe and runs
it. And what public CI, citations and licence scanners read says the same as pyproject.toml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_data import chats
from recipe_runs import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PURELIB = "import sysconfig; print(sysconfig.get_paths()['purelib'])"


def out(command: list[object], **options: Any) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files of the checkout alone."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in out(["git", "ls-files"], cwd=ROOT).splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    out([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", built, source])
    [file] = built.glob("vlm_sft-*.whl")
    return file


@pytest.mark.sweep
def test_a_wheel_holds_the_library_the_recipes_and_the_licence(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    tracked = out(["git", "ls-files", "vlm_sft", "recipes", "accelerate_configs"], cwd=ROOT).splitlines()
    assert {name if name.startswith("vlm_sft/") else f"vlm_sft/{name}" for name in tracked} <= held
    assert not [name for name in held if name.startswith(("tests/", "benchmarks/"))]
    [info] = [name for name in held if name.endswith(".dist-info/METADATA")]
    metadata = zipfile.ZipFile(wheel).read(info).decode()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)


@pytest.mark.sweep
def test_an_installed_wheel_copies_a_recipe_and_runs_it(wheel: Path, tmp_path: Path) -> None:
    """In an environment that holds nothing else but finds the packages we depend on."""
    out([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"])
    python = tmp_path / "env" / "bin" / "python"
    own, packages = Path(out([python, "-c", PURELIB])), out([sys.executable, "-c", PURELIB])
    out([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel])
    (own / "behind.pth").write_text(f"import site; site.addsitedir({packages!r})\n", encoding="utf-8")
    work = tmp_path / "work"
    work.mkdir()
    options = {"cwd": work, "env": {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}}
    assert Path(out([python, "-c", "import vlm_sft; print(vlm_sft.__file__)"], **options)).is_relative_to(own)
    command = python.with_name("vlm-sft")
    told = out([command, "copy", "llava15_sft"], **options)
    assert "accelerate launch llava15_sft.py" in told
    assert (work / "llava15_sft.py").read_text("utf-8") == (ROOT / "recipes" / "llava15_sft.py").read_text("utf-8")
    assert {path.name for path in (work / "accelerate_configs").iterdir()} == {
        path.name for path in (ROOT / "accelerate_configs").glob("*.yaml")
    }
    out([command, "tiny", "llava15", "twin"], **options)
    flags = ["--model_name_or_path", "twin", "--dataset_name", chats(tmp_path / "rows"), "--max_steps", 1]
    out([python, "llava15_sft.py", *flags, "--warmup_steps", 0, "--output_dir", "run"], **options)
    version = PROJECT["project"]["version"]
    assert json.loads((work / "run" / "run.json").read_text("utf-8"))["versions"]["vlm_sft"] == version
    assert f"vlm_sft {version}" in (work / "run" / "README.md").read_text("utf-8")


def test_every_folder_of_the_library_is_packaged() -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "vlm_sft").rglob("*.py")}
    named = set(PROJECT["tool"]["setuptools"]["packages"])
    assert named == {".".join(folder.parts) for folder in folders} | {"vlm_sft.recipes", "vlm_sft.accelerate_configs"}


def test_the_citation_says_what_the_project_says() -> None:
    cited, project = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8")), PROJECT["project"]
    assert (cited["cff-version"], cited["type"]) == ("1.2.0", "software")
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert cited["authors"]
    assert cited["message"]


def test_public_ci_runs_what_ours_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
