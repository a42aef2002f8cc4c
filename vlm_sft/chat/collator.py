"""Conversations in, a training batch out, with labels that hold only what the model has to learn.

Shapes: `B` rows, `T` tokens of the longest row. No model family is named here: the processor and its chat template
are asked.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from vlm_sft.chat import labels, messages
from vlm_sft.chat import template as spans
from vlm_sft.chat.images import to_rgb
from vlm_sft.chat.labels import IGNORE_INDEX
from vlm_sft.chat.messages import Conversation, Message

logger = logging.getLogger(__name__)

_BLANK = {
    "row": -1,
    "images": [Image.new("RGB", (64, 64))],
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "."}]},
    ],
}


class Source(NamedTuple):
    """A row as it was read and rendered, image placeholders not yet expanded; `trained` are those of its turns that
    are trained on."""

    name: str
    number: int | None
    conversation: Conversation
    rendered: spans.Rendered
    trained: list[spans.Turn]


@dataclass(frozen=True)
class Row:
    """One encoded conversation, without padding: what the audit looks at.

    `text` is what the tokenizer saw; `tokens` holds the per-token model inputs, each [T]; `offsets` [T, 2] are
    characters of `text`; `image` [T] marks the tokens that images bring; `turns` are all answers as characters of
    `text`, stop token included, and `trained` those of them that are trained on.
    """

    source: Source
    text: str
    tokens: dict[str, Tensor]
    offsets: Tensor
    labels: Tensor
    image: Tensor
    turns: list[spans.Turn]
    trained: list[spans.Turn]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def name(self) -> str:
        return self.source.name


@dataclass(frozen=True)
class ChatCollator:
    """Turns rows with `messages` and `images` into model inputs with `labels` [B, T].

    Trained are the words of the assistant and the stop token behind them, from the exact place where the generation
    prompt ends at inference. Never trained: padding (told by the attention mask, so also where pad is EOS) and every
    token that an image brings. BOS is there once, as at inference.

    - `train_on`: `"assistant"` (every answer; a message with `"train": False` is left out), `"last_assistant"`, or
      `"all"` (everything but padding and images).
    - `max_length`, `truncation`: a row with more tokens is an `"error"`; or `"trim"` drops its last exchanges with
      their images, then cuts the tail of the answer that is left (which then has no stop token), never an image; or
      `"drop"` leaves the row out and counts it in the log.
    - `stop_token`: `"auto"` keeps the one the template writes and inserts EOS behind an answer where it writes none
      (LLaVA-1.5); a token to insert instead; `None` inserts nothing.
    - `reserved_tokens`: control tokens typed as text are an `"error"`, or `"escape"` makes them plain text.
    - `padding_free`: one row [1, T] of all conversations with `position_ids` that begin again with each, and no
      attention mask (see `vlm_sft.chat.packing`, whose packs it takes as well).
    - `name_rows`: adds `rows` [B], the numbers in the `row` column, for `StopOnNaN`, which names them and takes them
      out before the model sees them.
    - `key_pictures`: adds `pictures` [B, 2], a hash of the pixels of each row's pictures, for `FeatureCache`.
    - `picture_in_every_batch`: a batch without a picture gets one more row, with a blank one, on which nothing is
      trained. Processes that share a model wait for each other at each of its layers, also at those of the tower
      (FSDP, ZeRO-3; DDP where tower or projector train). None is yes where several processes train.
    - `generation_config`: a model, or its generation config, to check that generation ends at the stop token.

    Raises `ValueError` at construction where this cannot be had from the processor, and for each bad row with its name
    (its `row` column where it has one, else its place in the batch).
    """

    processor: Any
    _: KW_ONLY
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    max_length: int | None = None
    truncation: Literal["error", "trim", "drop"] = "error"
    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    stop_token: str | None = "auto"
    reserved_tokens: Literal["error", "escape"] = "error"
    padding_free: bool = False
    name_rows: bool = False
    picture_in_every_batch: bool | None = None
    key_pictures: bool = False
    generation_config: InitVar[Any] = None
    stop_tokens: tuple[str, ...] = field(init=False, repr=False)
    _added: re.Pattern[str] = field(init=False, repr=False)
    _reserved: re.Pattern[str] = field(init=False, repr=False)
    _image_ids: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self, generation_config: Any) -> None:
        self._check_settings()
        tokenizer = self.processor.tokenizer
        added = tokenizer.added_tokens_decoder
        object.__setattr__(self, "_added", _any_of(token.content for token in added.values()))
        image_ids = self._probe_image_ids()
        object.__setattr__(self, "_image_ids", torch.tensor(sorted(image_ids), dtype=torch.long))
        reserved = {token.content for i, token in added.items() if token.special or i in image_ids}
        object.__setattr__(self, "_reserved", _any_of(reserved | {self.processor.image_token}))
        object.__setattr__(self, "stop_tokens", self._probe_stop_tokens())
        self._check_stop_tokens(generation_config)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch: `input_ids`, `labels`, `attention_mask` (or `position_ids`) [B, T] and whatever else the processor
        makes for the model. The examples are left as they are."""
        rows, inputs = self.encode(examples)
        for row in rows:
            if (row.labels == IGNORE_INDEX).all():
                raise ValueError(
                    f"{row.name}: no token is left to train on; give it an answer that is not marked 'train': false, "
                    "or drop the row"
                )
        if self._picture_is_due and not any(row.source.conversation.images for row in rows):
            (blank,), inputs = self.encode([_BLANK])
            rows = [*rows, replace(blank, labels=torch.full_like(blank.labels, IGNORE_INDEX))]
        if self.name_rows:
            if unknown := [row.name for row in rows if row.source.number is None]:
                raise ValueError(f"name_rows=True needs a 'row' column; {', '.join(unknown)} has none")
            inputs["rows"] = torch.tensor([row.source.number for row in rows])
        if self.key_pictures:
            inputs["pictures"] = torch.tensor([_key(row.source.conversation.images) for row in rows])
        return {**(self._join(rows) if self.padding_free else self._pad(rows)), **inputs}

    @property
    def _picture_is_due(self) -> bool:
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        return several if self.picture_in_every_batch is None else self.picture_in_every_batch

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> tuple[list[Row], dict[str, Tensor]]:
        """The rows before padding, and the model inputs that are not per token (pixels). Rows dropped for their
        length are absent; `ValueError` if that leaves none."""
        examples = [example for packed in examples for example in packed.get("packed", [packed])]
        rows, inputs = self._process([self._read(example, place) for place, example in enumerate(examples)])
        if self.max_length is None or all(len(row) <= self.max_length for row in rows):
            return rows, inputs
        fitted = [source for row in rows if (source := self._fit(row)) is not None]
        if not fitted:
            raise ValueError(
                f"every row of the batch ({', '.join(row.name for row in rows)}) is longer than max_length="
                f"{self.max_length}; raise it, or set truncation='trim'"
            )
        rows, inputs = self._process(fitted)
        return [_cut(row, self.max_length) for row in rows], inputs

    def _read(self, example: Mapping[str, Any], place: int) -> Source:
        number = example.get("row")
        name = f"example {place} of the batch" if number is None else f"row {number}"
        if "messages" not in example:
            raise ValueError(f"{name}: no field 'messages' among {', '.join(map(repr, example))}")
        try:
            conversation = messages.normalise(example["messages"], example.get("images"))
            messages.check_turns(conversation.messages)
            guarded = spans.guard_reserved(
                conversation.messages, self._reserved, escape=self.reserved_tokens == "escape"
            )
            return self._source(name, number, Conversation(guarded, [to_rgb(image) for image in conversation.images]))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _source(self, name: str, number: int | None, conversation: Conversation) -> Source:
        answers = [n for n, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if self.train_on == "last_assistant":
            answers = answers[-1:]
        chosen = {n for n in answers if conversation.messages[n].get("train", True)}
        rendered = spans.locate(
            conversation.messages,
            self._render,
            added_tokens=self._added,
            stop_to_insert=self.processor.tokenizer.eos_token if self.stop_token == "auto" else self.stop_token,
            trained=chosen,
        )
        if (found := rendered.text.count(self.processor.image_token)) != len(conversation.images):
            raise ValueError(
                f"the chat template wrote {found} {self.processor.image_token} for {len(conversation.images)} images; "
                "use a template that writes one for each image part"
            )
        return Source(name, number, conversation, rendered, [t for t in rendered.turns if t.message in chosen])

    def _render(self, conversation: Sequence[Message], prompt: bool) -> str:
        text: str = self.processor.apply_chat_template(
            list(conversation), tokenize=False, add_generation_prompt=prompt, **(self.chat_template_kwargs or {})
        )
        return text

    def _process(self, sources: list[Source]) -> tuple[list[Row], dict[str, Tensor]]:
        """Rows and other inputs, by one call of the processor."""
        texts = [source.rendered.text for source in sources]
        inputs, offsets, replacements = self._call_processor(texts, [s.conversation.images for s in sources])
        attention_mask = inputs.pop("attention_mask").bool()
        per_token = {key: inputs.pop(key) for key in list(inputs) if inputs[key].shape == attention_mask.shape}
        rows = []
        for b, source in enumerate(sources):
            real = attention_mask[b]
            tokens = {key: value[b][real] for key, value in per_token.items()}
            rows.append(self._row(source, tokens, offsets[b][real], replacements[b]))
        return rows, inputs

    def _row(
        self, source: Source, tokens: dict[str, Tensor], offsets: Tensor, replacements: labels.Replacements
    ) -> Row:
        """The row with its labels; tokens that straddle the start of a trained answer are cut there."""
        text = labels.expand(source.rendered.text, replacements)
        trained = [_move(turn, replacements) for turn in source.trained]
        if starts := labels.straddled(offsets, [turn.start for turn in trained]):
            tokens, offsets = self._cut_tokens(text, tokens, offsets, starts)
        input_ids = tokens["input_ids"]
        image = labels.tokens_in(offsets, [tuple(replaced["new_span"]) for replaced in replacements])
        image |= torch.isin(input_ids, self._image_ids)
        if self.train_on == "all":
            learned = torch.ones_like(image)
        else:
            learned = labels.tokens_in(offsets, [(turn.start, turn.end) for turn in trained])
        row = Row(
            source=source,
            text=text,
            tokens=tokens,
            offsets=offsets,
            labels=labels.make_labels(input_ids, learned, image),
            image=image,
            turns=[_move(turn, replacements) for turn in source.rendered.turns],
            trained=trained,
        )
        self._prove(row)
        return row

    def _call_processor(
        self, texts: list[str], images: list[list[Any]]
    ) -> tuple[dict[str, Tensor], Tensor, list[labels.Replacements]]:
        """Model inputs, right-padded; character offsets [B, T, 2]; what took the place of each placeholder."""
        starts_with_bos = {text.startswith(self.processor.tokenizer.bos_token or "\0") for text in texts}
        if len(starts_with_bos) > 1:
            raise ValueError("the chat template writes BOS for some rows of the batch only; use another template")
        output = self.processor(
            text=texts,
            images=[list(row) for row in images] if any(images) else None,
            add_special_tokens=not starts_with_bos.pop(),
            padding=True,
            padding_side="right",
            # Tensors for pixels alone: the processors of Idefics3 and InternVL would try to make one of the
            # replacements (transformers 5.23). Pictures are RGB here, and to convert them again would copy them.
            images_kwargs={"return_tensors": "pt", "do_convert_rgb": False},
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
        replacements = output.pop("text_replacement_offsets", None) or [[] for _ in texts]
        for name in {*self.processor.tokenizer.model_input_names, "offset_mapping"} & output.keys():
            output[name] = torch.from_numpy(np.array(output[name]))  # 4 times as fast as torch.tensor from lists
        inputs = dict(BatchFeature(dict(output), tensor_type="pt"))
        return inputs, inputs.pop("offset_mapping"), replacements

    def _cut_tokens(
        self, text: str, tokens: dict[str, Tensor], offsets: Tensor, starts: list[int]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Tokenizes the text again in pieces, so that a token ends where inference has the end of the prompt. Other
        per-token inputs are taken from the token that held the same character."""
        ends = offsets[:, 1].contiguous()
        pieces, places = [tokens["input_ids"][ends == 0]], [offsets[ends == 0]]  # what the tokenizer put in front
        for start, end in zip([0, *starts], [*starts, len(text)], strict=True):
            piece = self.processor.tokenizer(
                text[start:end], add_special_tokens=False, return_offsets_mapping=True, return_tensors="pt"
            )
            pieces.append(piece["input_ids"][0])
            places.append(piece["offset_mapping"][0] + start)
        offsets = torch.cat(places)
        same = torch.searchsorted(ends, offsets[:, 0].contiguous(), right=True).clamp(max=len(ends) - 1)
        return {key: value[same] for key, value in tokens.items()} | {"input_ids": torch.cat(pieces)}, offsets

    def _prove(self, row: Row) -> None:
        """Raises unless each trained answer ends with its stop token: offsets and ids then speak of the same text."""
        for turn in row.trained:
            if turn.stop is None:
                continue
            inside = labels.tokens_in(row.offsets, [(turn.start, turn.end)]).nonzero().flatten()
            expected = self.processor.tokenizer.convert_tokens_to_ids(turn.stop)
            if not len(inside) or row.tokens["input_ids"][inside[-1]] != expected:
                raise ValueError(
                    f"{row.name}: the answer in messages[{turn.message}] does not end with {turn.stop!r} once it is "
                    f"tokenized; {type(self.processor).__name__} changes the text in a way that it does not report, "
                    "so labels cannot be placed"
                )

    def _fit(self, row: Row) -> Source | None:
        """What fits into `max_length`: all, fewer exchanges, the first one (whose tail is cut later), or None."""
        assert self.max_length is not None
        if len(row) <= self.max_length:
            return row.source
        if self.truncation == "error":
            raise ValueError(
                f"{row.name}: {len(row)} tokens ({int(row.image.sum())} from images), more than "
                f"max_length={self.max_length}; raise it, or set truncation='trim' or 'drop'"
            )
        if self.truncation == "drop":
            logger.warning("%s: dropped, %d tokens are more than max_length=%d", row.name, len(row), self.max_length)
            return None
        _, number, (talk, images), *_ = row.source
        answers = [n for n, message in enumerate(talk) if message["role"] == "assistant"]
        for last in reversed(answers[:-1]):
            kept = talk[: last + 1]
            shorter = Conversation(kept, images[: messages.count_images(kept)])
            [row], _ = self._process([self._source(row.name, number, shorter)])
            if len(row) <= self.max_length:
                return row.source
        needed = max(
            int(row.image.nonzero().max()) + 1 if row.image.any() else 0,
            int((row.labels != IGNORE_INDEX).nonzero().min()) + 1 if (row.labels != IGNORE_INDEX).any() else len(row),
        )
        if needed > self.max_length:
            raise ValueError(
                f"{row.name}: its first question with its images takes {needed - 1} tokens, so max_length="
                f"{self.max_length} leaves no room for an answer; raise it, make images smaller, or drop the row"
            )
        return row.source

    def _pad(self, rows: list[Row]) -> dict[str, Tensor]:
        length = max(map(len, rows))
        if multiple := self.pad_to_multiple_of:
            length = -(-length // multiple) * multiple
        fill = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": IGNORE_INDEX}
        columns = [{**row.tokens, "labels": row.labels, "attention_mask": torch.ones_like(row.labels)} for row in rows]

        def padded(values: Tensor, value: int) -> Tensor:
            missing = length - len(values)
            sides = (0, missing) if self.padding_side == "right" else (missing, 0)
            return torch.nn.functional.pad(values, sides, value=value)

        return {key: torch.stack([padded(column[key], fill.get(key, 0)) for column in columns]) for key in columns[0]}

    def _join(self, rows: list[Row]) -> dict[str, Tensor]:
        """All rows in one. The first token of each is not trained: the last one of the row before would predict it."""
        labels = [torch.cat([row.labels.new_tensor([IGNORE_INDEX]), row.labels[1:]]) for row in rows]
        joined = {key: torch.cat([row.tokens[key] for row in rows])[None] for key in rows[0].tokens}
        positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
        return {**joined, "position_ids": positions, "labels": torch.cat(labels)[None]}

    def _check_settings(self) -> None:
        wrong = [
            f"{name}={value!r} (one of {', '.join(map(repr, known))})"
            for name, value, known in (
                ("train_on", self.train_on, ("assistant", "last_assistant", "all")),
                ("truncation", self.truncation, ("error", "trim", "drop")),
                ("padding_side", self.padding_side, ("right", "left")),
                ("reserved_tokens", self.reserved_tokens, ("error", "escape")),
            )
            if value not in known
        ]
        if self.max_length is not None and self.max_length < 1:
            wrong.append(f"max_length={self.max_length} (None or at least 1)")
        if self.padding_free and self.pad_to_multiple_of is not None:
            wrong.append(f"pad_to_multiple_of={self.pad_to_multiple_of} with padding_free=True (leave one out)")
        if wrong:
            raise ValueError(f"ChatCollator: {'; '.join(wrong)}")
        processor, kind = self.processor, type(self.processor).__name__
        if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_token", None) is None:
            raise ValueError(f"{kind} is no processor for images and text; pass load_processor(...) of a VLM")
        if processor.chat_template is None:
            raise ValueError(
                f"{kind} has no chat template. Prefix and suffix without a chat (PaliGemma) are not trained by "
                "ChatCollator: call processor(text=..., images=..., suffix=...) in a collator of your own. For a base "
                "model, set processor.chat_template"
            )
        if not processor.tokenizer.is_fast:
            raise ValueError(f"{type(processor.tokenizer).__name__} gives no character offsets; use a fast tokenizer")
        if processor.tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token; set processor.tokenizer.pad_token (it is never trained)")
        if self.stop_token not in ("auto", None) and self.stop_token not in processor.tokenizer.get_vocab():
            raise ValueError(f"stop_token={self.stop_token!r} is not a token of {type(processor.tokenizer).__name__}")

    def _probe_image_ids(self) -> set[int]:
        """Ids of added tokens that only an image brings (the template may write some of them itself), found by
        encoding one question with and without a picture."""
        word = {"type": "text", "text": "x"}
        seen = []
        for content in ([{"type": "image"}, word], [word]):
            text = self._render([{"role": "user", "content": content}], True)
            pictures = [[Image.new("RGB", (64, 48))] if len(content) > 1 else []]
            try:
                inputs, _, replacements = self._call_processor([text], pictures)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{type(self.processor).__name__} cannot encode a question: {error}") from error
            if pictures[0] and not replacements[0]:
                raise ValueError(
                    f"{type(self.processor).__name__} does not report what it writes in the place of an image "
                    "(return_text_replacement_offsets), so labels could not be proven right; use a model whose "
                    "processor does"
                )
            seen.append(set(inputs["input_ids"][0].tolist()))
        with_image, without = seen
        return {i for i in with_image - without if i in self.processor.tokenizer.added_tokens_decoder}

    def _probe_stop_tokens(self) -> tuple[str, ...]:
        """The stop tokens of a one-turn conversation, as it is trained on."""
        talk = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in (("user", "x"), ("assistant", "y"))
        ]
        turns = self._source("a probe", None, Conversation(talk, [])).rendered.turns
        found = tuple(turn.stop for turn in turns if turn.stop)
        if self.stop_token not in ("auto", None) and found != (self.stop_token,):
            raise ValueError(
                f"stop_token={self.stop_token!r}, but the chat template itself writes {found[0]!r} behind an answer; "
                "use stop_token='auto', or a template without it"
            )
        return found

    def _check_stop_tokens(self, generation_config: Any) -> None:
        config = getattr(generation_config, "generation_config", generation_config)
        if config is None:
            return
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        for token in self.stop_tokens:
            learned = self.processor.tokenizer.convert_tokens_to_ids(token)
            if learned not in ends:
                raise ValueError(
                    f"the model learns to stop with {token!r} (id {learned}), but generation ends at {ends}; set "
                    f"model.generation_config.eos_token_id = {[i for i in ends if i is not None] + [learned]}"
                )


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of the tokens; white space is text, not a token."""
    spelled = sorted({token for token in tokens if token.strip()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spelled)) or r"(?!)")


def _key(pictures: Sequence[Any]) -> list[int]:
    """128 bits as two numbers, and zeros without a picture."""
    digest = hashlib.blake2b(digest_size=16)
    for picture in pictures:
        digest.update(repr(picture.size).encode() + picture.tobytes())
    return [int(n) for n in np.frombuffer(digest.digest(), dtype=np.int64)] if pictures else [0, 0]


def _move(turn: spans.Turn, replacements: labels.Replacements) -> spans.Turn:
    return turn._replace(start=labels.moved(turn.start, replacements), end=labels.moved(turn.end, replacements))


def _cut(row: Row, length: int) -> Row:
    return replace(
        row,
        tokens={key: value[:length] for key, value in row.tokens.items()},
        offsets=row.offsets[:length],
        labels=row.labels[:length],
        image=row.image[:length],
    )
