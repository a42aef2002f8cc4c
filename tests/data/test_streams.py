"""A stream is checked as its rows come, and trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, IterableDataset, List, Value
from PIL import Image
from trl import SFTConfig, SFTTrainer

from vlm_sft import ChatCollator, check_rows, load_conversations, lora_config
from vlm_sft.data.check_rows import rows_checked

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def collator(tiny_processor: Callable[..., Any]) -> ChatCollator:
    return ChatCollator(tiny_processor("llava15"))


def to_conversation(row: Any) -> dict[str, Any]:
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["q"]}]}
    return {"messages": [question, {"role": "assistant", "content": row["a"]}], "images": [row["image"]]}


def load(folder: Path, count: int, *bad: int) -> Any:
    """A stream of JSON lines whose images lie beside them; the bad ones have an image that is not there."""
    Image.new("RGB", (20, 20), "red").save(folder / "a.png")
    rows = [{"q": f"Q{n}", "a": f"A{n}", "image": "gone.png" if n in bad else "a.png"} for n in range(count)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_conversations(folder / "rows.jsonl", to_conversation=to_conversation, streaming=True, max_eval_rows=2)


def test_a_bad_row_raises_when_it_comes(tmp_path: Path, collator: ChatCollator) -> None:
    data = check_rows(load(tmp_path, 9, 5), collator)
    assert rows_checked(data["train"]).on_bad_rows == "error"
    assert data["test"]["length"][:] == [len(row) for row in collator.encode(list(data["test"]))[0]]
    rows = iter(data["train"])
    assert [next(rows)["row"] for _ in range(3)] == [2, 3, 4]
    with pytest.raises(ValueError, match=r"^row 5: images\[0\]: image 'gone.png' does not exist"):
        next(rows)


def test_bad_rows_are_left_out_and_counted(
    tmp_path: Path, collator: ChatCollator, capsys: pytest.CaptureFixture[str]
) -> None:
    data = check_rows(load(tmp_path, 9, 5), collator, on_bad_rows="drop")
    rows = list(data["train"])
    assert [row["row"] for row in rows] == [2, 3, 4, 6, 7, 8]
    assert rows[0].keys() == {"messages", "images", "row"}
    assert collator(rows)["input_ids"].shape[0] == 6
    assert "1 of 4 rows of the stream are left out; the last is row 5: images[0]: ima" in capsys.readouterr().err
    data = check_rows(load(tmp_path, 300, *range(10, 300, 3)), collator, on_bad_rows="drop")
    with pytest.raises(ValueError, match=r"more than --max_bad_fraction 0\.1 .*: 32 of 102 rows of the stream"):
        list(data["train"])


def test_ignored_rows_come_as_they_are(tmp_path: Path, collator: ChatCollator) -> None:
    stream = load(tmp_path, 9)
    data = check_rows(stream, collator, on_bad_rows="ignore")
    assert data["train"] is stream["train"]
    assert rows_checked(data["train"]).on_bad_rows == rows_checked(data["test"]).on_bad_rows == "ignore"


def test_a_stream_of_parquet_with_images_is_checked(tmp_path: Path, collator: ChatCollator) -> None:
    features = Features({"prompt": Value("string"), "response": Value("string"), "images": List(datasets.Image())})
    rows = [{"prompt": f"<image>{n}", "response": "x", "images": [Image.new("RGB", (9, 9))]} for n in range(6)]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    data = load_conversations(tmp_path / "a.parquet", streaming=True, max_eval_rows=2)
    checked = check_rows(data, collator)
    assert [row["row"] for row in checked["train"]] == [2, 3, 4, 5]
    assert [row["row"] for row in checked["test"]] == [0, 1]


@pytest.mark.parametrize("held_out", [0, 2])
def test_a_stream_that_does_not_know_its_columns_is_read(held_out: int, collator: ChatCollator) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        for n in range(6):
            yield {"prompt": f"<image>{n}", "response": "x", "images": [Image.new("RGB", (9, 9), (n, 0, 0))]}

    data = load_conversations(IterableDataset.from_generator(rows), streaming=True, max_eval_rows=held_out)
    assert data["train"].features is None
    checked = check_rows(data, collator)
    assert [row["row"] for row in checked["train"]] == [*range(held_out, 6)]
    assert [row["row"] for row in checked["test"]] == [*range(held_out)]
    assert [row["images"][0].getpixel((0, 0))[0] for row in checked["test"]] == [*range(held_out)]


def test_held_out_rows_of_such_a_stream_come_to_the_recipe_as_the_others(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    kinds: list[type] = []

    def rows() -> Iterator[dict[str, Any]]:
        for n in range(6):
            photo = (tmp_path / "a.png").read_bytes()
            yield {"q": f"{n}?", "photo": photo, "image": Image.new("RGBA", (9, 9)), "weight": np.float32(n)}

    def to_conversation(row: Any) -> dict[str, Any]:
        kinds.append(type(row["photo"]))
        assert isinstance(row["image"], Image.Image)
        images = [Image.open(BytesIO(row["photo"])), row["image"]]
        return {"prompt": f"<image><image>{row['q']}", "response": "x", "images": images}

    stream = IterableDataset.from_generator(rows)
    data = load_conversations(stream, streaming=True, max_eval_rows=2, to_conversation=to_conversation)
    assert [len(row["images"]) for row in [*data["train"], *data["test"]]] == [2] * 6
    assert {*kinds} == {bytes}


@pytest.mark.parametrize("on_bad_rows", ["error", "drop", "ignore"])
def test_a_stream_trains(on_bad_rows: str, tmp_path: Path, tiny_model: Any, tiny_processor: Any) -> None:
    model, processor = tiny_model("llava15"), tiny_processor("llava15")
    collator = ChatCollator(processor, max_length=200)
    data = check_rows(load(tmp_path, 20), collator, on_bad_rows=on_bad_rows)
    assert isinstance(data["train"], IterableDataset)
    args = SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=2,
        dataloader_num_workers=1,
        eval_strategy="steps",
        eval_steps=3,
        max_length=None,
        remove_unused_columns=False,
        activation_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=processor,
        data_collator=collator,
        peft_config=lora_config(model, r=2),
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.train_dataset is data["train"]
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
