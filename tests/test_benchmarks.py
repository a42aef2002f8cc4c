"""The benchmarks run, on a few rows and tiny sizes, and what they write down names things that exist."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from datasets import load_dataset

from vlm_sft import ChatCollator, DataArguments, RecipeDefaults, check_rows, load_conversations

FOLDER = Path(__file__).parent.parent / "benchmarks"
NAMES = ("mix", "training", "parts", "collation", "cpu", "gpu", "first_step", "growth")
PEERS = ("labels", "tools", "child", "bench")


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(FOLDER / "peers"))
    yield {name: importlib.import_module(name) for name in (*NAMES, *PEERS)}
    logging.disable(logging.NOTSET)
    for name in (*NAMES, *PEERS):
        sys.modules.pop(name)


def test_rows_are_drawn_from_the_seed(benchmarks: dict[str, Any]) -> None:
    mix = benchmarks["mix"]
    rows = mix.rows(200)
    assert rows[:5]["messages"] == mix.rows(5)[:]["messages"] != mix.rows(5, seed=1)[:]["messages"]
    pictures = [len(images) for images in rows["images"]]
    assert set(pictures) == {0, 1, 2, 3}
    assert 0.05 < pictures.count(0) / 200 < 0.16
    assert {len(messages) // 2 for messages in rows["messages"]} >= {1, 2, 3, 4, 5}


@pytest.mark.sweep
def test_paths_train_on_the_same_rows(benchmarks: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, made = benchmarks["cpu"], []

    def here(call: Any, *args: Any) -> Any:
        made.append(call(*args))
        return made[-1]

    monkeypatch.setattr(cpu, "in_a_process", here)
    table = cpu.side_by_side("LM-heavy", 10, 1)
    runs = dict(zip(cpu.PATHS, made, strict=True))
    assert [row[0] for row in table[1:]] == list(cpu.NAMES.values())
    assert runs["recipe"].real == runs["packed"].real == runs["packed"].computed
    # The note's collate function adds the BOS of inference, TRL's does not; ours adds EOS behind each answer too.
    assert runs["note"].real == runs["trl"].real + 10 < runs["recipe"].real
    assert all(len(run.epochs) == 1 for run in runs.values())
    # The same batches, with one thing more given up; grouped rows have less padding.
    assert runs["drawn"].computed == runs["in autograd"].computed == runs["all scored"].computed
    assert runs["recipe"].real == runs["drawn"].real


def test_a_run_in_a_process_comes_back(benchmarks: dict[str, Any]) -> None:
    assert benchmarks["cpu"].in_a_process(sum, [1, 2]) == 3


def test_grouping_and_packing_leave_little_padding(benchmarks: dict[str, Any]) -> None:
    lengths = [50 + (n * 7919) % 700 for n in range(4000)]
    table = benchmarks["cpu"].padding(lengths, 8)
    few, many = ([float(row[column]) for row in table[1:]] for column in (1, 2))
    assert max(few[0], many[0]) < 0.7
    assert few[1] + 0.02 < few[2]
    assert min(few[2], many[1], many[2], few[5], many[5]) > 0.96


@pytest.mark.sweep
def test_parts_and_collation_have_figures(benchmarks: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    parts, collation = benchmarks["parts"], benchmarks["collation"]
    monkeypatch.setattr(parts.compare, "__kwdefaults__", {"repeats": 1})
    tower = parts.frozen_tower()
    held = [float(row[3]) for row in tower[1:]]
    assert held[1] < held[0]
    assert held[3] < held[2]
    assert [row[0] for row in parts.dora(width=64)[1:]][-1] == "DoRA, dropout 0.05"
    monkeypatch.setattr(collation, "ROWS", 8)
    assert set(collation.beside_image_work(repeats=1)) == {"image work alone", "TRL", "note", "recipe"}
    assert min(*collation.text_side("llava15", repeats=1), *collation.text_side("qwen3_5", repeats=1)) > 0
    assert len(collation.lengths(8)) == 8


def test_a_first_and_a_second_start_are_timed(
    benchmarks: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], own_cache: None
) -> None:
    first_step = benchmarks["first_step"]
    path = first_step.write_rows(tmp_path, 6)
    for _ in range(2):
        first_step.start(str(path), 0)
    seconds = [float(part) for part in re.findall(r"(\d+\.\d+) s", capsys.readouterr().out)]
    assert len(seconds) == 6


@pytest.mark.parametrize("name", ["LLaVA-1.5-7B", "Qwen2.5-VL-3B"])
def test_a_path_leaves_nothing_on_the_model_for_the_next(name: str, benchmarks: dict[str, Any], tmp_path: Path) -> None:
    gpu, seen = benchmarks["gpu"], []
    benchmarks["mix"].rows(4).save_to_disk(tmp_path / "rows")
    model, processor = gpu.build(name, "LoRA", True)
    tower = model.get_submodule("base_model.model.model." + ("vision_tower" if "LLaVA" in name else "visual"))
    tower.register_forward_hook(lambda module, _, out: seen.append(out.last_hidden_state.requires_grad))
    for path in ("TRL", "recipe, padded", "TRL", "recipe, packed"):
        seen.clear()
        gpu.train(path, model, processor, tmp_path / "rows", str(tmp_path / "out"))
        assert set(seen) == {path == "TRL"}


@pytest.mark.slow
@pytest.mark.sweep
def test_the_gpu_program_runs_tiny_without_one(
    benchmarks: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One path that works, one that fails, and the figures of a model and method, here instead of in a process."""
    gpu, every = benchmarks["gpu"], benchmarks["gpu"].checks
    plain, asked = gpu.lines_of, []

    def few(*given: Any) -> dict[str, list[str]]:
        commands = every(*given)
        assert len(commands) > 8
        fails = [sys.executable, "-c", "print('Step 1'); raise ValueError('no such kernel')"]
        return {"LoRA in 16 bit": commands["LoRA in 16 bit"], "a path that fails": fails}

    def lines_of(command: list[str], *given: Any) -> Any:
        if "--one" not in command:
            return plain(command, *given)
        asked.append(command)
        if len(asked) > 1:
            raise TimeoutError("not ended in time")
        monkeypatch.setattr(sys, "argv", command[1:])
        gpu.main()
        return iter(capsys.readouterr().out.splitlines())

    monkeypatch.setattr(gpu, "checks", few)
    monkeypatch.setattr(gpu, "lines_of", lines_of)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--rows", "8", "--output", str(tmp_path)])
    gpu.main()
    printed = (tmp_path / "gpu.md").read_text("utf-8")
    assert re.search(r"^\| LoRA in 16 bit \| works, \d+ s: loss \d", printed, re.M)
    assert "| a path that fails | FAILED: ValueError: no such kernel |" in printed
    assert "LLaVA-1.5-7B, QLoRA, attention sdpa; estimated peak " in printed
    for path in gpu.PATHS:
        assert re.search(rf"^\| {path} \| [\d,]+ \| \d+\.\d\d \|", printed, re.M)
    assert printed.count("not ended in time") == len(gpu.MODELS) * len(gpu.METHODS) - 1
    assert len((tmp_path / "gpu.jsonl").read_text("utf-8").splitlines()) == 2 + 2 + 2 * len(gpu.PATHS)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no GPU is visible" in capsys.readouterr().err


def test_what_runs_longer_than_the_time_left_is_ended(benchmarks: dict[str, Any]) -> None:
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    lines = benchmarks["gpu"].lines_of(command, time.monotonic() + 5)
    began = time.monotonic()
    assert next(lines) == "begun\n"
    with pytest.raises(TimeoutError):
        next(lines)
    assert time.monotonic() - began < 20


def test_what_a_tool_trains_is_told_by_its_labels(benchmarks: dict[str, Any]) -> None:
    """Our collator's labels, and the same with everything learned, and with a line break before each prompt."""
    _, processor = benchmarks["mix"].llava("LM-heavy")
    rows = benchmarks["bench"].stored(12, True)
    encoded = ChatCollator(processor).encode(list(benchmarks["mix"].rows(12, short=True)))[0]
    ours = [{"ids": row.tokens["input_ids"].tolist(), "labels": row.labels.tolist()} for row in encoded]
    found = benchmarks["labels"].facts(ours, rows, processor)
    for fact in ("answers learned with their stop token", "rows in which nothing else is learned"):
        assert found[fact] == found["prompts equal to inference"] == "all"
    assert found["learns user's words"] == "none"
    assert found["image tokens among learned ones"].startswith("0 of ")
    assert (found["rows"], found["BOS a row"], found["stop tokens an answer"]) == ("12 of 12", "1", "1.00")
    broken = [{"ids": [5, *row["ids"]], "labels": [5, *row["ids"]]} for row in ours]
    found = benchmarks["labels"].facts(broken, rows, processor)
    assert found["learns user's words"] == "all"
    assert found["rows in which nothing else is learned"] == found["prompts equal to inference"] == "none"
    assert not found["image tokens among learned ones"].startswith("0 of ")


def test_peers_get_the_same_rows_and_one_with_a_fault(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    bench = benchmarks["bench"]
    for fault in bench.FAULTS:
        rows = bench.spoiled(fault, bench.stored(40, True))
        data = bench.write_rows(rows, tmp_path / fault.replace(" ", "_"))
        lines = (data / "rows.jsonl").read_text("utf-8").splitlines()
        stock = load_dataset(str(data / "trl"), cache_dir=str(tmp_path / "cache"))["train"]
        assert len(lines) == len(stock) == 40
        try:
            faulty = check_rows(
                load_conversations(data / "rows.jsonl", eval_fraction=0),
                ChatCollator(benchmarks["mix"].llava("LM-heavy")[1], max_length=512),
                num_proc=0,
            )
        except ValueError as error:
            assert f"row {bench.PLACE}" in str(error)  # noqa: PT017
        else:
            pytest.fail(f"{fault}: {faulty}")


def test_a_run_beside_others_is_described(benchmarks: dict[str, Any]) -> None:
    outcome = benchmarks["bench"].outcome
    seen = [{"ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    assert outcome({"code": 1, "steps": 0, "names": True}, []) == "stops before the first step, names the row"
    assert outcome({"code": 1, "steps": 2, "names": False}, seen) == "stops after 2 steps"
    assert outcome({"code": 0, "steps": 5, "names": False}, []) == "trains without the row, silent"
    assert outcome({"code": 0, "steps": 5, "names": False}, seen) == "trains on it, 2 of 3 tokens learned, silent"


def test_a_tool_is_compared_with_ours_of_the_same_round(benchmarks: dict[str, Any]) -> None:
    cells = benchmarks["bench"].cells
    same = {"epoch": 5.0, "real": 80, "computed": 100, "peak": 700}
    ours = [{**same, "epoch_cpu": cpu} for cpu in (2.0, 3.0, 4.0)]
    theirs = [{**same, "epoch_cpu": cpu} for cpu in (4.0, 3.0, 2.0)]
    found = {("vlm_sft", "default"): ours, ("trl", "best"): theirs}
    assert cells(ours, found) == ["5.0", "3.0", "1.00", "20.0%", "700"]
    assert cells(theirs, found) == ["5.0", "3.0", "1.00 (0.50-2.00)", "20.0%", "700"]
    assert cells([*theirs, {"steps": 0}], found) == ["failed"] * 5


def test_tools_start_in_turns_and_two_of_them_again_with_their_caches(benchmarks: dict[str, Any]) -> None:
    calls: list[tuple[Any, ...]] = []

    class Bench:
        def run(self, tool: str, setting: str, *where: Path, **options: Any) -> Any:
            assert where[:2] == (Path("model"), Path("rows"))
            assert options == {"checkpointing": True, "first_step_only": True}
            calls.append((tool, setting, *where[2:]))
            at = {"first_step_begins": float(len(calls)), "first_step_ends": len(calls) + 0.5}
            return {"home": f"home{len(calls)}"} | (at if tool != "ms_swift" else {})

    table = benchmarks["bench"].starts(Bench(), {"twin": Path("model")}, Path("rows"), 2, True)
    once = [("vlm_sft", "default"), ("vlm_sft", "default"), ("vlm_sft", "streaming"), ("trl", "best"), ("trl", "best")]
    once += [("llama_factory", "best"), ("ms_swift", "best")]
    assert [call[:2] for call in calls] == once * 2
    assert [call[2:] for call in calls[:5]] == [(), (Path("home1"),), (), (), (Path("home4"),)]
    assert table[1:4] == [
        ["twin", "vlm_sft", "default", "4.5 (1.0-8.0)", "5.0 (1.5-8.5)", "5.5 (2.0-9.0)", "6.0 (2.5-9.5)"],
        ["twin", "vlm_sft", "streaming", "6.5 (3.0-10.0)", "7.0 (3.5-10.5)", "", ""],
        ["twin", "TRL", "best", "7.5 (4.0-11.0)", "8.0 (4.5-11.5)", "8.5 (5.0-12.0)", "9.0 (5.5-12.5)"],
    ]
    assert [row[3:] for row in table[4:]] == [["9.5 (6.0-13.0)", "10.0 (6.5-13.5)", "", ""], ["failed"] * 2 + [""] * 2]
    few = benchmarks["bench"].starts(Bench(), {"twin": Path("model")}, Path("rows"), 1, True, ["trl"])
    assert [row[:3] for row in few[1:]] == [["twin", "TRL", "best"]]


@pytest.mark.sweep
def test_a_tool_is_watched_while_it_trains(benchmarks: dict[str, Any], tmp_path: Path) -> None:
    """Ours, by its recipe, in a process of its own as in the benchmark."""
    bench, tools = benchmarks["bench"], benchmarks["tools"]
    model = bench.save_twin("LM-heavy LLaVA", tmp_path)
    data = bench.write_rows(bench.stored(16, True), tmp_path / "rows")
    job = tools.Job("vlm_sft", "default", model, data, tmp_path / "output")
    done = job.run(tools.python_of("vlm_sft", tmp_path), tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "output.json").read_text("utf-8"))
    assert (report["steps"], report["trains"], len(report["rows"])) == (2, ["language"], 16)
    assert 0 < report["epoch_cpu"] < report["total_cpu"]
    assert report["real"] == sum(len(row["ids"]) for row in report["rows"]) < report["computed"]
    assert report["peak"] > 300
    again = dataclasses.replace(job, output=tmp_path / "again", first_step_only=True)
    done = again.run(tools.python_of("vlm_sft", tmp_path), tmp_path)
    assert "16 of them known from before" in done.stdout + done.stderr
    report = json.loads((tmp_path / "again.json").read_text("utf-8"))
    assert (report["steps"], len(report["rows"])) == (1, 8)
    assert 0 < report["first_step_begins"] < report["first_step_ends"] <= report["total"]
    streamed = dataclasses.replace(again, setting="streaming", output=tmp_path / "streamed")
    done = streamed.run(tools.python_of("vlm_sft", tmp_path), tmp_path)
    assert "not checked before, each is when it comes" in done.stdout + done.stderr
    assert json.loads((tmp_path / "streamed.json").read_text("utf-8"))["first_step_begins"] > 0


def test_growth_is_told_by_its_exponent(benchmarks: dict[str, Any]) -> None:
    growth = benchmarks["growth"]
    assert growth.exponent([1, 2, 4, 8], [5, 4, 16, 64]) == pytest.approx(2)
    assert growth.exponent([1, 2], [3, 6]) == pytest.approx(1)
    assert growth.collated(words=500)["tokens"] > growth.collated(words=50)["tokens"] > 64


def test_the_switches_of_the_readme_exist() -> None:
    text = (FOLDER / "README.md").read_text("utf-8")
    fields = {field.name for kind in (RecipeDefaults, DataArguments) for field in dataclasses.fields(kind)}
    fields |= {"no_use_dora", "lora_dropout"}
    flags = set(re.findall(r"`--(\w+)", text))
    assert len(flags) > 6
    assert flags <= fields
    for program in re.findall(r"python benchmarks/([\w/]+\.py)", text):
        assert (FOLDER / program).is_file()
