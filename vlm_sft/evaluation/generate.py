"""What the model says to the last question of each row.

Shapes: `B` rows of a batch, `T` tokens, padding on the left.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from tqdm.auto import tqdm

from vlm_sft.chat.images import to_rgb
from vlm_sft.chat.messages import Message, normalise, text_of
from vlm_sft.chat.template import Rendered, locate


class Rows(Protocol):
    """A list or dataset of rows with `messages` and `images`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class Question(NamedTuple):
    """What is asked of the model: messages up to the last answer, their images, and the answer given there."""

    messages: list[Message]
    images: list[Any]
    reference: str | None


def question_of(row: Mapping[str, Any]) -> Question:
    """The row without its last message, if that is the assistant's; the whole row if nothing answers it yet.

    Raises `ValueError` for messages and images that do not fit together, as `messages.normalise` does.
    """
    conversation = normalise(row["messages"], row.get("images"))
    asked, answer = conversation.messages, None
    if asked[-1]["role"] == "assistant":
        asked, answer = asked[:-1], text_of(asked[-1])
    return Question(asked, conversation.images, answer)


@torch.no_grad()
def generate(
    model: Any,
    processor: Any,
    rows: Rows,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    stop_token: str | None = "auto",
    progress: bool = True,
) -> list[str]:
    """The model's answer to each row's last question, greedy, without special tokens and outer white space.

    The prompt is what the row is trained on up to its last answer (`ChatCollator` with the same
    `chat_template_kwargs` and `stop_token`). Generation ends at the stop token behind a trained answer, at those of the
    model's generation config, or after `max_new_tokens`. With several processes each takes its share of the rows, and
    each returns all answers. The model is left as it was, in training mode and with its own cache setting.

    Raises `ValueError` without rows, and for a bad row with its number (its `row` column where it has one).
    """
    if len(rows) == 0:
        raise ValueError("no rows to generate from; give at least one")
    rank, world_size = _rank_and_world_size()
    # Sharded models (FSDP, ZeRO-3) need the same number of batches everywhere: short shares start again from row 0.
    share = [i % len(rows) for i in range(rank, -(-len(rows) // world_size) * world_size, world_size)]
    prompter = _Prompter(processor, chat_template_kwargs or {}, stop_token)
    stop_ids = prompter.stop_ids(model.generation_config)
    answers: dict[int, str] = {}
    with _evaluating(model), tqdm(total=len(share), desc="Generating", disable=not progress or rank > 0) as bar:
        for start in range(0, len(share), batch_size):
            batch = share[start : start + batch_size]
            inputs = prompter.inputs(rows, batch).to(model.device)
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                eos_token_id=stop_ids,
                pad_token_id=processor.tokenizer.pad_token_id,
                use_cache=True,
                # Greedy, whatever the model's generation config says (Qwen-VL's samples, with a repetition penalty).
                do_sample=False,
                num_beams=1,
                temperature=1.0,
                top_k=50,
                top_p=1.0,
                repetition_penalty=1.0,
            )
            new_ids = output[:, inputs["input_ids"].shape[1] :].tolist()
            answers |= zip(batch, [_decode(ids, processor, stop_ids) for ids in new_ids], strict=True)
            bar.update(len(batch))
    if world_size > 1:
        shares: list[dict[int, str]] = [{}] * world_size
        torch.distributed.all_gather_object(shares, answers)
        answers = {i: answer for part in shares for i, answer in part.items()}
    return [answers[i] for i in range(len(rows))]


class _Prompter:
    """Questions in, left-padded model inputs out."""

    def __init__(self, processor: Any, chat_template_kwargs: Mapping[str, Any], stop_token: str | None) -> None:
        if stop_token not in ("auto", None, *processor.tokenizer.get_vocab()):
            raise ValueError(f"stop_token={stop_token!r} is not a token of {type(processor.tokenizer).__name__}")
        self.processor = processor
        self.chat_template_kwargs = chat_template_kwargs
        self.stop_to_insert = processor.tokenizer.eos_token if stop_token == "auto" else stop_token
        added = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.content.strip()]
        self.added_tokens = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")

    def stop_ids(self, generation_config: Any) -> list[int]:
        """The stop token behind a trained answer, the one to insert (EOS), and those of the generation config."""
        talk = [{"role": role, "content": [{"type": "text", "text": "x"}]} for role in ("user", "assistant")]
        tokens = {self._locate(talk).turns[0].stop, self.stop_to_insert} - {None}
        configured = generation_config.eos_token_id
        ids = {*configured} if isinstance(configured, list) else {configured} - {None}
        return sorted(ids | {self.processor.tokenizer.convert_tokens_to_ids(token) for token in tokens})

    def inputs(self, rows: Rows, numbers: Sequence[int]) -> Any:
        """A `BatchFeature` with `input_ids` [B, T] and what else the processor makes."""
        texts, images = [], []
        for number in numbers:
            name = number
            try:
                row = rows[number]
                name = row.get("row", number)  # `rows` may be some of a dataset
                question = question_of(row)
                images.append([to_rgb(image) for image in question.images])
                texts.append(self.prompt(question.messages))
            except ValueError as error:
                raise ValueError(f"row {name}: {error}") from error
        return self.processor(
            text=texts,
            images=images if any(images) else None,
            add_special_tokens=not texts[0].startswith(self.processor.tokenizer.bos_token or "\0"),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )

    def prompt(self, messages: list[Message]) -> str:
        """The text that the model continues. Earlier answers end as they are trained to: with a stop token."""
        history = self._locate(messages).text
        return history + self._render(messages, True)[len(self._render(messages, False)) :]

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        text: str = self.processor.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self.chat_template_kwargs,
        )
        return text

    def _locate(self, messages: list[Message]) -> Rendered:
        return locate(
            messages,
            self._render,
            added_tokens=self.added_tokens,
            stop_to_insert=self.stop_to_insert,
            trained=(),
        )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode and one precision; each module gets back its own mode, so a frozen part in eval mode stays so."""
    modes = [(module, module.training) for module in model.modules()]
    # In training, autocast brings adapters or a projector in float32 and their 16-bit base together.
    dtypes = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    narrow = min(dtypes - {torch.float32}, key=str, default=None)
    model.eval()
    try:
        with torch.autocast(model.device.type, narrow, enabled=len(dtypes) > 1):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _rank_and_world_size() -> tuple[int, int]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)


def _decode(ids: list[int], processor: Any, stop_ids: Sequence[int]) -> str:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    text: str = processor.tokenizer.decode(ids[:end], skip_special_tokens=True)
    return text.strip()
