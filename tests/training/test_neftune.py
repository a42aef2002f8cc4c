"""NEFTune's noise is of the size that each conversation's own length asks for, however the rows are laid out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conversations import answer, ask, picture
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from vlm_sft import ChatCollator, enable_padding_free
from vlm_sft.training.neftune import noise_by_conversation

ALPHA = 5.0
ROWS = [
    {"messages": [ask(None, "What is this?"), answer("A cat and a dog.")], "images": [picture(60, 40, 1)]},
    {"messages": [ask("Hello there"), answer("Hi"), ask("more?"), answer("no")], "images": []},
    {"messages": [ask("Compare ", None, " and ", None), answer("no")], "images": [picture(40, 40), picture(30, 64)]},
]


def embedded(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """What the embedding puts out in a forward of this batch [tokens of the mask, d]."""
    found = []
    last = model.get_input_embeddings().register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model(**{name: value for name, value in batch.items() if name not in ("rows", "labels")}, use_cache=False)
    last.remove()
    return found[0][batch.get("attention_mask", torch.ones(found[0].shape[:2])).bool()]


@pytest.mark.parametrize("family", ["llava15", "qwen2_5_vl", "smolvlm"])
@pytest.mark.parametrize("padding_free", [False, True])
def test_each_conversation_has_noise_of_its_own_length(
    family: str, padding_free: bool, tiny_model: Any, tiny_processor: Any
) -> None:
    model, processor = tiny_model(family), tiny_processor(family)
    enable_padding_free(model)
    batch = ChatCollator(processor, padding_free=padding_free, name_rows=False)(ROWS)
    lengths = [int(ChatCollator(processor)([row])["input_ids"].shape[1]) for row in ROWS]
    assert len(set(lengths)) > 1
    clean = embedded(model.eval(), batch)
    trainer = SimpleNamespace(model=model, neftune_noise_alpha=ALPHA)
    trainer.neftune_hook_handle = activate_neftune(model, ALPHA)
    noise_by_conversation(trainer)
    assert torch.equal(embedded(model.eval(), batch), clean)
    noise = embedded(model.train(), batch) - clean
    for part, length in zip(noise.split(lengths), lengths, strict=True):
        within = ALPHA / (length * part.shape[-1]) ** 0.5
        assert 0.98 * within < float(part.abs().max()) <= 1.01 * within
    deactivate_neftune(model, trainer.neftune_hook_handle)
    assert torch.equal(embedded(model.train(), batch), clean)


def test_without_padding_it_is_the_trainers_own(tiny_model: Any, tiny_processor: Any) -> None:
    model = tiny_model("llava15").train()
    batch = ChatCollator(tiny_processor("llava15"), name_rows=False)(ROWS[:1])
    trainer = SimpleNamespace(model=model, neftune_noise_alpha=ALPHA)
    trainer.neftune_hook_handle = activate_neftune(model, ALPHA)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(embedded(model, batch))
        noise_by_conversation(trainer)
    torch.testing.assert_close(found[0], found[1])


def test_a_run_without_noise_is_left_alone() -> None:
    noise_by_conversation(SimpleNamespace())
