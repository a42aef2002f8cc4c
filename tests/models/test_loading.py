"""Processor and model load right or say why not, and adapters find their base."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from runs import Collate, rows
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from vlm_sft import upstream
from vlm_sft.models import loading
from vlm_sft.models.adapters import check_trains, lora_config
from vlm_sft.models.fingerprints import TRAINING_BASE, base_settings, loaded_from, training_base
from vlm_sft.models.loading import AutoModelForVision2Seq, load_model, load_processor, read_config
from vlm_sft.models.manifest import write_manifest
from vlm_sft.models.quantization import check_quantized, nf4_config
from vlm_sft.tools import tiny

TRAINS: Any = {"language": "lora", "projector": "full"}


@pytest.fixture(scope="module")
def batch(tiny_processor: Callable[..., Any]) -> Callable[[str], dict[str, torch.Tensor]]:
    return lambda family: Collate(tiny_processor(family))(examples())


@pytest.fixture
def twin(tiny_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the LLaVA twin's folder, to break."""
    return Path(shutil.copytree(tiny_dir("llava15"), tmp_path / "twin"))


@pytest.fixture(scope="module")
def text_only(tiny_processor: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text_only")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(folder)
    tiny_processor("llava15").tokenizer.save_pretrained(folder)
    return folder


def test_the_old_name_is_the_class_that_serves_it() -> None:
    assert AutoModelForVision2Seq is AutoModelForImageTextToText


# -- processor


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_processor_is_the_familys_own(family: str, tiny_dir: Callable[[str], Path]) -> None:
    processor = load_processor(tiny_dir(family))
    assert type(processor) is type(tiny.build(family)[1])
    assert processor.tokenizer.pad_token is not None


@pytest.mark.parametrize(("unknown", "padding"), [("<unk>", "<unk>"), (None, "</s>")])
def test_a_tokenizer_without_pad_token_gets_its_unknown_or_end_token(
    unknown: str | None, padding: str, twin: Path
) -> None:
    file = twin / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.update(pad_token=None, unk_token=unknown)
    file.write_text(json.dumps(settings))
    assert load_processor(twin).tokenizer.pad_token == padding


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_larger_images_are_shrunk_to_so_many_pixels(
    family: str, tiny_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    def patches(processor: Any) -> int:
        return len(processor.image_processor(Image.new("RGB", (640, 480)), return_tensors="pt")["pixel_values"])

    whole, limited = load_processor(tiny_dir(family)), load_processor(tiny_dir(family), max_pixels=32 * 32)
    size = whole.image_processor.patch_size**2
    assert patches(limited) * size <= 32 * 32 < patches(whole) * size
    assert patches(load_processor(tiny_dir(family), max_pixels=10**9)) > patches(whole)
    limited.save_pretrained(tmp_path)
    assert patches(load_processor(tmp_path)) == patches(limited)


@pytest.mark.parametrize("family", ["llava15", "smolvlm", "llava_onevision", "gemma3", "internvl", "idefics3"])
def test_a_family_without_a_limit_of_pixels(family: str, tiny_dir: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"max_pixels=4096: a \w+ does not resize by the number of pixels"):
        load_processor(tiny_dir(family), max_pixels=4096)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "4096"])
def test_a_limit_that_is_not_a_number_of_pixels(limit: Any, tiny_dir: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"max_pixels=.*: a number of pixels, such as"):
        load_processor(tiny_dir("qwen2_5_vl"), max_pixels=limit)


@pytest.mark.parametrize("load", [load_processor, load_model])
@pytest.mark.parametrize("path", ["./no/such/folder", "/no/such", "no such", "a/b/c"])
def test_a_path_that_does_not_exist(path: str, load: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match=f"No folder '{path}'"):
        load(path)


@pytest.mark.parametrize("load", [load_processor, load_model])
def test_a_name_that_may_be_on_the_hub_but_cannot_be_reached(load: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match=r"'someone/some-model' \(.*revision main\): .*[^.]\. .*folder or Hub name"):
        load("someone/some-model")


@pytest.mark.parametrize("load", [load_processor, load_model])
def test_a_file_is_no_folder(load: Callable[[Path], Any], twin: Path) -> None:
    with pytest.raises(ValueError, match="No folder"):
        load(twin / "config.json")


def test_the_processor_of_a_text_only_model(text_only: Path) -> None:
    with pytest.raises(ValueError, match="text-only model"):
        load_processor(text_only)


@pytest.mark.slow
def test_without_torchvision_the_processor_says_what_to_install(tiny_dir: Callable[[str], Path]) -> None:
    hidden = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torchvision" else find_spec(name, package)
from vlm_sft.models.loading import load_processor
load_processor(sys.argv[1])
"""
    command = [sys.executable, "-c", hidden, str(tiny_dir("qwen2_5_vl"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: The processor of")
    assert "torchvision is not installed: pip install torchvision (torchvision in your torch's build" in done.stderr


def test_without_num2words_the_processor_says_what_to_install(
    tiny_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.smolvlm import processing_smolvlm

    folder = tiny_dir("smolvlm")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "num2words" else find_spec(name, *args)
    )
    with pytest.raises(ImportError, match="num2words is not installed: pip install num2words"):
        load_processor(folder)


# -- model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_loads_whole(family: str, tiny_dir: Callable[[str], Path]) -> None:
    model = load_model(tiny_dir(family))
    built = tiny.build(family)[0].state_dict()
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert built.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, built[name]) for name, weight in model.state_dict().items())


def test_settings_reach_the_model(tiny_dir: Callable[[str], Path]) -> None:
    model = load_model(tiny_dir("llava15"), dtype="bfloat16", attn_implementation="eager")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == model.config.text_config._attn_implementation == "eager"


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(
    ("device", "launch", "expected"),
    [
        ("cuda:3", {}, {"": torch.device("cuda:3")}),
        ("cpu", {}, {"": torch.device("cpu")}),
        ("cuda:3", {"ACCELERATE_USE_FSDP": "true"}, {"": torch.device("cpu")}),  # it is sharded from there
    ],
)
def test_a_model_goes_to_the_device_of_its_process(
    quantized: bool,
    device: str,
    launch: dict[str, str],
    expected: Any,
    tiny_dir: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}
    plain = AutoModelForImageTextToText.from_pretrained

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.update(options)
        return plain(name, output_loading_info=True)

    config = nf4_config(tiny.build("llava15")[0], compute_dtype=torch.float32) if quantized else None
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    monkeypatch.setattr(loading, "own_device", lambda: torch.device(device))
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    load_model(tiny_dir("llava15"), quantization_config=config, dtype="float32")
    assert asked["device_map"] == expected
    assert asked["use_safetensors"] is True
    assert asked["trust_remote_code"] is False
    monkeypatch.setattr(loading, "is_deepspeed_zero3_enabled", lambda: True)
    if quantized:
        with pytest.raises(ValueError, match=r"ZeRO-3, which shards no such weights: .*fsdp2_qlora.yaml"):
            load_model(tiny_dir("llava15"), quantization_config=config, dtype="float32")
    else:
        load_model(tiny_dir("llava15"), dtype="float32")
        assert asked["device_map"] is None


HUB2, HUB3 = "flash_attention_2", "kernels-community/flash-attn3"  # transformers fetches the first by itself


@pytest.mark.parametrize(
    ("family", "dtype", "capability", "installed", "chosen"),
    [
        ("llava15", "bfloat16", (8, 0), {"2"}, "flash_attention_2"),
        ("llava15", "bfloat16", (8, 0), {"kernels"}, HUB2),
        ("llava15", "bfloat16", (12, 0), {"kernels"}, HUB2),
        ("llava15", "bfloat16", (9, 0), {"2"}, "flash_attention_2"),
        ("llava15", "bfloat16", (9, 0), {"2", "3"}, "flash_attention_3"),
        ("llava15", "bfloat16", (9, 0), {"2", "kernels"}, HUB3),
        ("llava15", "bfloat16", (9, 0), {"2", "kernels, which do not load"}, "flash_attention_2"),
        ("llava15", "bfloat16", (9, 0), set(), None),
        ("llava15", "float32", (8, 0), {"2", "kernels"}, None),
        ("llava15", "float16", (7, 5), {"2", "kernels"}, None),
        ("gemma3", "bfloat16", (9, 0), {"2", "kernels"}, None),  # image tokens look both ways
    ],
)
def test_flash_attention_where_gpu_dtype_and_model_take_it(
    family: str,
    dtype: str,
    capability: tuple[int, int],
    installed: set[str],
    chosen: str | None,
    tiny_dir: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_to: list[str] = []

    def set_attention(self: Any, name: str) -> None:
        if name == HUB3 and "kernels" not in installed:
            raise ValueError("An error occurred while trying to load")
        set_to.append(name)

    monkeypatch.setattr(type(tiny.build(family)[0]), "set_attn_implementation", set_attention)
    monkeypatch.setattr(upstream, "is_flash_attn_2_available", lambda: "2" in installed)
    monkeypatch.setattr(upstream, "is_flash_attn_3_available", lambda: "3" in installed)
    monkeypatch.setattr(upstream, "is_kernels_available", lambda: any(name.startswith("kernels") for name in installed))
    load_model(tiny_dir(family), dtype=dtype)
    assert not set_to  # no GPU
    monkeypatch.setattr(upstream, "PartialState", lambda: SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    load_model(tiny_dir(family), dtype=dtype)
    assert set_to == ([chosen] if chosen else [])
    load_model(tiny_dir(family), dtype=dtype, attn_implementation="sdpa")
    assert len(set_to) == bool(chosen)


def test_flash_attention_would_hide_half_of_gemmas_image_tokens(tiny_dir: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"both directions.*use 'sdpa'"):
        load_model(tiny_dir("gemma3"), attn_implementation="flash_attention_2")


def test_the_revision_is_resolved_once_and_kept(
    tiny_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Resolved(str):
        resolved = "0123456789abcdef"

    asked = []

    def resolve(name: str, revision: str | None) -> Resolved:
        asked.append(revision)
        return Resolved(revision or "main")

    monkeypatch.setattr(loading, "resolve_revision", resolve)
    model = load_model(tiny_dir("llava15"), revision="v1")
    assert asked == ["v1"]
    assert base_settings(model)["revision"] == "0123456789abcdef"
    assert "0123456789abcdef" not in model.config.to_json_string()
    processor = load_processor(tiny_dir("llava15"), revision="v2")
    assert loaded_from(model) == (str(tiny_dir("llava15")), "0123456789abcdef")
    assert loaded_from(processor) == loaded_from(get_peft_model(model, lora_config(model)))
    processor.save_pretrained(tmp_path)
    assert not any("0123456789abcdef" in file.read_text() for file in tmp_path.glob("*.json"))
    assert loaded_from(load_processor(tiny_dir("llava15")))[0] == str(tiny_dir("llava15"))


def test_where_others_loaded_from(tiny_model: Callable[..., Any], tiny_processor: Callable[..., Any]) -> None:
    model, processor = tiny_model("llava15"), tiny_processor("llava15")
    assert loaded_from(model) == (model.config.name_or_path, None)
    assert loaded_from(processor) == (processor.tokenizer.name_or_path, None)


def test_the_processor_is_that_of_the_revision(
    tiny_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    plain = AutoProcessor.from_pretrained

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.update(options)
        return plain(name)

    monkeypatch.setattr(AutoProcessor, "from_pretrained", from_pretrained)
    load_processor(tiny_dir("llava15"), revision="v1")
    assert asked == {"revision": "v1", "trust_remote_code": False}


def test_a_text_only_model(text_only: Path) -> None:
    with pytest.raises(ValueError, match="is a 'llama' model, which takes no images; give a vision-language model"):
        load_model(text_only)


def test_a_model_whose_parts_cannot_be_told_is_refused_before_its_weights_are_read(
    twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tiny.build("llava15")[0]), "get_decoder", lambda self: None)
    (twin / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be told: it has no language model\..*register_parts\('llava', vis"):
        load_model(twin)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"model_type": "llava_from_tomorrow"},
            r"No model in .*llava_from_tomorrow.* Give the folder or Hub name of one",
        ),
        ({"auto_map": {"AutoConfig": "theirs.Config"}, "model_type": "theirs"}, r"No model in .*trust_remote_code"),
        ({"model_type": "llama"}, r"a 'llama' model, which takes no images"),
    ],
)
@pytest.mark.parametrize("start", [load_model, read_config])
def test_a_config_that_cannot_be_read_is_named(start: Any, changes: Any, complaint: str, twin: Path) -> None:
    config = json.loads((twin / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(config | changes))
    (twin / "theirs.py").write_text("raise SystemExit('their code ran')")
    with pytest.raises(ValueError, match=complaint):
        start(twin)


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    AutoConfig.for_model("t5gemma2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a 't5gemma2' model, an encoder-decoder: .*answers.*such as Qwen-VL"):
        load_model(tmp_path)


def test_only_safetensors(twin: Path) -> None:
    torch.save(load_file(twin / "model.safetensors"), twin / "pytorch_model.bin")
    (twin / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"No safetensors in .*save the model again"):
        load_model(twin)


def test_an_evaluation_leaves_4_bit_weights_as_they_were_loaded(
    tiny_dir: Callable[[str], Path], batch: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # On this kind of CPU bitsandbytes packs them for a kernel without a backward pass.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    folder = tiny_dir("llava15")
    model = load_model(folder, load_in_4bit=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.eval()(**batch("llava15"))
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    embeddings = model.get_input_embeddings()
    embeddings.weight.requires_grad_(True)
    model(**batch("llava15")).loss.backward()
    assert embeddings.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_weights_that_do_not_fit(fault: str, twin: Path) -> None:
    file = twin / "model.safetensors"
    weights = load_file(file)
    if fault == "missing":
        del weights["language_model.model.layers.1.mlp.up_proj.weight"]
    elif fault == "unexpected":
        weights["language_model.model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
    else:
        weights["language_model.model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"do not fit Llava.*: 1 {fault}_keys \(.*layers\.[17]\.mlp\.up_proj"):
        load_model(twin)


# -- adapters


@pytest.fixture(scope="module")
def adapted(tiny_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A DoRA adapter with a projector trained in full, on the LLaVA twin in NF4, as a run saves it; and its logits."""
    folder = tmp_path_factory.mktemp("adapter")
    model = load_model(tiny_dir("llava15"), load_in_4bit=True)
    wrapped = get_peft_model(model, lora_config(model, TRAINS, use_dora=True))
    torch.manual_seed(0)
    for weight in wrapped.parameters():
        if weight.requires_grad:
            weight.data += torch.randn_like(weight) * 0.1
    wrapped.save_pretrained(folder)
    (folder / TRAINING_BASE).write_text(json.dumps(training_base(wrapped)))
    return folder, wrapped.eval()(**Collate(load_processor(tiny_dir("llava15")))(examples())).logits


@pytest.fixture
def adapter(adapted: tuple[Path, torch.Tensor], tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapted[0], tmp_path / "adapter"))


def examples() -> list[Any]:
    return list(rows(2).remove_columns("row"))


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_an_adapter_finds_its_base_as_it_was_in_training(
    adapted: tuple[Path, torch.Tensor], batch: Callable[[str], Any]
) -> None:
    folder, logits = adapted
    model = load_model(folder)
    how = check_trains(load_model(folder, is_trainable=True), TRAINS).parts["language"].how
    assert how == "lora r 16, alpha 16 (scale 1), DoRA"
    assert len(check_quantized(model)[0]) == 14
    assert not any(weight.requires_grad for weight in model.parameters())
    assert torch.equal(model(**batch("llava15")).logits, logits)


def test_an_adapter_on_the_base_before_quantization(
    adapted: tuple[Path, torch.Tensor], batch: Callable[[str], Any]
) -> None:
    folder, logits = adapted
    model = load_model(folder, quantization_config=None)
    assert not hasattr(model.config, "quantization_config")
    assert not torch.equal(model(**batch("llava15")).logits, logits)


def test_an_adapter_loads_in_the_dtype_of_its_training(adapter: Path) -> None:
    (adapter / TRAINING_BASE).write_text(json.dumps({"dtype": "bfloat16", "weights": {}}))
    assert load_model(adapter).get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert load_model(adapter, dtype="float32").get_base_model().lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"peft_type": "MAGIC"}',
        '{"peft_type": "LORA", "r": "many", "task_type": 5}',
        '{"peft_type": null}',
    ],
)
def test_an_adapter_config_that_cannot_be_read_is_named(content: str, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"adapter(_config\.json)?"):
        load_model(adapter)


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_cut_weights_are_named(what: str, adapter: Path, twin: Path) -> None:
    folder, name = (twin, "model.safetensors") if what == "model" else (adapter, "adapter_model.safetensors")
    cut_in_half(folder / name)
    with pytest.raises(ValueError, match=rf"{folder}: {name} is damaged .* train or download it again"):
        load_model(folder)


def test_weights_that_differ_from_their_manifest_are_named(adapter: Path) -> None:
    write_manifest(adapter, {}, files="*.safetensors")
    load_model(adapter)
    file = adapter / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors has changed\. .* delete manifest\.json"):
        load_model(adapter)


def test_an_adapter_brings_its_generation_config(adapter: Path) -> None:
    GenerationConfig(max_new_tokens=7, eos_token_id=[2, 5]).save_pretrained(adapter)
    assert load_model(adapter).generation_config.eos_token_id == [2, 5]


def test_an_adapter_without_a_record_goes_on_the_base_that_peft_names(adapter: Path) -> None:
    (adapter / TRAINING_BASE).unlink()
    assert not hasattr(load_model(adapter).config, "quantization_config")


@pytest.mark.parametrize("named", ["/gone/base", "someone/gone", None])
def test_an_adapter_whose_base_is_gone(
    named: Any, adapter: Path, tiny_dir: Callable[[str], Path], batch: Callable[[str], Any]
) -> None:
    change_config(adapter, base_model_name_or_path=named)
    with pytest.raises(ValueError, match=rf"The adapter in '{adapter}' was trained on .*Pass base_model="):
        load_model(adapter)
    load_model(adapter, base_model=tiny_dir("llava15"))


@pytest.mark.parametrize(
    ("named", "recorded", "moved", "read"),
    [("v1", "0123ab", False, "v1"), (None, "0123ab", False, "0123ab"), ("v1", "0123ab", True, None)],
)
def test_an_adapter_reads_the_revision_that_it_was_trained_on(
    named: str | None,
    recorded: str,
    moved: bool,
    read: str | None,
    adapter: Path,
    tiny_dir: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    plain = AutoModelForImageTextToText.from_pretrained

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.append(options["revision"])
        return plain(name, **options)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    change_config(adapter, revision=named)
    base = json.loads((adapter / TRAINING_BASE).read_text())
    (adapter / TRAINING_BASE).write_text(json.dumps(base | {"revision": recorded}))
    load_model(adapter, base_model=tiny_dir("llava15") if moved else None)
    assert asked == [read]


def test_an_adapter_on_another_base_of_the_same_shapes(adapter: Path, tmp_path: Path) -> None:
    other = tiny.save("llava15", tmp_path / "other", seed=1)
    with pytest.raises(
        ValueError, match=r"is not the base that the adapter .* was trained on; \d+ of 80 weights differ"
    ):
        load_model(adapter, base_model=other)


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"quantization_config": None}])
def test_an_adapter_on_a_base_that_differs_in_a_quantized_weight(options: Any, adapter: Path, twin: Path) -> None:
    weights = load_file(twin / "model.safetensors")
    weights["language_model.model.layers.1.mlp.up_proj.weight"] *= -1
    save_file(weights, twin / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of 80 weights differ: language_model\.model\.layers\.1\.mlp\.up_proj"):
        load_model(adapter, base_model=twin, **options)


def test_an_adapter_on_a_base_of_other_shapes(adapter: Path, tmp_path: Path) -> None:
    (adapter / TRAINING_BASE).unlink()
    other = tiny.save("llava15", tmp_path / "other", hidden_size=128)
    with pytest.raises(ValueError, match=r"(?s)does not fit .*size mismatch"):
        load_model(adapter, base_model=other)


@pytest.mark.parametrize("fault", ["missing", "left over"])
def test_an_adapter_with_weights_missing_or_left_over(fault: str, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "lora_A" in name)
    if fault == "missing":
        del weights[name]
    else:
        weights[name.replace("layers.0", "layers.9")] = weights[name].clone()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"does not fit .*1 (weights )?(are )?{fault}"):
        load_model(adapter)


def test_an_adapter_that_is_not_saved_as_safetensors(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors"):
        load_model(adapter)
