"""A frozen vision tower costs no backward pass."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

from transformers import PreTrainedModel

from vlm_sft.models.parts import ModelParts, part_of, parts_of


def keep_frozen_out_of_autograd(model: PreTrainedModel, *, model_parts: ModelParts | None = None) -> None:
    """Leaves a tower without trainable parameters out of the graph, and so out of gradient checkpointing's recompute.

    With checkpointing, TRL and the Trainer (again, at the start of `train()`) call `enable_input_require_grads()`,
    which marks the tower's patch embeddings as well: a frozen tower is then recomputed and back-propagated for
    nothing (transformers 5.23). This model's own method now marks the language model's embeddings only, as long as no
    tower parameter trains at the time of the call. Gradients are the same. `load_model` and `assemble_llava` do this
    to each model.
    """
    parts = parts_of(model, model_parts=model_parts)
    # Bound to this instance, and in a way that a deep copy of the model binds to the copy.
    enable = MethodType(partial(_mark_embeddings, parts=parts), model)
    disable = MethodType(partial(_unmark_embeddings, parts=parts), model)
    model.enable_input_require_grads, model.disable_input_require_grads = enable, disable  # type: ignore[method-assign]


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
