"""Where vision tower, projector, language model and head lie in a model, asked of the model itself.

Quantization, adapters, freezing and learning rates go by it. The accessors of transformers 5.23 name three of the four
parts; the projector is the rest. `register_parts` settles whatever cannot be told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from vlm_sft.common import listed, on_meta

Part = Literal["vision", "projector", "language", "head"]
PARTS: tuple[Part, ...] = get_args(Part)

INSIDE_TOWER: dict[str, tuple[str, ...]] = {
    "glm46v": ("merger",),
    "qwen2_vl": ("merger",),
    "qwen2_5_vl": ("merger",),
    "qwen3_5": ("merger",),
    "qwen3_vl": ("merger", "deepstack_merger_list"),
}
"""By model_type, the projector's modules as the vision tower names them. One line adds a family."""

# What PEFT, DistributedDataParallel (or DeepSpeed) and torch.compile put before the names of what they wrap.
_WRAPPERS = ("base_model.model.", "module.", "_orig_mod.")


@dataclass(frozen=True)
class ModelParts:
    """Full paths of the four parts, from the root of the `...ForConditionalGeneration` model.

    A path is a module, or a parameter that no part's module holds (LLaVA-NeXT's `model.image_newline`). Paths may
    nest (Qwen's `model.visual.merger` in `model.visual`): ask `part_of`, and compare no prefixes by hand.
    """

    vision: tuple[str, ...]
    projector: tuple[str, ...]
    language: tuple[str, ...]
    head: tuple[str, ...]


PARTS_OVERRIDES: dict[str, ModelParts] = {}
"""By model_type, what `register_parts` was told."""


def register_parts(
    model_type: str,
    *,
    vision: str | Sequence[str],
    projector: str | Sequence[str],
    language: str | Sequence[str],
    head: str | Sequence[str],
) -> None:
    """Settles the parts of a family by hand, each a full path of `model.named_modules()` or several.

    Raises ValueError for an empty part or path, and for a path that stands in two parts.
    """
    given = {"vision": vision, "projector": projector, "language": language, "head": head}
    parts = ModelParts(**{part: (at,) if isinstance(at, str) else tuple(at) for part, at in given.items()})
    paths = [path for part in PARTS for path in getattr(parts, part)]
    faults = [f"{part}={given[part]!r} names nothing" for part in PARTS if not all(getattr(parts, part) or ("",))]
    faults += [f"{path!r} stands twice" for path in sorted({path for path in paths if path and paths.count(path) > 1})]
    if faults:
        raise ValueError(
            f"register_parts({model_type!r}): {'; '.join(faults)}. Each part is one full path of model.named_modules() "
            "or several, and each path has one part."
        )
    PARTS_OVERRIDES[model_type] = parts


def parts_of(model_or_config: nn.Module | PreTrainedConfig) -> ModelParts:
    """The parts of a model, also of one wrapped by PEFT, DistributedDataParallel or torch.compile; or of a config's.

    Raises ValueError where they cannot be told (a part is missing, one lies inside another, a second tower), and for a
    registered path that the model lacks; with the model's own modules.
    """
    model: Any = root_of(model_or_config)
    model_type = model.config.model_type
    if (parts := PARTS_OVERRIDES.get(model_type)) is None:
        parts, faults = _found(model)
    else:
        names = {name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))}
        faults = [f"{path} is not in it" for part in PARTS for path in getattr(parts, part) if path not in names]
    if faults or parts is None:
        raise ValueError(
            f"The parts of {type(model).__name__} ({model_type}) cannot be told: {'; '.join(faults)}. Load it with "
            f"AutoModelForImageTextToText; where it was, call vlm_sft.register_parts({model_type!r}, vision=..., "
            f"projector=..., language=..., head=...). Its parameters lie in {_outline(model)}."
        )
    return parts


def part_of(name: str, parts: ModelParts) -> Part:
    """The part that a parameter or module lies in: that of the longest path at or above the name.

    Names from `named_parameters()` or `named_modules()`, also of a model wrapped by PEFT, DistributedDataParallel or
    torch.compile. Raises ValueError for a name outside every part.
    """
    bare = name
    while wrapper := next((prefix for prefix in _WRAPPERS if bare.startswith(prefix)), None):
        bare = bare.removeprefix(wrapper)
    found = [(len(path), part) for part in PARTS for path in getattr(parts, part) if f"{bare}.".startswith(f"{path}.")]
    if not found:
        raise ValueError(f"{name!r} lies in none of {parts}; settle them with vlm_sft.register_parts.")
    return max(found)[1]


def root_of(model_or_config: Any) -> PreTrainedModel:
    """The model of transformers that is, or lies inside, what was given; of a config, one without weights."""
    if isinstance(model_or_config, PreTrainedConfig):
        try:
            return on_meta(model_or_config)  # type: ignore[no-any-return]
        except ValueError as error:
            kind = model_or_config.model_type
            raise ValueError(f"{kind!r} is not the model_type of a vision-language model in transformers.") from error
    modules = model_or_config.modules() if isinstance(model_or_config, nn.Module) else ()
    root = next((module for module in modules if isinstance(module, PreTrainedModel)), None)
    if root is None:
        kind = type(model_or_config).__name__
        raise ValueError(f"{kind} is not a model of transformers, nor its config; give what load_model returns.")
    return root


def _found(model: Any) -> tuple[ModelParts | None, list[str]]:
    """What the model's accessors say, and all that speaks against it."""
    names = {module: name for name, module in model.named_modules()}
    asked = {
        "vision tower": lambda: model.get_encoder(modality="image"),
        "language model": model.get_decoder,
        "head": model.get_output_embeddings,
    }
    paths: dict[str, str] = {}
    for what, accessor in asked.items():
        found = accessor()
        # Without such a part the accessors return None, or the model itself, whose name is empty.
        if names.get(found) and (what == "head" or any(True for _ in found.parameters())):
            paths[what] = names[found]
    if absent := [f"it has no {what}" for what in asked if what not in paths]:
        return None, absent
    vision, language, head = paths.values()
    faults = [
        f"{inner} lies inside {outer}"
        for inner in paths.values()
        for outer in paths.values()
        if f"{inner}.".startswith(f"{outer}.") and (inner != outer or vision == language)
    ]
    if not any(re.match(rf"{re.escape(language)}\.(\w+\.)*\d+$", name) for name in names.values()):
        faults.append(f"its language model, {language}, has no numbered layers")
    inside = [f"{vision}.{name}" for name in INSIDE_TOWER.get(model.config.model_type, ())]
    faults += [f"{path} is not in it" for path in inside if path not in names.values()]
    rest = list(_rest(model, "", set(paths.values()))) if not faults else []
    # transformers builds towers as models of their own, and projectors as plain modules.
    models = [name for module, name in names.items() if isinstance(module, PreTrainedModel)]
    if towers := [path for path in rest if any(f"{name}.".startswith(f"{path}.") for name in models)]:
        faults.append(f"{listed(towers)}: a second tower, or part of the projector")
    if not (faults or rest or inside):
        faults.append("nothing is left for its projector, which may lie inside the tower (INSIDE_TOWER in parts.py)")
    return ModelParts((vision,), (*inside, *rest), (language,), (head,)), faults


def _rest(module: nn.Module, path: str, known: set[str]) -> Iterator[str]:
    """The fewest modules and bare parameters that hold all parameters outside the known paths."""
    for name, child in module.named_children():
        at = f"{path}.{name}" if path else name
        if any(other.startswith(f"{at}.") for other in known):
            yield from _rest(child, at, known)
        elif at not in known and any(True for _ in child.parameters()):
            yield at
    for name, _ in module.named_parameters(recurse=False):
        yield f"{path}.{name}" if path else name


def _outline(model: nn.Module) -> str:
    """The upper modules of a model, by its parameters."""
    names = [name.split(".") for name, _ in model.named_parameters(remove_duplicate=False)]
    return ", ".join(dict.fromkeys(".".join(name[:2] if name[0] == "model" else name[:1]) for name in names))
