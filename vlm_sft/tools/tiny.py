"""A small random twin of each model family, built offline: for trying a recipe, and for tests.

The classes are the real ones; only sizes, weights and the vocabulary, which is trained on the spot, are small.
`python -m vlm_sft tiny llava15 twins/llava15` writes a folder that `from_pretrained` reads. `--like MODEL` makes a twin
of any model: its own processor, template and vocabulary before a random model of its own kind, so rows are as long."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from jinja2 import Template
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
_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bpe(texts: Sequence[str], words: Any, *, reserved: Sequence[str] = (), **settings: Any) -> dict[str, Any]:
    """Merges, and a vocabulary of at most 1,024 entries that begins with the reserved ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words
    settings |= {"special_tokens": list(reserved), "vocab_size": 1024, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**settings))
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def _byte_level(texts: Sequence[str]) -> dict[str, Any]:
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _bpe(texts, words, initial_alphabet=words.alphabet())


def _byte_fallback(texts: Sequence[str], *reserved: str) -> dict[str, Any]:
    """Words begin with a visible space, runs of line breaks are words, unknown characters become bytes."""
    words = [pre_tokenizers.Split(Regex("\n+"), "isolated"), pre_tokenizers.Split("▁", "merged_with_next")]
    reserved += tuple(f"<0x{byte:02X}>" for byte in range(256))
    return _bpe([text.replace(" ", "▁") for text in texts], pre_tokenizers.Sequence(words), reserved=reserved)


def _llama(texts: Sequence[str], **tokens: Any) -> Any:
    """As in the files of llava-1.5-hf: a normalizer writes the visible spaces, and nothing splits."""
    parts = _byte_fallback([f" {text}" for text in texts], "<unk>", "<s>", "</s>")
    backend = Tokenizer(models.BPE(**parts, fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces, strip = decoders.Replace("▁", " "), decoders.Strip(content=" ", left=1, right=0)
    backend.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    return _hf.TokenizersBackend(tokenizer_object=backend, **tokens)


def _gpt2(split: Any, use_regex: bool, texts: Sequence[str], **tokens: Any) -> Any:
    backend, words = Tokenizer(models.BPE(**_byte_level(texts))), pre_tokenizers.ByteLevel
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, words(add_prefix_space=False, use_regex=use_regex)])
    backend.decoder = decoders.ByteLevel()
    return _hf.TokenizersBackend(tokenizer_object=backend, **tokens)


_GEMMA = "<pad>", "<eos>", "<bos>", "<unk>", "<mask>"
_TOKENIZERS: dict[str, Callable[..., Any]] = {
    "llama": _llama,
    "gemma": lambda texts, **tokens: _hf.GemmaTokenizer(**_byte_fallback(texts, *_GEMMA), **tokens),
    "qwen": lambda texts, **tokens: _hf.Qwen2Tokenizer(**_byte_level(texts), **tokens),
}
_TOKENIZERS["smollm"] = partial(_gpt2, pre_tokenizers.Digits(individual_digits=True), True)
_TOKENIZERS["llama3"] = partial(_gpt2, pre_tokenizers.Split(Regex(_LLAMA3_REGEX), "isolated"), False)
_TWINS = Template(Path(__file__).with_name("twins.yaml.jinja").read_text("utf-8"))


def _families(hidden: int, layers: int, edge: int, patch: int) -> Any:
    return yaml.safe_load(_TWINS.render(hidden=hidden, layers=layers, edge=edge, patch=patch))["families"]


FAMILIES: tuple[str, ...] = tuple(_families(64, 2, 32, 8))


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

    Raises ValueError for settings that do not fit, all at once, and ImportError where torchvision is missing."""
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; the known ones are {', '.join(FAMILIES)}.")
    if min(hidden_size, num_layers, image_size, patch_size) < 1 or hidden_size % 64 or image_size % (2 * patch_size):
        sizes = f"{hidden_size=}, {num_layers=}, {image_size=}, {patch_size=}"
        raise ValueError(f"{sizes}: expected a multiple of 64, 1 or more layers, and an even number of patches")
    settings = _families(hidden_size, num_layers, image_size, patch_size)[family]
    tokens, names = settings["tokens"], settings["tokens"]["names"]
    others = [*(token for token in tokens["ids"].values() if token not in names.values()), *tokens["others"].split()]
    tokenizer = _TOKENIZERS[tokens["make"]]([*_TEXTS, *corpus], extra_special_tokens=others, **names)
    # trl ships the other families' templates. Ours render what the Hub's do, {% generation %} marks included.
    folders = files("vlm_sft.tools") / "templates", files("trl") / "chat_templates"
    template = next(file for folder in folders if (file := folder / f"{settings['template']}.jinja").is_file())
    given = {"tokenizer": tokenizer, "chat_template": template.read_text("utf-8")}
    try:
        parts = {name: _made(part) for name, part in settings["parts"].items()}
        processor = _made(settings["processor"], **parts, **given)
    except ImportError as error:
        how = "of torch's own build (in a checkout, make install)"
        raise ImportError(f"{family} needs torchvision, {how}: {error}") from error

    id_of, stop = tokenizer.convert_tokens_to_ids, tokenizer.convert_tokens_to_ids(tokens["stop"].split())
    # Qwen's tokenizer names no first token; its generation settings take the one it pads with.
    ends = {"bos_token_id": id_of(tokenizer.bos_token or tokenizer.pad_token), "pad_token_id": tokenizer.pad_token_id}
    ends["eos_token_id"] = stop if len(stop) > 1 else stop[0]
    ends["vocab_size"] = -(-len(tokenizer) // 64) * 64  # more than the tokenizer has, as those of the Hub
    ids = {name: id_of(token) for name, token in tokens["ids"].items()}
    config = {"text_config": settings["text"] | ends, "vision_config": settings["vision"], **ids}
    return random_model(_made(settings["config"], **config), seed), processor


def _made(given: dict[str, Any], **more: Any) -> Any:
    """An instance of the class that is named among its settings."""
    return getattr(_hf, given["class"])(**{name: value for name, value in given.items() if name != "class"}, **more)


def save(family: str, folder: str | Path, **options: Any) -> Path:
    """The folder, with what `build` makes. Raises ValueError where it exists and is not empty, and as `build`."""
    return _write(folder, lambda: build(family, **options))


def save_like(model: str | Path, folder: str | Path, *, seed: int = 0) -> Path:
    """The folder, with a small random model of the same kind as `model` (Hub id or folder; its weights are not read),
    beside the processor and generation settings of `model` itself: rows are as long as with it.

    Raises ValueError for a model that takes no images, a folder that is not empty, and a config that cannot be shrunk,
    with the sizes that were left."""
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
        found = f"The config of {name} cannot be shrunk: {type(error).__name__}: {' '.join(str(error).split())}"
        stayed = ", ".join(unchanged(whole, small)) or "none"
        raise ValueError(f"{found}. Sizes that stayed as they are: {stayed}.") from error
    return model, load_processor(name)  # the first now knows how it padded, and would save that


def _write(folder: str | Path, make: Callable[[], Sequence[Any]]) -> Path:
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; name another one or empty it")
    for part in make():
        part.save_pretrained(folder)
    return folder
