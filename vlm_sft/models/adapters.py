"""LoRA and DoRA configs bound by full path to the asked parts, and the check that the adapters landed there.

A bare name such as `q_proj` also matches the vision tower, and a name list that matches in part passes without a
word (PEFT 0.21). So the pattern is written from the model's own modules, and compared with them after wrapping.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from vlm_sft.models.parts import ModelParts, listed, part_of, parts_of

Projector = Literal["frozen", "full", "lora"]
ADAPTABLE_PARTS = ("language", "vision", "projector")


@dataclass(frozen=True)
class AdapterReport:
    """What `check_adapters` found: full paths of the adapted layers and of the modules trained in full."""

    adapted: tuple[str, ...]
    trained_in_full: tuple[str, ...]
    layers_by_part: Mapping[str, int]
    ranks: tuple[int, ...]
    dora: bool
    trainable_parameters: int

    def __str__(self) -> str:
        counts = ", ".join(f"{part} {count}" for part, count in self.layers_by_part.items())
        whole = f"; in full: {', '.join(self.trained_in_full)}" if self.trained_in_full else ""
        return (
            f"LoRA rank {'/'.join(map(str, self.ranks))} on {len(self.adapted)} layers ({counts}), "
            f"DoRA {'on' if self.dora else 'off'}{whole}; {self.trainable_parameters:,} trainable parameters"
        )


def lora_config(
    model_or_type: PreTrainedModel | PreTrainedConfig | str,
    *,
    r: int = 16,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
    use_dora: bool = False,
    use_rslora: bool = False,
    parts: Sequence[str] = ("language",),
    projector: Projector = "frozen",
    target_modules: Sequence[str] | None = None,
    model_parts: ModelParts | None = None,
) -> LoraConfig:
    """A LoraConfig whose pattern reaches the linear layers of the asked parts and no others.

    Language model and tower are adapted in their transformer layers: in every linear layer, or in those that
    `target_modules` names (`["q_proj", "v_proj"]`). Tower layers whose output the model drops (LLaVA's last, by
    `vision_feature_layer`) are left out: no gradient would reach them. The projector is frozen, trained in full and
    saved with the adapter ("full"; a bare parameter such as LLaVA-NeXT's `image_newline` stays frozen, since PEFT
    saves modules only), or adapted in all its linear layers ("lora", the same as naming it in `parts`).

    A config or a `model_type` serves too: its modules are read, without weights.

    Raises ValueError for a setting out of range, an unknown part, a name that matches nothing, a layer type without
    DoRA (with PEFT 0.21.2 also 8-bit layers on a CPU), and a projector trained in full although it is quantized.
    """
    _refuse_bad_settings(parts, projector, target_modules, r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout)
    model = _model(model_or_type)
    places = parts_of(model, model_parts=model_parts)
    if isinstance(model_or_type, str) and "vision" in parts and _unheard_layers(model.config):
        raise ValueError(
            f"{model_or_type!r} alone does not say which tower layers the checkpoint uses; pass the loaded model or "
            "its config."
        )
    linears = _linears(model, places)
    targets = _targets(linears, parts, projector, target_modules)
    modules = _modules(model)
    if use_dora and (unfit := [path for path in targets if _lacks_dora(modules[path])]):
        kinds = sorted({f"{type(modules[path]).__name__} on {model.device.type}" for path in unfit})
        raise ValueError(
            f"use_dora=True, but PEFT {version('peft')} has no working DoRA for {', '.join(kinds)} ({listed(unfit)}); "
            "set use_dora=False, or load the base in 16 bit or with nf4_config."
        )
    whole = _whole_projector(modules, places) if projector == "full" else []
    packed = [path for path in linears["projector"] if type(modules[path]).__name__ in ("Linear4bit", "Linear8bitLt")]
    if whole and packed:
        raise ValueError(
            f'projector="full", but {listed(packed)} came out quantized and cannot be trained; load the model with '
            "nf4_config, which keeps the projector in 16 bit."
        )
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_dora=use_dora,
        use_rslora=use_rslora,
        target_modules=_pattern(targets, modules),
        modules_to_save=whole or None,
    )


def check_adapters(
    model: nn.Module,
    *,
    parts: Sequence[str] = ("language",),
    projector: Projector = "frozen",
    target_modules: Sequence[str] | None = None,
    model_parts: ModelParts | None = None,
) -> AdapterReport:
    """What is adapted in this PEFT-wrapped model, once it equals what the arguments ask for.

    The asked set is worked out from the base model's modules, not from the pattern that placed the adapters, so a
    LoraConfig written by hand is judged as well. Call it on `trainer.model`, after everything has wrapped it.

    Raises ValueError with the difference: layers asked for and not adapted, or adapted and not asked for; modules
    trained in full or not; DoRA on some layers only; adapters that do not train; other parameters that do.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"{type(model).__name__} holds no adapters; give check_adapters the model that SFTTrainer(peft_config=...) "
            "or peft.get_peft_model made."
        )
    _refuse_bad_settings(parts, projector, target_modules)
    base: Any = model.get_base_model()
    places = parts_of(base, model_parts=model_parts)
    asked = set(_targets(_linears(base, places), parts, projector, target_modules))
    asked_whole = set(_whole_projector(_modules(base), places) if projector == "full" else ())

    adapted = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    whole = {name for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    dora = {name for name, module in adapted.items() if len(module.lora_magnitude_vector)}
    trainable = {name: weight for name, weight in base.named_parameters() if weight.requires_grad}
    unheard = {name for name in adapted.keys() - asked if _is_unheard(name, base.config, places)}
    homes = {*adapted, *whole}
    inside = {name: {home for home in homes if name.startswith(f"{home}.")} for name in trainable}
    differences = {
        "asked for, not adapted": asked - adapted.keys(),
        "adapted, not asked for": adapted.keys() - asked - unheard,
        "adapted in a tower layer whose output the model drops, so that no gradient arrives": unheard,
        "asked for in full, not trained in full": asked_whole - whole,
        "trained in full, not asked for": whole - asked_whole,
        "without DoRA, while others have it": adapted.keys() - dora if dora else set(),
        "adapted, but frozen": homes.difference(*inside.values()),
        "trained outside the adapters": {name for name in trainable if not inside[name]},
    }
    if found := [f"{len(names)} {what}: {listed(names)}" for what, names in differences.items() if names]:
        raise ValueError(
            f"The adapters differ from what was asked. {'; '.join(found)}. Give lora_config and check_adapters the "
            "same parts, projector and target_modules, and wrap the model with that config."
        )
    return AdapterReport(
        adapted=tuple(adapted),
        trained_in_full=tuple(sorted(whole)),
        layers_by_part=dict(Counter(part_of(name, places) for name in adapted)),
        ranks=tuple(sorted({rank for module in adapted.values() for rank in module.r.values()})),
        dora=bool(dora),
        trainable_parameters=sum(weight.numel() for weight in trainable.values()),
    )


def _refuse_bad_settings(
    parts: Sequence[str],
    projector: str,
    target_modules: Sequence[str] | None,
    *,
    r: int = 1,
    lora_alpha: int = 1,
    lora_dropout: float = 0.0,
) -> None:
    wanted = [] if target_modules is None or isinstance(target_modules, str) else list(target_modules)
    bad = [name for name in wanted if not re.fullmatch(r"\w+(\.\w+)*", name)]
    faults = {
        f"r={r}: the rank is at least 1": r < 1,
        f"lora_alpha={lora_alpha}: the scale lora_alpha / r must be above 0": lora_alpha <= 0,
        f"lora_dropout={lora_dropout}: a probability from 0 to below 1": not 0 <= lora_dropout < 1,
        f"parts={parts!r}: a tuple of one or more of {', '.join(ADAPTABLE_PARTS)}": (
            isinstance(parts, str) or not parts or not set(parts) <= set(ADAPTABLE_PARTS)
        ),
        f"projector={projector!r}: one of {', '.join(get_args(Projector))}": projector not in get_args(Projector),
        'projector="full" and "projector" in parts: train it in full or adapt it, not both': (
            projector == "full" and "projector" in parts
        ),
        f'target_modules={target_modules!r}: a list such as ["q_proj"]; leave it out for every linear layer': (
            target_modules is not None and not wanted
        ),
        f"target_modules holds {bad}: one bare name an item, without comma, blank or pattern": bad,
    }
    if any(faults.values()):
        raise ValueError("; ".join(text for text, wrong in faults.items() if wrong) + ".")


def _model(model_or_type: PreTrainedModel | PreTrainedConfig | str) -> PreTrainedModel:
    """The model itself, or its modules without weights (0.2 s at 7B)."""
    if isinstance(model_or_type, PreTrainedModel):
        return model_or_type
    config = AutoConfig.for_model(model_or_type) if isinstance(model_or_type, str) else model_or_type
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)  # type: ignore[no-any-return, no-untyped-call]


def _modules(root: nn.Module) -> dict[str, nn.Module]:
    """Each module by the path it has, or had before PEFT wrapped it."""
    return {
        re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", name): module
        for name, module in root.named_modules()
        if not re.search(r"\.(lora_\w+|modules_to_save)(\.|$)", name)
    }


def _linears(root: PreTrainedModel, places: ModelParts) -> dict[str, list[str]]:
    """Full paths, by part, of the linear layers that may be adapted."""
    linears: dict[str, list[str]] = defaultdict(list)
    for name, module in _modules(root).items():
        # `in_features` also marks the linear layers of other quantizers, which do not inherit from nn.Linear.
        if not hasattr(module, "in_features"):
            continue
        part = part_of(name, places)
        # A pooling head beside the numbered layers is not part of what the language model sees.
        in_layers = any(piece.isdigit() for piece in name.split("."))
        if part == "projector" or (in_layers and not _is_unheard(name, root.config, places)):
            linears[part].append(name)
    return linears


def _unheard_layers(config: PreTrainedConfig) -> range:
    """The tower's layers whose output the model drops: those above the highest `vision_feature_layer`.

    That counts hidden states: 0 is the embedding, -1 the last layer's output.
    """
    chosen = getattr(config, "vision_feature_layer", None)
    if chosen is None:
        return range(0)
    layers: int = config.vision_config.num_hidden_layers
    states = [chosen] if isinstance(chosen, int) else chosen
    return range(max(state if state >= 0 else layers + 1 + state for state in states), layers)


def _is_unheard(name: str, config: PreTrainedConfig, places: ModelParts) -> bool:
    layer = re.search(r"\.(\d+)(\.|$)", name)
    return layer is not None and int(layer[1]) in _unheard_layers(config) and part_of(name, places) == "vision"


def _targets(
    linears: Mapping[str, Sequence[str]], parts: Sequence[str], projector: str, names: Sequence[str] | None
) -> list[str]:
    """Full paths of the layers to adapt; ValueError where a part or a name comes to nothing."""
    asked = {*parts, "projector"} if projector == "lora" else set(parts)
    chosen = {part: list(linears.get(part, ())) for part in ADAPTABLE_PARTS if part in asked}
    there = {part: sorted({path.rsplit(".", 1)[-1] for path in paths}) or "none" for part, paths in chosen.items()}
    faults = []
    if names is not None:
        named = [part for part in chosen if part != "projector"]
        meant = {name: {p for part in named for p in chosen[part] if p.endswith(f".{name}")} for name in names}
        where = " or ".join(named) or "no part"
        faults = [f"target_modules: {name!r} matches no linear layer of {where}" for name in names if not meant[name]]
        for part in named:
            chosen[part] = [path for path in chosen[part] if any(path in paths for paths in meant.values())]
    faults += [f"no linear layer to adapt in part {part!r}" for part, paths in chosen.items() if not paths]
    if faults:
        hint = 'Where a projector has none, train it with projector="full".'
        raise ValueError(f"{'; '.join(faults)}. Linear layers by part: {there}. {hint}")
    return [path for paths in chosen.values() for path in paths]


def _whole_projector(modules: Mapping[str, nn.Module], places: ModelParts) -> list[str]:
    """The projector's modules; a ModuleList as its items, since PEFT's wrapper cannot be indexed."""
    whole = []
    for path in places.projector:
        if isinstance(modules.get(path), nn.ModuleList):
            whole += [name for name in modules if re.fullmatch(rf"{re.escape(path)}\.\d+", name)]
        elif path in modules:
            whole.append(path)
    return whole


def _pattern(targets: Sequence[str], modules: Mapping[str, nn.Module]) -> str:
    r"""One pattern that PEFT full-matches: `\d+` where every numbered layer is meant, else their numbers."""
    alternatives = []
    numbers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in targets:
        if numbered := re.fullmatch(r"(.*?)\.(\d+)\.(.+)", path):
            numbers[numbered[1], numbered[3]].append(numbered[2])
        else:
            alternatives.append(re.escape(path))
    leaves: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for (layers, leaf), found in numbers.items():
        leaves[layers, tuple(found)].append(re.escape(leaf))
    for (layers, meant), names in leaves.items():
        stem = re.escape(layers)
        every = len(meant) == sum(re.fullmatch(rf"{stem}\.\d+", name) is not None for name in modules)
        number = r"\d+" if every else f"(?:{'|'.join(meant)})"
        alternatives.append(rf"{stem}\.{number}\.(?:{'|'.join(names)})")
    return "|".join(alternatives)


def _lacks_dora(module: Any) -> bool:
    if type(module).__name__ == "Linear8bitLt":
        # PEFT 0.21.2 (utils/integrations.py, dequantize_module_weight) puts a weight that lies on a CPU back there as a
        # copy without the scales, which bitsandbytes 0.50.2 has moved to the layer: the second forward fails.
        return bool(module.weight.device.type == "cpu")
    return not isinstance(module, nn.Linear) and type(module).__name__ != "HQQLinear"
