"""What `import vlm_sft` offers is there, and leaves the commands to themselves."""

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


@pytest.mark.slow
def test_no_command_is_imported_before_it_runs() -> None:
    """`python -m` would warn of it."""
    files = Path(vlm_sft.__file__).parent.glob("*.py")
    commands = {f"vlm_sft.{path.stem}" for path in files if '__name__ == "__main__"' in path.read_text("utf-8")}
    assert {"vlm_sft.chat.audit", "vlm_sft.tools.merging", "vlm_sft.tools.tiny"} <= commands
    listing = [sys.executable, "-c", "import sys, vlm_sft; print(*sys.modules)"]
    done = subprocess.run(listing, check=True, capture_output=True, text=True, timeout=120)
    assert commands & set(done.stdout.split()) == set()
