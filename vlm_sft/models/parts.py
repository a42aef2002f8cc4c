"""Where vision tower, projector, language model and head lie in a model, asked of the model itself.

The accessors of transformers 5.23 name three; the projector is the rest. `register_parts` settles what cannot be told.
"""

from __future__ import annotations

import re
from collections import defaultdict
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
_WRAPPERS = re.compile(r"^(base_model\.model\.|module\.|_orig_mod\.)+")


@dataclass(frozen=True)
class ModelParts:
    """Full paths of the parts, from the root of the model: modules, or parameters that no part's module holds
    (LLaVA-NeXT's `model.image_newline`). They may nest (Qwen's `model.visual.merger` in `model.visual`): ask `part_of`.
    A model without a tower has no `vision`."""

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
    """Settles the parts of a family by hand, each a full path of `model.named_modules()` or several; `vision=()` for a
    model without a tower, `other` never trains. Raises ValueError for an empty part, and for a path in two parts."""
    given = {"vision": vision, "projector": projector, "language": language, "head": head, "other": other}
    parts = {part: (at,) if isinstance(at, str) else tuple(at) for part, at in given.items()}
    empty = [part for part, at in parts.items() if not (all(at) if at else part in ("vision", "other"))]
    paths = [path for at in parts.values() for path in at]
    faults = [f"{part}={given[part]!r} names nothing" for part in empty]
    faults += [f"{path!r} stands twice" for path in sorted({path for path in paths if path and paths.count(path) > 1})]
    if faults:
        how = "Each part is one full path of model.named_modules() or several, and each path has one part."
        raise ValueError(f"register_parts({model_type!r}): {'; '.join(faults)}. {how}")
    PARTS_OVERRIDES[model_type] = ModelParts(**parts)


def parts_of(model_or_config: nn.Module | PreTrainedConfig) -> ModelParts:
    """The parts of a model, also of one wrapped by PEFT, DistributedDataParallel or torch.compile; or of a config's.

    Raises ValueError, with the model's modules, where they cannot be told (a part is missing, one lies inside another,
    a second tower), and for a registered path that the model lacks."""
    model: Any = root_of(model_or_config)
    model_type = model.config.model_type
    if (parts := PARTS_OVERRIDES.get(model_type)) is None:
        parts, faults = _found(model)
    else:
        names = {name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))}
        faults = [f"{path} is not in it" for paths in vars(parts).values() for path in paths if path not in names]
    if faults or parts is None:
        paths = [name.split(".") for name, _ in model.named_parameters(remove_duplicate=False)]
        upper = dict.fromkeys(".".join(path[:2] if path[0] == "model" else path[:1]) for path in paths)
        raise ValueError(
            f"The parts of {type(model).__name__} ({model_type}) cannot be told: {'; '.join(faults)}. Load it with "
            f"AutoModelForImageTextToText; where it was, call vlm_sft.register_parts({model_type!r}, vision=..., "
            f"projector=..., language=..., head=...). Its parameters lie in {', '.join(upper)}."
        )
    return parts


def part_of(name: str, parts: ModelParts) -> Part:
    """The part that a parameter or module lies in: that of the longest path at or above the name, which may be that of
    a model wrapped by PEFT, DistributedDataParallel or torch.compile. Raises ValueError for one outside every part."""
    bare = f"{_WRAPPERS.sub('', name)}."
    found: Any = [(len(at), part) for part, paths in vars(parts).items() for at in paths if bare.startswith(f"{at}.")]
    if not found:
        raise ValueError(f"{name!r} lies in none of {parts}; settle them with vlm_sft.register_parts.")
    return max(found)[1]  # type: ignore[no-any-return]


def bare_name(name: str) -> str:
    """The name of a module or parameter without what PEFT puts between."""
    return re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", name)


def linear_layers(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The linear layers that adapters and quantization reach, by path; also of quantizers without an nn.Linear. Not of
    a model's own kind: a router (Llama4Router) returns more than a product. Nor one whose weight the model takes by
    itself (`_BY_WEIGHT`), nor PEFT's wrapper of one."""
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
    kind = type(model_or_config).__name__
    if isinstance(model_or_config, PreTrainedConfig):
        try:
            return on_meta(model_or_config)  # type: ignore[no-any-return]
        except Exception as error:  # a config that its own model does not take may raise anything
            kind, reason = model_or_config.model_type, str(error).partition("\n")[0]
            raise ValueError(f"No vision-language model takes this {kind!r} config: {reason}") from error
    for module in model_or_config.modules() if isinstance(model_or_config, nn.Module) else ():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"{kind} is not a model of transformers, nor its config; give what load_model returns.")


def _found(model: Any) -> tuple[ModelParts | None, list[str]]:
    """What the model's accessors say, and all that speaks against it."""
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}

    def path_of(found: Any) -> str:
        """Empty without such a part: the accessors then return None, a module without weights, or the model itself."""
        return names.get(found, "") if found is not None and any(True for _ in found.parameters()) else ""

    tower, language = path_of(model.get_encoder(modality="image")), path_of(model.get_decoder())
    head = path_of(model.get_output_embeddings() or model.get_decoder().get_output_embeddings())
    if absent := [f"it has no {what}" for what, at in (("language model", language), ("head", head)) if not at]:
        return None, absent
    pairs = ((tower, language), (language, tower), (head, tower), (tower, head), (language, head))
    nested = [pair for pair in pairs if all(pair) and f"{pair[0]}.".startswith(f"{pair[1]}.")]
    faults = [f"{inner} lies inside {outer}" for inner, outer in nested]
    if not any(re.match(rf"{re.escape(language)}\.(\w+\.)*\d+$", name) for name in modules):
        faults.append(f"its language model, {language}, has no numbered layers")
    if faults:
        return None, faults
    placed: dict[str, list[str]] = defaultdict(list)
    for path in _rest(model, "", {tower, language, *([] if f"{head}.".startswith(f"{language}.") else [head])}):
        module, kind = modules.get(path), "projector"
        # transformers builds towers as models of their own that take pixels or sound, projectors as plain modules.
        if _BESIDE.search(path):
            kind = "other"
        elif isinstance(module, PreTrainedModel) and not _PROJECTS.search(path.rpartition(".")[2]):
            kind = "vision" if module.main_input_name == "pixel_values" else "unknown"
        placed[kind].append(path)
    vision, projector = [tower] * bool(tower) + placed["vision"], placed["projector"]
    if vision and not projector:  # it may lie inside the tower (Qwen's merger)
        projector = [f"{vision[0]}.{n}" for n, _ in modules[vision[0]].named_children() if _PROJECTS.search(n)]
    if towers := placed["unknown"]:
        faults.append(f"{listed(towers)}: a second tower, or part of the projector")
    elif not projector:
        faults.append("nothing is left for its projector" if vision else "it has no vision tower and no projector")
    return ModelParts(tuple(vision), tuple(projector), (language,), (head,), tuple(placed["other"])), faults


def _rest(module: nn.Module, path: str, known: set[str]) -> Iterator[str]:
    """The fewest modules and bare parameters that hold all parameters outside the known paths."""
    for name, child in module.named_children():
        at = f"{path}.{name}" if path else name
        if any(other.startswith(f"{at}.") for other in known):
            yield from _rest(child, at, known)
        elif at not in known and any(True for _ in child.parameters()):
            yield at
    yield from (f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False))
