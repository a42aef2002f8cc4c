"""What the model answers to the last question of each row. Shapes: `B` rows of a batch, `T` tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from vlm_sft.chat.collator import ChatCollator
from vlm_sft.chat.images import to_rgb
from vlm_sft.chat.messages import Message, normalise, text_of
from vlm_sft.chat.template import ChatTemplate
from vlm_sft.common import evaluating

# Whatever the model's generation config says: Qwen-VL's samples, with a repetition penalty.
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}


class Question(NamedTuple):
    """What is asked of the model: messages up to the last answer, their images, and the answer given there."""

    messages: list[Message]
    images: list[Any]
    reference: str | None


def split_reference(row: Mapping[str, Any]) -> Question:
    """The row without its last message, if that is the assistant's; the whole row if nothing answers it yet.

    Raises `ValueError` for messages and images that do not fit together, as `messages.normalise` does."""
    messages, images = normalise(row["messages"], row.get("images"))
    if messages[-1]["role"] == "assistant":
        return Question(messages[:-1], images, text_of(messages[-1]))
    return Question(messages, images, None)


@torch.no_grad()
def generate(
    model: Any,
    prompter: ChatCollator | ChatTemplate,
    rows: Any,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    progress: bool = True,
) -> list[str]:
    """The model's answer to each row's last question, greedy, without special tokens and outer white space.

    `rows` is a list or dataset with `messages` and `images`. The prompt is what the collator trains on up to the last
    answer (a `ChatTemplate(processor)` serves as well). Generation ends at the stop token of a trained answer, at those
    of the model's generation config, or after `max_new_tokens`. With several processes each takes its share of the
    rows, and each returns all answers. The model is left as it was, in training mode and with its own cache setting.

    Raises `ValueError` without rows, and for a bad row with its number (its `row` column where it has one)."""
    if len(rows) == 0:
        raise ValueError("no rows to generate from; give at least one")
    rank, world_size = PartialState().process_index, PartialState().num_processes
    # Sharded models (FSDP, ZeRO-3) need the same number of batches everywhere: short shares start again from row 0.
    share = [i % len(rows) for i in range(rank, -(-len(rows) // world_size) * world_size, world_size)]
    template = prompter.template if isinstance(prompter, ChatCollator) else prompter
    tokenizer, stop_ids = template.processor.tokenizer, template.stop_ids(model.generation_config)
    settings = {"eos_token_id": stop_ids, "pad_token_id": tokenizer.pad_token_id, "use_cache": True, **GREEDY}
    # In training, autocast brings adapters or a projector in float32 and their 16-bit base together.
    dtypes = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    narrow = min(dtypes - {torch.float32}, key=str, default=None)
    one_precision = torch.autocast(model.device.type, narrow, enabled=len(dtypes) > 1)
    bar = tqdm(total=len(share), desc="Generating", disable=not progress or rank > 0)
    answers: list[tuple[int, str]] = []
    with evaluating(model), one_precision, bar:
        for start in range(0, len(share), batch_size):
            batch = share[start : start + batch_size]
            inputs = _inputs(prompter, template, rows, batch).to(model.device)
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)
            for row, ids in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
                answers.append((row, tokenizer.decode(ids[:end], skip_special_tokens=True).strip()))
            bar.update(len(batch))
    by_row = dict(gather_object(answers))
    return [by_row[i] for i in range(len(rows))]


def _inputs(prompter: ChatCollator | ChatTemplate, template: ChatTemplate, rows: Any, numbers: Sequence[int]) -> Any:
    """A `BatchFeature` with `input_ids` [B, T], padded on the left, and what else the processor makes."""
    texts, images = [], []
    for number in numbers:
        name = number
        try:
            row = rows[number]
            name = row.get("row", number)  # `rows` may be some of a dataset
            question = split_reference(row)
            images.append([to_rgb(image) for image in question.images])
            texts.append(prompter.prompt(question.messages))
        except ValueError as error:
            raise ValueError(f"row {name}: {error}") from error
    settings = {"add_special_tokens": template.add_special_tokens(texts[0]), "return_tensors": "pt"}
    settings |= {"padding": True, "padding_side": "left"}
    return template.processor(text=texts, images=images if any(images) else None, **settings)
