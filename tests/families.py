"""Twins of the families that `vlm_sft.tools.tiny` does not build: the real classes, sizes shrunk by the library.

`build(name)` gives (model, processor); `save(name, folder)` writes both; `python tests/families.py` builds each, and
says how large it is. Another family is one entry of `FAMILIES`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, GenerationConfig

from vlm_sft.tools import tiny
from vlm_sft.tools.shrink import random_model, shrink

_hf: Any = transformers

TEXTS = (
    "What is shown here? A seven, a cat and two red cars. How many? 0 1 2 3 4 5 6 7 8 9 yes no left right",
    "system user assistant model USER: ASSISTANT: Human: User: Assistant: Be brief. Hello world\n\n",
    "<think>\nI look at the image.\n</think>\n\nélan naïve 日本語 テスト 🙂 привет мир",
)


@dataclass(frozen=True)
class Family:
    """What a family has beside its shrunk default config. Strings of tokens hold several, separated by spaces (~ is a
    space inside of one); the keys of `config` are paths."""

    template: str
    special: Mapping[str, str]  # bos_token, eos_token, ... of the tokenizer
    processor: str  # its class begins so; "A B C D": those of processor, image, video and audio processor, - is none
    names: Mapping[str, str] = field(default_factory=dict)  # further attributes of the tokenizer -> token
    tokens: str = ""  # further tokens
    stop: str = ""  # tokens that end generation, where not EOS alone
    ids: Mapping[str, str] = field(default_factory=dict)  # field of the config -> token
    image: Mapping[str, Any] = field(default_factory=dict)  # settings of the image processor
    video: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the processor
    config: Mapping[str, Any] = field(default_factory=dict)
    add_bos: bool = False  # the tokenizer writes it
    edge: int = 32  # of images, in pixels
    patch: int = 8


def shipped(name: str, *changes: tuple[str, str]) -> str:
    """The family's own template, as trl ships it, with texts exchanged."""
    text = (files("trl") / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    for old, new in changes:
        assert old in text, (name, old)
        text = text.replace(old, new)
    return text


def chat(image: str, user: str, assistant: str, end: str = "", *, after: str = "", **other: str) -> str:
    """A template: an answer is `assistant`, its words, `end` and `after`; a question, `user`, its words and `asked`
    (else as an answer ends); `system` (else `user`) begins a system message, `start` the text."""
    heads = {"user": user, "assistant": assistant, "system": other.get("system", user)}
    asked = other.get("asked", end + after)
    ends = {"user": asked, "assistant": end + after, "system": asked}
    return (
        f"{{%- set heads = {json.dumps(heads)} -%}}{{%- set ends = {json.dumps(ends)} -%}}"
        f"{{{{- {json.dumps(other.get('start', ''))} -}}}}"
        "{%- for message in messages -%}{{- heads[message['role']] -}}"
        "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
        "{%- for part in message['content'] -%}"
        f"{{%- if part['type'] == 'image' -%}}{{{{- {json.dumps(image)} -}}}}"
        "{%- else -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
        "{{- ends[message['role']] -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- heads['assistant'] -}}{%- endif -%}"
    )


def roles(image: str, head: str, end: str, **other: str) -> str:
    """A template whose turns begin alike, but for the role."""
    return chat(image, head.format("user"), head.format("assistant"), end, system=head.format("system"), **other)


def rope(*section: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4} | ({"mrope_section": list(section)} if section else {}) | more


IM = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
S = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
BOS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
L3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
COHERE = {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>"}
DEEPSEEK = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>", "pad_token": "<pad>"}  # noqa: RUF001
IMAGE = {"image_token": "<image>"}
BOX = {"height": 32, "width": 32}
CHATML = "<|im_start|>{}\n"
COHERE_TURNS = "<|START_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|>"
PATCHES = {"size": {"shortest_edge": 512, "longest_edge": 4096}, "patch_size": 8}  # edges are numbers of pixels
CLIP = {"size": {"shortest_edge": 32}, "crop_size": BOX}
LLAVA = {"patch_size": 8, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
PINPOINTS = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
TILES = " ".join(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))

VISION_IDS = {f"vision_{end}_token_id": f"<|vision_{end}|>" for end in ("start", "end")}
QWEN: dict[str, Any] = {
    "special": IM,
    "processor": "Qwen3VL Qwen2VL Qwen3VL -",
    "names": {f"{kind}_token": f"<|{kind}_pad|>" for kind in ("image", "video")},
    "tokens": "<|im_start|> <|vision_start|> <|vision_end|>",
    "stop": "<|im_end|> <|endoftext|>",
    "ids": VISION_IDS | {"video_token_id": "<|video_pad|>"},
    "image": PATCHES,
    "video": {"patch_size": 8},
}
QWEN_GRID = {"vision_config.num_position_embeddings": 256}
QWEN3_5 = QWEN_GRID | {"text_config.rope_parameters": rope(11, 11, 10, partial_rotary_factor=0.25)}
GLM_IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
GLM: dict[str, Any] = {
    "special": {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"},
    "names": {"image_token": "<|image|>", "video_token": "<|video|>"},
    "tokens": "[gMASK] <sop> <|user|> <|assistant|> <|system|> <|begin_of_image|> <|end_of_image|>",
    "stop": "<|endoftext|> <|user|>",
    "ids": {"image_start_token_id": "<|begin_of_image|>", "image_end_token_id": "<|end_of_image|>"}
    | {"video_token_id": "<|video|>"},
    "image": PATCHES,
    "video": {"patch_size": 8},
    "config": {"text_config.rope_parameters": rope(8, 12, 12, partial_rotary_factor=0.5)},
}
_text = "{%- if item is mapping and item.type == 'text' -%}"
GLM_THINKING = shipped(
    "glm4moe", (_text, "{%- if item.type == 'image' -%}{{- '" + GLM_IMAGE + "' }}" + _text.replace("- if", "- elif"))
)
GEMMA: dict[str, Any] = {
    "special": BOS,
    "names": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    "tokens": "<start_of_turn> <end_of_turn>",
    "stop": "<eos> <end_of_turn>",
    "settings": {"image_seq_length": 4},
}
GEMMA_IDS = {"boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>"}
SOUND = {"audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"}
SAM = {"image_size": 64, "patch_size": 16, "window_size": 4}
DEEPSEEK_CHAT: dict[str, Any] = {"asked": "\n\n", "system": "", "start": DEEPSEEK["bos_token"]}
PIPES = chat("<image>\n", "<|User|>: ", "<|Assistant|>: ", DEEPSEEK["eos_token"], **DEEPSEEK_CHAT)
GRANITE = "<|start_of_role|>{}<|end_of_role|>"
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
HEADER_TOKENS = "<|start_header_id|> <|end_header_id|> <|eot_id|>"
LLAMA4 = "<|header_start|>{}<|header_end|>\n\n"

FAMILIES: dict[str, Family] = {
    # Grids of patches, squares of 2 x 2 merged.
    "qwen3_5": Family(shipped("qwen3_5_nothink"), **QWEN, config=QWEN3_5),
    "qwen3_5_moe": Family(shipped("qwen3_5_think"), **QWEN, config=QWEN3_5),
    "qwen3_vl_moe": Family(shipped("qwen3_vl"), **QWEN, config=QWEN_GRID),
    "glm46v": Family(GLM_THINKING, processor="Glm46V Glm46V Glm46V -", **GLM),
    "glm4v_moe": Family(
        chat(
            GLM_IMAGE,
            "<|user|>\n",
            "<|assistant|>\n",
            after="\n",
            asked="",
            system="<|system|>\n",
            start="[gMASK]<sop>",
        ),
        processor="Glm4v Glm4v Glm4v -",
        **GLM,
    ),
    "paddleocr_vl": Family(
        chat(
            *("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>", "User: ", "Assistant:\n", "</s>"),
            **{"asked": "\n", "system": "", "start": "<|begin_of_sentence|>"},
        ),
        {"bos_token": "<|begin_of_sentence|>", "eos_token": "</s>", "pad_token": "<unk>"},
        "PaddleOCRVL",
        {"image_token": "<|IMAGE_PLACEHOLDER|>"},
        "<|IMAGE_START|> <|IMAGE_END|>",
        ids={"vision_start_token_id": "<|IMAGE_START|>", "vision_end_token_id": "<|IMAGE_END|>"},
        image=PATCHES,
        config={"text_config.rope_parameters": rope(2, 3, 3)},
    ),
    "hunyuan_vl": Family(
        chat("<|im_s|><|im_p|><|im_e|>", "", "", "<|assistant|>", asked="<|user|>", start="<|begin|>"),
        {"bos_token": "<|begin|>", "eos_token": "<|assistant|>", "pad_token": "<pad>"},
        "HunYuanVL",
        {"image_token": "<|im_p|>", "image_start_token": "<|im_s|>", "image_end_token": "<|im_e|>"},
        "<|user|>",
        ids={"image_token_id": "<|im_p|>", "im_start_id": "<|im_s|>", "im_end_id": "<|im_e|>"},
        image=PATCHES,
        config={"text_config.rope_parameters": rope(16, 16, 16, 16), "text_config.head_dim": 128}
        | {"vision_config.max_image_size": 256},
    ),
    # Squares that a tower of fixed size sees, whole or in tiles.
    "vipllava": Family(
        chat("<image>\n", "###Human: ", "###Assistant:", system=""),
        *(S, "Llava CLIP - -", IMAGE),
        image=CLIP,
        settings=LLAVA,
        add_bos=True,
    ),
    "llava_next_video": Family(
        chat("<image>\n", "USER: ", "ASSISTANT:", after=" ", system=""),
        *(S, "LlavaNextVideo LlavaNext LlavaNextVideo -", IMAGE | {"video_token": "<video>"}),
        ids={"video_token_index": "<video>", "video_token_id": "<video>"},
        image=CLIP | PINPOINTS,
        video=CLIP,
        settings=LLAVA,
        config=PINPOINTS,
        add_bos=True,
    ),
    "fast_vlm": Family(
        roles("<image>", CHATML, "<|im_end|>", after="\n"),
        *(IM, "Llava CLIP - -", IMAGE, "<|im_start|>"),
        image={"size": {"shortest_edge": 128}, "crop_size": {"height": 128, "width": 128}},
        settings={"patch_size": 64, "vision_feature_select_strategy": "full"},
        config={
            "vision_config.hidden_size": 128,
            "vision_config.model_args": {
                **{"inference_mode": False, "layers": [1, 1, 1, 1, 1], "embed_dims": [32, 32, 32, 64, 64]},
                **{"mlp_ratios": [2, 2, 2, 2, 2]},
            },
        },
    ),
    "mistral3": Family(
        chat("[IMG]", "[INST]", "", "</s>", asked="[/INST]", system="[SYSTEM_PROMPT]", start="<s>"),
        *(S, "Pixtral Pixtral - -", {}, "[INST] [/INST] [SYSTEM_PROMPT] [IMG] [IMG_BREAK] [IMG_END]"),
        image={"size": {"longest_edge": 64}, "patch_size": 16},
        settings={"patch_size": 8, "spatial_merge_size": 2},
        edge=64,
    ),
    "aya_vision": Family(
        chat(
            *("<image>", "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"),
            COHERE["eos_token"],
            **{"system": "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>", "start": "<BOS_TOKEN>"},
        ),
        *(COHERE, "AyaVision GotOcr2 - -", {}),
        f"{COHERE_TURNS} <image> <|START_OF_IMG|> <|END_OF_IMG|> <|IMG_PATCH|> <|IMG_LINE_BREAK|> TILE_GLOBAL "
        + " ".join(f"TILE_{tile}" for tile in range(1, 13)),
        image={"size": BOX, "crop_to_patches": True, "min_patches": 1, "max_patches": 4},
        settings={"patch_size": 8, "img_size": 32, "downsample_factor": 2},
    ),
    "cohere2_vision": Family(
        chat(
            *("<|IMG_PATCH|>", "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"),
            COHERE["eos_token"],
            **{"system": "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>", "start": "<BOS_TOKEN>"},
        ),
        *(COHERE, "Cohere2Vision"),
        {"image_token": "<|IMG_PATCH|>", "img_line_break_token": "<|IMG_LINE_BREAK|>"}
        | {"boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>"},
        COHERE_TURNS,
        image={"size": BOX, "patch_size": 2, "downsample_factor": 2, "max_patches": 4},
        config={"downsample_factor": 2},
    ),
    "deepseek_vl": Family(
        chat("<image_placeholder>", "User: ", "Assistant:", DEEPSEEK["eos_token"], **DEEPSEEK_CHAT),
        *(DEEPSEEK, "DeepseekVL", {"image_token": "<image_placeholder>"}),
        image={"size": BOX, "min_size": 8},
        settings={"num_image_tokens": 16},
    ),
    "deepseek_vl_hybrid": Family(
        chat("<image_placeholder>", "User: ", "Assistant:", DEEPSEEK["eos_token"], **DEEPSEEK_CHAT),
        *(DEEPSEEK, "DeepseekVLHybrid", {"image_token": "<image_placeholder>"}),
        image={"size": BOX, "min_size": 8, "high_res_size": {"height": 64, "width": 64}},
        settings={"num_image_tokens": 16},
        config={f"high_res_vision_config.{name}": value for name, value in SAM.items()},
    ),
    "janus": Family(
        chat("<image_placeholder>\n", "<|User|>: ", "<|Assistant|>:", DEEPSEEK["eos_token"], asked="\n\n", system=""),
        *(DEEPSEEK, "Janus"),
        {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"},
        "<|User|> <|Assistant|>",
        ids={"image_token_id": "<image_placeholder>"},
        image={"size": BOX, "min_size": 8},
        settings={"num_image_tokens": 16},
        config={
            "vision_config.num_image_tokens": 16,
            "vq_config.num_embeddings": 32,
            "vq_config.channel_multiplier": [1, 1],
            "vq_config.num_res_blocks": 1,
            "vq_config.num_patches": 16,
        },
        add_bos=True,
    ),
    "ovis2": Family(
        roles("<image>\n", CHATML, "<|im_end|>", after="\n"),
        *(IM, "Ovis2", {}),
        "<|im_start|> <image> <IMG_ATOM> <IMG_START> <IMG_GRID> <IMG_COL> <IMG_ROW> <IMG_END>",
        ids={"image_token_id": "<IMG_ATOM>"},
        image={"size": BOX, "crop_to_patches": False},
        settings={"image_seq_length": 4},
        config={"vision_config.hidden_stride": 2, "vision_config.vocab_size": 64},
    ),
    "lfm2_vl": Family(
        shipped("lfm2_2_5_vl"),
        *(IM | {"bos_token": "<|startoftext|>"}, "Lfm2Vl"),
        IMAGE
        | {"image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"}
        | {"image_thumbnail_token": "<|img_thumbnail|>"},
        "<|im_start|> "
        + " ".join(f"<|img_row_{row}_col_{column}|>" for row in (1, 2, 3, 4) for column in (1, 2, 3, 4)),
        image={"encoder_patch_size": 8, "tile_size": 32, "max_num_patches": 64}
        | {"min_image_tokens": 4, "max_image_tokens": 16, "min_tiles": 2, "max_tiles": 4},
        config={"text_config.block_multiple_of": 64},
    ),
    "granite_docling": Family(
        roles("<image>", GRANITE, "<|end_of_text|>", after="\n"),
        {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<pad>"},
        *("GraniteDocling", IMAGE),
        f"{TILES} <fake_token_around_image> <global-img> <|start_of_role|> <|end_of_role|>",
        image={"size": BOX, "max_patches": 4},
        settings={"image_seq_len": 4},
        config={
            **{"vision_config.scale_factor": 2, "vision_config.use_fine_route": False},
            # Made for widths in the thousands; at 64 the images would hardly be seen.
            **{"text_config.attention_multiplier": 0.25, "text_config.residual_multiplier": 1.0},
            **{"text_config.embedding_multiplier": 1.0, "text_config.logits_scaling": 1.0},
        },
    ),
    "idefics2": Family(
        chat("<image>", "User:", "Assistant:", "<end_of_utterance>", after="\n", system=""),
        *(S, "Idefics2", {}, "<image> <fake_token_around_image> <end_of_utterance>"),
        image={"size": {"longest_edge": 32, "shortest_edge": 16}},
        settings={"image_seq_len": 4},
        config={"perceiver_config.resampler_n_latents": 4},
        stop="</s> <end_of_utterance>",
        add_bos=True,
    ),
    "mllama": Family(
        roles("<|image|>", HEADER, "<|eot_id|>", start="<|begin_of_text|>"),
        *(L3, "Mllama", {"image_token": "<|image|>"}, f"{HEADER_TOKENS} <|python_tag|>"),
        image={"size": BOX, "max_image_tiles": 4},
    ),
    "llama4": Family(
        roles("<|image|>", LLAMA4, "<|eot|>", start="<|begin_of_text|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>", "pad_token": "<|finetune_right_pad|>"},
        *("Llama4", {}),
        "<|header_start|> <|header_end|> <|image|> <|image_start|> <|image_end|> <|patch|> <|tile_x_separator|> "
        "<|tile_y_separator|>",
        ids={"boi_token_index": "<|image_start|>", "eoi_token_index": "<|image_end|>"}
        | {"image_token_id": "<|patch|>", "image_token_index": "<|patch|>"},
        image={"size": BOX, "max_patches": 4, "resize_to_max_canvas": False},
        settings={"patch_size": 8, "pixel_shuffle_ratio": 0.5},
    ),
    "perception_lm": Family(
        roles("<|image|>", HEADER, "<|eot_id|>", start="<|begin_of_text|>"),
        *(L3, "PerceptionLM PerceptionLM PerceptionLM -", {"image_token": "<|image|>", "video_token": "<|video|>"}),
        HEADER_TOKENS,
        image={"tile_size": 32, "max_num_tiles": 1},
        settings={"patch_size": 8, "pooling_ratio": 2},
        config={
            "projector_pooling_ratio": 2,
            "vision_config.architecture": "vit_pe_core_tiny_patch16_384",
            "vision_config.do_pooling": False,
            "vision_config.num_classes": 0,
            "vision_config.model_args": {
                **{"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": [32, 32], "patch_size": 8},
                **{"global_pool": "", "use_post_transformer_norm": False, "init_values": 0.1, "ref_feat_shape": [4, 4]},
            },
        },
    ),
    "gemma3n": Family(
        shipped("gemma3", ("<start_of_image>", "<image_soft_token>")),
        **GEMMA | {"names": GEMMA["names"] | SOUND},
        processor="Gemma3n Siglip - Gemma3n",
        image={"size": {"height": 64, "width": 64}},
        config={
            "vision_soft_tokens_per_image": 4,
            **{"vision_config.architecture": "test_efficientnet", "vision_config.hidden_size": 256},
            **{"vision_config.model_args": {}, "vision_config.do_pooling": False},
        },
    ),
    "gemma4": Family(
        shipped("gemma4_v5"),
        BOS,
        "Gemma4 Gemma4 Gemma4 Gemma4",
        {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
        | {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"},
        "<|turn> <turn|> <|channel> <channel|> <|think|> <|tool_response> <|video|>",
        "<eos> <turn|>",
        ids={"video_token_id": "<|video|>", "eoa_token_index": "<audio|>"},
        image={"max_soft_tokens": 70},
        settings={"image_seq_length": 70},
        config={
            "vision_config.model_type": "gemma4_vision",
            "vision_config.position_embedding_size": 128,
            "text_config.num_kv_shared_layers": 12,
            "text_config.use_bidirectional_attention": "vision",
        },
        patch=16,
    ),
    "deepseek_ocr2": Family(
        PIPES,
        *(DEEPSEEK, "DeepseekOcr2", IMAGE, "<|User|> <|Assistant|>"),
        image={"size": {"height": 768, "width": 768}, "tile_size": 768, "crop_to_patches": False},
        config={
            "vision_config.sam_config.image_size": 768,
            "vision_config.sam_config.patch_size": 16,
            "text_config.mlp_layer_types": ["dense", *["sparse"] * 31],
            **{"text_config.num_experts_per_tok": 6, "text_config.n_group": 1, "text_config.topk_group": 1},
        },
    ),
    "unlimited_ocr": Family(
        PIPES,
        *(DEEPSEEK, "UnlimitedOcr", IMAGE, "<|User|> <|Assistant|>"),
        image={"size": {"height": 128, "width": 128}, "tile_size": 64},
        config={f"vision_config.sam_config.{name}": value for name, value in (SAM | {"image_size": 128}).items()}
        | {"vision_config.encoder_config.image_size": 64, "vision_config.encoder_config.patch_size": 16},
    ),
    # To be refused: the encoder reads the answer, text that is not reported, no chat.
    "t5gemma2": Family(
        shipped("gemma3"),
        **GEMMA,
        processor="Gemma3 Gemma3 - -",
        ids=GEMMA_IDS | {"image_token_index": "<image_soft_token>", "image_token_id": "<image_soft_token>"},
        image={"size": BOX},
        config={"encoder.mm_tokens_per_image": 4, "encoder.vision_config.vision_use_head": False},
    ),
    "emu3": Family(
        chat("<image>", "USER: ", "ASSISTANT: ", "<|extra_204|>", asked=" ", system=""),
        {"bos_token": "<|extra_203|>", "eos_token": "<|extra_204|>", "pad_token": "<|endoftext|>"},
        "Emu3",
        IMAGE
        | {"boi_token": "<|image~start|>", "eoi_token": "<|image~end|>"}
        | {"image_wrapper_token": "<|image~token|>", "eof_token": "<|extra_201|>"},
        "<|extra_200|> " + " ".join(f"<|visual~token~{code:06d}|>" for code in range(16)),
        image={"min_pixels": 512, "max_pixels": 4096, "spatial_factor": 8},
        config={
            **{"vq_config.num_res_blocks": 1, "vq_config.codebook_size": 16},
            "vq_config.channel_multiplier": [1, 1, 1, 2],
        },
    ),
    "paligemma": Family(
        chat("<image>", "user: ", "assistant: ", "<eos>", asked="\n"),
        *(BOS, "PaliGemma Siglip - -", IMAGE),
        image={"size": BOX, "image_seq_length": 16},
        config={"vision_config.vision_use_head": False},
    ),
}
TEN = tuple(name for name in tiny.FAMILIES if name not in FAMILIES)
"""The families that every test of a module goes through."""


def _tokenizer(family: Family) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=words.alphabet(), show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.decoder = decoders.ByteLevel()
    named = {name: token.replace("~", " ") for name, token in {**family.special, **family.names}.items()}
    more = [token.replace("~", " ") for token in family.tokens.split() if token not in named.values()]
    tokenizer = _hf.TokenizersBackend(
        tokenizer_object=backend, **named, extra_special_tokens=more, add_bos_token=family.add_bos
    )
    if "<think>" in family.template:
        tokenizer.add_tokens(["<think>", "</think>"])  # words of their own, as in Qwen's files, not control tokens
    return tokenizer


def processor_of(name: str) -> Any:
    family = FAMILIES[name]
    classes = family.processor.split() if " " in family.processor else [family.processor] * 2 + ["-", "-"]
    of_part = ("ImageProcessor", "VideoProcessor", "AudioFeatureExtractor")
    names = ("image_processor", "video_processor", "feature_extractor")
    settings = (family.image, family.video, {})
    parts = {
        part: getattr(_hf, start + ending)(**given)
        for part, start, ending, given in zip(names, classes[1:], of_part, settings, strict=True)
        if start != "-"
    }
    make = getattr(_hf, f"{classes[0]}Processor")
    return make(**parts, tokenizer=_tokenizer(family), chat_template=family.template, **family.settings)


def config_of(name: str, processor: Any) -> Any:
    """The family's default config with the grid of its twin's images and the ids of its tokenizer, shrunk."""
    family, tokenizer = FAMILIES[name], processor.tokenizer
    image = getattr(processor, "image_token_id", None)
    ids = {f"image_token_{end}": image for end in ("id", "index") if image is not None}
    ids |= {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    ids |= {key: tokenizer.convert_tokens_to_ids(token) for key, token in family.ids.items()}
    rows = -(-len(tokenizer) // 64) * 64 + 64

    def fit(key: str, value: Any) -> Any:
        if isinstance(value, dict) and key.endswith(("_config", "coder")):
            return {inner: fit(inner, part) for inner, part in value.items()}
        if key in ("image_size", "patch_size") and value:
            edge = family.edge if key == "image_size" else family.patch
            return [edge] * len(value) if isinstance(value, (list, tuple)) else edge
        if key.startswith("vocab_size"):
            return rows
        if key == "vocabulary_map":
            return tokenizer.get_vocab()
        strange = key.endswith(("token_id", "token_index")) and isinstance(value, int)
        return ids.get(key, rows - 1 if strange else value)  # the last row is no token's

    default = AutoConfig.for_model(name)
    settings = {key: fit(key, value) for key, value in default.to_dict().items()} | {
        key: ids[key] for key in family.ids
    }
    return type(default)(**shrink(_with(settings, family.config)))


def _with(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, those at the paths changed; a config that is not there has its model_type's defaults."""
    for path, value in changes.items():
        level, *inner = path.split(".", 1)
        if inner == ["model_type"]:
            value = AutoConfig.for_model(value).to_dict()
        elif inner:
            value = _with(settings[level], {inner[0]: value})
        settings = settings | {level: value}
    return settings


def build(name: str, *, seed: int = 0) -> tuple[Any, Any]:
    """A random model in float32 and evaluation mode, and its processor."""
    processor = processor_of(name)
    model, tokenizer = random_model(config_of(name, processor), seed), processor.tokenizer
    stops = tokenizer.convert_tokens_to_ids((FAMILIES[name].stop or tokenizer.eos_token).split())
    ends = {"eos_token_id": stops if len(stops) > 1 else stops[0], "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, **ends)
    return model, processor


def save(name: str, folder: str | Path, *, seed: int = 0) -> Path:
    """The folder, with what `build` makes."""
    for part in build(name, seed=seed):
        part.save_pretrained(folder)
    return Path(folder)


if __name__ == "__main__":
    for each in sys.argv[1:] or FAMILIES:
        print(f"{each:20s}{build(each)[0].num_parameters():12,d}", flush=True)
