"""Models, adapters, checkpoints and rows by somebody who means harm: none of their code runs, nothing outside is read,
and what cannot be meant is refused in a sentence. Templates: chat/test_collators.py; images: chat/test_images.py;
pages: evaluation/test_samples.py."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from proven import TRAINS, pieces
from recipe_data import noise

import vlm_sft
from vlm_sft.models.loading import load_model, load_processor
from vlm_sft.models.manifest import read_manifest, write_manifest

CODE = "from pathlib import Path\nPath({!r}).touch()\nclass Evil: pass\n"


@pytest.fixture
def payload(tmp_path: Path) -> Any:
    """Bytes that write a file when they are unpickled, and the source of a module that does. It is never written."""

    class Payload:
        pickled: bytes
        code = CODE.format(str(tmp_path / "executed"))

        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    Payload.pickled = pickle.dumps(Payload())
    yield Payload
    assert not (tmp_path / "executed").exists()


def test_the_payload_would_work(payload: Any, tmp_path: Path) -> None:
    for runs in (lambda: exec(payload.code), lambda: pickle.loads(payload.pickled)):
        runs()
        (tmp_path / "executed").unlink()


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# -- models and processors


@pytest.fixture
def twin(tiny_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir("llava15"), tmp_path / "twin"))


AUTO = dict.fromkeys(("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor"), "evil.Evil")
AUTO["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]  # type: ignore[assignment]


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize("hidden", [True, False])
def test_code_beside_a_model_is_not_run(file: str, hidden: bool, twin: Path, payload: Any) -> None:
    """Where transformers knows the class, its own is taken; else it is refused."""
    (twin / "evil.py").write_text(payload.code)
    edit(twin / file, auto_map=AUTO)
    if not hidden:
        edit(twin / file, model_type="evil", processor_class="Evil", tokenizer_class="Evil")
    refused = not hidden and file != "tokenizer_config.json"
    with pytest.raises(ValueError, match="contains custom code") if refused else contextlib.nullcontext():
        load_processor(twin)
        load_model(twin)


def test_only_weights_are_read_as_weights(twin: Path, payload: Any) -> None:
    (twin / "model.safetensors").write_bytes(payload.pickled)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(twin)
    (twin / "model.safetensors").rename(twin / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"No safetensors in .*can run code"):
        load_model(twin)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (
            '{"weight_map": {"a": "../../../../etc/passwd"}}',
            r"names '../../../../etc/passwd', which is no file beside it",
        ),
        ('{"weight_map": {"a": "model-9.safetensors"}}', r"names 'model-9.safetensors', which is no file beside it"),
        ('{"weight_map"', r"model\.safetensors\.index\.json is damaged"),
        ("[1]", r"model\.safetensors\.index\.json is damaged"),
        ('{"weight_map": [1]}', r"model\.safetensors\.index\.json is damaged"),
    ],
)
def test_an_index_names_only_files_beside_it(index: str, said: str, twin: Path) -> None:
    (twin / "model.safetensors").rename(twin / "model-1.safetensors")
    (twin / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=said):
        load_model(twin)


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000, '"text"', "\0"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "processor_config.json"])
def test_a_config_that_is_none_is_a_sentence(file: str, text: str, twin: Path) -> None:
    (twin / file).write_text(text)
    with pytest.raises(ValueError, match=r"No (model|processor for images) in .*twin"):
        (load_model if file == "config.json" else load_processor)(twin)


# -- adapters


@pytest.fixture(scope="module")
def adapted(tiny_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_model(tiny_dir("llava15"))
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(model, vlm_sft.lora_config(model, TRAINS)).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(adapted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapted, tmp_path / "adapter"))


@pytest.mark.parametrize(
    "values",
    [
        {"peft_type": "EVIL"},
        {"r": "eight"},
        {"r": -1},
        {"r": 10**15},
        {"lora_alpha": None},
        {"target_modules": 5},
        {"target_modules": "(("},
        {"target_modules": "(a+)+$"},
        {"rank_pattern": {"(": 4}},
        {"layers_to_transform": "x"},
        {"init_lora_weights": "evil"},
        {"megatron_core": "evil", "megatron_config": {"a": 1}},
        {"base_model_name_or_path": None},
        {"base_model_name_or_path": ["x"]},
        {"base_model_name_or_path": "https://nowhere.invalid/model"},
        {"base_model_name_or_path": "../../../../etc"},
    ],
    ids=str,
)
def test_an_adapter_config_that_cannot_be_meant_is_a_sentence(
    values: dict[str, Any], adapter: Path, payload: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "evil.py").write_text(payload.code)
    monkeypatch.syspath_prepend(tmp_path)
    edit(adapter / "adapter_config.json", **values)
    with pytest.raises(ValueError, match=re.escape(str(adapter))):
        load_model(adapter)


def test_an_adapter_names_no_library_to_import(
    adapter: Path, payload: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "evil.py").write_text(payload.code)
    monkeypatch.syspath_prepend(tmp_path)
    edit(adapter / "adapter_config.json", auto_mapping={"base_model_class": "Evil", "parent_library": "evil"})
    load_model(adapter)


@pytest.mark.parametrize("text", ["[1]", "[" * 100_000, "{", "null"])
@pytest.mark.parametrize("file", ["adapter_config.json", "training_base.json"])
def test_a_file_of_an_adapter_that_is_none_is_a_sentence(file: str, text: str, adapter: Path) -> None:
    (adapter / file).write_text(text)
    with pytest.raises(ValueError, match=rf"{file} (cannot be read|is damaged)"):
        load_model(adapter)


def test_a_pickled_adapter_is_not_read(adapter: Path, payload: Any) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(payload.pickled)
    with pytest.raises(ValueError, match=r"but no adapter_model\.safetensors"):
        load_model(adapter)


# -- checkpoints


def goes_on(base: Path, folder: Path, steps: int) -> str | None:
    settings = {"save_steps": 2, "save_strategy": "steps", "eval_strategy": "no", "load_best_model_at_end": False}
    run = pieces(base, folder, answers=False, max_steps=steps, **settings)
    run.prove(None, require_answers=False)
    run.trainer.train(resume_from_checkpoint=(newest := vlm_sft.latest_checkpoint(run.trainer)))
    return newest


@pytest.fixture(scope="module")
def ended(tiny_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    goes_on(tiny_dir("llava15"), folder, 2)
    return folder


READ = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
ADDED = ("scaler.pt", "optimizer.bin", "pytorch_model.bin", "model.safetensors", "adapter_model.bin")


@pytest.mark.parametrize(
    ("name", "forged"), [*((name, False) for name in READ + ADDED), *((name, True) for name in READ)]
)
def test_a_pickle_in_a_checkpoint_is_not_run(
    name: str, forged: bool, ended: Path, tiny_dir: Callable[[str], Path], tmp_path: Path, payload: Any
) -> None:
    """Passed over by its name; with a manifest made for it, torch reads weights alone, and raises. (`scaler.pt` is read
    in float16 alone.)"""
    run = Path(shutil.copytree(ended, tmp_path / "run"))
    checkpoint = run / "output" / "checkpoint-2"
    (checkpoint / name).write_bytes(payload.pickled)
    if not forged:
        assert goes_on(tiny_dir("llava15"), run, 4) is None
        return
    content = read_manifest(checkpoint)
    del content["files"]
    write_manifest(checkpoint, content)
    if name == "training_args.bin":  # which nobody reads
        assert goes_on(tiny_dir("llava15"), run, 4).endswith("checkpoint-2")
        return
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        goes_on(tiny_dir("llava15"), run, 4)


# -- rows


def test_names_of_files_reach_nothing_outside_the_data(tmp_path: Path) -> None:
    data, outside = tmp_path / "data", tmp_path / "secret.png"
    data.mkdir()
    for file in (outside, data / "own.png"):
        noise(1)[0].save(file)
    os.symlink(outside, data / "link.png")
    os.symlink(tmp_path, data / "folder")
    names = [
        *("../secret.png", str(outside), f"file://{outside}", "link.png", "folder/secret.png", "./x/../../secret.png"),
        *(
            "~/secret.png",
            "..\\secret.png",
            "\\\\host\\secret.png",
            "a\0b.png",
            "x" * 5000 + ".png",
            "",
            "/dev/zero",
            ".",
        ),
        *("https://nowhere.invalid/a.png", "ftp://nowhere.invalid/a.png", "data:text/html;base64,PGI+", "data:,"),
        *("hf://datasets/nobody/none/a.png", "s3://bucket/a.png", "zip://a.png::https://nowhere.invalid/a.zip"),
    ]
    rows = [row(name) for name in ("own.png", *names)]
    (data / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = vlm_sft.load_conversations(data / "rows.jsonl", eval_fraction=0)["train"]
    assert read[0]["images"][0].size
    for number, name in enumerate(names, 1):
        with pytest.raises(ValueError, match=rf"row {number}\b"):
            print(name, read[number]["images"][0].size)


def row(image: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "So."}]
    return {"messages": messages, "images": [image]}


def test_a_script_beside_the_rows_is_not_run(tmp_path: Path, payload: Any) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("data.py", "rows.py", "__init__.py", "conftest.py"):
        (data / name).write_text(payload.code)
    noise(1)[0].save(data / "own.png")
    (data / "rows.jsonl").write_text("\n".join(json.dumps(row("own.png")) for _ in range(2)))
    assert len(vlm_sft.load_conversations(data, eval_fraction=0)["train"]) == 2
    with pytest.raises(ValueError, match=r"rows\.py"):
        vlm_sft.load_conversations(data / "rows.py")


def test_deep_and_huge_values_are_rows_like_others(tmp_path: Path) -> None:
    values = ["[" * 100_000, "[" * 900 + "]" * 900, "9" * 5000]
    lines = [*(f'{{"messages": {value}}}' for value in values), json.dumps(row("own.png"))]
    noise(1)[0].save(tmp_path / "own.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    read = vlm_sft.load_conversations(tmp_path / "rows.jsonl", eval_fraction=0)["train"]
    for number in range(3):
        with pytest.raises(ValueError, match=rf"^row {number}: "):
            read[number]


@pytest.mark.parametrize("name", ["../llava15_sft", "/etc/passwd", "llava15_sft/../../setup", "..", ""])
def test_copy_writes_recipes_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_sft.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vlm-sft", "copy", name])
    assert main() == 1
    assert not any(tmp_path.iterdir())


def test_a_deep_array_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"rows\.json: row 0 \(line 1\) cannot be read, nor what follows: maximum"):
        vlm_sft.load_conversations(tmp_path / "rows.json")
