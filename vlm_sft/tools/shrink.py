"""A config made small: its widths, depths, heads and experts. What decides the length of a row stays: vocabulary and
token ids, sizes of images, patches, merges and windows, numbers of queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

WIDTH = 64  # NF4 packs blocks of 64 weights of a row
_AT_MOST = {
    WIDTH: "hidden_size d_model embed_dim hidden_dim n_embd width out_hidden_size output_dim projection_dim "
    "text_hidden_size vision_hidden_size encoder_hidden_size mm_hidden_size projector_hidden_size projector_input_dim "
    "projector_output_dim projection_hidden_size image_text_hidden_size word_embed_proj_dim downsample_channels "
    "downsample_hidden_size image_token_embed_dim latent_channels",
    32: "base_channels output_channels qk_head_dim q_lora_rank",
    16: "d_kv d_head resampler_head_dim attention_head_dim global_head_dim swa_head_dim linear_key_head_dim kv_lora_rank "
    "linear_value_head_dim linear_head_dim index_head_dim mamba_head_dim ssm_state_size qk_rope_head_dim v_head_dim "
    "qk_nope_head_dim rotary_dim query_pre_attn_scalar hidden_size_per_layer_input",
    4: "num_attention_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads n_heads "
    "resampler_n_heads conf_num_attention_heads swa_num_attention_heads linear_num_value_heads linear_num_heads "
    "mamba_num_heads index_n_heads num_experts n_routed_experts num_local_experts moe_num_experts",
    2: "num_kv_heads num_global_key_value_heads swa_num_key_value_heads linear_num_key_heads n_groups num_experts_per_tok "
    "num_experts_per_token moe_topk moe_k moe_top_k top_k_experts num_global_layers resampler_depth "
    "conf_num_hidden_layers",
    1: "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts",
}
_SIZES = {name: size for size, names in _AT_MOST.items() for name in names.split()}
_INNER = ("intermediate_size", "ffn_dim", "d_ff", "mlp_dim", "intermediate_size_mlp", "expert_dim")  # names end so
_DEPTHS = ("num_hidden_layers", "depth", "num_layers", "encoder_layers", "decoder_layers", "n_layers", "layers")
_NESTED = ("_config", "_cfg", "encoder", "decoder", "model_args")  # names of configs in a config end so


def shrink(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a small model of the same kind, from `config.to_dict()`.

    Of a stack of layers one of each kind is kept (sliding and full attention, dense and sparse, with and without a tap),
    and two at least. Numbers that are small already stay.
    """
    width = next((config[name] for name in ("hidden_size", "d_model", "embed_dim") if config.get(name)), None)
    timm = "architecture" in config and "embed_dim" not in (config.get("model_args") or {})  # it knows its own width

    def small(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [small(name, part) for part in value]
        if isinstance(value, bool) or not isinstance(value, int) or (timm and name == "hidden_size"):
            return value
        if name.endswith(_INNER):
            wider = round(value / width) if isinstance(width, int) else 2
            return min(value, WIDTH * min(max(wider, 1), 4))
        if name == "num_key_value_heads":  # one for each head, or fewer
            return min(value, 4 if value == config.get("num_attention_heads") else 2)
        if name == "head_dim":
            return min(value, _head_dim(config))
        return min(value, _SIZES.get(name, value))

    settings = {
        name: shrink(value) if isinstance(value, dict) and name.endswith(_NESTED) else small(name, value)
        for name, value in config.items()
    }
    if depth := next((name for name in _DEPTHS if isinstance(config.get(name), int)), None):
        settings |= _fewer_layers(settings, depth)
    if layers := settings.pop("per_layer_config", None):
        settings["per_layer_config"] = {
            layer: {name: max(1, settings[name] * value // config[name]) for name, value in changes.items()}
            for layer, changes in layers.items()
        }
    if "vision_output_dim" in settings:  # of Mllama, its last layer and those it taps; of Llama 4, its projector's
        settings["vision_output_dim"] = WIDTH * (1 + len(settings.get("intermediate_layers_indices", ())))
    if "channel_multiplier" in settings and "hidden_size" in settings:
        settings["hidden_size"] = settings["base_channels"] * settings["channel_multiplier"][-1]
    tower = settings.get("vision_config") or {}
    if deep := next((tower[name] for name in _DEPTHS if isinstance(tower.get(name), int)), None):
        for name in settings.keys() & {"vision_feature_layer", "vision_feature_layers"}:
            settings[name] = _within(settings[name], deep)
    head = settings.get("head_dim") or WIDTH // 4
    for name in settings.keys() & {"rope_parameters", "rope_scaling"}:
        settings[name] = _rotated(settings[name], head)
    return settings


def _within(layer: Any, depth: int) -> Any:
    if isinstance(layer, (list, tuple)):
        return [_within(one, depth) for one in layer]
    return layer if layer is None else max(-depth - 1, min(layer, depth))


def _head_dim(config: Mapping[str, Any]) -> int:
    """16, or more where only a share of it is rotated and the rotation has sections."""
    ropes = str([config.get(name) for name in ("rope_parameters", "rope_scaling", "partial_rotary_factor")])
    return 32 if "mrope_section" in ropes and "0.25" in ropes else 16


def _rotated(rope: Any, head: int) -> Any:
    """Sections and factors for as many frequencies as a head of this size has."""
    if not isinstance(rope, dict):
        return rope
    frequencies = int(head * rope.get("partial_rotary_factor", 1)) // 2
    rope = {name: _rotated(value, head) for name, value in rope.items()}
    if section := rope.get("mrope_section"):
        shares = [frequencies * part / sum(section) for part in section]
        order = sorted(range(len(shares)), key=lambda part: int(shares[part]) - shares[part])
        more = order[: frequencies - sum(map(int, shares))]
        rope["mrope_section"] = [int(share) + (part in more) for part, share in enumerate(shares)]
    return rope | {
        name: rope[name][:frequencies] for name in rope if name.endswith("_factor") and isinstance(rope[name], list)
    }


def _fewer_layers(config: dict[str, Any], depth: str) -> dict[str, Any]:
    """One layer of each kind. A list as long as the stack has an entry for each layer; one of growing numbers below its
    depth names some of the layers."""
    total = config[depth]
    lists = {name: value for name, value in config.items() if isinstance(value, (list, tuple))}
    some = {
        name: list(value)
        for name, value in lists.items()
        if all(isinstance(one, int) and 0 <= one < total for one in value)
        and sorted(set(value)) == list(value)
        and value
    }
    each = {name: value for name, value in lists.items() if len(value) == total and name not in some}
    changes = {int(layer): value for layer, value in (config.get("per_layer_config") or {}).items()}
    first, shared = config.get("first_k_dense_replace") or 0, config.get("num_kv_shared_layers") or 0

    def kind(layer: int) -> str:
        named = [layer in value for value in some.values()] + [layer < first, layer >= total - shared]
        return str([value[layer] for value in each.values()] + named + [changes.get(layer)])

    kinds = [kind(layer) for layer in range(total)]
    kept = sorted({kinds.index(one) for one in kinds})
    kept = kept if len(kept) > 1 else [*range(min(total, 2))]
    fewer: dict[str, Any] = {depth: len(kept)}
    fewer |= {name: [value[layer] for layer in kept] for name, value in each.items()}
    fewer |= {name: [at for at, layer in enumerate(kept) if layer in value] for name, value in some.items()}
    if first:
        fewer["first_k_dense_replace"] = sum(layer < first for layer in kept)
    if shared:
        fewer["num_kv_shared_layers"] = sum(layer >= total - shared for layer in kept)
    if changes:
        fewer["per_layer_config"] = {at: changes[layer] for at, layer in enumerate(kept) if layer in changes}
    return fewer


def random_model(config: Any, seed: int) -> Any:
    """A model in float32 and evaluation mode, whose parts all have an effect."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        # The usual deviation of 0.02 is made for widths in the thousands. At 64, attention would hardly look at
        # positions, so that faults there hide, Gemma3's projector starts at zero, and Mllama's gates do: images
        # without effect.
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                row = parameter[0, 0] if ".experts." in name and parameter.ndim > 2 else parameter[0]
                torch.nn.init.normal_(parameter, std=row.numel() ** -0.5)
            elif parameter.numel() == 1 and not parameter.any():
                torch.nn.init.ones_(parameter)
    return model.eval()
