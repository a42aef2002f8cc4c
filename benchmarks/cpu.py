"""Our path beside TRL's own and the 2024 note's, on two CPU cores: `make bench`, or

    python benchmarks/cpu.py [--rows 320] [--runs 3] [--write]

Each run is a process of its own, the paths take turns, and what is printed is the median (and the range) of the runs.
`--write` puts the tables into benchmarks/README.md. Without a GPU, in some twenty minutes; leave the machine alone.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import collation
import datasets
import mix
import parts
import torch
import training
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from vlm_sft import IGNORE_INDEX, ChatCollator, pack
from vlm_sft.tools import tiny
from vlm_sft.training.batches import Groups

PATHS = ("trl", "note", "all scored", "in autograd", "drawn", "recipe", "packed")
NAMES = {
    "trl": "TRL 1.16, `sft_vlm.py`",
    "note": "collate function of 2024",
    "all scored": "TRL with the recipe's data workers and collator",
    "in autograd": "and scores of trained positions alone",
    "drawn": "and the frozen tower out of autograd",
    "recipe": "and rows of like length together: the recipe",
    "packed": "recipe, packed (SDPA)",
}
README = Path(__file__).with_name("README.md")
Table = list[list[str]]


def in_a_process(call: Callable[..., Any], *args: Any) -> Any:
    """The result of the call in a fork of this process, whose memory and caches it does not leave behind."""
    forks = multiprocessing.get_context("fork")
    mine, other = forks.Pipe()

    def work() -> None:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        other.send(call(*args))

    process = forks.Process(target=work)
    process.start()
    other.close()
    result = mine.recv()
    process.join()
    return result


def spread(values: Iterable[float], digits: int = 0) -> str:
    """The median, and the range where there is one."""
    values = sorted(values)
    middle = f"{statistics.median(values):,.{digits}f}"
    ends = [f"{value:,.{digits}f}" for value in (values[0], values[-1])]
    return middle if ends[0] == ends[1] else f"{middle} ({ends[0]}-{ends[1]})"


def side_by_side(kind: str, rows: int, runs: int) -> Table:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "rows")
        data = mix.rows(rows)
        data.save_to_disk(str(folder))
        collator = ChatCollator(mix.llava(kind)[1])
        answers = sum(int((row.labels != IGNORE_INDEX).sum()) for row in collator.encode(list(data))[0])
        found: dict[str, list[training.Run]] = {path: [] for path in PATHS}
        for _ in range(runs):
            for path in PATHS:
                found[path].append(in_a_process(run_of, path, kind, folder))
                print(kind, path, found[path][-1], flush=True)
    table = [["", "trained tokens/s", "x TRL", "computed per real token", "first step, s", "memory, MiB"]]
    speeds = {path: [answers / run.epochs[-1] for run in those] for path, those in found.items()}
    for path, those in found.items():
        ratios = [ours / theirs for ours, theirs in zip(speeds[path], speeds["trl"], strict=True)]
        table.append(
            [
                NAMES[path],
                spread(speeds[path]),
                spread(ratios, 2),
                f"{those[0].computed / those[0].real:.2f}",
                spread((run.first_step for run in those), 1),
                spread(run.peak for run in those),
            ]
        )
    return table


def run_of(path: str, kind: str, folder: Path) -> training.Run:
    return training.run(path, partial(mix.llava, kind), folder)


def padding(lengths: list[int], batch: int) -> Table:
    """Tokens that are real, of those computed, by the way of batching: of the first 320 rows and of all."""
    return [
        ["batches", "320 rows", f"{len(lengths):,} rows"],
        *(
            [*few, many[1]]
            for few, many in zip(*(shares(some, batch) for some in (lengths[:320], lengths)), strict=True)
        ),
    ]


def shares(lengths: list[int], batch: int) -> Table:
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    balanced = BatchRebalanceSampler(lengths, effective_batch_size=4 * batch, dp_size=1, grad_accum=4)
    budget = 2048
    packs = pack(datasets.Dataset.from_dict({"length": lengths}), max_length=budget).with_format(None)["length"][:]

    def share(batches: Iterable[list[int]]) -> str:
        chosen = [[lengths[n] for n in batch] for batch in batches]
        return f"{sum(map(sum, chosen)) / sum(len(those) * max(those) for those in chosen):.3f}"

    def cut(indices: Iterable[int]) -> list[list[int]]:
        found = [*indices]
        return [found[n : n + batch] for n in range(0, len(found), batch)]

    theirs, ours = (kind(batch, lengths=lengths, generator=generator) for kind in (LengthGroupedSampler, Groups))
    return [
        [f"random, {batch} rows", share(cut(order))],
        ["`group_by_length`, transformers' order", share(cut(theirs))],
        ["`group_by_length`, the recipes' order", share(cut(ours))],
        ["`batch_rebalance`, 4 accumulation steps", share(list(balanced))],
        [f"`pack` to {budget:,} tokens, rows without padding", "1.000"],
        [f"`pack` to {budget:,} tokens, of the budget", f"{sum(packs) / (budget * len(packs)):.3f}"],
    ]


def collated(backend: str) -> Table:
    times = collation.beside_image_work(backend)
    alone = times["image work alone"]
    return [
        ["", "ms a row", "x image work"],
        *([name, f"{value:.1f}", f"{value / alone:.2f}"] for name, value in times.items()),
    ]


def text_sides() -> Table:
    rows = [["family", "one exchange", "four exchanges"]]
    for family in tiny.FAMILIES:
        rows.append([family, *(f"{value:.2f}" for value in collation.text_side(family))])
    return rows


def markdown(table: Table) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|---" + "|---:" * (len(table[0]) - 1) + "|", *lines[1:]])


def machine() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    kind = model[1] if model else platform.processor()
    libraries = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    return (
        f"{datetime.date.today():%Y-%m-%d}. {len(os.sched_getaffinity(0))} cores of {kind}, one thread a process. "
        f"Python {platform.python_version()}, {versions}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=320, help="of each run")
    parser.add_argument("--runs", type=int, default=3, help="of each path")
    parser.add_argument("--collation", action="store_true", help="the tables of collation alone; three minutes")
    parser.add_argument("--write", action="store_true", help="the tables into benchmarks/README.md")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    for part, tables_of in {"cpu": training_tables, "collation": collation_tables}.items():
        if args.collation and part != "collation":
            continue
        start, tables = time.perf_counter(), tables_of(args)
        text = "\n\n".join(f"### {title}\n\n{markdown(table)}" for title, table in tables.items())
        text = f"{machine()} {(time.perf_counter() - start) / 60:.0f} minutes.\n\n{text}\n"
        print(text)
        if args.write:
            write(part, text)


def training_tables(args: argparse.Namespace) -> dict[str, Table]:
    tables = {
        f"Training, {kind} model, {args.rows} rows, batches of {training.BATCH}, {args.runs} runs": side_by_side(
            kind, args.rows, args.runs
        )
        for kind in ("vision-heavy", "LM-heavy")
    }
    return tables | {
        "Padding, rows of the same mix": padding(collation.lengths(), training.BATCH),
        "A frozen tower out of autograd, vision-heavy model, one step": parts.frozen_tower(),
        "DoRA beside LoRA on a 4-bit base 768 wide, checkpointing, one step": parts.dora(),
    }


def collation_tables(args: argparse.Namespace) -> dict[str, Table]:
    return {
        "Collation, CPU ms a row, images at LLaVA-1.5's own size, by Pillow": collated("pil"),
        "Collation, the same by torchvision": collated("torchvision"),
        "Collation, the text side alone (rendering, spans, labels), CPU ms a row": text_sides(),
    }


def write(part: str, text: str) -> None:
    """Puts tables into benchmarks/README.md, between the marks of their part."""
    before, begin, rest = README.read_text().partition(f"<!-- {part} -->\n")
    README.write_text(f"{before}{begin}{text}{rest[rest.index(f'<!-- end {part} -->') :]}")


if __name__ == "__main__":
    main()
