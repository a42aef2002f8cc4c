"""What an owner of a GPU runs first: does each path work there, how fast is it, and how far off is `memory`?

    make gpu                                    # or: python benchmarks/gpu.py [--minutes 9] [--tiny]

Random weights of the real sizes of LLaVA-1.5-7B and Qwen2.5-VL-3B, nothing is downloaded. First each path of the
recipes takes three steps on a tiny twin, a line each: it works, or how it failed. Then training at full size, by QLoRA,
LoRA, and DoRA on a 4-bit base: TRL's own path with the default collator, with data workers and without; the recipe's
with padding, without, and packed. All through SFTTrainer, on the same rows, with the recipe's own optimizer, precision,
dropout and checkpointing. An epoch is thrown away, the next one counts, and the paths take turns in another order each
round. Beside the peaks stands what `vlm_sft.tools.memory` estimates. No failure ends the others; what is found is
written to outputs/gpu.md and outputs/gpu.jsonl as it comes, each program's output to a .log beside them, and the
program ends after --minutes. `--tiny` tries the program itself, on twins, also without a GPU.

Where no package index can be reached and torch is there already (2.11 or newer): on a machine with an index,
`grep -v '^torch==' requirements.txt > r.txt && pip download -r r.txt kernels --no-deps -d wheels`; copy the project
with the wheels, and `pip install --no-index --no-deps wheels/*`; then `PYTHONPATH=. python benchmarks/gpu.py`. The
project itself need not be installed. Kernels come over the network: without it, rows without padding are left out
unless flash-attn is installed. torchvision must be of torch's build; without it Qwen2.5-VL is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.update(TOKENIZERS_PARALLELISM="false")

import mix
import torch
from datasets import load_from_disk
from peft import get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    Qwen2_5_VLConfig,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

import vlm_sft
from vlm_sft.common import base_of, on_meta
from vlm_sft.models.freezing import cast_trainable_to_fp32, detach_frozen_tower
from vlm_sft.models.hardware import best_dtype, best_worker_count
from vlm_sft.tools import memory, tiny
from vlm_sft.training.batches import GroupByLength
from vlm_sft.upstream import flash_attentions, use_one_gpu

ROOT = Path(__file__).parents[1]
ON_GPU = torch.cuda.is_available()
BATCH = 4  # the recipes'
PATHS = ("TRL", "TRL, workers", "recipe, padded", "recipe, no padding", "recipe, packed")
FOUR_BIT = {"load_in_4bit": True}
METHODS: dict[str, dict[str, Any]] = {
    "QLoRA": FOUR_BIT,
    "QDoRA": {**FOUR_BIT, "use_dora": True},  # llava15_sft's own
    "LoRA": {},
    "QDoRA, no dropout": {**FOUR_BIT, "use_dora": True, "lora_dropout": 0.0},
}
# config.json of llava-hf/llava-1.5-7b-hf and Qwen/Qwen2.5-VL-3B-Instruct; the token ids are those of the twins.
LLAVA = {
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "image_seq_length": 576,
}
QWEN = {
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "tie_word_embeddings": True,
}
MODELS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "LLaVA-1.5-7B": ("llava15", LlavaConfig, LLAVA),
    "Qwen2.5-VL-3B": ("qwen2_5_vl", Qwen2_5_VLConfig, QWEN),
}


# -- does it work?


def checks(twin: Path, rows: Path, folder: Path) -> dict[str, list[str]]:
    """Name -> command of a run of three steps on the twin. Several processes where there are several GPUs; a launch
    with FSDP shards on one as well."""
    data = ["--model_name_or_path", twin, "--dataset_name", rows, "--num_eval_rows", 4, "--max_steps", 3]
    short = ["--warmup_steps", 0, "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "False"]
    devices = torch.cuda.device_count() if ON_GPU else 2
    count = ["--num_processes", devices, "--main_process_port", 0]

    def command(name: str, *flags: object, config: str = "", recipe: str = "llava15_sft") -> list[str]:
        yaml = (
            ROOT / f"accelerate_configs/{config if ON_GPU else config.replace('fsdp2_qlora', 'cpu_2proc_fsdp2')}.yaml"
        )
        launch = ["-m", "accelerate.commands.launch", "--config_file", yaml, *count] if config else []
        output = folder / name.replace(" ", "-").replace(",", "")
        given = [sys.executable, *launch, ROOT / f"recipes/{recipe}.py", *data, *short, *flags, "--output_dir", output]
        return [*map(str, given)]

    sharded, spread = ("fsdp2", "multi_gpu") if ON_GPU else ("cpu_2proc_fsdp2", "cpu_2proc")
    return {
        "QLoRA with DoRA, no launcher, the recipe's optimizer": command("plain"),
        "LoRA in 16 bit": command("lora", "--no_load_in_4bit", "--no_use_dora"),
        "attention sdpa, rows with padding": command("sdpa", "--attn_implementation", "sdpa"),
        "8-bit optimizer": command("8bit", "--optim", "adamw_8bit"),
        "a whole model trains": command("full", recipe="llava_finetune_full"),
        "evaluation and answers": command("answers", "--eval_strategy", "steps", "--eval_steps", 2),
        "DDP": command("ddp", config=spread),
        "FSDP2, LoRA in 16 bit": command("fsdp", "--no_load_in_4bit", "--no_use_dora", config=sharded),
        "FSDP2, a whole model": command("fsdp-full", config=sharded, recipe="llava_finetune_full"),
        "FSDP2, QLoRA, packed on the CPU": command("fsdp-qlora", "--no_use_dora", config="fsdp2_qlora"),
    }


def sentence(output: str) -> str:
    """The line of an output that says why it ended: the last error, without its place."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0] or "error:" in line]
    return (errors or lines or ["no output"])[-1][:300]


# -- how fast is it, and what does it take?


def build(name: str, method: str, small: bool) -> tuple[Any, Any]:
    """Random weights of the real size with adapters on them, on the device and in the precision of a recipe, and a
    processor with a small vocabulary."""
    family, config_class, sizes = MODELS[name]
    edge = 56 if small else {"llava15": 336, "qwen2_5_vl": 448}[family]
    twin, processor = tiny.build(family, image_size=edge, patch_size=14, corpus=[" ".join(mix.WORDS)])
    torch.manual_seed(0)
    config, device = twin.config, "cuda" if ON_GPU else "cpu"
    if not small:
        ids = {key: value for key, value in config.to_dict().items() if key.endswith(("token_id", "token_index"))}
        config = config_class(**sizes, **ids)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=best_dtype())
    options = dict(METHODS[method])
    if options.pop("load_in_4bit", False):
        weights, kind = {key: value.cpu() for key, value in model.state_dict().items()}, type(model)
        del model
        packing = vlm_sft.nf4_config(config)
        given = {"config": config, "state_dict": weights, "quantization_config": packing, "dtype": best_dtype()}
        model = kind.from_pretrained(None, device_map={"": device}, **given)
    model.generation_config = twin.generation_config
    for attention in flash_attentions(model):
        with contextlib.suppress(ValueError, ImportError):
            model.set_attn_implementation(attention)
            break
    adapted = get_peft_model(model, vlm_sft.lora_config(model, r=16, **options))
    cast_trainable_to_fp32(adapted)
    return adapted, processor


class Clock(TrainerCallback):
    """Seconds of each epoch, with all that the GPU was given done; the peak is counted from the second one on. An epoch
    begins with its first step, since the start of data workers, once an epoch, is long beside a few steps."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.began: float | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = None
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.began is None:
            self.began = now()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.began is not None
        self.epochs.append(now() - self.began)


def now() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def forget_runs(model: Any) -> None:
    """Takes off what earlier runs left on the model. TRL 1.16 and the Trainer each mark the embeddings, the tower's
    too, and transformers 5.23 removes the last marks only: the next run would send gradients through a frozen tower."""
    for module in model.modules():
        for name in ("forward", "train", "enable_input_require_grads", "disable_input_require_grads"):
            vars(module).pop(name, None)
        for key, hook in [*module._forward_hooks.items()]:
            if "require_grads" in getattr(hook, "__qualname__", ""):
                del module._forward_hooks[key]


def train(path: str, model: Any, processor: Any, folder: Path, output: str) -> dict[str, float]:
    """Trains two epochs, and says of the second its seconds and the peak of memory in GiB."""
    base, clock = base_of(model), Clock()
    forget_runs(model)
    given: dict[str, Any] = {"optim": "paged_adamw_32bit" if ON_GPU else "adamw_torch", "max_grad_norm": 0.3}
    given |= {"per_device_train_batch_size": BATCH, "num_train_epochs": 2, "learning_rate": 2e-4, "max_length": None}
    given |= {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    given |= {"bf16": best_dtype() == torch.bfloat16, "use_cpu": not ON_GPU, "dataloader_pin_memory": ON_GPU}
    given |= {"activation_checkpointing": True, "dataloader_num_workers": 0 if path == "TRL" else best_worker_count()}
    callbacks: list[Any] = [clock]
    if path.startswith("TRL"):
        parts: dict[str, Any] = {"train_dataset": load_from_disk(str(folder))}
    else:
        detach_frozen_tower(base)
        free = path != "recipe, padded"
        if free:
            vlm_sft.enable_padding_free(base)
        collator = vlm_sft.ChatCollator(processor, padding_free=free, name_rows=False)
        data = vlm_sft.check_rows(vlm_sft.load_conversations(folder, eval_fraction=0), collator, num_proc=0)["train"]
        given |= {"remove_unused_columns": False, "train_sampling_strategy": "group_by_length"}
        callbacks.append(GroupByLength())
        if path == "recipe, packed":
            lengths = data.with_format(None)["length"][:]
            data = vlm_sft.pack(data, max_length=max(max(lengths), BATCH * sum(lengths) // len(lengths)))
            given |= {"per_device_train_batch_size": 1, "train_sampling_strategy": "random"}
            callbacks.pop()
        parts = {"train_dataset": data, "data_collator": collator}
    args = SFTConfig(output, **given)
    use_one_gpu(args)
    trainer = SFTTrainer(model, args, processing_class=processor, callbacks=callbacks, **parts)
    if not path.startswith("TRL"):
        cast_trainable_to_fp32(model)  # as prove does: TRL leaves the adapters of a 4-bit base in bfloat16
    trainer.train()
    found = {"seconds": clock.epochs[-1]}
    if ON_GPU:
        unused, total = torch.cuda.mem_get_info()
        found |= {"reserved": torch.cuda.max_memory_reserved() / 2**30, "driver": (total - unused) / 2**30}
    del trainer
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
    return found


def measure(name: str, method: str, folder: Path, args: argparse.Namespace) -> None:
    """Prints a line of JSON for each thing found; an error of one path is a line too."""
    began = time.perf_counter()
    model, processor = build(name, method, args.tiny)
    attention = base_of(model).config._attn_implementation
    collator = vlm_sft.ChatCollator(processor, name_rows=False)
    encoded = collator.encode(list(load_from_disk(str(folder))))[0]
    config = base_of(model).config
    options = {key: value for key, value in METHODS[method].items() if key != "load_in_4bit"}
    kind = "qlora" if METHODS[method].get("load_in_4bit") else "lora"
    estimated = memory.estimate(
        bare(config),
        method=kind,
        rows=BATCH,
        tokens=max(map(len, encoded)),
        generation_batch_size=0,
        **{"lora_dropout": 0.05, **options},
    )
    trained = sum(int((row.labels != vlm_sft.IGNORE_INDEX).sum()) for row in encoded)
    say(model=name, method=method, attention=attention, trained=trained, estimated=estimated["peak"] / 2**30)
    say(model=name, method=method, built=time.perf_counter() - began)
    paths = [path for path in args.paths if args.tiny or "flash" in attention or path not in PATHS[3:]]
    with tempfile.TemporaryDirectory() as output:
        for turn in range(args.rounds):
            for path in [*paths[turn:], *paths[:turn]][:: -1 if turn % 2 else 1]:
                try:
                    say(model=name, method=method, path=path, **train(path, model, processor, folder, output))
                except Exception as error:
                    say(model=name, method=method, path=path, failed=f"{type(error).__name__}: {error}"[:300])


def bare(config: Any) -> Any:
    """The model of this config on the meta device, without what quantizes it."""
    plain = copy.deepcopy(config)
    plain.__dict__.pop("quantization_config", None)
    return on_meta(plain)


def say(**found: Any) -> None:
    print(json.dumps(found), flush=True)


# -- in time, and one after the other


class Report:
    """Lines for the terminal and outputs/gpu.md, facts for outputs/gpu.jsonl, as they come."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.text, self.facts = folder / "gpu.md", folder / "gpu.jsonl"
        self.text.write_text("", encoding="utf-8")
        self.facts.write_text("", encoding="utf-8")

    def line(self, text: str = "") -> None:
        print(text, flush=True)
        with self.text.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    def keep(self, name: str, lines: Iterator[str]) -> Iterator[str]:
        """The lines as they come, kept in a file of this name beside the report."""
        with (self.text.parent / f"{name.replace(' ', '-').replace(',', '')}.log").open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(line)
                yield line

    def fact(self, **found: Any) -> None:
        with self.facts.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(found)}\n")


def lines_of(command: list[str], until: float, environment: dict[str, str] | None = None) -> Iterator[str]:
    """What a command prints, as it comes; it is ended at this time. Raises RuntimeError where it fails, TimeoutError
    where it was ended."""
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    there = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(command, env=there | (environment or {}), cwd=ROOT, **streams)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    said = []
    try:
        while True:
            line = lines.get(timeout=max(0.1, until - time.monotonic()))
            if line is None:
                break
            said.append(line)
            yield line
    except queue.Empty:
        raise TimeoutError("not ended in time") from None
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
    if process.wait() != 0:
        raise RuntimeError(sentence("".join(said)))


def try_paths(report: Report, until: Callable[[], float], folder: Path) -> None:
    twin, processor = tiny.build("llava15", image_size=56, patch_size=14, corpus=[" ".join(mix.WORDS)])
    for made in (twin, processor):
        made.save_pretrained(folder / "twin")
    mix.rows(16).save_to_disk(folder / "few")
    report.line("| path | |\n|---|---|")
    for name, command in checks(folder / "twin", folder / "few", folder).items():
        began = time.monotonic()
        if began > until():
            report.line(f"| {name} | no time left |")
            continue
        try:
            said = list(report.keep(name, lines_of(command, min(until(), began + 180), {"OMP_NUM_THREADS": "1"})))
            loss = [line for line in said if line.startswith("forward")]
            result = f"works, {time.monotonic() - began:.0f} s{': ' + ' '.join(loss[0].split()[1:3]) if loss else ''}"
        except (RuntimeError, TimeoutError) as error:
            result = f"FAILED: {error}"
        report.line(f"| {name} | {result} |")
        report.fact(check=name, result=result)


def try_speed(report: Report, until: Callable[[], float], folder: Path, args: argparse.Namespace) -> None:
    mix.rows(args.rows).save_to_disk(folder / "rows")
    flags = ["--rounds", str(args.rounds), "--paths", *args.paths, *(["--tiny"] if args.tiny else [])]
    for method in args.methods:
        for name in args.models:
            if time.monotonic() > until():
                report.line(f"\n{name}, {method}: no time left")
                continue
            found: list[dict[str, Any]] = []
            command = [sys.executable, __file__, "--one", name, method, str(folder / "rows"), *flags]
            try:
                for line in report.keep(f"{name}, {method}", lines_of(command, until())):
                    with contextlib.suppress(ValueError):
                        if isinstance(fact := json.loads(line), dict):
                            found.append(fact)
                            report.fact(**fact)
            except (RuntimeError, TimeoutError) as error:
                report.line(f"\n{name}, {method}: {error}")
            table(report, name, method, found)


def table(report: Report, name: str, method: str, found: list[dict[str, Any]]) -> None:
    first = next((fact for fact in found if "trained" in fact), None)
    runs = {path: [fact for fact in found if fact.get("path") == path and "seconds" in fact] for path in PATHS}
    if first is None or not any(runs.values()):
        return
    times = {path: median(run["seconds"] for run in those) for path, those in runs.items() if those}
    report.line(f"\n{name}, {method}, attention {first['attention']}; estimated peak {first['estimated']:.1f} GiB\n")
    report.line("| | trained tokens/s | x TRL | peak reserved, GiB | driver, GiB |\n|---|---:|---:|---:|---:|")
    for path, seconds in times.items():
        peaks = [
            f"{max(run[kind] for run in runs[path]):.1f}" if kind in runs[path][0] else "-"
            for kind in ("reserved", "driver")
        ]
        beside = f"{times['TRL'] / seconds:.2f}" if "TRL" in times else "-"
        report.line(f"| {path} | {first['trained'] / seconds:,.0f} | {beside} | {' | '.join(peaks)} |")
    for fact in found:
        if "failed" in fact:
            report.line(f"| {fact['path']} | FAILED: {fact['failed']} | | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="ends after so many, with what it has")
    parser.add_argument("--rows", type=int, default=32, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=2, help="of all paths, each in another order")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=[*METHODS], help="whose speed is measured")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=[*MODELS])
    parser.add_argument("--paths", nargs="*", choices=PATHS, default=[*PATHS])
    parser.add_argument("--checks", action=argparse.BooleanOptionalAction, default=True, help="the paths on a twin")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, also without a GPU")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs", help="folder of gpu.md and gpu.jsonl")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "METHOD", "ROWS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args.one[0], args.one[1], Path(args.one[2]), args)
        return
    if not (args.tiny or ON_GPU):
        parser.error("no GPU is visible; --tiny tries the program without one")
    end = time.monotonic() + 60 * args.minutes - 5
    report = Report(args.output)
    where = "the CPU" if not ON_GPU else f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    report.line(f"On {where}, torch {torch.__version__}, {'tiny' if args.tiny else 'real'} sizes, {args.rows} rows\n")
    with tempfile.TemporaryDirectory() as folder:
        # Checks get at most 40% of the time, so that there is a figure of speed too.
        if args.checks:
            try_paths(report, lambda: end - 0.6 * 60 * args.minutes, Path(folder))
        try_speed(report, lambda: end, Path(folder), args)


if __name__ == "__main__":
    main()
