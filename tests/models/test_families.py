"""The table of parts covers every parameter of every real architecture exactly once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from vlm_sft.models.parts import MODEL_PARTS, PARTS, ModelParts, part_of, parts_of

PARTS_BY_HAND = {
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


@pytest.fixture(scope="module", params=sorted(MODEL_PARTS))
def real(request: pytest.FixtureRequest) -> torch.nn.Module:
    """The architecture at its default size, without storage."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(request.param))


def test_every_parameter_has_a_part_and_every_part_has_modules(real: torch.nn.Module) -> None:
    parts = parts_of(real)
    assert parts == parts_of(real.config) == parts_of(real.config.model_type)
    # remove_duplicate=False: where head and input embedding are one tensor, both names must have their part.
    counts = Counter(part_of(name, parts) for name, _ in real.named_parameters(remove_duplicate=False))
    assert set(counts) == set(PARTS)
    assert counts["head"] == 1
    assert part_of(PARTS_BY_HAND[real.config.model_type], parts) == "projector"


def test_parts_are_what_the_model_calls_them(real: torch.nn.Module) -> None:
    parts = parts_of(real)
    modules = dict(real.named_modules())
    embedding, head = real.get_input_embeddings(), real.get_output_embeddings()
    names = {id(module): name for name, module in modules.items()}
    assert part_of(names[id(embedding)], parts) == "language"
    assert part_of(names[id(head)], parts) == "head"
    assert "Vision" in type(modules[parts.vision[0]]).__name__
    # Nothing of one part may hide inside another, except a projector inside its vision tower.
    for part in ("projector", "language", "head"):
        for path in getattr(parts, part):
            inside = {part_of(name, parts) for name in modules if name == path or name.startswith(f"{path}.")}
            assert inside <= {part}


def test_most_specific_path_wins() -> None:
    parts = MODEL_PARTS["qwen2_vl"]
    assert part_of("model.visual.blocks.0.attn.qkv.weight", parts) == "vision"
    assert part_of("model.visual.merger", parts) == "projector"
    assert part_of("model.visual.merger_of_another_kind.weight", parts) == "vision"


@pytest.mark.parametrize("prefix", ["base_model.model.", "module.", "_orig_mod.module.base_model.model."])
def test_wrappers_do_not_hide_the_part(prefix: str) -> None:
    assert part_of(f"{prefix}model.language_model.norm.weight", MODEL_PARTS["llava"]) == "language"


def test_parts_of_a_model_with_adapters() -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("qwen3_vl"))
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["merger"]))
    parts = parts_of(model)
    trained = Counter(part_of(name, parts) for name, p in model.named_parameters() if p.requires_grad)
    assert trained == {"language": 2 * model.config.text_config.num_hidden_layers, "projector": 6}


def test_unknown_family_lists_the_known_and_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"'blip_2'.*gemma3.*smolvlm.*model_parts=ModelParts") as error:
        parts_of("blip_2")
    assert all(model_type in str(error.value) for model_type in MODEL_PARTS)


def test_given_parts_are_taken_and_checked_against_the_model() -> None:
    given = ModelParts(vision=("visoin",), projector=(), language=("0",), head=("1",))
    assert parts_of("blip_2", model_parts=given) is given
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"Sequential .* holds no visoin;"):
        parts_of(model, model_parts=given)


def test_bare_model_without_head_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("idefics3")).model
    with pytest.raises(ValueError, match=r"holds no .*model\.vision_model.*AutoModelForImageTextToText"):
        parts_of(model)


def test_name_outside_every_part_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'model\.extra\.weight' lies in none of ModelParts"):
        part_of("model.extra.weight", MODEL_PARTS["llava"])


def test_faulty_parts_are_named_all_at_once() -> None:
    with pytest.raises(ValueError, match=r"vision='model\.visual', head=\(''\,\).*needs its comma"):
        ModelParts(vision="model.visual", projector=(), language=("model.text",), head=("",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"listed twice: model\.visual;"):
        ModelParts(vision=("model.visual",), projector=("model.visual",), language=("a",), head=("b",))
