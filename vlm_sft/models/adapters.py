"""What trains, in one sentence: `TRAINS = {"language": "lora"}`. `lora_config` makes it so, `check_trains` proves it.

A part is adapted ("lora"), adapted in layers of these names (["q_proj", "v_proj"]), trained whole ("full"), or not
named and frozen. PEFT 0.21 matches a bare name in the tower too, and a list that matches in part passes without a word.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from math import prod
from typing import Any, Literal

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn

from vlm_sft.common import is_quantized, listed
from vlm_sft.models.hardware import dtype_name
from vlm_sft.models.parts import PARTS, bare_name, linear_layers, part_of, parts_of, root_of, stacked_weights
from vlm_sft.upstream import lacks_dora, targets_of

Trains = Mapping[str, Literal["lora", "full"] | Sequence[str]]


@dataclass(frozen=True)
class PartReport:
    """How a part trains. `share` is that of its matrices, embedding tables aside, that training reaches. Two 4-bit
    parameters in one byte count as two; what PEFT trains a copy of counts once."""

    parameters: int
    trainable: int
    quantized: int
    dtypes: tuple[str, ...]
    how: str
    adapted_layers: int
    share: float


@dataclass(frozen=True)
class TrainsReport:
    """What `check_trains` found, part by part."""

    parts: Mapping[str, PartReport]

    def lines(self) -> list[str]:
        """A table of six lines."""
        width = max(len("trains"), *(len(found.how) for found in self.parts.values())) + 2
        names = f"{'layers':>6}{'matrices':>10}{'trainable':>15}{'parameters':>16}  dtypes"
        lines = [f"{'part':<11}{'trains':<{width}}{names}"]
        for part, found in self.parts.items():
            share = f"{int(found.share * 1000) / 10:g}%"  # rounded down: 100% is all of them
            numbers = f"{found.adapted_layers:>6}{share:>10}{found.trainable:>15,}{found.parameters:>16,}"
            lines.append(f"{part:<11}{found.how:<{width}}{numbers}  {', '.join(found.dtypes)}".rstrip())
        return lines


def lora_config(
    model: nn.Module,
    trains: Trains | None = None,
    *,
    r: int = 16,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
    use_dora: bool = False,
) -> LoraConfig | None:
    """Makes `trains` so on this loaded model, by default {"language": "lora"}: what SFTTrainer takes as `peft_config`.

    Freezes what is not named, unfreezes what trains in full, and returns a LoraConfig whose pattern reaches the asked
    layers and no others, or None without any. Language model and tower are adapted in their transformer layers, without
    tower layers whose output the model drops (LLaVA's last, by `vision_feature_layer`): no gradient would reach them.
    The projector is adapted in all its linear layers, or trained whole and saved with the adapters, except for a bare
    parameter such as LLaVA-NeXT's `image_newline`: PEFT saves modules only. The experts of a mixture are adapted where
    they are stacked in one weight (PEFT's `target_parameters`), which knows neither dropout nor DoRA. Raises ValueError
    for all that cannot be meant or made, such as a quantized part in full."""
    if isinstance(model, PeftModel):
        how = "train these (load_model with is_trainable=True, no peft_config), or give lora_config the model without"
        raise ValueError(f"The model has adapters already: {how} them.")
    trains = {"language": "lora"} if trains is None else trains
    plan = _Plan(model, trains)
    faults = [f"r={r}: the rank is at least 1"] * (r < 1)
    faults += [f"lora_alpha={lora_alpha}: the scale lora_alpha / r must be above 0"] * (lora_alpha <= 0)
    faults += [f"lora_dropout={lora_dropout}: a probability from 0 to below 1"] * (not 0 <= lora_dropout < 1)
    faults += [f"use_dora={use_dora!r}: True or False"] * (use_dora not in (True, False))
    if use_dora and (unfit := [path for path in plan.layers if lacks_dora(plan.modules[path])]):
        kinds = sorted({f"{type(plan.modules[path]).__name__} on {plan.base.device.type}" for path in unfit})
        found = f"PEFT {version('peft')} has no working DoRA for {', '.join(kinds)} ({listed(unfit)})"
        faults.append(f"{found}; set use_dora=False, or load the base in 16 bit or with nf4_config")
    if plan.experts and (lora_dropout or use_dora):
        found = f"PEFT {version('peft')} has neither for the experts of a mixture ({listed(plan.experts)})"
        how = f"set lora_dropout=0 and use_dora=False, or {plan.without_experts()}"
        faults.append(f"lora_dropout={lora_dropout}, use_dora={use_dora}: {found}; {how}")
    if faults:
        raise ValueError(f"{'; '.join(faults)}.")
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_dora=use_dora,
        target_modules=_pattern(plan.layers, plan.modules) if plan.layers else [],
        target_parameters=plan.experts or None,
        modules_to_save=plan.whole or None,
    )
    if plan.adapts and targets_of(config, plan.base) != {*plan.layers, *plan.experts}:
        found = f"PEFT {version('peft')} takes {plan.base.config.model_type!r} for an older checkpoint"
        raise ValueError(f"{found} and would adapt other layers than those asked for; {plan.without_experts()}.")
    for name, parameter in model.named_parameters():
        # Beside adapters PEFT trains a copy of the projector.
        parameter.requires_grad_(not plan.adapts and trains.get(part_of(name, plan.parts)) == "full")
    return config if plan.adapts else None


def check_trains(model: nn.Module, trains: Trains) -> TrainsReport:
    """How each part of this model, wrapped or not, trains, once that is what `trains` says. The asked layers are worked
    out from the base model's modules, so a LoraConfig written by hand is judged as well. Call it on `trainer.model`,
    when all has wrapped it. Raises ValueError with every difference."""
    plan = _Plan(model, trains)
    # The adapters by the path of their layer, or of the stacked weight: PEFT nests those of one module.
    held: dict[str, Any] = {
        f"{bare_name(name)}.{module.parameter_name}" if isinstance(module, ParamWrapper) else name: module
        for name, module in plan.base.named_modules()
        if isinstance(module, LoraLayer)
    }
    if plan.adapts and not held:
        fault = f"TRAINS={dict(trains)} asks for adapters, and {type(plan.base).__name__} holds none"
        raise ValueError(f"{fault}; pass peft_config=lora_config(model, TRAINS) to SFTTrainer.")
    asked = {*plan.layers, *plan.experts}
    unused = {name for name in held.keys() - asked if plan.drops(name)}
    dora = {name for name, module in held.items() if len(module.lora_magnitude_vector)}
    frozen = {
        name
        for name, adapter in held.items()
        if not all(weight.requires_grad for own, weight in adapter.named_parameters() if own.startswith("lora_"))
    }
    own = {name: weight for name, weight in plan.base.named_parameters() if ".lora_" not in name}
    # Beside adapters PEFT trains a copy of the whole projector, and saves modules only.
    full = {n for n in own if trains.get(part_of(n, plan.parts)) == "full" and ".original_module." not in n}
    bare = full & {*plan.parts.projector} if held else set()
    full -= bare
    trained = {name for name, weight in own.items() if weight.requires_grad}
    differences = {
        "layers asked for are not adapted": asked - held.keys(),
        "layers are adapted and not asked for": held.keys() - asked - unused,
        "tower layers are adapted whose output the model drops, so that no gradient arrives": unused,
        "adapted layers are frozen": frozen,
        "layers are without DoRA, while others have it": held.keys() - dora if dora else set(),
        "weights train and should not": trained - full,
        "weights should train in full and do not": full - trained,
    }
    if found := [f"{len(names)} {what}: {listed(names)}" for what, names in differences.items() if names]:
        how = "Give lora_config the same TRAINS and SFTTrainer its result as peft_config; set no requires_grad after."
        raise ValueError(f"What trains differs from TRAINS={dict(trains)}. {'; '.join(found)}. {how}")
    return TrainsReport(_report(plan, trains, held, bare))


class _Plan:
    """What a valid `trains` means on this model; raises ValueError with all that cannot be."""

    def __init__(self, model: nn.Module, trains: Trains) -> None:
        _refuse_unknown(trains)
        self.parts = parts_of(model)
        self.base: Any = root_of(model)
        # Each module by the path it has, or had before PEFT wrapped it.
        self.modules = {
            bare_name(name): module
            for name, module in self.base.named_modules()
            if not re.search(r"\.(lora_\w+|modules_to_save)(\.|$)", name)
        }
        self.layers: list[str] = []
        self.experts: list[str] = []
        self.whole: list[str] = []
        experts = stacked_weights(self.base)
        adaptable = [name for name in linear_layers(self.modules) if self._is_adaptable(name)] + [*experts]
        faults = []
        for part, how in trains.items():
            if how == "full":
                weights = [w for name, w in self.base.named_parameters() if part_of(name, self.parts) == part]
                if packed := sum(map(is_quantized, weights)):
                    found = f"{packed} weights of {part!r} are quantized and cannot train in full"
                    faults.append(f"{found}; adapt it, or load it in 16 bit (no --load_in_4bit; or by nf4_config)")
                elif not weights and not (part == "head" and trains.get("language") == "full"):
                    faults.append(f"{part!r} has no parameters of its own; a shared head trains with 'language'")
                continue
            chosen = [name for name in adaptable if part_of(name, self.parts) == part]
            if not chosen:
                faults.append(f'{part!r} has no linear layers to adapt; "full" trains it whole')
            elif how != "lora":
                kinds = sorted({path.rpartition(".")[2] for path in chosen})
                lost = [name for name in how if not any(f".{path}".endswith(f".{name}") for path in chosen)]
                faults += [f"{name!r} matches no linear layer of {part!r}, which are {kinds}" for name in lost]
                chosen = [path for path in chosen if f".{path}".endswith(tuple(f".{name}" for name in how))]
            self.layers += [path for path in chosen if path not in experts]
            self.experts += [path for path in chosen if path in experts]
        self.adapts = bool(self.layers or self.experts)
        if self.adapts and trains.get("projector") == "full":
            for path in filter(self.modules.__contains__, self.parts.projector):
                # A ModuleList as its items, since PEFT's wrapper cannot be indexed.
                is_list = isinstance(self.modules[path], nn.ModuleList)
                self.whole += [f"{path}.{n}" for n, _ in self.modules[path].named_children()] if is_list else [path]
            if not self.whole:
                faults.append(f"'projector' is {listed(self.parts.projector)}, not a module: PEFT cannot save it")
        if faults:
            raise ValueError(f"TRAINS={dict(trains)}: {'; '.join(faults)}.")

    def _is_adaptable(self, name: str) -> bool:
        """Not a pooling head next to the numbered layers, which the language model never sees."""
        used = any(map(str.isdigit, name.split("."))) and not self.drops(name)
        return used or part_of(name, self.parts) == "projector"

    def drops(self, name: str) -> bool:
        """Whether this lies in a tower layer above the highest `vision_feature_layer`, whose output the model drops.
        That setting counts hidden states: 0 is the embedding, -1 the last layer's output."""
        chosen = getattr(self.base.config, "vision_feature_layer", None)
        layer = re.search(r"\.(\d+)(\.|$)", name)
        tower = getattr(self.base.config, "vision_config", None)
        layers = getattr(tower, "num_hidden_layers", None)  # timm's towers have none
        if chosen is None or layer is None or layers is None or part_of(name, self.parts) != "vision":
            return False
        states = [chosen] if isinstance(chosen, int) else chosen
        return int(layer[1]) >= max(state if state >= 0 else layers + 1 + state for state in states)

    def without_experts(self) -> str:
        """The way out for a mixture: adapters on the layers that are no expert's and no dense twin of one."""
        attention = sorted({path.rpartition(".")[2] for path in self.layers if ".mlp." not in path})
        return f'adapt its attention alone, as in TRAINS = {{"language": {attention}}}'


def _refuse_unknown(trains: Trains) -> None:
    """Raises ValueError for what no model could train, all of it at once."""
    ways = '"lora", "full" or a list of layer names such as ["q_proj", "v_proj"], bare: without comma, blank or pattern'
    if not isinstance(trains, Mapping) or not trains:
        raise ValueError(f"TRAINS={trains!r}: a dict of one or more of {', '.join(PARTS)}, each {ways}.")
    faults = []
    for part, how in trains.items():
        if part not in PARTS:
            faults.append(f"{part!r} is not a part ({_meant(part, PARTS)})")
        names = how if isinstance(how, (list, tuple)) else []
        named = names and all(isinstance(name, str) and re.fullmatch(r"\w+(\.\w+)*", name) for name in names)
        if not named and how not in ("lora", "full"):
            faults.append(f"{part}: {how!r} is not a way to train ({_meant(how, ('lora', 'full'))}): {ways}")
        if part == "head" and how != "full":
            faults.append('head: adapters on it are not supported; "full", or leave it out')
    whole = [part for part, how in trains.items() if how == "full" and part != "projector"]
    if whole and any(how != "full" for how in trains.values()):
        found = f"{' and '.join(map(repr, whole))} in full next to adapters: only the projector can be saved with them"
        faults.append(f"{found}; adapt it too, or train everything in full")
    if faults:
        raise ValueError(f"TRAINS={dict(trains)}: {'; '.join(faults)}.")


def _meant(word: Any, known: Sequence[str]) -> str:
    close = get_close_matches(str(word).lower(), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"one of {', '.join(known)}"


def _pattern(layers: Sequence[str], modules: Collection[str]) -> str:
    r"""One pattern that PEFT full-matches: `\d+` where it reaches asked layers only, else their numbers. (PEFT 0.21.2
    shortens a list of paths to endings such as `24.self_attn.q_proj`, which fit a tower of 24 layers only.)"""
    numbers: dict[str, list[str]] = defaultdict(list)
    for path in layers:
        before, number, after = re.fullmatch(r"(?:(.*?\.)(\d+)(?=\.))?(.+)", path).groups(default="")  # type: ignore[union-attr]
        numbers[f"{re.escape(before)}#{re.escape(after)}" if number else re.escape(after)].append(number)
    alternatives = []
    for path, found in numbers.items():
        pattern = path.replace("#", r"\d+")
        if sum(re.fullmatch(pattern, name) is not None for name in modules) != len(found):
            pattern = path.replace("#", found[0] if len(found) == 1 else f"(?:{'|'.join(found)})")
        alternatives.append(pattern)
    return "|".join(alternatives)


def _report(plan: _Plan, trains: Trains, held: Mapping[str, Any], bare: Collection[str]) -> dict[str, PartReport]:
    """How each part trains, and all together (`total`)."""
    rows = (*PARTS, *["other"] * bool(plan.parts.other), "total")
    counts: dict[str, Counter[str]] = {part: Counter() for part in rows}
    dtypes: dict[str, set[str]] = defaultdict(set)
    tables = {f"{name}.weight" for name, module in plan.modules.items() if isinstance(module, nn.Embedding)}
    for name, parameter in plan.base.named_parameters():
        packing = getattr(parameter, "quant_state", None)
        size = parameter.numel() if packing is None else prod(packing.shape)
        copied, path = ".original_module." in name, bare_name(name)
        matrix = (parameter.ndim > 1 or packing is not None) and path not in tables
        matrix &= ".lora_" not in name and ".modules_to_save." not in name
        adapted = path in held or path.rpartition(".")[0] in held
        reached = matrix and (parameter.requires_grad or copied or adapted)
        for part in (part_of(name, plan.parts), "total"):
            counts[part].update(matrices=size * matrix, reached=size * reached)
            if not copied:
                quantized, trainable = size * is_quantized(parameter), size * parameter.requires_grad
                counts[part].update(parameters=size, trainable=trainable, quantized=quantized)
                dtypes[part].add(dtype_name(parameter.dtype))
    reports = {}
    for part, count in counts.items():
        layers = [held[name] for name in held if part in ("total", part_of(name, plan.parts))]
        how = "" if part == "total" else "frozen"
        if layers and part != "total":
            told = []
            for setting in ("r", "lora_alpha", "scaling"):
                values = {value for layer in layers for value in getattr(layer, setting).values()}
                told.append("/".join(f"{value:g}" for value in sorted(values)))
            how = "lora r {}, alpha {} (scale {})".format(*told)
            how += ", DoRA" * bool(layers[0].lora_magnitude_vector)
            how += f" on {', '.join(trains[part])}" if trains[part] != "lora" else ""
        elif trains.get(part) == "full":
            how = "full" + (f" but {listed(bare)}, which PEFT cannot save" if bare else "")
        share = count["reached"] / count["matrices"] if count["matrices"] else float(count["trainable"] > 0)
        sizes = count["parameters"], count["trainable"], count["quantized"]
        reports[part] = PartReport(*sizes, tuple(sorted(dtypes[part])), how, len(layers), share)
    return reports
