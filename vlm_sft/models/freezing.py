"""A frozen tower costs no backward pass, and what trains is in a precision that can."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vlm_sft.common import base_of
from vlm_sft.models.parts import ModelParts, part_of, parts_of


def detach_frozen_tower(model: PreTrainedModel) -> None:
    """Leaves a tower without trainable parameters out of the graph, and so out of gradient checkpointing's recompute;
    what is frozen in it stays in evaluation mode, or a BatchNorm would move that no adapter saves.

    With checkpointing, TRL and the Trainer (again, when `train()` starts) call `enable_input_require_grads()`, which
    marks the tower's patch embeddings as well: a frozen tower is then recomputed and back-propagated for nothing
    (transformers 5.23). This model's own method now marks the language model's embeddings only, as long as no tower
    parameter trains at the time of the call. Gradients are the same."""
    parts = parts_of(model)
    # Bound to this instance, and in a way that a deep copy of the model binds to the copy.
    enable = MethodType(partial(_mark_embeddings, parts=parts), model)
    disable = MethodType(partial(_unmark_embeddings, parts=parts), model)
    model.enable_input_require_grads, model.disable_input_require_grads = enable, disable  # type: ignore[method-assign]
    modules = dict(model.named_modules())
    for tower in (modules[path] for path in (*parts.vision, *parts.other) if path in modules):
        tower.train = MethodType(_train, tower)


def cast_trainable_to_fp32(model: nn.Module) -> None:
    """Puts the trainable parameters into float32: what fp16 training needs, and bf16 training of whole parts.

    A bfloat16 weight of 0.02 cannot move by less than 6e-5, which an AdamW step at a learning rate of 2e-5 never
    reaches; the gradient scaler of fp16 unscales float32 alone; TRL 1.16 casts the adapters of a quantized base to
    bfloat16. The forward pass then needs autocast. Raises ValueError for a SmolVLM whose embeddings are then in another
    dtype than its tower."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    base = base_of(model)
    # It casts the features of an image to the dtype of its first parameter, and merges them with the embeddings
    # (transformers 5.23, modeling_smolvlm.py).
    if base.config.model_type == "smolvlm" and base.dtype != (held := base.get_input_embeddings().weight.dtype):
        found = f"The tower is in {base.dtype} and the embeddings in {held}, which SmolVLM cannot merge"
        how = 'load it with load_model(dtype="float32"): bf16=True or fp16=True still computes in 16 bit'
        raise ValueError(f"{found}; {how}.")


def _train(tower: nn.Module, mode: bool = True) -> nn.Module:
    """`nn.Module.train` for what trains in the tower; the rest is in evaluation mode. A step calls it: a tower that is
    frozen as a whole is not gone through module by module."""
    mode = mode and any(weight.requires_grad for weight in tower.parameters())
    type(tower).train(tower, mode)
    for module in tower.modules() if mode else ():
        weights = [weight.requires_grad for weight in module.parameters()]
        if weights and not any(weights):
            module.eval()
    return tower


def _mark_embeddings(model: Any, *, parts: ModelParts) -> None:
    _unmark_embeddings(model, parts=parts)
    if any(weight.requires_grad and part_of(name, parts) == "vision" for name, weight in model.named_parameters()):
        type(model).enable_input_require_grads(model)
    else:
        for path in parts.language:
            model.get_submodule(path).enable_input_require_grads()


def _unmark_embeddings(model: Any, *, parts: ModelParts) -> None:
    type(model).disable_input_require_grads(model)
    for path in parts.language:
        model.get_submodule(path).disable_input_require_grads()
