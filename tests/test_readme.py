"""The documents tell the truth: every command can be run, every path exists, every quoted error is raised somewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import yaml
from recipe_data import noise
from trl import SFTTrainer, TrlParser

import vlm_sft

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/evaluation.md")
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))


def blocks(name: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text("utf-8"), re.S)


def header_commands(recipe: Path) -> list[str]:
    docstring = recipe.read_text("utf-8").split('"""')[1]
    return [line.strip() for line in docstring.splitlines() if line.startswith("    ")]


COMMANDS = [
    (document, line.strip())
    for document in DOCUMENTS
    for block in blocks(document)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
] + [(f"recipes/{recipe.name}", line) for recipe in RECIPES for line in header_commands(recipe)]


@pytest.mark.sweep
@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=[command[:70] for _, command in COMMANDS])
def test_command(document, command, tmp_path):
    words = [word for word in shlex.split(command, comments=True) if not re.fullmatch(r"[A-Z0-9_]+=\S*", word)]
    match words:
        case ["make", *targets]:
            subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)
        case ["pip", "install", *rest]:
            for word in rest:
                assert word.startswith("-") or word in {".", "requirements.txt"} or word.startswith(".[")
                if word.startswith(".["):
                    assert f"\n{word[2:-1]} = [" in (ROOT / "pyproject.toml").read_text("utf-8")
        case ["cp", source, _]:
            assert (ROOT / source).is_file()
        case [".venv/bin/pre-commit", "install"]:
            assert (ROOT / ".pre-commit-config.yaml").is_file()
        case ["source", ".venv/bin/activate"]:
            pass
        case ["python", "-m", "vlm_sft", verb, *_] | ["vlm-sft", verb, *_]:
            options = [word for word in words if word.startswith("--")]
            shown = subprocess.run(
                [sys.executable, "-m", "vlm_sft", verb, "--help"], capture_output=True, text=True, check=True
            )
            assert all(option in shown.stdout for option in options)
        case ["transformers" | "vllm", "serve", folder, *_]:  # tests/test_serving.py runs the first one
            assert any(other.startswith("vlm-sft merge") and folder in other for _, other in COMMANDS)
        case ["accelerate", "launch", "--config_file", config, recipe, *flags]:
            assert (ROOT / config).is_file()
            parse(recipe, flags)
        case ["accelerate", "launch", recipe, *flags] | ["python", recipe, *flags]:
            parse(recipe, flags)
        case _:
            pytest.fail(f"{document} holds a command that this test does not know: {command}")


def parse(recipe: str, flags: list[str]) -> None:
    """The recipe's own parser takes the flags. `my_sft.py` is the copy that the README makes of llava15_sft.py."""
    path = ROOT / ("recipes/llava15_sft.py" if recipe == "my_sft.py" else recipe)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    kinds = [getattr(module, name) for name in ("RecipeArguments", "RecipeConfig") if hasattr(module, name)]
    TrlParser(tuple(kinds)).parse_args_and_config([*flags])


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES])
def test_paths_exist(document):
    text = (ROOT / document).read_text("utf-8")
    links = [(ROOT / document).parent / path for path in re.findall(r"\]\(([^)#:]+)\)", text)]
    named = re.findall(r"(?<![\w./])(?:recipes|vlm_sft|tests|accelerate_configs|benchmarks|docs)/[\w./-]*\w", text)
    assert [path for path in [*links, *(ROOT / name for name in named)] if not path.exists()] == []


def test_readme_is_short_and_counts_right():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 180
    rows = (ROOT / "docs" / "families.md").read_text("utf-8").split("|---|\n")[1].split("\n\n")[0].splitlines()
    assert f"\nread. {len(rows)} families are proven" in text


def test_recipe_table_names_every_recipe_and_its_lines():
    table = (ROOT / "README.md").read_text("utf-8").split("## Recipes")[1].split("##")[0]
    trains = {recipe.name for recipe in RECIPES} - {"chat.py", "evaluate.py"}
    counted = {name: int(lines) for name, lines in re.findall(r"\[(\w+\.py)\]\(recipes/\w+\.py\) \| (\d+) \|", table)}
    assert counted == {name: len((ROOT / "recipes" / name).read_text("utf-8").splitlines()) for name in trains}


def test_quoted_errors_are_the_librarys():
    """What stands in the first column of the trouble table is written in the code, or is known of another library."""
    rows = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8").splitlines()
    quoted = [match[1] for row in rows if (match := re.match(r"\| `([^`]+)`", row))]
    elsewhere = {
        *("operator torchvision::nms does not exist", "CUDA out of memory", "CalledProcessError"),
        "Failed to load CPU gemm_4bit_forward",
    }
    source = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text("utf-8") for path in (ROOT / "vlm_sft").rglob("*.py")))
    for text in set(quoted) - elsewhere:
        pattern = ".*?".join(re.escape(words) for words in re.split(r"\.\.\.|'[^']*'|\b\d+\b", text) if words.strip())
        assert re.search(pattern, source, re.S), text


def test_hooks_run_what_make_check_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == ["make check"]


@pytest.mark.families
def test_family_table_is_what_the_command_prints():
    command = [sys.executable, "benchmarks/family_table.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() in (ROOT / "docs" / "families.md").read_text("utf-8")


def test_the_library_by_itself(tiny_dir, tmp_path, monkeypatch, capsys):
    """README's lines as they stand, on a twin and rows of one's own."""
    [code] = [
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
        if "prove" in block
    ]
    monkeypatch.chdir(tmp_path)
    rows = []
    for n, image in enumerate(noise(12)):
        image.save(f"{n}.png")
        rows.append({"prompt": "<image>\nHow many?", "response": f"{n}.", "images": f"{n}.png"})
    Path("my_data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    exec(
        code,
        {"vlm_sft": vlm_sft, "SFTTrainer": SFTTrainer, "name": tiny_dir("llava15"), "TRAINS": {"language": "lora"}},
    )
    assert vlm_sft.load_model("outputs/mine").peft_config["default"].use_dora
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "evaluation.md").read_text("utf-8"), re.S)
    code = code.replace("outputs/llava15_sft", "outputs/mine").replace("photo.jpg", "0.png")
    exec(code, {"vlm_sft": vlm_sft, "PIL": PIL})
    assert capsys.readouterr().out.splitlines()[-1].startswith("[")


@pytest.mark.sweep
def test_readmes_commands_run_as_they_stand(tmp_path):
    """All of README down to "On a GPU", in order, in a fresh clone, in a shell that knows nothing else, on ten rows and
    an image of the reader's own."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    readme = (clone / "README.md").read_text("utf-8").split("## On a GPU")[0]
    for n, image in enumerate(noise(10)):
        image.save(clone / f"{n}.jpg")
    image.save(clone / "photo.jpg")
    rows = [
        {"messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": f"A {n}."}]}
        | {"images": [f"{n}.jpg"]}
        for n in range(10)
    ]
    (clone / "my_data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    commands = [line for block in re.findall(r"```bash\n(.*?)```", readme, re.S) for line in block.splitlines()]
    until_trained = commands[: 1 + next(n for n, line in enumerate(commands) if line.startswith("python my_sft.py"))]
    assert 1 + len(until_trained) <= 6  # with `git clone`

    known = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    path = os.pathsep.join(f for f in os.environ["PATH"].split(os.pathsep) if not f.startswith(sys.prefix))
    shell = {"PATH": path, "HOME": str(tmp_path), **known}
    script = "\n".join(["set -ex", *commands])
    done = subprocess.run(["bash", "-c", script], cwd=clone, env=shell, capture_output=True, text=True, check=False)
    said = done.stderr + done.stdout
    assert done.returncode == 0, said[-4000:]
    assert "gemm_4bit" not in said
    assert "Traceback" not in said
    [share] = re.findall(r"Held-out digits read correctly: ([\d.]+)%", done.stdout)
    assert abs(float(share) - float(re.findall(r"([\d.]+)% of 297 held-out digits", readme)[0])) < 2
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", readme, re.S | re.M)
    [listing] = [block for language, block in blocks if not language and block.startswith("part ")]
    assert [line for line in listing.splitlines() if line not in done.stderr] == []
    assert "\ntuned: " in done.stdout
    left = ["outputs/quickstart/samples.html", "audit.html", "outputs/try/run.json", "outputs/merged/model.safetensors"]
    assert [name for name in left if not (clone / name).is_file()] == []


@pytest.mark.parametrize(("there", "taken"), [(["python3.12", "python3.14"], "python3.12"), (["python3"], "python3")])
def test_make_takes_any_python_that_torch_serves(there, taken, tmp_path):
    for name in there:
        (tmp_path / name).write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    old = tmp_path / "python3.11"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")  # another Python by that name, too old
    old.chmod(0o755)
    for tool in ("make", "sh", "sed", "git"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    command = ["make", "--dry-run", f"VENV={tmp_path}/none", "install"]
    told = subprocess.run(
        command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True
    ).stdout
    assert f"\n{taken} -m venv {tmp_path}/none" in f"\n{told}"


@pytest.mark.slow
def test_the_page_of_public_names_is_current():
    """`python docs/api.py` makes it anew."""
    code = "import sys; sys.path.insert(0, 'docs'); import api; print(api.page())"
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert made.rstrip("\n") == (ROOT / "docs" / "api.md").read_text("utf-8").rstrip("\n")
