"""What `import vlm_sft` offers is there, and no module but `__main__` is a command."""

from __future__ import annotations

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
