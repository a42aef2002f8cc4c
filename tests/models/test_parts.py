"""The model says where its parts lie: for ten families what stood in a table by hand, for others too, or a refusal."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForImageTextToText

from vlm_sft.models import parts as module
from vlm_sft.models.parts import ModelParts, part_of, parts_of, register_parts

LLAVA = ("model.vision_tower", ("model.multi_modal_projector",), "model.language_model")
TILED = ("model.vision_tower", ("model.multi_modal_projector", "model.image_newline"), "model.language_model")
QWEN = ("model.visual", ("model.visual.merger",), "model.language_model")
IDEFICS = ("model.vision_model", ("model.connector",), "model.text_model")
TABLE: dict[str, Any] = {
    "gemma3": LLAVA,
    "idefics3": IDEFICS,
    "internvl": LLAVA,
    "llava": LLAVA,
    "llava_next": TILED,
    "llava_onevision": TILED,
    "qwen2_5_vl": QWEN,
    "qwen2_vl": QWEN,
    "qwen3_vl": ("model.visual", ("model.visual.merger", "model.visual.deepstack_merger_list"), "model.language_model"),
    "smolvlm": IDEFICS,
    # Found without a line of ours.
    "glm46v": QWEN,
    "lfm2_vl": LLAVA,
    "mistral3": LLAVA,
    "paligemma": LLAVA,
    "qwen3_5": QWEN,
    "glm4v_moe": QWEN,
    "qwen3_vl_moe": (
        "model.visual",
        ("model.visual.merger", "model.visual.deepstack_merger_list"),
        "model.language_model",
    ),
    "granite_docling": ("model.vision_model", ("model.vision_model.connector",), "model.text_model"),
    "idefics2": IDEFICS,  # its connector holds a model of transformers
    "molmo2": LLAVA,  # its projector is one
    "nemotron_h_omni": ("vision_model", ("multi_modal_projector",), "language_model", "language_model.lm_head"),
    "llama4": ("vision_model", ("multi_modal_projector",), "language_model", "language_model.lm_head"),
    "fuyu": ((), ("model.vision_embed_tokens",), "model.language_model"),  # without a tower
    "deepseek_vl_hybrid": (  # two towers
        ("model.vision_model", "model.high_res_vision_model"),
        (
            *("model.high_res_vision_neck", "model.high_res_vision_proj", "model.aligner"),
            "model.high_res_vision_alpha",
        ),
        "model.language_model",
    ),
    "janus": ("model.vision_model", ("model.aligner",), "model.language_model"),
    "gemma3n": ("model.vision_tower", ("model.embed_vision",), "model.language_model"),
    "qwen2_5_omni_thinker": QWEN,
}
OTHER = {
    "janus": ("vqmodel", "generation_embeddings", "generation_aligner", "generation_head"),
    "gemma3n": ("audio_tower", "embed_audio"),
    "qwen2_5_omni_thinker": ("audio_tower",),
}
BY_HAND = {
    "gemma3": "model.multi_modal_projector.mm_soft_emb_norm.weight",
    "idefics3": "model.connector.modality_projection.proj.weight",
    "internvl": "model.multi_modal_projector.layer_norm.weight",
    "llava": "model.multi_modal_projector.linear_2.bias",
    "llava_next": "model.image_newline",
    "llava_onevision": "model.image_newline",
    "qwen2_5_vl": "model.visual.merger.mlp.0.weight",
    "qwen2_vl": "model.visual.merger.ln_q.weight",
    "qwen3_vl": "model.visual.deepstack_merger_list.2.linear_fc2.bias",
    "smolvlm": "model.connector.modality_projection.proj.weight",
}


def expected(model_type: str) -> ModelParts:
    vision, projector, language, *head = TABLE[model_type]
    other = tuple(f"model.{name}" for name in OTHER.get(model_type, ()))
    towers = (vision,) if isinstance(vision, str) else vision
    return ModelParts(towers, projector, (language,), tuple(head or ["lm_head"]), other)


def built(model_type: str) -> Any:
    """The architecture at its default size, without storage."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type))


@pytest.fixture(scope="module", params=sorted(TABLE))
def real(request: pytest.FixtureRequest) -> nn.Module:
    return built(request.param)


@pytest.fixture
def overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARTS_OVERRIDES", {})


def test_the_parts_are_those_that_stood_in_the_table(real: nn.Module) -> None:
    assert parts_of(real) == parts_of(real.config) == expected(real.config.model_type)


def test_every_parameter_has_a_part_and_every_part_has_modules(real: nn.Module) -> None:
    parts = parts_of(real)
    # remove_duplicate=False: where head and input embedding are one tensor, both names must have their part.
    counts = Counter(part_of(name, parts) for name, _ in real.named_parameters(remove_duplicate=False))
    there = {part for part, paths in vars(parts).items() if paths}
    assert set(counts) == there >= {"projector", "language", "head"}
    assert counts["head"] == 1
    by_hand = BY_HAND.get(real.config.model_type)
    assert by_hand is None or part_of(by_hand, parts) == "projector"


def test_parts_are_what_the_model_calls_them(real: nn.Module) -> None:
    parts = parts_of(real)
    modules = dict(real.named_modules())
    embedding = real.get_input_embeddings()
    head = real.get_output_embeddings() or real.get_decoder().get_output_embeddings()
    names = {id(module): name for name, module in modules.items()}
    assert part_of(names[id(embedding)], parts) == "language"
    assert part_of(names[id(head)], parts) == "head"
    # Nothing of one part may hide inside another, but a projector in its tower, and a head in its language model.
    for part in ("projector", "language", "head"):
        for path in getattr(parts, part):
            inside = {part_of(name, parts) for name in modules if name == path or name.startswith(f"{path}.")}
            assert inside <= {part, *["head"] * (part == "language" and path in parts.head[0])}


def test_most_specific_path_wins() -> None:
    parts = expected("qwen2_vl")
    assert part_of("model.visual.blocks.0.attn.qkv.weight", parts) == "vision"
    assert part_of("model.visual.merger", parts) == "projector"
    assert part_of("model.visual.merger_of_another_kind.weight", parts) == "vision"


@pytest.mark.parametrize("prefix", ["base_model.model.", "module.", "_orig_mod.module.base_model.model."])
def test_wrappers_do_not_hide_the_part(prefix: str) -> None:
    assert part_of(f"{prefix}model.language_model.norm.weight", expected("llava")) == "language"


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_next"])
def test_parts_of_a_wrapped_model(family: str, tiny_model: Any) -> None:
    model = tiny_model(family)
    parts = parts_of(model)
    whole = "merger" if family == "qwen3_vl" else "multi_modal_projector"
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=[whole]))
    compiled = torch.compile(wrapped)

    class Parallel(DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:  # without a process group
            nn.Module.__init__(self)
            self.module = module

    assert parts_of(wrapped) == parts_of(compiled) == parts_of(Parallel(compiled)) == parts
    trained = Counter(part_of(name, parts) for name, p in Parallel(compiled).named_parameters() if p.requires_grad)
    assert trained.keys() == {"language", "projector", "head", *(["vision"] if family == "llava_next" else [])}


@pytest.mark.parametrize(
    ("model_type", "complaint"),
    [
        ("pix2struct", r"encoder: a second tower, or part of the projector.*register_parts\('pix2struct', vis"),
        ("idefics", r"model\.vision_model lies inside model.*lie in model\.embed_tokens, model\.vision_model"),
        ("gemma4", "it has no vision tower and no projector"),  # nor has its default config
        ("blip", "nothing is left for its projector"),
        ("git", "it has no vision tower and no projector"),
    ],
)
def test_what_cannot_be_told_is_refused_with_the_models_modules(model_type: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=rf"The parts of \w+ \({model_type}\) cannot be told: .*{complaint}"):
        parts_of(built(model_type))


def test_a_tower_inside_the_language_model_and_one_without_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llava")
    monkeypatch.setattr(model, "get_encoder", lambda modality: model.model.language_model.layers[0])
    with pytest.raises(ValueError, match=r"model\.language_model\.layers\.0 lies inside model\.language_model"):
        parts_of(model)
    monkeypatch.setattr(model, "get_encoder", lambda modality: model.model.language_model)
    with pytest.raises(ValueError, match=r"model\.language_model lies inside model\.language_model"):
        parts_of(model)
    model = built("llava")
    model.model.language_model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match=r"its language model, model\.language_model, has no numbered layers"):
        parts_of(model)


def test_a_bare_model_without_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"it has no head\. Load it with AutoModelForImageTextToText"):
        parts_of(built("idefics3").model)


@pytest.mark.parametrize(
    ("subject", "complaint"),
    [
        (nn.Sequential(nn.Linear(1, 1)), "Sequential is not a model of transformers"),
        ("llava", "str is not a model of transformers"),
        (AutoConfig.for_model("llama"), "No vision-language model takes this 'llama' config"),
    ],
)
def test_what_is_not_a_vision_language_model(subject: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parts_of(subject)


def test_registered_parts_are_taken_and_checked_against_the_model(overrides: None) -> None:
    model = built("idefics2")
    given: dict[str, Any] = {"vision": (), "language": "model.text_model", "head": ["lm_head"]}
    given |= {"other": "model.vision_model"}
    register_parts("idefics2", projector="model.connector", **given)
    parts = ModelParts((), ("model.connector",), ("model.text_model",), ("lm_head",), ("model.vision_model",))
    assert parts_of(model) == parts_of(model.config) == parts
    register_parts("idefics2", projector=["model.conector", "model.connector"], **given)
    with pytest.raises(ValueError, match=r"Idefics2.* cannot be told: model\.conector is not in it\."):
        parts_of(model)


def test_faulty_parts_are_named_all_at_once(overrides: None) -> None:
    with pytest.raises(ValueError, match=r"vision='' names nothing; head=\[\] names nothing; 'a' stands twice"):
        register_parts("some", vision="", projector=["a"], language=("a", "b"), head=[])
    assert module.PARTS_OVERRIDES == {}


def test_a_name_outside_every_part_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'model\.extra\.weight' lies in none of vision model\.vision_tower; proj"):
        part_of("model.extra.weight", expected("llava"))
