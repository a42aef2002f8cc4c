"""Conversations in, a training batch out, with labels that hold only what the model has to learn.

No model family is named here: the processor and its template are asked. Methods stand in the order of a row's trip."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import printable
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import BatchFeature

from vlm_sft.chat.expansions import find_images, reading_runs_once, tokens_in
from vlm_sft.chat.images import to_rgb
from vlm_sft.chat.messages import (
    Conversation,
    Message,
    answers_of,
    check_turns,
    count_images,
    guard_reserved,
    normalise,
    one_answer,
    split_turns,
)
from vlm_sft.chat.places import Edit, edited, moved
from vlm_sft.chat.template import ChatTemplate, Rendered, RenderedDifferently, Turn

IGNORE_INDEX = -100
NOTHING_TRAINED = "no token is left to train on; give it an answer not marked 'train': false, or drop it"
_EMPTY = torch.empty(0)
_EXCHANGE = [{"role": role, "content": "."} for role in ("user", "assistant")]
_BLANK = {"row": -1, "images": [Image.new("RGB", (64, 64))], "messages": _EXCHANGE}


@dataclass(frozen=True, kw_only=True)
class CollatorSettings:
    """The keywords of `ChatCollator`, which explains them. Raises `ValueError` for all that are wrong at once."""

    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    max_length: int | None = None
    truncation: Literal["error", "trim"] = "error"
    chat_template_kwargs: Mapping[str, Any] | None = None
    stop_token: str | None = "auto"
    reserved_tokens: Literal["error", "escape"] = "error"
    padding_free: bool = False
    pad_to_multiple_of: int | None = None
    name_rows: bool = True
    image_in_every_batch: bool | None = None

    def __post_init__(self) -> None:
        allowed: dict[Any, tuple[Any, ...]] = {bool: (True, False), bool | None: (True, False, None)}
        wrong = [
            f"{name}={getattr(self, name)!r} (one of {', '.join(map(repr, values))})"
            for name, hint in get_type_hints(type(self)).items()
            if (values := get_args(hint) if get_origin(hint) is Literal else allowed.get(hint))
            and getattr(self, name) not in values
        ]
        if self.max_length is not None and self.max_length < 1:
            wrong.append(f"max_length={self.max_length} (None or at least 1)")
        if self.padding_free and self.pad_to_multiple_of is not None:
            wrong.append(f"pad_to_multiple_of={self.pad_to_multiple_of} with padding_free=True (leave one out)")
        if wrong:
            raise ValueError(f"ChatCollator: {'; '.join(wrong)}")


@dataclass(frozen=True)
class EncodedRow:
    """One conversation on its trip, without padding: what the audit looks at.

    `rendered` has the image placeholders not yet expanded; `text` is what the tokenizer saw, and `offsets` [T, 2] and
    `turns`, all answers with their stop tokens, are characters of it. `tokens` holds the per-token model inputs, each
    [T]; `image` [T] marks the tokens that images bring."""

    name: str
    number: int | None
    conversation: Conversation
    rendered: Rendered
    text: str = ""
    tokens: dict[str, Tensor] = field(default_factory=dict)
    offsets: Tensor = _EMPTY
    labels: Tensor = _EMPTY
    image: Tensor = _EMPTY
    turns: Sequence[Turn] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def trained(self) -> list[Turn]:
        """The turns that are trained on."""
        return [turn for turn in self.turns if turn.trained]

    def tokens_of(self, *turns: Turn) -> Tensor:
        """Which tokens lie in one of the turns: bool [T]."""
        return tokens_in(self.offsets, [(turn.start, turn.end) for turn in turns])

    def cut(self, length: int) -> EncodedRow:
        """The row with its first `length` tokens."""
        per_token = {name: getattr(self, name)[:length] for name in ("offsets", "labels", "image")}
        return replace(self, tokens={key: value[:length] for key, value in self.tokens.items()}, **per_token)


class ChatCollator:
    """A `data_collator`: B rows with `messages` and `images` become model inputs with `labels` [B, T of the longest].

    The loss covers each assistant turn and the stop token that ends it, from the exact place where the generation
    prompt ends at inference. Never trained: padding (told by the attention mask, so that pad may be EOS) and every
    token that an image brings. BOS is there once, as at inference.

    - `train_on`: `"assistant"` (every answer; a message with `"train": False` is left out), `"last_assistant"`, or
      `"all"` (everything but padding and images).
    - `max_length`, `truncation`: a row with more tokens is an `"error"`, or `"trim"` drops its last exchanges with
      their images, then cuts the tail of the answer that is left (which then has no stop token), never an image.
    - `chat_template_kwargs`, `stop_token`: see `ChatTemplate`.
    - `reserved_tokens`: control tokens typed as text are an `"error"`, or `"escape"` makes them plain text.
    - `padding_free`: one row [1, T] of all conversations (or packs), whose `position_ids` begin again with each, and no
      attention mask: see `vlm_sft.chat.packing`.
    - `name_rows`: adds `rows` [B], the column `row` where every example has it, for `StopOnNaN`, which takes it out.
    - `image_in_every_batch`: a batch without an image gets one more row, with a blank one, on which nothing is trained:
      processes that share a model wait for each other at the layers of the tower. None: where several processes train.

    Raises `ValueError` at construction where this cannot be had from the processor, and for each bad row with its name
    (its `row` column where it has one, else its place in the batch)."""

    def __init__(self, processor: Any, **settings: Any) -> None:
        self._settings = chosen = CollatorSettings(**settings)
        self._template = ChatTemplate(processor, chosen.chat_template_kwargs, chosen.stop_token)
        if not processor.tokenizer.is_fast:
            raise ValueError(f"{type(processor.tokenizer).__name__} gives no character offsets; use a fast tokenizer")
        self._image_ids = torch.tensor(sorted(self._template.image_ids), dtype=torch.long)
        self._added_ids = torch.tensor([i for i in self._template.added_tokens if i not in self._template.image_ids])
        self._written: tuple[Any, bytes, str] = None, b"", ""
        _ = self._template.stops  # raises where they cannot be had
        _ = self._template.reserved  # once here, not in each worker: 0.7 s for the 6,000 added tokens of Gemma

    @property
    def settings(self) -> CollatorSettings:
        return self._settings

    @property
    def template(self) -> ChatTemplate:
        return self._template

    @property
    def processor(self) -> Any:
        return self._template.processor

    def with_settings(self, **changes: Any) -> ChatCollator:
        """A collator of the same processor with some settings changed."""
        return type(self)(self.processor, **(vars(self.settings) | changes))

    def split(self, example: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The row; or one for each of its trained answers, where the template renders earlier answers differently from
        how the model is asked for them. Raises as `encode` does."""
        try:
            if "packed" not in example:
                self._read(example, 0)
        except RenderedDifferently:
            conversation = normalise(example["messages"], example.get("images"))
            pieces = [one_answer(conversation, answer) for answer in answers_of(conversation.messages)]
            return [{**example, **piece._asdict()} for piece in pieces]
        return [dict(example)]

    def made_of(self) -> dict[str, Any]:
        """All that decides a batch, by name: own settings, and those of the processor; of long values a sha256."""
        processor, tokenizer = self.processor, self.processor.tokenizer
        own = {"kind": f"{type(self).__module__}.{type(self).__qualname__}", **vars(self.settings)}
        long = {"tokenizer": self._sha256_of_tokenizer(), "chat_template": _sha256(processor.chat_template)}
        return {**own, "processor": {**processor.to_dict(), **tokenizer.special_tokens_map, **long}}

    def _sha256_of_tokenizer(self) -> str:
        """Once, as 150,000 tokens take 0.3 s; anew where the tokenizer is another one, or its size, its added tokens,
        what stands round its vocabulary or the ids of a text are others than before."""
        tokenizer = self.processor.tokenizer
        backend = tokenizer.backend_tokenizer
        parts = [backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder]
        about = [backend.get_vocab_size(), repr(tokenizer.added_tokens_decoder), backend.encode(printable).ids]
        state = pickle.dumps([*parts, *about])
        if self._written[0] is not backend or self._written[1] != state:
            text = backend.to_str()  # first how the last call padded, which says nothing
            self._written = backend, state, hashlib.sha256(text[text.index('"added_tokens"') :].encode()).hexdigest()
        return self._written[2]

    def fingerprint(self) -> str:
        """A sha256 of all that decides a row's tokens and labels, the same in every process; padding, naming and
        `max_length` aside."""
        aside = ("max_length", "truncation", "padding_free", "pad_to_multiple_of", "name_rows", "image_in_every_batch")
        return _sha256({name: value for name, value in self.made_of().items() if name not in aside})

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch: `input_ids`, `labels`, `attention_mask` (or `position_ids`) [B, T], and what else the processor
        makes. The examples are left as they are."""
        rows, inputs = self.encode(examples)
        for row in rows:
            if (row.labels == IGNORE_INDEX).all():
                raise ValueError(f"{row.name}: {NOTHING_TRAINED}")
        due = self.settings.image_in_every_batch
        due = int(os.environ.get("WORLD_SIZE", "1")) > 1 if due is None else due
        if due and not any(row.conversation.images for row in rows):
            (blank,), inputs = self.encode([_BLANK])
            rows = [*rows, replace(blank, labels=torch.full_like(blank.labels, IGNORE_INDEX))]
        if self.settings.name_rows and all(isinstance(row.number, int) for row in rows):
            inputs["rows"] = torch.tensor([row.number for row in rows])
        return {**(self._join(rows) if self.settings.padding_free else self._pad(rows)), **inputs}

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> tuple[list[EncodedRow], dict[str, Tensor]]:
        """The rows before padding, and the model inputs that are not per token (pixels)."""
        examples = [example for packed in examples for example in packed.get("packed", [packed])]
        rows, inputs = self._process([self._read(example, place) for place, example in enumerate(examples)])
        limit = self.settings.max_length
        if limit is None or all(len(row) <= limit for row in rows):
            return rows, inputs
        rows, inputs = self._process([self._fit(row, limit) for row in rows])
        return [row.cut(limit) for row in rows], inputs

    def _read(self, example: Mapping[str, Any], place: int) -> EncodedRow:
        number = example.get("row")
        name = f"example {place} of the batch" if number is None else f"row {number}"
        if "messages" not in example:
            raise ValueError(f"{name}: no field 'messages' among {', '.join(map(repr, example))}")
        try:
            messages, images = normalise(example["messages"], example.get("images"))
            check_turns(messages)
            first = [message["role"] for message in messages].index("assistant")
            if not count_images(messages[:first]) and self.template.needs_images:
                found = f"messages[{first}] is answered before there is an image, which {type(self.processor).__name__}"
                raise ValueError(f"{found} encodes differently beside other rows; leave it out (--on_bad_rows drop)")
            conversation = Conversation(self._guard(messages), [to_rgb(image) for image in images])
            return EncodedRow(name, number, conversation, self._render(conversation))
        except ValueError as error:
            raise type(error)(f"{name}: {error}") from error

    def prompt(self, messages: Sequence[Message]) -> str:
        """`ChatTemplate.prompt` of the messages, without control tokens typed as text."""
        return self.template.prompt(self._guard(messages))

    def _guard(self, messages: Sequence[Message]) -> list[Message]:
        return guard_reserved(messages, self.template.reserved, escape=self.settings.reserved_tokens == "escape")

    def _render(self, conversation: Conversation) -> Rendered:
        messages, images = conversation
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        chosen = answers[-1:] if self.settings.train_on == "last_assistant" else answers
        rendered = self.template.locate(messages, {n for n in chosen if messages[n].get("train", True)})
        if (found := rendered.text.count(self.template.placeholder)) != len(images):
            written = f"the chat template wrote {found} {self.template.placeholder} for {len(images)} images"
            raise ValueError(f"{written}; use a template that writes one for each image part")
        return rendered

    def _process(self, rows: Sequence[EncodedRow]) -> tuple[list[EncodedRow], dict[str, Tensor]]:
        """The rendered rows with tokens and labels, and other inputs, by one call of the processor."""
        texts, images = [row.rendered.text for row in rows], [list(row.conversation.images) for row in rows]
        add_special_tokens = self.template.add_special_tokens(texts[0])
        if any(self.template.add_special_tokens(text) != add_special_tokens for text in texts):
            raise ValueError("the chat template writes BOS for some rows of the batch only; use another template")
        output = reading_runs_once(self.template)(
            text=texts,
            images=images if any(images) else None,
            add_special_tokens=add_special_tokens,
            padding=True,
            padding_side="right",
            # Tensors for pixels alone: the processors of Idefics3 and InternVL would try to make one of the
            # replacements (transformers 5.23). Images are RGB here, and to convert them again would copy them.
            images_kwargs={"return_tensors": "pt", "do_convert_rgb": False},
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
        reported = output.pop("text_replacement_offsets", None)
        for name in {*self.processor.tokenizer.model_input_names, "offset_mapping"} & output.keys():
            if not isinstance(output[name], Tensor):
                output[name] = torch.from_numpy(np.array(output[name]))  # 4 times as fast as torch.tensor from lists
        kept = getattr(self.processor, "skip_tensor_conversion", None)
        inputs = dict(BatchFeature(dict(output), tensor_type="pt", skip_tensor_conversion=kept))
        # Some image processors round to bfloat16 (Llama 4), which a model in float32 does not take.
        inputs = {key: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for key, v in inputs.items()}
        offsets, mask = inputs.pop("offset_mapping"), inputs.pop("attention_mask").bool()
        per_token = {k: inputs.pop(k) for k in [*inputs] if getattr(inputs[k], "shape", ())[:2] == mask.shape}
        encoded = []
        for b, (row, real) in enumerate(zip(rows, mask, strict=True)):
            tokens, spans = {key: value[b][real] for key, value in per_token.items()}, offsets[b][real]
            edits = [(*written["span"], written["replacement"]) for written in (reported[b] if reported else ())]
            if row.conversation.images and not edits:
                edits, spans = find_images(self.template, row.rendered.text, tokens["input_ids"], name=row.name)
            encoded.append(self._label(row, tokens, spans, edits))
        return encoded, inputs

    def _label(self, row: EncodedRow, tokens: dict[str, Tensor], offsets: Tensor, edits: Sequence[Edit]) -> EncodedRow:
        """The row with its labels; tokens that hold the start of a trained answer inside are cut there. Raises unless
        offsets and ids speak of the edited text: each added token reads as it says, and nothing is left at the end."""
        text = edited(row.rendered.text, edits)
        turns = [t._replace(start=moved(t.start, edits), end=moved(t.end, edits)) for t in row.rendered.turns]
        added = torch.isin(tokens["input_ids"], self._added_ids) & (offsets[:, 1] > 0)
        where = zip(tokens["input_ids"][added].tolist(), offsets[added].tolist(), strict=True)
        read = [(self.template.added_tokens[i].content, text[start:end]) for i, (start, end) in where]
        covers = len(text.rstrip()) <= int(offsets.max()) <= len(text)
        if not covers or any(token.strip() != there.strip() for token, there in read):
            found = f"{row.name}: {type(self.processor).__name__} adds text that it does not report"
            raise ValueError(f"{found}, so that labels cannot be placed; use a model whose processor reports it")
        row = replace(row, text=text, tokens=tokens, offsets=offsets, turns=turns)
        start, end = offsets.numpy().T
        if cuts := [
            turn.start
            for turn in row.trained
            # GPT-2's pattern takes two line breaks apart where a word follows, and together at the end of a prompt.
            if ((start < turn.start) & (end > turn.start)).any() or text[: turn.start][-2:].isspace()
        ]:
            row = self._cut_tokens(row, cuts)
        input_ids = row.tokens["input_ids"]
        image = tokens_in(row.offsets, [(moved(e, edits) - len(words), moved(e, edits)) for _, e, words in edits])
        image |= torch.isin(input_ids, self._image_ids)
        learned = torch.ones_like(image) if self.settings.train_on == "all" else row.tokens_of(*row.trained)
        return replace(row, labels=input_ids.where(learned & ~image, IGNORE_INDEX), image=image)

    def _cut_tokens(self, row: EncodedRow, starts: list[int]) -> EncodedRow:
        """Tokenized again in pieces, so that a token ends where inference has the end of the prompt; other per-token
        inputs are those of the token that held the same character."""
        ends = row.offsets[:, 1].contiguous()
        pieces, places = [row.tokens["input_ids"][ends == 0]], [row.offsets[ends == 0]]  # what the tokenizer put first
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "return_tensors": "pt"}
        for start, end in zip([0, *starts], [*starts, len(row.text)], strict=True):
            piece = self.processor.tokenizer(row.text[start:end], **options)
            pieces.append(piece["input_ids"][0])
            places.append(piece["offset_mapping"][0] + start)
        offsets = torch.cat(places)
        same = torch.searchsorted(ends, offsets[:, 0].contiguous(), right=True).clamp(max=len(ends) - 1)
        tokens = {key: value[same] for key, value in row.tokens.items()} | {"input_ids": torch.cat(pieces)}
        return replace(row, tokens=tokens, offsets=offsets)

    def _fit(self, row: EncodedRow, limit: int) -> EncodedRow:
        """What fits into `max_length`: all, fewer exchanges, or the first one (whose tail is cut later)."""
        if len(row) <= limit:
            return row
        if self.settings.truncation == "error":
            found = f"{len(row)} tokens ({int(row.image.sum())} from images), more than max_length={limit}"
            raise ValueError(f"{row.name}: {found}; raise it, set truncation='trim', or drop the row")
        for shorter in reversed(split_turns(row.conversation)[:-1]):
            # Rendered and processed again: a template or tiling may write a shorter conversation differently.
            [row], _ = self._process([replace(row, conversation=shorter, rendered=self._render(shorter))])
            if len(row) <= limit:
                return row
        trained, image = (row.labels != IGNORE_INDEX).nonzero(), row.image.nonzero()
        needed = max(int(image.max()) + 1 if len(image) else 0, int(trained.min()) + 1 if len(trained) else len(row))
        if needed > limit:
            found = f"{row.name}: its first question with its images takes {needed - 1} tokens, so max_length={limit}"
            raise ValueError(f"{found} leaves no room for an answer; raise it, make images smaller, or drop the row")
        return row

    def _pad(self, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        multiple = self.settings.pad_to_multiple_of or 1
        length = -(-max(map(len, rows)) // multiple) * multiple
        fill = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": IGNORE_INDEX}
        columns = [{**row.tokens, "labels": row.labels, "attention_mask": torch.ones_like(row.labels)} for row in rows]

        def padded(value: Tensor, key: str) -> Tensor:  # [T], or [T, ...]
            return pad(value, (0, 0) * (value.ndim - 1) + (0, length - len(value)), value=fill.get(key, 0))

        return {key: torch.stack([padded(c[key], key) for c in columns]) for key in columns[0]}

    def _join(self, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        """All rows in one. The first token of each, which the last of the row before would predict, is not trained."""
        labels = [torch.cat([row.labels.new_tensor([IGNORE_INDEX]), row.labels[1:]]) for row in rows]
        joined = {key: torch.cat([row.tokens[key] for row in rows])[None] for key in rows[0].tokens}
        positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
        return {**joined, "position_ids": positions, "labels": torch.cat(labels)[None]}


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=lambda v: repr(sorted(map(repr, v)) if isinstance(v, set) else v))
    return hashlib.sha256(text.encode()).hexdigest()
