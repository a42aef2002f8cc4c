"""Where vision tower, projector, language model and head lie in a model, asked of the model itself.

Quantization, adapters, freezing and learning rates go by it. The accessors of transformers 5.23 name three of the four
parts; the projector is the rest. `register_parts` settles whatever cannot be told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from vlm_sft.common import listed, on_meta

Part = Literal["vision", "projector", "language", "head", "other"]
PARTS: tuple[Part, ...] = ("vision", "projector", "language", "head")
"""What TRAINS may name. Rows with images never reach what is "other": towers for sound, and what draws."""

_PROJECTS = re.compile("merger|connector|project|align|adapter|resampler|qformer")
_BESIDE = re.compile("audio|speech|vqmodel|generation")

_BY_WEIGHT = (".altup.correction_coefs", ".altup.prediction_coefs")  # Gemma 3n, transformers 5.23

# What PEFT, DistributedDataParallel (or DeepSpeed) and torch.compile put before the names of what they wrap.
_WRAPPERS = ("base_model.model.", "module.", "_orig_mod.")


@dataclass(frozen=True)
class ModelParts:
    """Full paths of the parts, from the root of the `...ForConditionalGeneration` model.

    A path is a module, or a parameter that no part's module holds (LLaVA-NeXT's `model.image_newline`). Paths may
    nest (Qwen's `model.visual.merger` in `model.visual`): ask `part_of`, and compare no prefixes by hand. A model
    without a tower has no `vision`.
    """

    vision: tuple[str, ...]
    projector: tuple[str, ...]
    language: tuple[str, ...]
    head: tuple[str, ...]
    other: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "; ".join(f"{part} {', '.join(paths)}" for part, paths in vars(self).items() if paths)


PARTS_OVERRIDES: dict[str, ModelParts] = {}
"""By model_type, what `register_parts` was told."""


def register_parts(
    model_type: str,
    *,
    vision: str | Sequence[str],
    projector: str | Sequence[str],
    language: str | Sequence[str],
    head: str | Sequence[str],
    other: str | Sequence[str] = (),
) -> None:
    """Settles the parts of a family by hand, each a full path of `model.named_modules()` or several.

    `vision=()` for a model without a tower; `other` is never trained. Raises ValueError for an empty part or path, and
    for a path that stands in two parts.
    """
    given = {"vision": vision, "projector": projector, "language": language, "head": head, "other": other}
    parts = ModelParts(**{part: (at,) if isinstance(at, str) else tuple(at) for part, at in given.items()})
    paths = [path for part in given for path in getattr(parts, part)]
    needed = {"projector", "language", "head"}
    faults = [
        f"{part}={given[part]!r} names nothing"
        for part in given
        if not all(getattr(parts, part) or [""] * (part in needed))
    ]
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
        faults = [f"{path} is not in it" for paths in vars(parts).values() for path in paths if path not in names]
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
    paths: list[tuple[str, Part]] = [(path, part) for part in (*PARTS, "other") for path in getattr(parts, part)]
    found = [(len(path), part) for path, part in paths if f"{bare}.".startswith(f"{path}.")]
    if not found:
        raise ValueError(f"{name!r} lies in none of {parts}; settle them with vlm_sft.register_parts.")
    return max(found)[1]


def bare_name(name: str) -> str:
    """The name of a module or parameter without what PEFT puts between."""
    return re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", name)


def linear_layers(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The linear layers that adapters and quantization reach, by path.

    Not of a model's own kind: a router (Llama4Router) returns more than a product. Nor one whose weight the model takes
    by itself (`_BY_WEIGHT`), nor PEFT's wrapper of one. `in_features` also marks the layers of other quantizers, which
    do not inherit from nn.Linear.
    """
    return {
        path: module
        for path, module in modules.items()
        if hasattr(module, "in_features")
        and not hasattr(module, "base_layer")
        and not (isinstance(module, nn.Linear) and type(module).__module__.startswith("transformers.models"))
        and not path.endswith(_BY_WEIGHT)
        and ".lora_" not in path
    }


def stacked_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The experts of each layer of a mixture, by their full path: weights of three dimensions, no convolution's."""
    return {
        bare_name(f"{name}.{own}"): weight
        for name, module in model.named_modules()
        if not hasattr(module, "kernel_size") and re.search(r"\.\d+\.", name)
        for own, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3
    }


def root_of(model_or_config: Any) -> PreTrainedModel:
    """The model of transformers that is, or lies inside, what was given; of a config, one without weights."""
    if isinstance(model_or_config, PreTrainedConfig):
        try:
            return on_meta(model_or_config)  # type: ignore[no-any-return]
        except Exception as error:  # a config that its own model does not take may raise anything
            kind, reason = model_or_config.model_type, str(error).partition("\n")[0]
            raise ValueError(f"No vision-language model takes this {kind!r} config: {reason}") from error
    modules = model_or_config.modules() if isinstance(model_or_config, nn.Module) else ()
    root = next((module for module in modules if isinstance(module, PreTrainedModel)), None)
    if root is None:
        kind = type(model_or_config).__name__
        raise ValueError(f"{kind} is not a model of transformers, nor its config; give what load_model returns.")
    return root


def _found(model: Any) -> tuple[ModelParts | None, list[str]]:
    """What the model's accessors say, and all that speaks against it."""
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    asked = {
        "vision tower": lambda: model.get_encoder(modality="image"),
        "language model": model.get_decoder,
        "head": lambda: model.get_output_embeddings() or model.get_decoder().get_output_embeddings(),
    }
    paths: dict[str, str] = {}
    for what, accessor in asked.items():
        found = accessor()
        # Without such a part the accessors return None, or the model itself, whose name is empty.
        if names.get(found) and (what == "head" or any(True for _ in found.parameters())):
            paths[what] = names[found]
    if absent := [f"it has no {what}" for what in asked if what not in paths and what != "vision tower"]:
        return None, absent
    tower, language, head = paths.get("vision tower", ""), paths["language model"], paths["head"]
    faults = [
        f"{inner} lies inside {outer}"
        for inner, outer in ((tower, language), (language, tower), (head, tower), (tower, head), (language, head))
        if inner and outer and f"{inner}.".startswith(f"{outer}.")
    ]
    if not any(re.match(rf"{re.escape(language)}\.(\w+\.)*\d+$", name) for name in modules):
        faults.append(f"its language model, {language}, has no numbered layers")
    if faults:
        return None, faults
    placed: dict[str | None, list[str]] = {part: [] for part in ("vision", "projector", "other", None)}
    for path in _rest(model, "", {tower, language, *([] if f"{head}.".startswith(f"{language}.") else [head])}):
        placed[_kind_of(path, modules.get(path))].append(path)
    if towers := placed[None]:
        faults.append(f"{listed(towers)}: a second tower, or part of the projector")
    vision = [tower] * bool(tower) + placed["vision"]
    if vision and not placed["projector"]:  # it may lie inside the tower (Qwen's merger)
        inside = [name for name, _ in modules[vision[0]].named_children() if _PROJECTS.search(name)]
        placed["projector"] = [f"{vision[0]}.{name}" for name in inside]
    if not (faults or placed["projector"]):
        faults.append("nothing is left for its projector" if vision else "it has no vision tower and no projector")
    parts = ModelParts(tuple(vision), tuple(placed["projector"]), (language,), (head,), tuple(placed["other"]))
    return parts, faults


def _kind_of(path: str, module: nn.Module | None) -> Part | None:
    """The part of what no accessor names; None where it cannot be told.

    transformers builds towers as models of their own that take pixels or sound, and projectors as plain modules.
    """
    if _BESIDE.search(path):
        return "other"
    if not isinstance(module, PreTrainedModel):
        return "projector"
    if module.main_input_name == "pixel_values":
        return "vision"
    return "projector" if _PROJECTS.search(path.rpartition(".")[2]) else None


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
