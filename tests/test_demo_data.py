"""Data as other projects ship and document it trains on a twin by the README's own command, as it is."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipe_data import noise
from recipe_runs import run

pytestmark = pytest.mark.usefixtures("own_cache")
SHORT = (
    *("--max_steps", "1", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"),
    *("--warmup_steps", "0", "--eval_steps", "1", "--save_steps", "1", "--dataloader_num_workers", "0"),
    *("--disable_tqdm", "True", "--num_eval_rows", "2", "--no_load_in_4bit"),
)


def data_url(folder: Path, name: str) -> str:
    return f"data:image/png;base64,{base64.b64encode((folder / name).read_bytes()).decode()}"


def mllm_demo(folder: Path, n: int) -> Any:
    """LLaMA-Factory's data/mllm_demo.json, listed in its dataset_info.json."""
    talk = [
        ("user", "<image>Who are they?"),
        ("assistant", f"{n} players."),
        ("user", "What for?"),
        ("assistant", "A cup."),
    ]
    return {"messages": [{"content": text, "role": role} for role, text in talk], "images": [f"images/{n}.png"]}


def single_images(folder: Path, n: int) -> Any:
    """Qwen3-VL's qwen-vl-finetune/demo/single_images.json: the image after the question."""
    talk = [("human", f"Is the value {n} in 2015?\n<image>"), ("gpt", "Yes")]
    return {"image": f"images/{n}.png", "conversations": [{"from": role, "value": text} for role, text in talk]}


def llava(folder: Path, n: int) -> Any:
    """LLaVA's llava_v1_5_mix665k.json, 2U1's too: with and without images in one file."""
    row = single_images(folder, n)
    if n % 2:
        return {
            "id": str(n),
            "conversations": [{**t, "value": t["value"].replace("<image>", "")} for t in row["conversations"]],
        }
    return {"id": f"00000{n}", **row}


def swift(folder: Path, n: int) -> Any:
    """ms-swift's documented rows, both kinds in one file."""
    if n % 2:
        return {"query": f"<image>{n}?", "response": "Yes", "history": [["Hi", "Hello"]], "images": [f"images/{n}.png"]}
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"<image>{n}?"}]
    return {"messages": [*talk, {"role": "assistant", "content": "Yes", "loss": True}], "images": [f"images/{n}.png"]}


def openai(folder: Path, n: int) -> Any:
    """OpenAI's vision fine-tuning: data URLs."""
    parts = [
        {"type": "text", "text": f"{n}?"},
        {"type": "image_url", "image_url": {"url": data_url(folder, f"images/{n}.png")}},
    ]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes", "weight": 1}]}


def axolotl(folder: Path, n: int) -> Any:
    """Axolotl's multimodal docs: paths and base64 in parts."""
    image = {"path": f"images/{n}.png"} if n % 2 else {"base64": data_url(folder, f"images/{n}.png").split(",")[1]}
    parts = [{"type": "image", **image}, {"type": "text", "text": f"{n}?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}
    return {"messages": [{"role": "user", "content": parts}, answer]}


def xtuner(folder: Path, n: int) -> Any:
    parts = [
        {"type": "image_url", "image_url": {"url": f"images/{n}.png", "image_wh": [40, 32]}},
        {"type": "text", "text": f"{n}?"},
    ]
    return {"id": n, "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes"}]}


def trl(folder: Path, n: int) -> Any:
    turns = [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes"}]
    return {"prompt": turns[:1], "completion": turns[1:], "images": [f"images/{n}.png"]}


def cauldron(folder: Path, n: int) -> Any:
    turns = [{"user": f"{n}?", "assistant": "Yes", "source": "x"}, {"user": "Sure?", "assistant": "Yes", "source": "x"}]
    return {"images": [f"images/{n}.png"], "texts": turns}


def alpaca(folder: Path, n: int) -> Any:
    return {"instruction": f"{n}?", "input": "", "output": "Yes", "images": [f"images/{n}.png"]}


DEMOS = (mllm_demo, single_images, llava, swift, openai, axolotl, xtuner, trl, cauldron, alpaca)


def written(folder: Path, *demos: Callable[[Path, int], Any], suffix: str = "json") -> Path:
    (folder / "images").mkdir(parents=True)
    for n, image in enumerate(noise(12)):
        image.save(folder / "images" / f"{n}.png")
    rows = [demo(folder, n) for demo in demos for n in range(12)]
    text = json.dumps(rows, indent=1) if suffix == "json" else "\n".join(map(json.dumps, rows))
    (folder / f"demo.{suffix}").write_text(text, encoding="utf-8")
    return folder / f"demo.{suffix}"


def trains(path: Path, model: Path, output: Path, *flags: str, recipe: str = "llava15_sft") -> Any:
    where = ["--model_name_or_path", model, "--dataset_name", path, "--output_dir", output]
    finished = run(recipe, [*where, *SHORT, *flags])
    assert finished.steps == 1
    return finished


def test_rows_of_every_project_train_from_one_file(tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    finished = trains(written(tmp_path / "data", *DEMOS, suffix="jsonl"), tiny_dir("llava15"), tmp_path / "out")
    assert len(finished.trainer.train_dataset) == 12 * len(DEMOS) - 2
    record = json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))["held_out"]
    assert sorted(record["rows"]) == finished.trainer.eval_dataset.with_format(None)["row"][:]


def test_a_recipe_of_another_dataset_trains_on_them_too(tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """ChartQA's `to_conversation` asks for other columns; the folder's dataset_info.json names the file."""
    path = written(tmp_path / "data", mllm_demo)
    (path.parent / "dataset_info.json").write_text(
        json.dumps(
            {
                "mllm_demo": {
                    "file_name": "demo.json",
                    "formatting": "sharegpt",
                    "columns": {"messages": "messages", "images": "images"},
                    "tags": {
                        "role_tag": "role",
                        "content_tag": "content",
                        "user_tag": "user",
                        "assistant_tag": "assistant",
                    },
                }
            }
        )
    )
    trains(path.parent / "mllm_demo", tiny_dir("qwen2_5_vl"), tmp_path / "out", recipe="qwen2_5_vl_sft")


def test_captions_train_with_a_constant_question_and_nothing_held_out(tiny_dir: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "data", lambda folder, n: {"image": f"images/{n}.png", "text": f"Noise {n}."})
    flags = ["--prompt", "Describe the image.", "--system_prompt", "Be brief.", "--num_eval_rows", "0"]
    finished = trains(path, tiny_dir("qwen2_5_vl"), tmp_path / "out", *flags, recipe="qwen2_5_vl_sft")
    assert finished.trainer.eval_dataset is None
    assert len(finished.trainer.train_dataset) == 12
    said = "no row is held out (--num_eval_rows 0), so nothing is evaluated"
    assert said in json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))["proof"]["changed"]


@pytest.mark.sweep
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("demo", DEMOS, ids=lambda demo: demo.__name__)
def test_each_trains_by_itself(demo: Any, suffix: str, tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    trains(written(tmp_path / "data", demo, suffix=suffix), tiny_dir("llava15"), tmp_path / "out")
