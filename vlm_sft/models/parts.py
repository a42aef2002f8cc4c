"""Where the vision tower, the projector, the language model and its head lie in each model family.

Paths start at the root of the loaded `...ForConditionalGeneration` model and are those of transformers 5.23.
Quantization, adapters, freezing and learning rates all read this one table.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

Part = Literal["vision", "projector", "language", "head"]
PARTS: tuple[Part, ...] = get_args(Part)

# What PEFT, DistributedDataParallel (or DeepSpeed) and torch.compile put before the names of what they wrap.
_WRAPPERS = ("base_model.model.", "module.", "_orig_mod.")


@dataclass(frozen=True)
class ModelParts:
    """Full paths of the four parts of a vision-language model.

    A path is a module, or a parameter that no part's module holds (LLaVA-NeXT's `model.image_newline`). Paths
    may nest: the most specific one wins. Qwen's `model.visual.merger` is therefore projector although
    `model.visual` is vision. Ask `part_of` and never compare prefixes by hand.

    Raises ValueError for a path that is no non-empty string, or that stands in two parts.
    """

    vision: tuple[str, ...]
    projector: tuple[str, ...]
    language: tuple[str, ...]
    head: tuple[str, ...]

    def __post_init__(self) -> None:
        faults = [
            f"{field.name}={paths!r}"
            for field in fields(self)
            if not isinstance(paths := getattr(self, field.name), tuple)
            or not all(isinstance(path, str) and path for path in paths)
        ]
        if faults:
            raise ValueError(
                f"ModelParts: {', '.join(faults)}: expected a tuple of full paths; a single one needs its "
                'comma, as in ("model.vision_tower",).'
            )
        paths = [path for part in PARTS for path in getattr(self, part)]
        if twice := sorted({path for path in paths if paths.count(path) > 1}):
            raise ValueError(f"ModelParts: listed twice: {', '.join(twice)}; each path has one part.")


def _parts(vision: str, projector: tuple[str, ...], language: str) -> ModelParts:
    return ModelParts(vision=(vision,), projector=projector, language=(language,), head=("lm_head",))


_LLAVA = _parts("model.vision_tower", ("model.multi_modal_projector",), "model.language_model")
# `image_newline` is a learned vector of the language model's width that ends each row of image features.
_LLAVA_TILED = _parts(
    "model.vision_tower", ("model.multi_modal_projector", "model.image_newline"), "model.language_model"
)
_QWEN = _parts("model.visual", ("model.visual.merger",), "model.language_model")
_QWEN3 = _parts("model.visual", ("model.visual.merger", "model.visual.deepstack_merger_list"), "model.language_model")
_IDEFICS = _parts("model.vision_model", ("model.connector",), "model.text_model")

MODEL_PARTS: dict[str, ModelParts] = {
    "gemma3": _LLAVA,
    "idefics3": _IDEFICS,
    "internvl": _LLAVA,
    "llava": _LLAVA,
    "llava_next": _LLAVA_TILED,
    "llava_onevision": _LLAVA_TILED,
    "qwen2_5_vl": _QWEN,
    "qwen2_vl": _QWEN,
    "qwen3_vl": _QWEN3,
    "smolvlm": _IDEFICS,
}


def parts_of(
    model_or_config_or_model_type: nn.Module | PreTrainedConfig | str,
    *,
    model_parts: ModelParts | None = None,
) -> ModelParts:
    """The parts of this family, or `model_parts` where they are given.

    Raises ValueError for a family that is not in the table, and for a model (wrapped or not) that lacks one
    of the paths: a path that matches nothing would freeze, quantize or adapt nothing without a word.
    """
    subject: Any = model_or_config_or_model_type
    config = getattr(subject, "config", subject)
    model_type = subject if isinstance(subject, str) else getattr(config, "model_type", None)
    parts = model_parts or MODEL_PARTS.get(model_type or "")
    if parts is None:
        raise ValueError(
            f"model_type {model_type!r} is not one of the known families ({', '.join(MODEL_PARTS)}); pass "
            "model_parts=ModelParts(vision=..., projector=..., language=..., head=...), each a tuple of full paths. "
            f"{_outline(subject)}"
        )
    if hasattr(subject, "named_modules"):
        names = {_unwrapped(name) for name, _ in (*subject.named_modules(), *subject.named_parameters())}
        if missing := [path for part in PARTS for path in getattr(parts, part) if path not in names]:
            raise ValueError(
                f"{type(subject).__name__} ({model_type}) holds no {', '.join(missing)}; load it with "
                "AutoModelForImageTextToText, or pass model_parts=ModelParts(...) with the full paths that "
                "model.named_modules() shows."
            )
    return parts


def part_of(name: str, parts: ModelParts) -> Part:
    """The part that a parameter or module lies in: that of the longest path at or above the name.

    Names from `named_parameters()` or `named_modules()`, also those of a model wrapped by PEFT,
    DistributedDataParallel or torch.compile. Raises ValueError for a name outside every part.
    """
    bare = _unwrapped(name)
    found = [
        (len(path), part)
        for part in PARTS
        for path in getattr(parts, part)
        if bare == path or bare.startswith(f"{path}.")
    ]
    if not found:
        raise ValueError(f"{name!r} lies in none of {parts}; add its path to the part it belongs to.")
    return max(found)[1]


def listed(names: Collection[str]) -> str:
    """The first six names in alphabetical order and how many more there are, for a message."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(sorted(names)[:6]) + more or "none"


def _outline(model: Any) -> str:
    """Where to look for the paths: the upper modules of a model, if it is one."""
    if not hasattr(model, "named_modules"):
        return "They are those that model.named_modules() shows."
    names = [_unwrapped(name).split(".") for name, _ in model.named_parameters(remove_duplicate=False)]
    upper = dict.fromkeys(".".join(name[:2] if name[0] == "model" else name[:1]) for name in names)
    return f"Its parameters lie in {', '.join(upper)}."


def _unwrapped(name: str) -> str:
    while wrapper := next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), None):
        name = name.removeprefix(wrapper)
    return name
