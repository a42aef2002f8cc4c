"""recipes/evaluate.py: the quickstart's numbers again, base beside tuned, and a sentence for what it cannot measure."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import digits
import pytest
from conversations import ask, picture
from datasets import Dataset, DatasetDict
from recipe_runs import recipe
from trl import TrlParser

import vlm_sft
from vlm_sft.data.rows import held_out_record
from vlm_sft.evaluation import metrics

evaluate = recipe("evaluate")


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    return digits.quickstart(tmp_path_factory)


def run(**settings: Any) -> dict[str, dict[str, float]]:
    return evaluate.main(evaluate.RecipeArguments(**settings))


def write(folder: Path, rows: list[dict[str, Any]], split: str = "test") -> Path:
    DatasetDict({split: Dataset.from_list(rows)}).save_to_disk(folder)
    return folder


def row(answer: str | None = "A cat.") -> dict[str, Any]:
    messages = [ask(None, "What is this?")]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"messages": messages, "images": [picture(40, 30)]}


def test_repeats_what_the_quickstart_printed(quickstart, tmp_path, capsys):
    scores = run(
        model_name_or_path=str(quickstart.folder),
        base_model=str(quickstart.base),
        base=True,
        dataset_name=str(quickstart.folder / "data"),
        metrics=["exact_match", "cer"],
        output_dir=str(tmp_path),
    )
    lines = map(json.loads, (quickstart.folder / "samples.jsonl").read_text("utf-8").splitlines())
    before = fmean(line["scores"]["exact_match"] for line in lines if line["step"] == 0)
    assert scores["tuned"]["exact_match"] == quickstart.printed["eval_exact_match"]
    assert scores["base"]["exact_match"] == before
    assert scores["tuned"]["exact_match"] > scores["base"]["exact_match"] + 0.5
    assert scores["tuned"]["cer"] < scores["base"]["cer"]

    lines = capsys.readouterr().out.splitlines()
    assert f"{quickstart.folder} on {quickstart.folder / 'data'}" in lines
    assert [line.split() for line in lines if line.startswith(("40 rows", "exact_match"))] == [
        ["40", "rows", "base", "tuned"],
        ["exact_match", f"{before:.4f}", f"{quickstart.printed['eval_exact_match']:.4f}"],
    ]
    found = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert (found["rows"], found["metrics"]) == (40, scores)
    page = (tmp_path / "samples.html").read_text("utf-8")
    assert page.count("<tr data-kinds=") == 40
    right = len(re.findall(r'<tr data-kinds="all right', page))
    assert right == round(scores["tuned"]["exact_match"] * 40)
    assert page.count("data:image/png") == 40


@pytest.fixture(scope="session")
def adapter(tiny_dir, tmp_path_factory) -> Path:
    return digits.adapter(tmp_path_factory.mktemp("adapter"), tiny_dir("llava15"))


def test_adapter_beside_the_same_model_without_it(adapter, tiny_dir, tmp_path):
    rows = [row(f"{n} cats.") for n in range(3)]
    data = write(tmp_path / "data", rows)
    scores = run(
        model_name_or_path=str(adapter),
        base=True,
        dataset_name=str(data),
        split="test",
        metrics=["cer"],
        max_new_tokens=6,
        output_dir=str(tmp_path / "out"),
    )
    processor = vlm_sft.load_processor(adapter)
    right = ["0 cats.", "1 cats.", "2 cats."]
    for name, model in {"tuned": vlm_sft.load_model(adapter), "base": vlm_sft.load_model(tiny_dir("llava15"))}.items():
        said = vlm_sft.generate(model, vlm_sft.ChatTemplate(processor), rows, max_new_tokens=6, progress=False)
        assert scores[name] == {"cer": metrics.cer(said, right)}
    assert scores["tuned"] != scores["base"]


def test_page_scores_an_error_rate_the_other_way_round():
    answers = {"tuned": ["cats", "cut!", "a dog and a cat"]}
    references = ["cats", "cat!", "cat"]
    shown = evaluate.samples([row()] * 3, references, answers, "cer")
    assert [sample.score for sample in shown] == [1.0, 0.75, 0.0]
    assert all(sample.before is None and sample.score_before is None for sample in shown)


def test_page_holds_rows_from_first_to_last(monkeypatch):
    monkeypatch.setattr(evaluate, "PAGE_ROWS", 4)
    answers = {"tuned": [str(n) for n in range(10)]}
    shown = evaluate.samples([row()] * 10, ["x"] * 10, answers, "exact_match")
    assert [sample.after for sample in shown] == ["0", "3", "6", "9"]


def test_rows_are_those_that_the_run_held_out(tiny_dir, tmp_path, monkeypatch):
    """Whatever the seed now is; a checkpoint finds the record of its run; other data is refused."""
    data = write(tmp_path / "data", [row(f"{n} cats.") for n in range(100)], split="train")
    held_out = vlm_sft.load_conversations(data, seed=7)["test"]
    assert len(held_out) == 20
    output = tmp_path / "run"
    model = shutil.copytree(tiny_dir("llava15"), output / "checkpoint-2")
    (output / "run.json").write_text(json.dumps({"held_out": held_out_record(held_out)}))
    seen = []

    def generate(model, template, rows, **options):
        seen.append([row["row"] for row in rows])
        return ["A cat."] * len(rows)

    monkeypatch.setattr(vlm_sft, "generate", generate)
    settings = {"dataset_name": str(data), "output_dir": str(tmp_path / "out")}
    run(model_name_or_path=str(model), **settings)
    run(model_name_or_path=str(tiny_dir("llava15")), run=str(output), **settings)
    assert seen == [list(held_out["row"])] * 2
    with pytest.raises(ValueError, match=r"has no run\.json that tells which were held out: name the folder"):
        run(model_name_or_path=str(tiny_dir("llava15")), **settings)
    other = write(tmp_path / "other", [row(f"{n} dogs.") for n in range(100)], split="train")
    with pytest.raises(
        ValueError, match=r"run.json tells of no such rows: .*--split train, those that were trained on"
    ):
        run(model_name_or_path=str(model), **settings | {"dataset_name": str(other)})
    run(model_name_or_path=str(model), **settings | {"dataset_name": str(other), "split": "train"})
    assert len(seen[-1]) == 100


def test_the_system_prompt_of_training_is_asked_with(tiny_dir, tmp_path, monkeypatch, capsys):
    """Whether or not it is given again; another one is refused; metrics.json tells it."""
    data = write(tmp_path / "data", [row()])
    output = tmp_path / "run"
    shutil.copytree(tiny_dir("llava15"), output)
    (output / "run.json").write_text(json.dumps({"settings": {"recipe": {"system_prompt": "/no_think"}}}))
    seen = []
    monkeypatch.setattr(vlm_sft, "generate", lambda model, template, rows, **_: seen.extend(rows) or ["A cat."])
    settings = {"dataset_name": str(data), "split": "test", "output_dir": str(tmp_path / "out")}
    run(model_name_or_path=str(output), **settings)
    assert "run.json: '/no_think'" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))
    assert found["settings"]["system_prompt"] == "/no_think"
    run(model_name_or_path=str(output), system_prompt="/no_think", **settings)
    run(model_name_or_path=str(tiny_dir("llava15")), run=str(output), **settings)
    run(model_name_or_path=str(tiny_dir("llava15")), system_prompt="Another.", **settings)  # no run knows another one
    run(model_name_or_path=str(tiny_dir("llava15")), **settings)
    first = [each["messages"][0] for each in seen]
    said = [m["content"][0]["text"] if m["role"] == "system" else None for m in first]
    assert said == ["/no_think", "/no_think", "/no_think", "Another.", None]
    told = r"--system_prompt 'Another\.': .*run\.json tells of a model that was trained with '/no_think', .* leave --"
    with pytest.raises(ValueError, match=told):
        run(model_name_or_path=str(output), system_prompt="Another.", **settings)
    (output / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json: Expecting"):
        run(model_name_or_path=str(output), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": True}, "is a full model, which does not know what it was before training; add --base_model"),
        ({"metrics": ["exact", "anls"]}, "no metric is called exact; there are exact_match, anls, cer"),
        ({"num_rows": 0}, "--num_rows 0: expected at least 1, or leave it out"),
        ({"num_rows": -2}, "--num_rows -2: expected at least 1"),
        ({"batch_size": 0}, "--batch_size 0: expected at least 1"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0: expected at least 1"),
        ({"split": "validation"}, "no split 'validation'; found test"),
        ({"model_name_or_path": "no/such/folder"}, "No folder 'no/such/folder'"),
    ],
)
def test_what_cannot_be_measured(settings, message, tiny_dir, tmp_path):
    data = write(tmp_path / "data", [row(), row()])
    default = {"model_name_or_path": str(tiny_dir("llava15")), "split": "test", "max_new_tokens": 2}
    with pytest.raises(ValueError, match=message):
        run(**default | {"dataset_name": str(data), "output_dir": str(tmp_path / "out")} | settings)


def test_rows_without_an_answer(tiny_dir, tmp_path):
    data = write(tmp_path / "data", [row(), row(None), row(None)])
    with pytest.raises(ValueError, match=r"2 rows \(1, 2\) do not end with an assistant message"):
        run(model_name_or_path=str(tiny_dir("llava15")), dataset_name=str(data), split="test")


def test_no_rows(tiny_dir, tmp_path):
    empty = Dataset.from_list([row()]).select([])
    DatasetDict({"test": empty}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="it holds no row"):
        run(model_name_or_path=str(tiny_dir("llava15")), dataset_name=str(tmp_path / "data"), split="test")


def test_adapter_whose_base_is_gone(adapter, tmp_path):
    moved = digits.without_base(adapter, tmp_path / "adapter")
    data = write(tmp_path / "data", [row()])
    with pytest.raises(ValueError, match=r"was trained on .*gone.*, which did not load .* Pass base_model="):
        run(model_name_or_path=str(moved), dataset_name=str(data), split="test")


def test_flags_of_the_command_line():
    (args,) = TrlParser((evaluate.RecipeArguments,)).parse_args_and_config(["--metrics", "cer", "anls", "--base"])
    assert (args.metrics, args.base) == (["cer", "anls"], True)
