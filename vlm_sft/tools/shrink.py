"""A model made small: its widths, depths, heads and experts, by the names of its config's fields.

What decides the length of a row stays: vocabulary and token ids, sizes of images, patches, merges and windows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

WIDTH = 64  # NF4 packs blocks of 64 weights of a row
# What a field of this name is at most; the first pattern that fits counts.
_AT_MOST = {
    r"base_channels|output_channels|qk_head_dim|q_lora_rank": 32,
    r".*head_dim|d_kv|d_head|.*lora_rank|.*state_size|rotary_dim|query_pre_attn_scalar|hidden_size_per_layer_input": 16,
    r"n_group|topk_group|.*shared_experts": 1,
    r".*(kv|key|key_value)_heads|n_groups|.*experts_per_tok(en)?|(moe_)?top_?k(_experts)?|moe_k": 2,
    r"num_global_layers|resampler_depth|conf_num_hidden_layers": 2,
    r".*heads|.*experts": 4,
    r".*(hidden_size|hidden_dim|embed_dim|ection_dim|put_dim|proj_dim|channels)|d_model|n_embd|width": WIDTH,
}
_INNER = re.compile(r".*(intermediate_size(_mlp)?|ffn_dim|mlp_dim|expert_dim)|d_ff")
_KEPT = re.compile("token|vocab|position|image|patch|window|_id$")
_DEPTHS = ("num_hidden_layers", "depth", "num_layers", "encoder_layers", "decoder_layers", "n_layers", "layers")


def shrink(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a small model of the same kind, from `config.to_dict()`.

    Of a stack of layers one of each kind is kept (sliding and full attention, dense and sparse, tapped or not), and two
    at least. Numbers that are small already stay."""
    heads = config.get("num_attention_heads")
    width = next((config[name] for name in ("hidden_size", "d_model", "embed_dim") if config.get(name)), None)
    # A tower of timm has the width of its architecture, unless told another.
    timm = "architecture" in config and "embed_dim" not in (config.get("model_args") or {})
    ropes = str([value for name, value in config.items() if "rope" in name])
    sections = "mrope_section" in ropes and "0.25" in ropes  # of a quarter of each head

    def small(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [small(name, part) for part in value]
        if isinstance(value, dict) and name.endswith(("_config", "_cfg", "encoder", "decoder", "model_args")):
            return shrink(value)
        if type(value) is not int or timm:
            return value
        if name.startswith("vision_feature_layer"):
            return max(-2, min(value, 1))
        if name == "head_dim":  # Gemma 4's are wider where attention is full
            return min(value, 32 if sections or value >= 512 else 16)
        if name == "num_key_value_heads" and value == heads:
            return min(value, 4)
        if _INNER.fullmatch(name):
            return min(value, WIDTH * min(max(round(value / width) if isinstance(width, int) else 2, 1), 4))
        return next((min(value, size) for pattern, size in _AT_MOST.items() if re.fullmatch(pattern, name)), value)

    settings = {name: small(name, value) for name, value in config.items() if name != "quantization_config"}
    if depth := next((name for name in _DEPTHS if isinstance(config.get(name), int)), None):
        settings |= _fewer_layers(settings, depth)
    if "vision_output_dim" in settings:  # of Mllama's tower, its last layer and those that it taps
        settings["vision_output_dim"] = WIDTH * (1 + len(settings.get("intermediate_layers_indices", ())))
    for name in settings.keys() & {"rope_parameters", "rope_scaling"}:
        settings[name] = _turned(settings[name], settings.get("head_dim") or WIDTH // 4)
    return settings


def _turned(rope: Any, head_dim: int) -> Any:
    """Rotary settings whose sections have as many frequencies together as a head of this size."""
    if not isinstance(rope, dict):
        return rope
    turned = {name: _turned(value, head_dim) for name, value in rope.items()}
    if sections := len(rope.get("mrope_section") or ()):
        total = int(head_dim * rope.get("partial_rotary_factor", 1)) // 2
        each = total // sections
        turned["mrope_section"] = [each] * (sections - 1) + [total - each * (sections - 1)]
    return turned


def _fewer_layers(config: Mapping[str, Any], depth: str) -> dict[str, Any]:
    """One layer of each kind. A list as long as the stack has an entry for each layer; one of growing numbers below its
    depth names some of the layers."""
    total, lists = config[depth], {name: value for name, value in config.items() if isinstance(value, list) and value}
    numbers = {name: {n for n in value if type(n) is int and 0 <= n < total} for name, value in lists.items()}
    some = {name: value for name, value in lists.items() if value == sorted(numbers[name])}
    each = {name: value for name, value in lists.items() if len(value) == total and name not in some}
    changes = {int(layer): shrink(value) for layer, value in (config.get("per_layer_config") or {}).items()}
    ends = {"first_k_dense_replace": range(config.get("first_k_dense_replace") or 0)}
    ends["num_kv_shared_layers"] = range(total - (config.get("num_kv_shared_layers") or 0), total)
    named = [*some.values(), *ends.values()]
    kinds = [
        str(([value[layer] for value in each.values()], [layer in value for value in named], changes.get(layer)))
        for layer in range(total)
    ]
    kept = sorted(map(kinds.index, set(kinds)))
    kept = kept if len(kept) > 1 else [*range(min(total, 2))]
    fewer: dict[str, Any] = {depth: len(kept)} | {name: [value[at] for at in kept] for name, value in each.items()}
    fewer |= {name: [new for new, layer in enumerate(kept) if layer in value] for name, value in some.items()}
    fewer |= {name: sum(layer in value for layer in kept) for name, value in ends.items() if config.get(name)}
    if changes:
        fewer["per_layer_config"] = {new: changes[layer] for new, layer in enumerate(kept) if layer in changes}
    return fewer


def unchanged(config: Mapping[str, Any], small: Mapping[str, Any]) -> Iterator[str]:
    """Numbers from 128 up that `shrink` did not know, as paths in the config; not those that it means to keep."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from (f"{name}.{inner}" for inner in unchanged(value, small.get(name) or {}))
        elif isinstance(value, int) and 128 <= value == small.get(name) and not _KEPT.search(name):
            yield f"{name}={value}"


def random_model(config: Any, seed: int) -> Any:
    """A random model of a config, in float32 and evaluation mode, of which every part has an effect."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        # The usual deviation of 0.02 is made for widths in the thousands. At 64, attention would hardly look at
        # positions, so that faults there hide; Gemma3's projector starts at zero, and so do Mllama's gates.
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                row = parameter[0, 0] if ".experts." in name and parameter.ndim > 2 else parameter[0]
                torch.nn.init.normal_(parameter, std=row.numel() ** -0.5)
            elif parameter.numel() == 1 and not parameter.any():
                torch.nn.init.ones_(parameter)
    return model.eval()
