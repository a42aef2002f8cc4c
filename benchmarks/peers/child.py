"""Runs one tool once, in the environment of that tool, and notes what reaches the model:

    python child.py REPORT.json TOOL [FLAG ...]

The tool is started by its own entry point with its own flags. Two methods of transformers' Trainer, on which all four
build, are watched, and nothing of a run is changed but one number: ms-swift learns the twin's image token. Nothing of
vlm_sft is imported here but by its recipe.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import runpy
import sys
import time
from pathlib import Path
from typing import Any

IGNORE_INDEX = -100
FIRST = {  # what each imports first by its own entry point
    "vlm_sft": "vlm_sft",
    "trl": "trl.scripts.sft",
    "llama_factory": "llamafactory.train.tuner",
    "ms_swift": "swift",
}


def vlm_sft(flags: list[str]) -> None:
    sys.argv = flags  # the first is the recipe
    runpy.run_path(flags[0], run_name="__main__")


def trl(flags: list[str]) -> None:
    from trl.scripts.sft import main, make_parser

    script, training, model, mixture = make_parser().parse_args_and_config(flags, fail_with_unknown_args=False)
    main(script, training, model, mixture)


def llama_factory(flags: list[str]) -> None:
    from llamafactory.train.tuner import run_exp

    sys.argv = ["llamafactory-cli", *flags]
    run_exp()


def ms_swift(flags: list[str]) -> None:
    from swift import sft_main
    from swift.template.templates.qwen import Qwen2VLTemplate

    # It holds the image token of Qwen's own vocabulary as a number, and would leave those of a twin unexpanded.
    config = json.loads(Path(flags[flags.index("--model") + 1], "config.json").read_text())
    Qwen2VLTemplate.image_token_id = config.get("image_token_id")
    sft_main(flags)


class Watch:
    """What one training does, by hooks on the Trainer's own methods."""

    def __init__(self) -> None:
        self.report: dict[str, Any] = {"steps": 0, "computed": 0, "real": 0}
        self.batches: list[tuple[Any, Any, Any]] = []

    def install(self) -> None:
        from transformers import Trainer, TrainerCallback

        watch, train, step = self, Trainer.train, Trainer.training_step

        class Clock(TrainerCallback):  # type: ignore[misc]
            def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                watch.began = (time.perf_counter(), cpu_seconds())

            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                watch.report.setdefault("first_step_begins", since_start())

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                watch.report["steps"] = state.global_step
                if state.global_step == 1:
                    watch.report["first_step_ends"] = since_start()
                    if os.environ.get("FIRST_STEP_ONLY"):
                        raise SystemExit(0)

            def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                wall, cpu = watch.began
                watch.report |= {"epoch": time.perf_counter() - wall, "epoch_cpu": cpu_seconds() - cpu}

        def watched_train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            trainer.add_callback(Clock())
            watch.look_at(trainer.model)
            return train(trainer, *args, **kwargs)

        def watched_step(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            watch.note(inputs)
            return step(trainer, model, inputs, *args, **kwargs)

        Trainer.train, Trainer.training_step = watched_train, watched_step

    def look_at(self, model: Any) -> None:
        trains = {part_of(name) for name, weight in model.named_parameters() if weight.requires_grad}
        four = [part_of(name) for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
        count = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        self.report |= {"trains": sorted(trains), "trained_weights": count, "four_bit": sorted(set(four))}

    def note(self, inputs: Any) -> None:
        ids, labels, mask = (inputs.get(name) for name in ("input_ids", "labels", "attention_mask"))
        self.report["computed"] += ids.numel()
        self.report["real"] += ids.numel() if mask is None else int(mask.sum())
        self.batches.append((ids.clone(), labels.clone(), None if mask is None else mask.clone()))

    def rows(self) -> list[dict[str, list[int]]]:
        """Each row that was trained on, its padding left out."""
        found = []
        for ids, labels, mask in self.batches:
            for n in range(len(ids)):
                real = slice(None) if mask is None else mask[n].bool()
                found.append({"ids": ids[n][real].tolist(), "labels": labels[n][real].tolist()})
        return found


def part_of(name: str) -> str:
    if "multi_modal_projector" in name or "merger" in name:
        return "projector"
    if "vision" in name or "visual" in name:
        return "vision"
    return "head" if "lm_head" in name else "language"


def cpu_seconds() -> float:
    """Of this process, user and system; data workers are processes of their own."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def since_start() -> float:
    """Seconds since this process began, the start of Python and its imports included."""
    began = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - began / 100


def peak_mib() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) >> 10


def main() -> None:
    output, tool, *flags = sys.argv[1:]
    importlib.import_module(FIRST[tool])
    watch = Watch()
    watch.install()
    try:
        {"vlm_sft": vlm_sft, "trl": trl, "llama_factory": llama_factory, "ms_swift": ms_swift}[tool](flags)
    finally:
        watch.report |= {"peak": peak_mib(), "total_cpu": cpu_seconds(), "total": since_start(), "rows": watch.rows()}
        Path(output).write_text(json.dumps(watch.report))


if __name__ == "__main__":
    main()
