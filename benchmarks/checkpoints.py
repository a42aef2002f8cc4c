"""Seconds that a checkpoint's proof takes beside torch's own write of it: `python benchmarks/checkpoints.py [GB]`.

Writes an optimizer state of so many gigabytes (1) into the temporary folder, then makes its manifest.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vlm_sft.models.manifest import verify_checkpoint, write_manifest


def main(gigabytes: float) -> None:
    state = {"state": {n: torch.randn(int(gigabytes * 1e9 / 16)) for n in range(4)}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "checkpoint-1")
        folder.mkdir()
        steps: dict[str, Callable[[], object]] = {
            "torch.save": lambda: torch.save(state, folder / "optimizer.pt"),
            "its way to the disk": os.sync,
            "manifest": lambda: write_manifest(folder, {}),
            "verified by a resume": lambda: verify_checkpoint(folder),
        }
        for what, work in steps.items():
            started = time.perf_counter()
            work()
            print(f"{what:<22}{(time.perf_counter() - started) / gigabytes:7.3f} s a GB")


if __name__ == "__main__":
    main(float(sys.argv[1]) if sys.argv[1:] else 1.0)
