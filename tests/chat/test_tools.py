"""Tools and their answers go to templates that know them, and are never trained; the calls are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from PIL import Image

from vlm_sft import ChatCollator, load_conversations
from vlm_sft.chat.audit import audit
from vlm_sft.data.check_rows import check_report

pytestmark = pytest.mark.usefixtures("own_cache")
PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
ROW = json.loads(PAGE.split("## Tools")[1].split("```json\n")[1].split("\n```")[0])
CALL = '<tool_call>\n{"name": "zoom", "arguments": {}}\n</tool_call><|im_end|>'


def load(folder: Path, *rows: Any, **options: Any) -> Dataset:
    Image.new("RGB", (32, 32), "red").save(folder / "a.jpg")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_conversations(folder / "rows.jsonl", eval_fraction=0, **options)["train"]


def sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    """As LLaMA-Factory writes it: JSON in texts."""
    asked, _, told, answered = row["messages"]
    talk = [("human", asked["content"]), ("function_call", json.dumps({"name": "zoom", "arguments": {}}))]
    talk += [("observation", told["content"]), ("gpt", answered["content"])]
    turns = [{"from": sender, "value": text} for sender, text in talk]
    return {"conversations": turns, "tools": json.dumps(row["tools"]), "images": row["images"]}


def openai(row: dict[str, Any]) -> dict[str, Any]:
    row = json.loads(json.dumps(row))
    row["messages"][1] |= {
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "zoom", "arguments": "{}"}}],
    }
    row["messages"][2]["tool_call_id"] = "1"
    return row


@pytest.mark.parametrize("form", [dict, sharegpt, openai])
def test_the_call_and_the_answer_train_and_nothing_else(
    form: Callable[..., Any], tmp_path: Path, tiny_processor: Callable[..., Any]
) -> None:
    collator = ChatCollator(tiny_processor("qwen3_vl"))
    rows = load(tmp_path, form(ROW))
    assert not check_report(rows, collator, num_proc=0).faults
    [row], _ = collator.encode([rows[0]])
    assert [row.text[turn.start : turn.end] for turn in row.trained] == [CALL, "Exit.<|im_end|>"]
    learned = collator.processor.decode(row.labels[row.labels != -100])
    assert learned == CALL + "Exit.<|im_end|>"
    assert "Enlarge a part." in row.text
    assert "<tool_response>\nEXIT\n</tool_response>" in row.text
    report = audit(collator, rows)
    assert report.answers == {"end with '<|im_end|>'": 2}
    assert report.prompts == {"equal those of inference": 2}


@pytest.mark.parametrize("family", ["llava15", "qwen2_5_vl", "gemma3"])
def test_a_template_that_knows_no_tools_is_refused(family: str, tmp_path: Path, tiny_processor: Any) -> None:
    collator = ChatCollator(tiny_processor(family))
    plain = [ROW["messages"][0], ROW["messages"][3]]
    told = [ROW["messages"][0], {"role": "assistant", "content": "Zoom."}, *ROW["messages"][2:]]
    called = [*ROW["messages"][:2], {"role": "user", "content": "EXIT"}, ROW["messages"][3]]
    rows = [{"messages": messages, "images": ["a.jpg"]} for messages in (plain, plain, told, called)]
    rows[1]["tools"] = ROW["tools"]
    rows[1]["messages"] = [{**plain[0], "content": "<image>Other?"}, plain[1]]
    faults = check_report(load(tmp_path, *rows), collator, num_proc=0).faults
    assert {fault.index for fault in faults} >= {1, 3}
    by_row = {fault.index: fault.detail for fault in faults}
    assert 0 not in by_row
    assert by_row[1].startswith("the chat template does not know tools, and would leave them out")
    assert "tool_calls" in by_row[3] or "the chat template" in by_row[3]
    if 2 in by_row:
        assert "the chat template" in by_row[2]
    else:  # it writes any role
        [row], _ = collator.encode([load(tmp_path, rows[2])[0]])
        assert "EXIT" in row.text
        assert "EXIT" not in collator.processor.decode(row.labels[row.labels != -100])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda row: row.update(tools="zoom"), "tools is 'zoom'; expected a list of JSON schemas"),
        (
            lambda row: row["messages"][1].update(tool_calls=["zoom"]),
            "a tool call is 'zoom'; expected a name and argum",
        ),
        (lambda row: row["messages"].insert(1, row["messages"][2]), r"messages\[1\] is from tool; expected assistant"),
        (lambda row: row["tools"][0]["function"].update(description="<|im_end|>"), "holds '<|im_end|>' as text"),
    ],
)
def test_tools_that_are_none(change: Callable[..., Any], told: str, tmp_path: Path, tiny_processor: Any) -> None:
    row = json.loads(json.dumps(ROW))
    change(row)
    report = check_report(load(tmp_path, {**ROW, "id": 1}, row), ChatCollator(tiny_processor("qwen3_vl")), num_proc=0)
    [fault] = report.faults
    assert fault.index == 1
    assert told.replace("\\", "") in fault.detail
