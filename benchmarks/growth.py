"""How cost grows: with rows, images, tokens and turns in a row, checking processes, sizes of tokenizer and photo.

    python benchmarks/growth.py [--rows 1000 4000 16000] [--only turns ...]

Processor time, that of worker processes included, for the twin of LLaVA-1.5. The last line of each table is the
exponent of the upper half: 1 is linear. The rows of a table are each measured in a process of their own, offline.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = {
    "rows": (1_000, 4_000, 16_000),
    "images in a row": (1, 2, 4, 8, 16, 32),
    "tokens in a row": (256, 1_024, 4_096, 16_384),
    "turns": (1, 2, 4, 8, 16, 32, 64),
    "processes": (1, 2),
    "vocabulary": (1_000, 32_000, 152_000, 262_000),  # Llama's, Qwen's, Gemma's
    "added tokens": (16, 256, 6_400),  # the last as Gemma's
    "pixels of a photo": (300_000, 1_200_000, 4_800_000, 12_000_000),  # the last as a telephone's
}
STARTED = 64  # rows, where a start is timed
CHECKED = 2_000  # rows, where processes are counted


def cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def talk(turns: int, words: int, number: int = 0) -> list[dict[str, Any]]:
    """Messages with some `words` in all; images of the row stand before the first question."""
    half = max(1, words // (2 * turns))
    messages = []
    for _ in range(turns):
        messages.append({"role": "user", "content": " ".join(["where"] * half) + f" {number}?"})
        messages.append({"role": "assistant", "content": " ".join(["there"] * half) + "."})
    return messages


def collated(*, turns: int = 1, words: int = 64, images: int = 1) -> dict[str, float]:
    """Milliseconds of the collator for one row."""
    from PIL import Image

    from vlm_sft import ChatCollator
    from vlm_sft.tools import tiny

    collator = ChatCollator(tiny.build("llava15", corpus=["where there"])[1])
    row = {"messages": talk(turns, words), "images": [Image.new("RGB", (336, 336))] * images}
    times, tokens = [], 0
    for _ in range(7):
        start = time.process_time()
        tokens = collator([row])["input_ids"].shape[1]
        times.append((time.process_time() - start) * 1e3)
    return {"tokens": tokens, "ms": statistics.median(times)}


def checked(rows: int, num_proc: int | None) -> dict[str, float]:
    """Seconds of a first start and of a second one (reading and checking), and MiB that the process grew by."""
    import datasets
    from PIL import Image

    from vlm_sft import ChatCollator, check_rows, load_conversations
    from vlm_sft.tools import tiny

    datasets.disable_progress_bars()
    folder = Path(os.environ["HF_HOME"])
    Image.new("RGB", (32, 32)).save(folder / "image.png")
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(rows):
            file.write(json.dumps({"messages": talk(1, 64, number), "images": ["image.png"]}) + "\n")
    collator = ChatCollator(tiny.build("llava15", corpus=["where there"])[1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {}
    for start in ("first start, s", "second start, s"):
        began, clock = cpu_seconds(), time.perf_counter()
        check_rows(load_conversations(folder / "rows.jsonl", eval_fraction=0), collator, num_proc=num_proc)
        found[start] = cpu_seconds() - began
        found.setdefault("first start, wall s", time.perf_counter() - clock)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {**found, "memory, MiB": grown / 1024}


def started(vocabulary: int = 1_000, added: int = 16) -> dict[str, float]:
    """Seconds of what comes before a first step, with a tokenizer of this size."""
    import datasets
    from PIL import Image
    from tokenizers.models import BPE

    from vlm_sft import ChatCollator, check_rows
    from vlm_sft.chat.audit import audit
    from vlm_sft.evaluation.pages import write_audit_html
    from vlm_sft.tools import tiny

    processor = tiny.build("llava15", corpus=["where there"])[1]
    backend = processor.tokenizer.backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    vocab, merges, taken = model["vocab"], [*map(tuple, model["merges"])], len(processor.tokenizer)
    words = ("".join(word) for length in range(2, 9) for word in itertools.product("aehiorstw", repeat=length))
    for word in itertools.islice((word for word in words if word not in vocab), max(0, vocabulary - len(vocab))):
        vocab[word] = taken = taken + 1
        merges.append((word[:-1], word[-1]))
    backend.model = BPE(vocab, [merge for merge in merges if {*merge, "".join(merge)} <= vocab.keys()])
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [f"<unused{n}>" for n in range(added)]})
    datasets.disable_progress_bars()
    image = Image.new("RGB", (336, 336))
    rows = datasets.Dataset.from_list([{"messages": talk(1, 64, n), "images": [image]} for n in range(STARTED)])
    gc.freeze()  # as vlm_sft.run does
    found, clock = {}, time.process_time()

    def took(what: str) -> None:
        nonlocal clock
        now = time.process_time()
        found[what], clock = now - clock, now

    collator = ChatCollator(processor)
    took("collator, s")
    check_rows(rows, collator, num_proc=0)
    took("first pass, s")
    checked = check_rows(rows, collator, num_proc=0)
    took("second pass, s")
    report = audit(collator, checked)
    took("audit, s")
    write_audit_html(report, Path(os.environ["HF_HOME"], "audit.html"))
    took("its page, s")
    return found


def photographed(pixels: int) -> dict[str, float]:
    """Of rows with a JPEG of so many pixels each: seconds of the audit, and MiB that the process grew by."""
    from PIL import Image

    from vlm_sft import ChatCollator, load_conversations
    from vlm_sft.chat.audit import audit
    from vlm_sft.tools import tiny

    folder, side = Path(os.environ["HF_HOME"]), round(math.sqrt(pixels / 12))
    noise = Image.frombytes("RGB", (400, 300), random.Random(0).randbytes(400 * 300 * 3))
    noise.resize((4 * side, 3 * side), Image.Resampling.BICUBIC).save(folder / "photo.jpg", quality=88)
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(STARTED):
            file.write(json.dumps({"messages": talk(1, 64, number), "images": ["photo.jpg"]}) + "\n")
    collator = ChatCollator(tiny.build("llava15", corpus=["where there"])[1])
    rows = load_conversations(folder / "rows.jsonl", eval_fraction=0)["train"]
    before, began, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, cpu_seconds(), time.perf_counter()
    audit(collator, rows)
    found = {"audit, s": cpu_seconds() - began, "audit, wall s": time.perf_counter() - clock}
    return {**found, "memory, MiB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def measure(what: str, size: int) -> dict[str, float]:
    match what:
        case "rows":
            return checked(size, 0)
        case "processes":
            return checked(CHECKED, 0 if size == 1 else size)
        case "images in a row":
            return collated(images=size)
        case "tokens in a row":
            return collated(words=size)
        case "vocabulary":
            return started(vocabulary=size)
        case "added tokens":
            return started(added=size)
        case "pixels of a photo":
            return photographed(size)
    return collated(turns=size, words=16 * size)


def exponent(sizes: list[int], values: list[float]) -> float:
    """Of the upper half of the sizes: the slope of the logarithms."""
    half = len(sizes) // 2 if len(sizes) > 2 else 0
    xs, ys = ([math.log(max(value, 1e-9)) for value in line[half:]] for line in (sizes, values))
    return statistics.linear_regression(xs, ys).slope


def table(what: str, sizes: list[int]) -> str:
    found = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as home:
            switches = {
                "HF_HOME": home,
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
            command = [sys.executable, __file__, "--measure", what, str(size)]
            done = subprocess.run(command, env={**os.environ, **switches}, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{what} {size}: {done.stderr}")
            found.append(json.loads(done.stdout.splitlines()[-1]))
    names = list(found[0])
    lines = [[what, *names]]
    for size, line in zip(sizes, found, strict=True):
        lines.append([f"{size:,}", *(f"{line[name]:,.2f}" for name in names)])
    # Of tokens, what is measured grows with their number, not with the words that were asked for.
    places = [int(line["tokens"]) for line in found] if what == "tokens in a row" else sizes
    lines.append(["exponent", *(f"{exponent(places, [line[name] for line in found]):.2f}" for name in names)])
    return "\n".join("".join(f"{cell:>20}" for cell in line) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(SIZES["rows"]))
    parser.add_argument("--only", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], int(args.measure[1]))))
        return
    for what in args.only:
        print(table(what, args.rows if what == "rows" else list(SIZES[what])), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
