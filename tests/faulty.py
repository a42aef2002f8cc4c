"""A recipe with a fault in it: `python tests/faulty.py FAULT recipes/NAME.py ...`, or through a launcher.

A fault is `kill@EVENT:STEP:RANK`, `wait@...` (for a minute), `raise@...` or `memory@...` (which runs out): what happens
to that process at that event of the Trainer.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from typing import Any

import torch
import trl
from transformers import TrainerCallback


class Fault(TrainerCallback):
    def __init__(self, kind: str, event: str, step: int, rank: int) -> None:
        def strike(args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step != step or args.process_index != rank:
                return
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "raise":
                raise RuntimeError("the fault that was asked for")
            if kind == "memory":
                raise torch.OutOfMemoryError("the memory that was asked for")
            print("waiting", flush=True)
            time.sleep(60)

        setattr(self, event, strike)


class FaultyTrainer(trl.SFTTrainer):
    fault: Fault

    def __init__(self, *args: Any, callbacks: Any = (), **kwargs: Any) -> None:
        super().__init__(*args, callbacks=[*callbacks, self.fault], **kwargs)


if __name__ == "__main__":
    kind, _, where = sys.argv[1].partition("@")
    event, step, rank = where.split(":")
    FaultyTrainer.fault = Fault(kind, event, int(step), int(rank))
    trl.SFTTrainer = FaultyTrainer
    del sys.argv[:2]
    runpy.run_path(sys.argv[0], run_name="__main__")
