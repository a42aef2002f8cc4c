"""A merged model is written only if it answers as adapter on base does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, GenerationConfig

from vlm_sft.models.fingerprints import TRAINING_BASE
from vlm_sft.tools import merging, tiny
from vlm_sft.tools.merging import _Answers, _compare, merge
from vlm_sft.training.checkpoints import SafeCheckpoints
from vlm_sft.upstream import keep_packing

# By full path, so that tower, projector and head stay in 16 bit.
KEPT = {
    "llava15": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    "gemma3": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    "qwen2_5_vl": ["model.visual", "lm_head"],
    "smolvlm": ["model.vision_model", "model.connector", "lm_head"],
}
PROJECTOR = {"llava15": "model.multi_modal_projector", "gemma3": "model.multi_modal_projector"}


def quantized(kind: str, family: str) -> BitsAndBytesConfig | None:
    kept = {"llm_int8_skip_modules": KEPT[family]}
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **kept)
    if kind == "nf4":
        four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **four, **kept)
    return None


def trained(base: Path, folder: Path, *, kind: str = "float32", family: str = "llava15", **lora: Any) -> Path:
    """An adapter after four steps, as a recipe leaves it."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype, quantization_config=quantized(kind, family))
    keep_packing(model)
    settings = {"r": 4, "target_modules": r".*(language|text)_model.*\.(q|v|up)_proj"}
    if family in PROJECTOR:
        settings["modules_to_save"] = [PROJECTOR[family]]
    trainer = runs.trainer(
        base,
        folder,
        callbacks=[SafeCheckpoints()],
        model=model,
        peft_config=LoraConfig(**settings | lora),
        learning_rate=1e-2,
        bf16=dtype == torch.bfloat16,
        save_strategy="no",
    )
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture(scope="module")
def llava(tiny_dir: Any) -> Path:
    return tiny_dir("llava15")


@pytest.fixture(scope="module")
def adapter(llava: Path, tmp_path_factory: Any) -> Path:
    return trained(llava, tmp_path_factory.mktemp("adapter") / "float32")


@pytest.fixture(scope="module")
def nf4_adapter(llava: Path, tmp_path_factory: Any) -> Path:
    return trained(llava, tmp_path_factory.mktemp("adapter") / "nf4", kind="nf4")


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    """An adapter to be damaged, in a folder of its own."""
    return Path(shutil.copytree(adapter, tmp_path / "in/adapter"))


def test_the_result_is_a_plain_model(adapter: Path, llava: Path, tmp_path: Path) -> None:
    merged = merge(adapter, tmp_path / "deep/out")
    assert merged.error < 1e-5 < 0.1 < merged.effect
    assert merged.same_tokens == (32, 32)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    files = {path.name for path in merged.folder.iterdir()}
    assert files > {"model.safetensors", "config.json", "generation_config.json", "chat_template.jinja", "README.md"}
    assert not any("adapter" in name or "training" in name for name in files)
    written, base = load_file(merged.folder / "model.safetensors"), load_file(llava / "model.safetensors")
    assert written.keys() == base.keys()
    moved = {name for name in base if not torch.equal(base[name], written[name])}
    assert {name.split(".")[0] for name in moved} == {"language_model", "multi_modal_projector"}
    assert all(name.split(".")[-2] in ("q_proj", "v_proj", "up_proj", "linear_1", "linear_2") for name in moved)
    card = (merged.folder / "README.md").read_text("utf-8")
    assert "pipeline_tag: image-text-to-text" in card
    assert "base_model:" not in card  # no folder of this machine
    processor = AutoProcessor.from_pretrained(merged.folder)
    assert processor.chat_template == AutoProcessor.from_pretrained(llava).chat_template


@pytest.mark.parametrize(
    ("kind", "use_dora"),
    [("nf4", False), ("nf4", True), ("bfloat16", False), ("bfloat16", True), ("int8", False)],
)
def test_every_base_merges(kind: str, use_dora: bool, llava: Path, tmp_path: Path) -> None:
    folder = trained(llava, tmp_path / "adapter", kind=kind, use_dora=use_dora)
    merged = merge(folder, tmp_path / "out")
    assert merged.dtype == "bfloat16"
    assert merged.error < 0.02 < 0.1 < merged.effect
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert {value.dtype for value in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "gemma3"])
def test_other_families_merge(family: str, tiny_dir: Any, tmp_path: Path) -> None:
    folder = trained(tiny_dir(family), tmp_path / "adapter", kind="nf4", family=family)
    merged = merge(folder, tmp_path / "out")
    assert merged.error < 0.02 < merged.effect
    names = load_file(tiny_dir(family) / "model.safetensors").keys()
    assert load_file(merged.folder / "model.safetensors").keys() == names


def test_as_trained_is_what_was_trained(nf4_adapter: Path, llava: Path, tmp_path: Path) -> None:
    """Merged into the dequantized base it answers as in training; merged into the published weights it does not."""
    base = AutoModelForImageTextToText.from_pretrained(
        llava, dtype=torch.bfloat16, quantization_config=quantized("nf4", "llava15")
    )
    keep_packing(base)
    reference = PeftModel.from_pretrained(base, nf4_adapter).eval()
    processor = AutoProcessor.from_pretrained(llava)
    expected = merging._answers(reference, processor).prompt
    off = {}
    for practice in ("as-trained", "original"):
        folder = merge(nf4_adapter, tmp_path / practice, base=practice).folder
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
        off[practice] = merging._distance(expected, merging._answers(model, processor).prompt)
    assert off["as-trained"] < 0.02
    assert off["original"] > 5 * off["as-trained"]


def test_another_dtype(nf4_adapter: Path, tmp_path: Path) -> None:
    merged = merge(nf4_adapter, tmp_path / "out", dtype=torch.float32)
    assert merged.dtype == "float32"
    assert {value.dtype for value in load_file(merged.folder / "model.safetensors").values()} == {torch.float32}


def test_the_base_may_have_moved(copied: Path, llava: Path, tmp_path: Path) -> None:
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/llava"}))
    with pytest.raises(ValueError, match=r"trained on '/gone/llava', which did not load .*Pass base_model="):
        merge(copied, tmp_path / "out")
    assert merge(copied, tmp_path / "out", base_model=llava).error < 1e-5


def test_the_generation_config_of_the_adapter_is_kept(copied: Path, tmp_path: Path) -> None:
    GenerationConfig(eos_token_id=[2, 5], max_new_tokens=7).save_pretrained(copied)
    merge(copied, tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 5]


def test_an_adapter_from_elsewhere(copied: Path, tmp_path: Path) -> None:
    (copied / TRAINING_BASE).unlink()
    with pytest.raises(ValueError, match=r"does not say how its base was loaded .* use base='original'"):
        merge(copied, tmp_path / "out")
    assert merge(copied, tmp_path / "out", base="original").error < 1e-5


# What is not written


def nothing_left(folder: Path) -> bool:
    return [path.name for path in folder.iterdir()] in ([], ["in"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, r"is not the base that the adapter .* was trained on; \d+ of 80 weights differ: \S+\.weight:"),
        ({"hidden_size": 128}, r"\d+ of 80 weights differ: .*recorded \S+ float32, now \S+ float32"),
    ],
)
def test_another_base_is_refused(options: dict[str, Any], said: str, adapter: Path, tmp_path: Path) -> None:
    other = tiny.save("llava15", tmp_path / "in", **options)
    with pytest.raises(ValueError, match=said):
        merge(adapter, tmp_path / "out", base_model=other)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("base", ["as-trained", "original"])
def test_another_base_is_refused_whatever_it_is_merged_into(
    base: Any, nf4_adapter: Path, llava: Path, tmp_path: Path
) -> None:
    """The weights of a 4-bit base are compared with those it was made of."""
    other = Path(shutil.copytree(llava, tmp_path / "in/other"))
    held = load_file(other / "model.safetensors")
    held = {name: value + 0.1 for name, value in held.items()}
    save_file(held, other / "model.safetensors", metadata={"format": "pt"})
    for dtype in (None, torch.float32):
        with pytest.raises(ValueError, match=r"is not the base .* 80 of 80 weights differ"):
            merge(nf4_adapter, tmp_path / "out", base=base, base_model=other, dtype=dtype)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("base", ["as-trained", "original"])
def test_an_adapter_without_effect_is_refused(base: Any, copied: Path, tmp_path: Path) -> None:
    file = copied / "adapter_model.safetensors"
    idle = {name: value * 0 if "lora_B" in name else value for name, value in load_file(file).items()}
    save_file({name: value for name, value in idle.items() if "lora" in name}, file)
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": None}))
    with pytest.raises(ValueError, match=r"adapter in .* has no effect: the base gives the same logits without it"):
        merge(copied, tmp_path / "out", base=base)
    assert nothing_left(tmp_path)


def test_another_base_is_refused_by_its_shapes_alone(copied: Path, tmp_path: Path) -> None:
    (copied / TRAINING_BASE).unlink()
    other = tiny.save("llava15", tmp_path / "in/other", hidden_size=128)
    with pytest.raises(ValueError, match=r"does not fit '.*other': .*\s+size mismatch for \S+: copying"):
        merge(copied, tmp_path / "out", base="original", base_model=other)
    assert nothing_left(tmp_path)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(("change", "said"), [("pop", "1 weights are missing"), ("add", "1 left over")])
def test_a_missing_or_unknown_key_is_refused(change: str, said: str, copied: Path, tmp_path: Path) -> None:
    file = copied / "adapter_model.safetensors"
    held = load_file(file)
    name = next(name for name in held if "lora_B" in name)
    if change == "pop":
        del held[name]
    else:
        held[name.replace("layers.0", "layers.7")] = held[name].clone()
    save_file(held, file)
    with pytest.raises(ValueError, match=said):
        merge(copied, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_what_stands_in_the_way_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json.*holds no adapter_model.*base='best'.*exists"):
        merge(tmp_path / "none", tmp_path / "out", base="best")  # type: ignore[arg-type]


def test_a_merge_that_does_nothing_is_noticed(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda model, **_: model.unload(), raising=False)
    with pytest.raises(ValueError, match=r"logits are off by \S+ \(relative\), more than 0.0001"):
        merge(adapter, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_a_key_that_is_lost_in_writing_is_noticed(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model = merging.load_model

    def lose(folder: Path, **options: Any) -> Any:
        if folder != adapter:
            held = load_file(folder / "model.safetensors")
            save_file(dict(list(held.items())[:-1]), folder / "model.safetensors", metadata={"format": "pt"})
        return load_model(folder, **options)

    monkeypatch.setattr(merging, "load_model", lose)
    with pytest.raises(ValueError, match=r"do not fit LlavaForConditionalGeneration: 1 missing_keys \(\S+\)"):
        merge(adapter, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_a_merge_appears_whole_or_not_at_all(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_power(*_: Any) -> None:
        raise OSError("power lost")

    monkeypatch.setattr(os, "rename", lose_power)
    with pytest.raises(OSError, match="power lost"):
        merge(adapter, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_an_update_that_rounding_erases_is_noticed(llava: Path, tmp_path: Path) -> None:
    folder = trained(llava, tmp_path / "in/adapter", kind="bfloat16", modules_to_save=None)
    file = folder / "adapter_model.safetensors"
    faint = {name: value * 2e-3 if "lora_B" in name else value for name, value in load_file(file).items()}
    save_file(faint, file)
    with pytest.raises(ValueError, match=r"rounding has erased it; merge with dtype=torch\.float32"):
        merge(folder, tmp_path / "out")
    assert nothing_left(tmp_path)
    merge(folder, tmp_path / "out", dtype=torch.float32)
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    base = load_file(llava / "model.safetensors")[name].bfloat16().float()
    assert (load_file(tmp_path / "out/model.safetensors")[name] != base).float().mean() > 0.9


def answers(tokens: list[int], logits: torch.Tensor) -> _Answers:
    return _Answers(prompt=[torch.ones(1, 4)], tokens=[torch.tensor(tokens)], steps=[logits])


def test_generation_may_part_at_a_near_tie_only() -> None:
    bare, steps = answers([], torch.ones(0, 4))._replace(prompt=[torch.zeros(1, 4)]), torch.eye(4)
    tie = steps.clone()
    tie[2] = torch.tensor([0.0, 0.0, 1.0, 1.001])
    _compare(answers([0, 1, 2, 3], tie), answers([0, 1, 3, 0], tie), bare, 1e-3)
    with pytest.raises(ValueError, match=r"generates \[0, 1, 3, 0\], adapter on base \[0, 1, 2, 3\]"):
        _compare(answers([0, 1, 2, 3], steps), answers([0, 1, 3, 0], steps[[0, 1, 3, 0]]), bare, 1e-3)
    with pytest.raises(ValueError, match=r"generates \[0, 1\], adapter on base \[0, 1, 2, 3\]"):
        _compare(answers([0, 1, 2, 3], steps), answers([0, 1], steps[:2]), bare, 1e-3)
