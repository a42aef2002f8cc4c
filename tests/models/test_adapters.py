"""TRAINS is made so and proven on ten families: adapters and whole parts learn, come back from disk, and whatever
differs is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TEN
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from runs import Collate, rows
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig

from vlm_sft.common import on_meta
from vlm_sft.models.adapters import check_trains, lora_config
from vlm_sft.models.parts import PARTS, part_of, parts_of, root_of
from vlm_sft.models.quantization import nf4_config

FAMILIES = pytest.mark.parametrize("family", TEN)
LANGUAGE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LORA: Any = {"language": "lora"}
LORA_AND_PROJECTOR: Any = {"language": "lora", "projector": "full"}
nf4 = partial(nf4_config, compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def batch(tiny_processor: Callable[..., Any]) -> Callable[[str], dict[str, torch.Tensor]]:
    return lambda family: Collate(tiny_processor(family))(list(rows(1).remove_columns("row")))


def int8(model: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=nf4(model).llm_int8_skip_modules)


def linears(model: nn.Module, part: str) -> set[str]:
    parts = parts_of(model)
    return {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and part_of(n, parts) == part}


def held(model: nn.Module) -> set[str]:
    """The layers that hold adapters, by their paths in the base model."""
    return {n for n, m in root_of(model).named_modules() if isinstance(m, LoraLayer)}


def adapted(model: Any, trains: Any = LORA, **settings: Any) -> Any:
    """As SFTTrainer wraps it."""
    return get_peft_model(model, lora_config(model, trains, **settings))


def stir(model: nn.Module) -> None:
    """Non-zero adapters, so that they have an effect and gradients pass through both of their matrices."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.1 + ("magnitude" in name)


# -- adapters


@FAMILIES
def test_by_default_every_linear_layer_of_the_language_model_and_nothing_else(
    family: str, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(family)
    asked = linears(model, "language")
    wrapped = get_peft_model(model, lora_config(model))
    report = check_trains(wrapped, LORA)
    assert held(wrapped) == asked
    assert {name.rsplit(".", 1)[-1] for name in asked} == LANGUAGE
    trainable = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * len(asked)
    assert all(".lora_" in name for name in trainable)
    language = report.parts["language"]
    assert (language.how, language.adapted_layers, language.share) == (
        "lora r 16, alpha 16 (scale 1)",
        len(asked),
        1.0,
    )
    assert all(report.parts[part].how == "frozen" for part in ("vision", "projector", "head"))


@FAMILIES
def test_tower_and_projector_adapters_all_receive_a_gradient(
    family: str, tiny_model: Callable[..., Any], batch: Callable[[str], Any]
) -> None:
    projector = "full" if family == "gemma3" else "lora"  # Gemma3's projector is one bare matrix
    trains = {"language": "lora", "vision": "lora", "projector": projector}
    model = tiny_model(family)
    tower = linears(model, "vision")
    wrapped = adapted(model, trains, r=4)
    report = check_trains(wrapped, trains)
    stir(wrapped)
    wrapped(**batch(family)).loss.backward()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    left_out = tower - held(wrapped)
    dropped = {"llava15", "llava_next"}  # vision_feature_layer=-2
    last = model.config.vision_config.to_dict().get("num_hidden_layers", 0) - 1
    assert all(f".layers.{last}." in name for name in left_out)
    assert len(left_out) == (6 if family in dropped else 0)
    assert report.parts["projector"].share > 0.9


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl", "smolvlm", "gemma3"])
def test_a_projector_trained_in_full_is_saved_and_comes_back_with_the_adapter(
    family: str, tiny_model: Callable[..., Any], batch: Callable[[str], Any], tmp_path: Path
) -> None:
    wrapped = adapted(tiny_model(family), LORA_AND_PROJECTOR, r=4)
    report = check_trains(wrapped, LORA_AND_PROJECTOR).parts["projector"]
    # What a reader is told of the one weight that PEFT cannot save.
    bare = " but model.image_newline, which PEFT cannot save" if family == "llava_next" else ""
    assert (report.how, report.share) == (f"full{bare}", 1.0)
    before = {name: parameter.clone() for name, parameter in wrapped.named_parameters()}
    stir(wrapped)
    moved = {name for name, parameter in wrapped.named_parameters() if not torch.equal(parameter, before[name])}
    assert all(".lora_" in name or ".modules_to_save." in name for name in moved)
    parts = parts_of(wrapped)
    whole = {re.sub(r".*\.modules_to_save\.default\.|.*lora_.*", "", name) for name in moved} - {""}
    own = {n for n, _ in tiny_model(family).named_parameters() if part_of(n, parts) == "projector"}
    assert {name for name in own if not name.endswith(tuple(whole))} == ({"model.image_newline"} if bare else set())
    wrapped.save_pretrained(tmp_path)
    expected = wrapped.eval()(**batch(family)).logits
    again = PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    assert torch.equal(again(**batch(family)).logits, expected)
    assert not torch.allclose(tiny_model(family)(**batch(family)).logits, expected)


@pytest.mark.parametrize(("pack", "use_dora"), [(nf4, True), (int8, False)])
def test_adapters_and_a_full_projector_on_a_quantized_base(
    pack: Callable[..., Any],
    use_dora: bool,
    tiny_model: Callable[..., Any],
    batch: Callable[[str], Any],
    tmp_path: Path,
) -> None:
    def base() -> Any:
        return tiny_model("llava15", quantization_config=pack(tiny_model("llava15")))

    wrapped = adapted(base(), LORA_AND_PROJECTOR, use_dora=use_dora)
    report = check_trains(wrapped, LORA_AND_PROJECTOR)
    language = report.parts["language"]
    assert language.how.endswith(", DoRA") == use_dora
    assert held(wrapped) == linears(tiny_model("llava15"), "language")
    sizes = {n: w.numel() for n, w in tiny_model("llava15").named_parameters()}
    assert language.quantized == sum(sizes[f"{name}.weight"] for name in held(wrapped))
    assert language.share == 1.0
    stir(wrapped)
    wrapped(**batch("llava15")).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in wrapped.parameters() if p.requires_grad)
    wrapped.save_pretrained(tmp_path)
    expected = wrapped.eval()(**batch("llava15")).logits
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(again(**batch("llava15")).logits, expected)


def test_dora_on_8_bit_layers_fails_on_a_cpu(tiny_model: Callable[..., Any], batch: Callable[[str], Any]) -> None:
    model = tiny_model("llava15", quantization_config=int8(tiny_model("llava15")))
    with pytest.raises(ValueError, match=r"no working DoRA for Linear8bitLt on cpu .* nf4_config"):
        lora_config(model, use_dora=True)
    config: Any = lora_config(model)
    config.use_dora = True
    wrapped = get_peft_model(model, config).eval()
    wrapped(**batch("llava15"))
    with pytest.raises(AttributeError):  # once it passes, the refusal above can go
        wrapped(**batch("llava15"))


@FAMILIES
def test_the_pattern_is_one_short_line_that_any_copy_of_the_model_takes(
    family: str, tiny_model: Callable[..., Any], tiny_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    config: Any = lora_config(tiny_model(family))
    assert config.target_modules == lora_config(on_meta(AutoConfig.from_pretrained(tiny_dir(family)))).target_modules
    assert len(config.target_modules) < 600
    wrapped = get_peft_model(tiny_model(family), config)
    wrapped.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == config.target_modules
    again = PeftModel.from_pretrained(tiny_model(family), tmp_path, is_trainable=True)
    assert held(again) == held(wrapped)
    check_trains(again, LORA)
    assert not any(".lora_" in name for name in again.merge_and_unload().state_dict())


def test_the_pattern_reaches_the_asked_layers_only(tiny_model: Callable[..., Any]) -> None:
    """Where layers are left out they are named by number; where another module has such a path, too."""
    model = tiny_model("llava15")
    config: Any = lora_config(model, {"vision": "lora"})
    assert r"layers\.(?:0|1)\.self_attn\.q_proj" in config.target_modules
    assert not re.fullmatch(config.target_modules, "model.vision_tower.encoder.layers.2.self_attn.q_proj")
    model.model.language_model.layers[1].mlp.up_proj = nn.Identity()
    config = lora_config(model)
    assert r"layers\.0\.mlp\.up_proj" in config.target_modules
    assert r"layers\.\d+\.mlp\.down_proj" in config.target_modules


def test_named_layers_only(tiny_model: Callable[..., Any]) -> None:
    trains: Any = {"language": ["q_proj", "v_proj"], "vision": ["self_attn.q_proj"], "projector": ["linear_1"]}
    wrapped = adapted(tiny_model("llava15"), trains)
    report = check_trains(wrapped, trains)
    assert {name.rsplit(".", 1)[-1] for name in held(wrapped)} == {"q_proj", "v_proj", "linear_1"}
    assert {part: found.adapted_layers for part, found in report.parts.items()} == {
        "vision": 2,
        "projector": 1,
        "language": 4,
        "head": 0,
        "total": 7,
    }
    assert report.parts["language"].how == "lora r 16, alpha 16 (scale 1) on q_proj, v_proj"
    assert 0 < report.parts["language"].share < 0.3
    with pytest.raises(ValueError, match=r"10 layers asked for are not adapted: .*down_proj"):
        check_trains(adapted(tiny_model("llava15"), trains), {**trains, "language": "lora"})


def test_settings_reach_the_config(tiny_model: Callable[..., Any]) -> None:
    asked: dict[str, Any] = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.2, "use_dora": True}
    config = lora_config(tiny_model("llava15"), LORA, **asked)
    assert {name: getattr(config, name) for name in asked} == asked


def test_a_pooling_head_of_the_tower_is_left_out() -> None:
    """Gemma's tower has one by default, and the language model never sees what it makes."""
    config: Any = lora_config(on_meta(AutoConfig.for_model("gemma3")), {"vision": "lora"})
    assert re.fullmatch(config.target_modules, "model.vision_tower.encoder.layers.0.mlp.fc1")
    assert not re.fullmatch(config.target_modules, "model.vision_tower.head.mlp.fc1")


def test_dora_on_a_layer_type_that_peft_cannot(tiny_model: Callable[..., Any]) -> None:
    class AwqLinear(nn.Module):
        in_features = out_features = 64

    model = tiny_model("llava15")
    model.model.language_model.layers[0].mlp.up_proj = AwqLinear()
    with pytest.raises(
        ValueError, match=r"no working DoRA for AwqLinear on cpu \(model\.language_model\.layers\.0\.mlp\.up_proj\)"
    ):
        lora_config(model, use_dora=True)
    lora_config(model)


# -- whole parts


@pytest.mark.parametrize("trained", [("projector",), ("projector", "language", "head"), ("vision",)], ids="+".join)
@FAMILIES
def test_the_parts_in_full_train_and_no_others(
    family: str, trained: tuple[str, ...], tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(family)
    trains: Any = dict.fromkeys(trained, "full")
    assert lora_config(model, trains) is None
    parts = parts_of(model)
    for name, weight in model.named_parameters():
        assert weight.requires_grad == (part_of(name, parts) in trained), name
    report = check_trains(model, trains)
    tied = family in ("gemma3", "internvl")
    for part in PARTS:
        found = report.parts[part]
        assert found.how == ("full" if part in trained else "frozen")
        assert found.trainable == (found.parameters if part in trained else 0)
        assert found.share == (1 if part in trained and not (part == "head" and tied) else 0)
    lora_config(model, {"language": "full"} if tied else {"head": "full"})
    with pytest.raises(ValueError, match=r"\d+ weights train and should not: .*\d+ weights should train in full"):
        check_trains(model, {"vision": "full"})
    lora_config(model, {"projector": "full"})
    with pytest.raises(ValueError, match=r"projector': 'full', 'vision': 'full'}\. \d+ weights should train in full"):
        check_trains(model, {"projector": "full", "vision": "full"})


def test_a_head_that_shares_the_embedding_trains_with_the_language_model(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gemma3")
    with pytest.raises(ValueError, match=r"'head' has no parameters of its own.*trains with 'language'"):
        lora_config(model, {"head": "full"})
    lora_config(model, {"language": "full", "head": "full"})
    assert model.lm_head.weight.requires_grad
    check_trains(model, {"language": "full", "head": "full"})
    check_trains(model, {"language": "full"})


@pytest.mark.parametrize("pack", [nf4, int8])
def test_quantized_weights_cannot_train_in_full(pack: Callable[..., Any], tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llava15", quantization_config=pack(tiny_model("llava15")))
    for ask in (lora_config, check_trains):
        with pytest.raises(ValueError, match=r"14 weights of 'language' are quantized.*no --load_in_4bit"):
            ask(model, {"projector": "full", "language": "full"})
    assert lora_config(model, {"projector": "full"}) is None


def test_a_quantized_projector_cannot_be_trained_in_full(tiny_model: Callable[..., Any]) -> None:
    config = nf4(tiny_model("llava15"))
    config.llm_int8_skip_modules = ["vision_tower", "multi_modal_projector", "lm_head"]  # names instead of paths
    model = tiny_model("llava15", quantization_config=config)
    with pytest.raises(ValueError, match=r"2 weights of 'projector' are quantized.*nf4_config"):
        lora_config(model, LORA_AND_PROJECTOR)


# -- what cannot be meant


@pytest.mark.parametrize(
    ("trains", "complaint"),
    [
        ({}, r"TRAINS={}: a dict of one or more of vision, projector, language, head, each \"lora\""),
        ("language", "TRAINS='language': a dict of"),
        ({"projektor": "full"}, r"'projektor' is not a part \(did you mean 'projector'\?\)"),
        ({"x": "full"}, r"'x' is not a part \(one of vision, projector, language, head\)"),
        ({"language": "Lora"}, r"language: 'Lora' is not a way to train \(did you mean 'lora'\?\)"),
        ({"language": "fulll"}, r"did you mean 'full'\?"),
        ({"language": "q_proj"}, r"'q_proj' is not a way to train .*a list of layer names such as \[\"q_proj\""),
        ({"language": []}, r"language: \[\] is not a way"),
        ({"language": None}, "language: None is not a way"),
        ({"language": ["q_proj,", "v_proj"]}, r"\['q_proj,', 'v_proj'\].*without comma"),
        ({"language": [" q_proj"]}, "without comma, blank"),
        ({"head": "lora"}, "head: adapters on it are not supported"),
        ({"head": ["lm_head"]}, "head: adapters on it are not supported"),
        ({"vision": "full", "language": "lora"}, "'vision' in full next to adapters: only the projector"),
        ({"language": "full", "head": "full", "vision": ["q_proj"]}, "'language' and 'head' in full next to"),
        ({"projector": "lora", "language": "full"}, "'language' in full next to adapters"),
        ({"projektor": "fulll", "head": "lora", "vision": []}, r"(?s)projektor.*fulll.*head: adapters.*vision: \[\]"),
        ({"language": ["q_proj", "queries"]}, "'queries' matches no linear layer of 'language'.*'q_proj'"),
        ({"language": ["embed_tokens"]}, "'embed_tokens' matches no linear layer"),
        ({"language": ["gate_proj"], "vision": ["gate_proj"]}, "'gate_proj' matches no linear layer of 'vision'.*fc1"),
        ({"language": ["a"], "vision": ["b"]}, r"(?s)'a' matches no.*'b' matches no"),
    ],
)
def test_a_sentence_that_cannot_be_meant(trains: Any, complaint: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llava15")
    for ask in (lora_config, check_trains):
        with pytest.raises(ValueError, match=complaint):
            ask(model, trains)
    assert all(weight.requires_grad for weight in model.parameters())  # nothing was done by half


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"r": 0}, "r=0: the rank is at least 1"),
        ({"use_dora": "false"}, "use_dora='false': True or False"),
        ({"r": -4, "lora_alpha": 0, "lora_dropout": 1.0}, r"r=-4.*=0.*=1\.0"),
    ],
)
def test_a_setting_out_of_range(settings: Any, complaint: str, tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=complaint):
        lora_config(tiny_model("llava15"), **settings)


def test_a_projector_without_a_linear_layer_cannot_be_adapted(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"'projector' has no linear layers to adapt; \"full\" trains it"):
        lora_config(tiny_model("gemma3"), {"projector": "lora"})


def test_a_model_with_adapters_takes_no_more(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"has adapters already.*is_trainable=True, no peft_config"):
        lora_config(adapted(tiny_model("llava15")))


# -- the check


def wrap(model: Any, **settings: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, **settings))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"target_modules": sorted(LANGUAGE)},
            r"6 layers are adapted and not asked for: model\.vision_tower.*3 tower layers are adapted whose output",
        ),
        (
            {"target_modules": ["down_proj,", "o_proj,", "v_proj"]},
            r"12 layers asked for are not.*adapted and not",
        ),
        (
            {"target_modules": r"model\.language_model\..*_proj", "modules_to_save": ["lm_head"]},
            r"1 weights train and should not: lm_head",
        ),
        ({"target_modules": r"model\.language_model\..*[qv]_proj"}, "10 layers asked for are not adapted: .*down_proj"),
    ],
)
def test_the_check_says_where_a_hand_written_config_went(
    settings: Any, complaint: str, tiny_model: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_trains(wrap(tiny_model("llava15"), **settings), LORA)


def test_the_check_accepts_a_hand_written_config_that_is_right(tiny_model: Callable[..., Any]) -> None:
    wrapped = wrap(tiny_model("llava15"), target_modules=r"model\.language_model\..*_proj", use_dora=True)
    assert check_trains(wrapped, LORA).parts["language"].how == "lora r 2, alpha 8 (scale 4), DoRA"


def test_the_check_sees_what_else_trains_and_what_does_not(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llava15")
    wrapped = adapted(model)
    bias = "model.vision_tower.encoder.layers.0.mlp.fc1.bias"
    model.get_parameter(bias).requires_grad_(True)
    with pytest.raises(ValueError, match=f"1 weights train and should not: {re.escape(bias)}"):
        check_trains(wrapped, LORA)
    model.get_parameter(bias).requires_grad_(False)
    model.model.language_model.layers[1].mlp.up_proj.lora_A.default.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"1 adapted layers are frozen: .*layers\.1\.mlp\.up_proj"):
        check_trains(wrapped, LORA)


def test_the_check_sees_a_projector_that_was_not_asked_for_or_is_missing(tiny_model: Callable[..., Any]) -> None:
    wrapped = adapted(tiny_model("qwen3_vl"), LORA_AND_PROJECTOR)
    with pytest.raises(ValueError, match=r"weights train and should not: model\.visual\.deepstack_merger_list\.0"):
        check_trains(wrapped, LORA)
    with pytest.raises(ValueError, match=r"weights should train in full and do not: model\.visual\.deepstack"):
        check_trains(adapted(tiny_model("qwen3_vl")), LORA_AND_PROJECTOR)


def test_the_check_sees_the_copy_that_a_whole_projector_trains_in(tiny_model: Callable[..., Any]) -> None:
    wrapped = adapted(tiny_model("llava15"), LORA_AND_PROJECTOR)
    projector = wrapped.get_base_model().model.multi_modal_projector
    projector.original_module.linear_1.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 weights train and should not: .*original_module\.linear_1\.weight"):
        check_trains(wrapped, LORA_AND_PROJECTOR)
    projector.original_module.linear_1.weight.requires_grad_(False)
    projector.modules_to_save.default.linear_1.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"1 weights should train in full and do not: .*default\.linear_1\.weight"):
        check_trains(wrapped, LORA_AND_PROJECTOR)


@pytest.mark.parametrize("trains", [LORA, {"projector": ["linear_1"], "vision": "lora"}])
def test_the_check_wants_the_adapters_that_were_asked_for(trains: Any, tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"holds none; pass peft_config=lora_config\(model, TRAINS\) to SFTTrainer"):
        check_trains(tiny_model("llava15"), trains)
    with pytest.raises(ValueError, match=r"14 layers are adapted and not asked for"):
        check_trains(adapted(tiny_model("llava15")), {"projector": "full"})


def test_dora_on_some_layers_only(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llava15")
    wrapped = adapted(model, use_dora=True)
    model.model.language_model.layers[0].mlp.up_proj.lora_magnitude_vector.clear()
    with pytest.raises(ValueError, match=r"1 layers are without DoRA, while others have it: .*layers\.0\.mlp\.up_proj"):
        check_trains(wrapped, LORA)


def test_experts_that_adapters_do_not_reach_show_in_the_share(tiny_model: Callable[..., Any]) -> None:
    """transformers 5.23 holds them as one parameter of three dimensions, which is not a linear layer."""
    model = tiny_model("llava15")
    wrapped = adapted(model)
    mlp = model.model.language_model.layers[1].mlp
    mlp.experts = nn.Parameter(torch.zeros(4, 64, 64), requires_grad=False)
    with pytest.raises(ValueError, match=r"1 layers asked for are not adapted: .*layers\.1\.mlp\.experts\."):
        check_trains(wrapped, LORA)
    names = sorted({name.rpartition(".")[2] for name in held(model)})
    report = check_trains(wrapped, {"language": names})
    sizes = {n: w.numel() for n, w in tiny_model("llava15").named_parameters()}
    reached = sum(sizes[f"{name}.weight"] for name in held(model))
    assert report.parts["language"].share == pytest.approx(reached / (reached + mlp.experts.numel()))
    assert "100%" not in report.lines()[3]


def test_parameters_are_counted_by_part_as_what_they_stand_for(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llava15", quantization_config=nf4(tiny_model("llava15")), dtype=torch.bfloat16)
    trains: Any = {"projector": "full"}
    lora_config(model, trains)
    found, plain = check_trains(model, trains).parts, tiny_model("llava15")
    assert list(found) == [*PARTS, "total"]
    parts = parts_of(plain)
    for part in PARTS:
        size = sum(weight.numel() for name, weight in plain.named_parameters() if part_of(name, parts) == part)
        assert found[part].parameters == size
        assert found[part].trainable == (size if part == "projector" else 0)
    linears = sum(w.numel() for n, w in plain.named_parameters() if "language_model.layers" in n and w.ndim == 2)
    assert (found["language"].quantized, found["language"].dtypes) == (linears, ("bfloat16", "uint8"))
    assert (found["vision"].quantized, found["vision"].dtypes) == (0, ("bfloat16",))
    assert found["total"].parameters == plain.num_parameters()


def test_adapters_count_to_the_part_they_lie_in(tiny_model: Callable[..., Any]) -> None:
    wrapped = adapted(tiny_model("llava15"))
    size = sum(weight.numel() for weight in wrapped.parameters() if weight.requires_grad)
    found = check_trains(wrapped, LORA).parts
    assert found["language"].trainable == found["total"].trainable == size


def test_the_table(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llava15", quantization_config=nf4(tiny_model("llava15")), dtype=torch.bfloat16)
    report = check_trains(adapted(model, LORA_AND_PROJECTOR, r=4, lora_alpha=8, use_dora=True), LORA_AND_PROJECTOR)
    lines = report.lines()
    assert len(lines) <= 7
    assert max(map(len, lines)) <= 124
    assert lines[0].split() == ["part", "trains", "layers", "matrices", "trainable", "parameters", "dtypes"]
    rows = {line.split()[0]: line for line in lines}
    assert "lora r 4, alpha 8 (scale 2), DoRA" in rows["language"]
    assert re.search(r" 14 +100% ", rows["language"])
    assert rows["language"].endswith("bfloat16, float32, uint8")
    assert rows["vision"].split()[1:5] == ["frozen", "0", "0%", "0"]
    found = report.parts
    assert found["projector"].how == "full"
    assert found["projector"].trainable == found["projector"].parameters  # once, although PEFT holds two of it
    assert found["language"].quantized == found["total"].quantized == 73728
    assert found["total"].trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_check_sees_through_what_wraps_a_model(tiny_model: Callable[..., Any]) -> None:
    wrapped = torch.compile(adapted(tiny_model("llava15"), LORA_AND_PROJECTOR))
    parallel = nn.Sequential()
    parallel.add_module("module", wrapped)  # as DistributedDataParallel and DeepSpeed hold it
    assert check_trains(parallel, LORA_AND_PROJECTOR).parts["language"].adapted_layers == 14
    with pytest.raises(ValueError, match="4 weights train and should not"):
        check_trains(parallel, LORA)
