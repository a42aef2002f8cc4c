"""A small random twin of each model family, built offline: for trying a recipe, and for tests.

The classes are the real ones; only sizes, weights and the vocabulary, which is trained on the spot, are small.
`python -m vlm_sft tiny llava15 twins/llava15` writes a folder that `from_pretrained` reads. `--like MODEL` makes a twin
of any model: its own processor, template and vocabulary before a random model of its own kind, so rows are as long.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from vlm_sft.models.loading import load_processor, read_config
from vlm_sft.tools.shrink import random_model, shrink, unchanged

_hf: Any = transformers  # partly typed

# Words of the templates and of messages, runs of line breaks, and scripts beyond ASCII.
_TEXTS = (
    "USER: What is in this picture? ASSISTANT: The digit is seven. Hello world, a cat and a dog.",
    "User: Describe the image. Assistant: It shows 12 red cars; and <b>bold</b> text\n\n\n",
    "system user assistant model You are a helpful assistant. [INST] [/INST] <<SYS>>\n\n<</SYS>>\n\n",
    "How many are there? There are two. yes no left right above below 0 1 2 3 4 5 6 7 8 9\n",
    "élan naïve 日本語 テスト 🙂 привет мир",
)

_SMOLLM_WORDS = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
_LLAMA3_REGEX = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_WORDS = [
    pre_tokenizers.Split(_LLAMA3_REGEX, "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
]


def _bpe(texts: Sequence[str], words: Any, *, reserved: Sequence[str], **settings: Any) -> dict[str, Any]:
    """Merges, and a vocabulary of at most 1,024 entries that begins with the reserved ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words
    settings |= {"special_tokens": list(reserved), "vocab_size": 1024, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**settings))
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def _byte_level(texts: Sequence[str]) -> dict[str, Any]:
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _bpe(texts, words, reserved=(), initial_alphabet=words.alphabet())


def _byte_fallback(texts: Sequence[str], *reserved: str) -> dict[str, Any]:
    """Words begin with a visible space, runs of line breaks are words, unknown characters become bytes."""
    words = [pre_tokenizers.Split(Regex("\n+"), "isolated"), pre_tokenizers.Split("▁", "merged_with_next")]
    reserved += tuple(f"<0x{byte:02X}>" for byte in range(256))
    return _bpe([text.replace(" ", "▁") for text in texts], pre_tokenizers.Sequence(words), reserved=reserved)


def _llama(texts: Sequence[str], **tokens: Any) -> Any:
    """As in the files of llava-1.5-hf: a normalizer writes the visible spaces, and nothing splits."""
    parts = _byte_fallback([f" {text}" for text in texts], "<unk>", "<s>", "</s>")
    tokens |= {"pad_token": "<pad>", "add_bos_token": True, "padding_side": "left"}
    backend = Tokenizer(models.BPE(**parts, fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces, strip = decoders.Replace("▁", " "), decoders.Strip(content=" ", left=1, right=0)
    backend.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    tokens |= {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return _hf.TokenizersBackend(tokenizer_object=backend, **tokens)


def _gemma(texts: Sequence[str], **tokens: Any) -> Any:
    parts = _byte_fallback(texts, "<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    return _hf.GemmaTokenizer(**parts, add_bos_token=True, **tokens)


def _qwen(texts: Sequence[str], **tokens: Any) -> Any:
    tokens |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return _hf.Qwen2Tokenizer(**_byte_level(texts), **tokens)


def _backend(words: list[Any], texts: Sequence[str], **tokens: Any) -> Any:
    backend = Tokenizer(models.BPE(**_byte_level(texts)))
    backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    backend.decoder = decoders.ByteLevel()
    return _hf.TokenizersBackend(tokenizer_object=backend, **tokens)


_Settings = dict[str, dict[str, Any]]


def _settings(family: str, *, hidden: int, layers: int, edge: int, patch: int) -> _Settings:
    """Arguments of image, video (processors), processor, and of the configurations vision, text, config."""
    shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": hidden // 16}
    vision = shape | {"image_size": edge, "patch_size": patch}
    square = {"size": {"height": edge, "width": edge}}
    wider = [[edge, 2 * edge], [2 * edge, edge], [2 * edge, 2 * edge]]
    pooled = (edge // patch // 2) ** 2  # tokens of an image (or tile) whose squares of 2 x 2 patches become one each
    siglip = vision | {"model_type": "siglip_vision_model", "vision_use_head": False}
    sliding = ["sliding_attention"] * (layers - 1) + ["full_attention"]

    def clip(**tilings: Any) -> _Settings:
        select = {"vision_feature_select_strategy": "default"}
        return {
            "image": {"size": {"shortest_edge": edge}, "crop_size": square["size"], **tilings},
            # One layer more than asked for: features are taken before the last, which never gets a gradient.
            "vision": vision | {"model_type": "clip_vision_model", "num_hidden_layers": layers + 1},
            "processor": select | {"patch_size": patch, "num_additional_image_tokens": 1},
            "config": select | {"vision_feature_layer": -2, **tilings},
        }

    def qwen(mrope: list[int], rope: dict[str, Any], text: Any = None, **others: Any) -> _Settings:
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": mrope, **rope}
        return {
            "image": {"patch_size": patch, "min_pixels": edge**2 // 2, "max_pixels": (2 * edge) ** 2},
            "video": {"patch_size": patch},
            "vision": vision | others,
            "text": {"head_dim": 16, "rope_parameters": rope, **(text or {})},
        }

    onevision, select = {"image_grid_pinpoints": [[edge, edge], *wider]}, {"vision_feature_select_strategy": "full"}
    windows = {"window_size": 4 * patch, "fullatt_block_indexes": [layers - 1]}
    linear: Any = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    linear |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention"] * (layers - 1) + ["full_attention"]}
    grid = {"num_position_embeddings": 256}
    taps = {"deepstack_visual_indexes": [*range(layers)], **grid}
    idefics3: _Settings = {
        "image": {"size": {"longest_edge": 2 * edge}, "max_image_size": {"longest_edge": edge}},
        "vision": vision,
        "processor": {"image_seq_len": pooled},
        "config": {"scale_factor": 2},
    }
    families: dict[str, _Settings] = {
        "llava15": clip(),
        "llava_next": clip(image_grid_pinpoints=wider),
        "llava_onevision": {
            "image": square | onevision,
            "video": square,
            "vision": siglip,
            "processor": select | {"num_image_tokens": (edge // patch) ** 2},
            "config": select | {"vision_feature_layer": -1} | onevision,
        },
        "qwen2_vl": qwen([2, 3, 3], {}, embed_dim=hidden, mlp_ratio=2),
        "qwen2_5_vl": qwen([2, 3, 3], {}, out_hidden_size=hidden, **windows),
        "qwen3_vl": qwen([3, 3, 2], {"mrope_interleaved": True}, out_hidden_size=hidden, **taps),
        "qwen3_5": qwen([2, 1, 1], {"partial_rotary_factor": 0.5}, linear, out_hidden_size=hidden, **grid),
        "idefics3": idefics3,
        "smolvlm": idefics3 | {"video": {key: {"longest_edge": edge} for key in ("size", "max_image_size")}},
        "gemma3": {
            "image": square,
            "vision": siglip,
            "processor": {"image_seq_length": pooled},
            "config": {"mm_tokens_per_image": pooled},
            "text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "layer_types": sliding},
        },
        "gemma4": {
            "image": {"patch_size": patch, "max_soft_tokens": 70},
            "video": {"patch_size": patch},
            "vision": shape
            | {"model_type": "gemma4_vision", "patch_size": patch, "position_embedding_size": 128, "head_dim": 16}
            | {"num_key_value_heads": hidden // 16},
            "processor": {"image_seq_length": 70, "feature_extractor": _hf.Gemma4AudioFeatureExtractor()},
            "text": {"head_dim": 16, "global_head_dim": 32, "sliding_window": 16, "layer_types": sliding}
            | {"hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 2048},
        },
        "internvl": {
            "image": square | {"crop_to_patches": True, "min_patches": 1, "max_patches": 4},
            "video": square,
            "vision": vision | {"image_size": [edge] * 2, "patch_size": [patch] * 2},
            "processor": {"image_seq_length": pooled},
            "config": {"image_seq_length": pooled, "downsample_ratio": 0.5},
        },
    }
    settings = families[family]
    text = shape | {"num_key_value_heads": hidden // 32, "max_position_embeddings": 4096}
    return settings | {"text": text | settings.get("text", {})}


@dataclass(frozen=True)
class _Tokens:
    """A tokenizer and what it knows next to the tokens of its class; strings hold several, separated by spaces."""

    make: Callable[..., Any]
    stop: str  # these end generation
    ids: dict[str, str]  # field of the configuration -> token
    names: dict[str, str] = field(default_factory=dict)  # attribute of the tokenizer -> token
    others: str = ""


_IMAGE = {"image_token_id": "<image>"}
_TILES = " ".join(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_GEMMA_NAMES = {"image": "<image_soft_token>", "boi": "<start_of_image>", "eoi": "<end_of_image>"}

_LLAMA = _Tokens(_llama, "</s>", _IMAGE)
_QWEN_IDS = {f"{kind}_token_id": f"<|{kind}_pad|>" for kind in ("image", "video")}
_QWEN_IDS |= {f"vision_{end}_token_id": f"<|vision_{end}|>" for end in ("start", "end")}
_QWEN = _Tokens(_qwen, "<|im_end|> <|endoftext|>", _QWEN_IDS, others="<|im_start|> <|vision_pad|>")
_ONEVISION = replace(_QWEN, ids=_IMAGE | {"video_token_id": "<video>"}, others="<|im_start|>")
_INTERNVL_NAMES = {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
_INTERNVL_NAMES |= {"start_image_token": "<img>", "end_image_token": "</img>"}
_INTERNVL = _Tokens(_qwen, "<|im_end|>", {"image_token_id": "<IMG_CONTEXT>"}, _INTERNVL_NAMES, "<|im_start|>")
_SMOLVLM = _Tokens(
    partial(_backend, _SMOLLM_WORDS),
    "<end_of_utterance>",
    _IMAGE,
    {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    | {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    | {"end_of_utterance_token": "<end_of_utterance>", "global_image_token": "<global-img>"},
    f"<|endoftext|> {_TILES}",
)
_IDEFICS3 = _Tokens(
    partial(_backend, _LLAMA3_WORDS, add_bos_token=True),
    "<|end_of_text|> <end_of_utterance>",
    _IMAGE,
    {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"},
    f"<|eot_id|> <end_of_utterance> <fake_token_around_image> <global-img> {_TILES}",
)
_GEMMA3 = _Tokens(
    _gemma,
    "<eos> <end_of_turn>",
    {f"{name}_token_index": token for name, token in _GEMMA_NAMES.items()},
    {f"{name}_token": token for name, token in _GEMMA_NAMES.items()},
    "<start_of_turn> <end_of_turn>",
)
_GEMMA4_NAMES = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
_GEMMA4_NAMES |= {"audio_token": "<|audio|>", "boa_token": "<|audio>"}
_GEMMA4 = _Tokens(
    _gemma,
    "<eos> <turn|>",
    {f"{name}_id": token for name, token in _GEMMA4_NAMES.items()}
    | {"video_token_id": "<|video|>", "eoa_token_index": "<audio|>"},
    _GEMMA4_NAMES | {"eoa_token": "<audio|>"},
    "<|turn> <turn|> <|channel> <channel|> <|think|>",
)


@dataclass(frozen=True)
class _Family:
    classes: str  # the names of its classes begin with this
    language: str  # model_type of the language model
    tokens: _Tokens
    template: str  # file in templates, or in trl/chat_templates
    image: str = ""  # the name of the image (video) processor begins with this, where not with `classes`
    video: str = ""
    processor: str = ""


_FAMILIES = {
    "llava15": _Family("Llava", "llama", _LLAMA, "llava15", image="CLIP"),
    "llava_next": _Family("LlavaNext", "mistral", _LLAMA, "llava_next"),
    "llava_onevision": _Family("LlavaOnevision", "qwen2", _ONEVISION, "llava_onevision"),
    "qwen2_vl": _Family("Qwen2VL", "qwen2_vl_text", _QWEN, "qwen2_5_vl"),
    "qwen2_5_vl": _Family("Qwen2_5_VL", "qwen2_5_vl_text", _QWEN, "qwen2_5_vl", image="Qwen2VL", video="Qwen2VL"),
    "qwen3_vl": _Family("Qwen3VL", "qwen3_vl_text", _QWEN, "qwen3_vl", image="Qwen2VL"),
    "qwen3_5": _Family("Qwen3_5", "qwen3_5_text", _QWEN, "qwen3_5_think", "Qwen2VL", "Qwen3VL", "Qwen3VL"),
    "smolvlm": _Family("SmolVLM", "llama", _SMOLVLM, "smolvlm"),
    "idefics3": _Family("Idefics3", "llama", _IDEFICS3, "idefics3"),
    "gemma3": _Family("Gemma3", "gemma3_text", _GEMMA3, "gemma3"),
    "gemma4": _Family("Gemma4", "gemma4_text", _GEMMA4, "gemma4_v5"),
    "internvl": _Family("InternVL", "qwen2", _INTERNVL, "internvl", image="GotOcr2"),
}
FAMILIES: tuple[str, ...] = tuple(_FAMILIES)


def build(
    family: str,
    *,
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 2,
    image_size: int = 32,
    patch_size: int = 8,
    corpus: Sequence[str] = (),
) -> tuple[Any, Any]:
    """A random model (float32, evaluation mode) of one of `FAMILIES`, and the processor that goes with it.

    `image_size` and `patch_size` are edges in pixels: of the square (or tile) that the tower sees and of a patch;
    Qwen-VL takes images up to twice that edge. Words of `corpus` become tokens.

    Raises ValueError for settings that do not fit, all at once, and ImportError where torchvision is missing.
    """
    if family not in _FAMILIES:
        raise ValueError(f"unknown family {family!r}; the known ones are {', '.join(FAMILIES)}.")
    spec = _FAMILIES[family]
    odd_patches = patch_size < 1 or image_size < 1 or image_size % (2 * patch_size)
    faults = {
        f"hidden_size={hidden_size}: expected a multiple of 64": hidden_size < 1 or hidden_size % 64,
        f"num_layers={num_layers}: expected 1 or more": num_layers < 1,
        f"image_size={image_size}, patch_size={patch_size}: expected an even number of patches": odd_patches,
    }
    if any(faults.values()):
        raise ValueError("; ".join(text for text, wrong in faults.items() if wrong))
    settings = _settings(family, hidden=hidden_size, layers=num_layers, edge=image_size, patch=patch_size)
    tokens = spec.tokens
    extra = [*[token for token in tokens.ids.values() if token not in tokens.names.values()], *tokens.others.split()]
    tokenizer = tokens.make([*_TEXTS, *corpus], extra_special_tokens=extra, **tokens.names)
    try:
        processor = _processor(spec, settings, tokenizer)
    except ImportError as error:
        raise ImportError(f'{family} needs what pip install "vlm_sft[torchvision]" brings: {error}') from error
    return _model(spec, settings, tokenizer, seed), processor


def _processor(spec: _Family, settings: _Settings, tokenizer: Any) -> Any:
    image_processor = getattr(_hf, f"{spec.image or spec.classes}ImageProcessor")
    parts = {"image_processor": image_processor(**settings["image"]), "tokenizer": tokenizer}
    if "video" in settings:
        parts["video_processor"] = getattr(_hf, f"{spec.video or spec.classes}VideoProcessor")(**settings["video"])
    # trl ships the other families' templates. Ours render what the Hub's do, {% generation %} marks included.
    folders = files("vlm_sft.tools") / "templates", files("trl") / "chat_templates"
    template = next(file for folder in folders if (file := folder / f"{spec.template}.jinja").is_file())
    options = {"chat_template": template.read_text("utf-8"), **settings.get("processor", {})}
    return getattr(_hf, f"{spec.processor or spec.classes}Processor")(**parts, **options)


def _model(spec: _Family, settings: _Settings, tokenizer: Any, seed: int) -> Any:
    id_of = tokenizer.convert_tokens_to_ids
    stop = id_of(spec.tokens.stop.split())
    ends = {
        # Qwen's tokenizer names no first token; its generation settings take the one it pads with.
        "bos_token_id": id_of(tokenizer.bos_token or tokenizer.pad_token),
        "eos_token_id": stop if len(stop) > 1 else stop[0],
        "pad_token_id": tokenizer.pad_token_id,
    }
    rows = -(-len(tokenizer) // 64) * 64  # more than the tokenizer has, as those of the Hub
    config = getattr(_hf, f"{spec.classes}Config")(
        text_config=settings["text"] | ends | {"model_type": spec.language, "vocab_size": rows},
        vision_config=settings["vision"],
        **{name: id_of(token) for name, token in spec.tokens.ids.items()},
        **settings.get("config", {}),
    )
    return random_model(config, seed)


def save(family: str, folder: str | Path, **options: Any) -> Path:
    """The folder, with what `build` makes. Raises ValueError where it exists and is not empty, and as `build`."""
    return _write(folder, lambda: build(family, **options))


def save_like(model: str | Path, folder: str | Path, *, seed: int = 0) -> Path:
    """The folder, with a small random model of the same kind as `model` (Hub id or folder; its weights are not read),
    beside the processor and generation settings of `model` itself: rows are as long as with it.

    Raises ValueError for a model that takes no images, a folder that is not empty, and a config that cannot be shrunk,
    with the sizes that were left.
    """
    return _write(folder, lambda: _like(model, seed))


def _like(name: str | Path, seed: int) -> tuple[Any, Any]:
    config, processor = read_config(name), load_processor(name)
    whole, small = config.to_dict(), shrink(config.to_dict())
    question = [{"type": "image", "image": Image.new("RGB", (64, 64))}, {"type": "text", "text": "?"}]
    asked = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    try:
        model = random_model(type(config)(**small), seed)
        with contextlib.suppress(OSError):  # it has none
            model.generation_config = _hf.GenerationConfig.from_pretrained(name)
        if processor.chat_template:
            batch = processor.apply_chat_template([{"role": "user", "content": question}], **asked)
            with torch.inference_mode():
                model(**batch.to(model.dtype))
    except Exception as error:
        raise ValueError(
            f"The config of {name} cannot be shrunk: {type(error).__name__}: {' '.join(str(error).split())}. "
            f"Sizes that stayed as they are: {', '.join(unchanged(whole, small)) or 'none'}."
        ) from error
    return model, load_processor(name)  # the first now knows how it padded, and would save that


def _write(folder: str | Path, make: Callable[[], Sequence[Any]]) -> Path:
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; name another one or empty it")
    for part in make():
        part.save_pretrained(folder)
    return folder
