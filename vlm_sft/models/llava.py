"""A LLaVA from its parts: a CLIP tower, a new projector, and a text model of the Llama or Qwen kind.

vicuna.jinja is conv_vicuna_v1 of haotian-liu/LLaVA, llava/conversation.py, without its system prompt, as
llava-hf/llava-1.5-7b-hf; unlike there, it writes the end token, so that all that renders it shows what was trained."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils.hub import resolve_revision

from vlm_sft.common import eos_ids
from vlm_sft.models.fingerprints import record_source
from vlm_sft.models.freezing import detach_frozen_tower
from vlm_sft.models.hardware import best_dtype
from vlm_sft.models.loading import check_weights, first_line, place, read_config

# Models whose decoder takes embeddings as they are; Gemma, for one, would scale the features of an image.
LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3")


def assemble_llava(
    vision_tower: str | Path, language_model: str | Path, *, seed: int, language_revision: str | None = None
) -> tuple[Any, Any]:
    """A LLaVA-1.5 made of the two models' weights and a random projector, and the processor that goes with it.

    The projector is LLaVA's `mlp2x_gelu` with PyTorch's own initialisation, drawn from `seed`; the random state of the
    process stays as it was. The tower is read one layer before its last, without the class token. The tokenizer gains
    `<image>`, and a pad token where it has none; the embedding grows to hold them, and never shrinks. The dtype is
    `best_dtype()`. Which tower it was is kept in the config (`check_tower`). Source: arXiv 2310.03744.
    Raises ValueError for a tower that is no CLIP, a text model that is none of `LANGUAGE_MODELS`, and lost weights."""
    vision_name, language_name = str(vision_tower), str(language_model)
    vision_revision = resolve_revision(vision_name)
    language_revision = resolve_revision(language_name, language_revision)
    faults = _fault(vision_name, vision_revision, ("clip", "clip_vision_model"), "the tower must be a CLIP")
    rule = f"the text model must be one of {', '.join(LANGUAGE_MODELS)}"
    if faults := faults + _fault(language_name, language_revision, LANGUAGE_MODELS, rule):
        raise ValueError(f"A LLaVA cannot be assembled: {'; '.join(faults)}.")
    vision = _load(transformers.CLIPVisionModel, vision_name, vision_revision)
    language = _load(transformers.AutoModelForCausalLM, language_name, language_revision)

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(language_name, revision=language_revision)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})

    config = transformers.LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(vision.config.image_size // vision.config.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config.assembled_from = {"vision_tower": _short(vision_name), "language_model": _short(language_name)}
    with torch.device("meta"):
        model: Any = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower = vision
    model.model.language_model = language.get_decoder()
    model.lm_head = language.get_output_embeddings()
    projector = model.model.multi_modal_projector.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's, where all of it is drawn
        for layer in (projector.linear_1, projector.linear_2):
            layer.reset_parameters()
        projector.to(language.dtype)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            # A multiple of 64, as LLaVA's, for the sake of the GPU's matrix units.
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    # Ids alone: how to sample stays with the text model, whose settings may not even be savable (Vicuna's).
    model.generation_config = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted({tokenizer.eos_token_id, *eos_ids(language.generation_config.eos_token_id)}),
        pad_token_id=tokenizer.pad_token_id,
    )
    images = transformers.CLIPImageProcessor.from_pretrained(vision_name, revision=vision_revision or "main")
    processor = transformers.LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(files("vlm_sft.models") / "vicuna.jinja").read_text("utf-8"),
    )
    detach_frozen_tower(model)
    for made in (model, processor):
        record_source(made, language_name, language_revision)
    return model.eval(), processor


def check_tower(name_or_path: str | Path, vision_tower: str | Path | None, *, revision: str | None = None) -> None:
    """Raises ValueError unless the model's config says that it was assembled on this tower; with None any will do."""
    config = read_config(name_or_path, revision=revision)
    recorded = getattr(config, "assembled_from", {}).get("vision_tower")
    if vision_tower is not None and recorded != _short(vision_tower):
        vision = config.vision_config
        found = f"was assembled on {recorded!r}" if recorded else "has no record of its tower"
        raise ValueError(
            f"{config.name_or_path!r} {found} (width {vision.hidden_size}, {vision.num_hidden_layers} layers, "
            f"{vision.image_size} pixels), and {_short(vision_tower)!r} is asked for: give the folder that stage 1 "
            "wrote with that tower, or leave vision_tower out to continue with the folder's own."
        )


def plain_template(tokenizer: Any) -> str:
    """The chat template of captions for the projector's first training: image, caption, no roles and no end token. The
    caption is tokenized as if it stood alone (after a token some tokenizers of Llama need a blank for that), as by
    conv_llava_plain and tokenizer_image_token of haotian-liu/LLaVA."""
    alone, after = tokenizer.tokenize("a b"), tokenizer.tokenize("<image>a b")[1:]
    blank = "" if after == alone else " "
    return (
        "{%- for turn in messages -%}{%- for part in turn['content'] -%}"
        f"{{{{- '<image>' if part['type'] == 'image' else '{blank}' ~ part['text'] -}}}}"
        "{%- endfor -%}{%- endfor -%}"
    )


def _fault(name: str, revision: str | None, known: tuple[str, ...], rule: str) -> list[str]:
    """What speaks against taking this model for a part, unless its kind is known."""
    try:
        found = transformers.AutoConfig.from_pretrained(name, revision=revision).model_type
    except (OSError, ValueError) as error:
        return [f"no model in {name!r} ({first_line(error)})"]
    return [] if found in known else [f"{name!r} is a {found!r} model: {rule}"]


def _load(kind: Any, name: str, revision: str | None) -> Any:
    # Also from .bin files, in which both of LLaVA's own parts come: transformers reads no code from them.
    model, info = kind.from_pretrained(name, revision=revision, dtype=best_dtype(), output_loading_info=True)
    # A CLIP with its text half has weights left over.
    check_weights(model, {"missing_keys": info["missing_keys"]}, place(name, revision))
    return model


def _short(name: str | Path) -> str:
    """A Hub name as it is; of a folder the last part, since its path says nothing on another machine."""
    return Path(name).name if Path(name).is_dir() else str(name)
