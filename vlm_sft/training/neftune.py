"""NEFTune's noise by the length of each conversation, so that rows with padding and without it train the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vlm_sft.common import base_of


def noise_by_conversation(trainer: Any) -> None:
    """Replaces the noise that the Trainer has put on the model's embeddings, where it has (`neftune_noise_alpha`).

    Each conversation of T tokens gets uniform noise within alpha / sqrt(T d) (arXiv 2310.05914). The Trainer's (in
    transformers 5.23) takes for T what a row of the batch has: padding too, and without padding all conversations."""
    if (own := getattr(trainer, "neftune_hook_handle", None)) is None:
        return
    own.remove()
    model, alpha, lengths = base_of(trainer.model), trainer.neftune_noise_alpha, [torch.ones(())]

    def measure(core: Any, args: Any, kwargs: dict[str, Any]) -> None:
        lengths[0] = _lengths(**kwargs)

    def add_noise(embedding: Any, args: Any, output: Tensor) -> Any:
        if not embedding.training:
            return output
        within = alpha / (lengths[0].to(output.device) * output.shape[-1]).sqrt()
        return output + torch.zeros_like(output).uniform_(-1, 1) * within[..., None].to(output.dtype)

    hooks = [
        model.base_model.register_forward_pre_hook(measure, with_kwargs=True),
        model.get_input_embeddings().register_forward_hook(add_noise),
    ]
    trainer.neftune_hook_handle = SimpleNamespace(remove=lambda: [hook.remove() for hook in hooks])


def _lengths(
    input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **_: Any
) -> Tensor:
    """The tokens of each token's conversation: [B, 1] by the mask, or [1, T] by where positions begin again."""
    if attention_mask is not None:
        return attention_mask.sum(dim=1, keepdim=True)
    if position_ids is None:
        return torch.full((1, 1), input_ids.shape[1])
    conversations = (position_ids.reshape(-1, input_ids.shape[1])[0] == 0).cumsum(0)
    return conversations.bincount()[conversations][None]
