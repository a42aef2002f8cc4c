"""What `import vlm_sft` offers is there, and no module but `__main__` is a command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import vlm_sft


def test_every_public_name_is_there() -> None:
    assert all(getattr(vlm_sft, name) is not None for name in vlm_sft.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        vlm_sft.nothing  # noqa: B018


def test_only_main_is_a_command() -> None:
    """`python -m` would warn of a module that `import vlm_sft` brings along."""
    sources = {path: path.read_text("utf-8") for path in Path(vlm_sft.__file__).parent.rglob("*.py")}
    commands = {path.name for path, text in sources.items() if "argparse" in text or '__name__ == "__main__"' in text}
    assert commands == {"__main__.py"}


@pytest.mark.parametrize("collecting", [True, pytest.param(False, marks=pytest.mark.sweep)])
def test_an_import_looks_for_no_garbage_and_leaves_the_collector_as_it_was(collecting: bool) -> None:
    """It would go through all that torch, transformers and TRL make, again and again."""
    said = f"""
import gc
gc.{"enable" if collecting else "disable"}()
collected = []
gc.callbacks.append(lambda phase, info: collected.append(info["generation"]))
import vlm_sft
from trl import SFTTrainer
made, young = len(gc.get_objects()), len(gc.get_objects(0)) + len(gc.get_objects(1))
print(gc.isenabled(), len(collected) < 20, made > 300_000, young < 20_000, gc.get_freeze_count())
vlm_sft.run(lambda: print(gc.get_freeze_count() >= made, gc.isenabled()))
"""
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(collecting), "True", "True", "True", "0", "True", str(collecting)]
