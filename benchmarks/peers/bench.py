"""vlm_sft beside the tools that people would use instead, on the same rows and models: `make bench-peers`, or

    python benchmarks/peers/bench.py [--quick] [--starts [vlm_sft trl]] [--rounds 3] [--environments .venv/peers]
        [--output FOLDER] [--write]

Three random twins, two regimes, four tools; each run is a process of its own, the tools take turns, and figures are
medians, those of ratios with their range. How soon the first step comes is measured apart, in runs that end with it
(`--starts`: only these, of all tools or of those that are named); ours and TRL's start a second time, with what the
first start left in their caches, and ours once more with rows that are checked as they come. Nothing is downloaded but
the tools, once. Ours is the recipe as it ships, with its pass over the rows, its proof and its guards.
What is written: `peers.json`, every run as it ends, and `peers.md` and `starts.md`, the tables, which `--write` puts
into benchmarks/README.md as well.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
sys.path.append(str(Path(__file__).parents[1]))

import mix
import pyarrow.parquet
from cpu import machine, spread, write
from labels import facts, text_of
from tools import ENVIRONMENTS, NAMES, SETTINGS, STARTS, Job, python_of

TWINS = ("vision-heavy LLaVA", "LM-heavy LLaVA", "Qwen2.5-VL")
REGIMES = {"short rows, no checkpointing": (True, False), "long-tailed rows, checkpointing": (False, True)}
FAULTS = (
    "image does not open",
    "image is missing",
    "row longer than max_length",
    "two marks, one image",
    "empty answer",
)
PLACE = 13  # of the row with the fault
STARTED_AGAIN = (("vlm_sft", "default"), ("trl", "best"))  # with the caches that the first start has left
Rows = list[dict[str, Any]]


def save_twin(name: str, folder: Path) -> Path:
    if name == "Qwen2.5-VL":
        from vlm_sft.tools import tiny

        sizes = {"hidden_size": 128, "num_layers": 4, "image_size": 112, "patch_size": 14}
        made = tiny.build("qwen2_5_vl", corpus=[" ".join(mix.WORDS)], **sizes)
    else:
        made = mix.llava(name.removesuffix(" LLaVA"))
    for part in made:
        part.save_pretrained(folder / name.replace(" ", "_"))
    return folder / name.replace(" ", "_")


def write_rows(rows: Rows, folder: Path) -> Path:
    """The rows as JSON lines with marks and files (vlm_sft, LLaMA-Factory, ms-swift), and as TRL's datasets are."""
    (folder / "images").mkdir(parents=True)
    (folder / "trl").mkdir()
    lines = []
    for number, row in enumerate(rows):
        paths = [str(folder / "images" / f"{number}_{n}.jpg") for n in range(len(row["images"]))]
        for path, image in zip(paths, row["images"], strict=True):
            if image["bytes"] is not None:
                Path(path).write_bytes(image["bytes"])
        messages = [{"role": m["role"], "content": marked(m)} for m in row["messages"]]
        lines.append(json.dumps({"messages": messages, "images": paths}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    form = {"formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"}}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl", **form, "tags": tags}}))
    table = mix.Dataset.from_list(rows, features=mix.FEATURES).data.table
    pyarrow.parquet.write_table(table, folder / "trl" / "train.parquet")
    return folder


def marked(message: dict[str, Any]) -> str:
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in message["content"])


def stored(count: int, short: bool) -> Rows:
    return mix.rows(count, short=short).with_format("arrow")[:].to_pylist()


def spoiled(fault: str, rows: Rows) -> Rows:
    row = next(row for row in rows[PLACE:] if len(row["images"]) == 1)
    rows.remove(row)
    rows.insert(PLACE, row)
    question, answer = row["messages"][0]["content"], row["messages"][1]["content"]
    if fault == "image does not open":
        row["images"][0]["bytes"] = b"no image"
    elif fault == "image is missing":
        row["images"][0] = {"bytes": None, "path": "/nowhere/missing.jpg"}
    elif fault == "row longer than max_length":
        answer[0]["text"] = " ".join(mix.WORDS * 20)
    elif fault == "two marks, one image":
        question.insert(0, dict(question[0]))
    else:
        answer[0]["text"] = ""
    return rows


class Bench:
    def __init__(self, folder: Path, environments: Path, log: Path) -> None:
        self.folder, self.log, self.runs = folder, log, []
        self.pythons = {tool: python_of(tool, environments) for tool in NAMES}
        self.count = 0

    def run(
        self, tool: str, setting: str, model: Path, data: Path, home: Path | None = None, **settings: Any
    ) -> dict[str, Any]:
        """What `child.py` reports of one run; `home` holds the caches of an earlier one."""
        self.count += 1
        home = home or self.folder / f"run{self.count}"
        home.mkdir(exist_ok=True)
        job = Job(tool, setting, model, data, home / f"output{self.count}", **settings)
        done = job.run(self.pythons[tool], home)
        report = job.output.with_suffix(".json")
        found = json.loads(report.read_text()) if report.exists() else {"steps": 0, "rows": []}
        told = f"{done.stdout}\n{done.stderr}"
        found |= {"tool": tool, "setting": setting, "model": model.name, "code": done.returncode, "told": told[-4000:]}
        found |= {"data": data.name, "home": str(home)}
        found["names"] = bool(re.search(rf"{PLACE}_0\.jpg|missing\.jpg|row {PLACE}\b", told))
        print(tool, setting, model.name, f"code {done.returncode}, {found['steps']} steps", flush=True)
        self.runs.append({name: value for name, value in found.items() if name != "rows"})
        self.log.write_text(json.dumps(self.runs, indent=1))
        return found


def speed(bench: Bench, models: dict[str, Path], data: Path, rounds: int, checkpointing: bool) -> list[list[str]]:
    table = [["model", "tool", "setting", "epoch, s", "CPU of it, s", "x ours (CPU)", "padding", "peak, MiB"]]
    for name, model in models.items():
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for _ in range(rounds):
            for tool, settings in SETTINGS.items():
                for setting in settings:
                    run = bench.run(tool, setting, model, data, checkpointing=checkpointing)
                    found.setdefault((tool, setting), []).append(run)
        table += [[name, NAMES[tool], setting, *cells(runs, found)] for (tool, setting), runs in found.items()]
    return table


def cells(runs: list[dict[str, Any]], found: dict[tuple[str, str], list[dict[str, Any]]]) -> list[str]:
    """Medians of the rounds; of the ratio to ours in the same round, the range as well."""
    if any("epoch" not in run for run in runs):
        return ["failed"] * 5
    ratios = (run["epoch_cpu"] / ours["epoch_cpu"] for run, ours in zip(runs, found["vlm_sft", "default"], strict=True))
    return [
        f"{middle(runs, 'epoch'):.1f}",
        f"{middle(runs, 'epoch_cpu'):.1f}",
        spread(ratios, 2),
        f"{1 - runs[0]['real'] / runs[0]['computed']:.1%}",
        f"{middle(runs, 'peak'):.0f}",
    ]


def starts(
    bench: Bench, models: dict[str, Path], data: Path, rounds: int, checkpointing: bool, tools: Iterable[str] = NAMES
) -> list[list[str]]:
    """Seconds from the start of Python until the first step begins, its batch at hand, and ends."""
    table = [["model", "tool", "setting", "begins, s", "ends, s", "second start: begins, s", "ends, s"]]
    options: dict[str, Any] = {"checkpointing": checkpointing, "first_step_only": True}
    for name, model in models.items():
        found: dict[tuple[str, str], tuple[list[dict[str, Any]], list[dict[str, Any]]]]
        found = {(tool, setting): ([], []) for tool, setting in STARTS if tool in tools}
        for _ in range(rounds):
            for way, (first, second) in found.items():
                run = bench.run(*way, model, data, **options)
                first.append(run)
                if way in STARTED_AGAIN:
                    second.append(bench.run(*way, model, data, Path(run["home"]), **options))
        for (tool, setting), both in found.items():
            seconds = [seconds_of(runs, part) for runs in both for part in ("begins", "ends")]
            table.append([name, NAMES[tool], setting, *seconds])
    return table


def seconds_of(runs: list[dict[str, Any]], part: str) -> str:
    seconds = [run.get(f"first_step_{part}") for run in runs]
    return "failed" if None in seconds else spread(seconds, 1) if seconds else ""


def middle(runs: Iterable[dict[str, Any]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def trained(bench: Bench, models: dict[str, Path], data: Path, rows: Rows) -> list[list[str]]:
    """Labels in 16 bit, parts that hold adapters, parts in 4 bit; a model of each kind of template."""
    from vlm_sft import load_processor

    lines: list[list[str]] = []
    columns = [(tool, setting) for tool, settings in SETTINGS.items() for setting in settings]
    for name, model in models.items():
        cells = []
        for tool, setting in columns:
            run = bench.run(tool, setting, model, data)
            four = bench.run(tool, setting, model, data, four_bit=True)
            bits = four.get("four_bit", [])
            cell = facts(run["rows"], rows, load_processor(model)) if run["rows"] else {}
            adapters = {"adapters in": ", ".join(run.get("trains", [])) or "failed"}
            cells.append(cell | adapters | {"4-bit layers in": ", ".join(bits) or f"failed: {last_error(four)}"})
        for fact in dict.fromkeys(name for cell in cells for name in cell):
            lines.append([name, fact, *(cell.get(fact, "failed") for cell in cells)])
    return [["model", "", *(f"{NAMES[tool]}, {setting}" for tool, setting in columns)], *lines]


def faults(bench: Bench, model: Path) -> list[list[str]]:
    from vlm_sft import load_processor

    tokenizer = load_processor(model).tokenizer
    table = [["fault", *NAMES.values()]]
    for fault in FAULTS:
        rows = spoiled(fault, stored(40, True))
        data = write_rows(rows, bench.folder / fault.replace(" ", "_"))
        asked = text_of(rows[PLACE]["messages"][0])
        cells = []
        for tool, settings in SETTINGS.items():
            run = bench.run(tool, settings[0], model, data, max_length=512)
            seen = [row for row in run["rows"] if asked in tokenizer.decode(row["ids"])]
            cells.append(outcome(run, seen))
        table.append([fault, *cells])
    return table


def outcome(run: dict[str, Any], seen: list[dict[str, list[int]]]) -> str:
    named = ", names the row" if run["names"] else ""
    if run["code"] and not run["steps"]:
        return f"stops before the first step{named}"
    if run["code"]:
        return f"stops after {run['steps']} steps{named}"
    if not seen:
        return f"trains without the row{named or ', silent'}"
    learned = sum(label >= 0 for label in seen[0]["labels"])
    return f"trains on it, {learned} of {len(seen[0]['ids'])} tokens learned{named or ', silent'}"


def last_error(run: dict[str, Any]) -> str:
    lines = [line for line in run["told"].splitlines() if re.match(r"\w*(Error|Exception)\b", line)]
    return lines[-1][:120] if lines else f"code {run['code']}"


def markdown(table: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])


def tables_of(bench: Bench, args: argparse.Namespace) -> Iterator[tuple[str, str, list[list[str]]]]:
    """The part of README, title and rows of each table, as soon as it is measured."""
    models = {twin: save_twin(twin, bench.folder) for twin in TWINS[-1 if args.quick else 0 :]}
    regimes = {
        f"{regime}: {args.rows} rows, batches of 8, {args.rounds} rounds": (
            write_rows(stored(args.rows, short), bench.folder / ("short" if short else "long")),
            checkpointing,
        )
        for regime, (short, checkpointing) in list(REGIMES.items())[: 1 if args.quick else 2]
    }
    for title, (data, checkpointing) in regimes.items():
        yield "starts", title, starts(bench, models, data, args.rounds, checkpointing, args.starts or NAMES)
    if args.starts is not None:
        return
    for title, (data, checkpointing) in regimes.items():
        yield "peers", title, speed(bench, models, data, args.rounds, checkpointing)
    kinds = {twin: model for twin, model in models.items() if twin != "LM-heavy LLaVA"}
    few = stored(32, True)
    yield "peers", "What each trains, 32 rows", trained(bench, kinds, write_rows(few, bench.folder / "few"), few)
    name, model = next(iter(models.items()))
    yield "peers", f"Planted faults, one row of 40, {name}", faults(bench, model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tool and setting")
    parser.add_argument("--rows", type=int, default=320)
    only = "how soon the first step comes, and nothing else; of these tools (all)"
    parser.add_argument("--starts", nargs="*", choices=NAMES, metavar="TOOL", help=only)
    parser.add_argument("--quick", action="store_true", help="one twin, one regime, one round, 32 rows: does all run?")
    parser.add_argument("--environments", type=Path, default=Path(sys.prefix) / "peers", help="of the other tools")
    parser.add_argument("--output", type=Path, default=Path("outputs/peers"))
    parser.add_argument("--write", action="store_true", help="the tables into benchmarks/README.md")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.rows = 1, 32
    args.output.mkdir(parents=True, exist_ok=True)
    others = ", ".join(packages[0] for packages in ENVIRONMENTS.values())
    text: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), args.environments.absolute(), args.output / "peers.json")
        load, began = os.getloadavg()[0], time.monotonic()
        for part, title, table in tables_of(bench, args):
            if part not in text:
                text[part], start = "", began
            text[part] += f"\n\n### {title}\n\n{markdown(table)}"
            began = time.monotonic()
            took = f"Load {load:.1f} at the start, {(began - start) / 60:.0f} minutes."
            (args.output / f"{part}.md").write_text(f"{machine()} {others}. {took}{text[part]}\n")
    for part in text:
        tables = (args.output / f"{part}.md").read_text()
        print(tables)
        if args.write:
            write(part, tables)


if __name__ == "__main__":
    main()
