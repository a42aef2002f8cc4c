"""A processor's chat template: the text of a conversation, and where the assistant's words lie in it.

Nothing is searched for: the template is rendered again up to each prompt, and with invisible marks round each text, so
text that imitates a turn changes nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

from jinja2 import TemplateError
from PIL import Image
from transformers import AddedToken

from vlm_sft.chat.messages import ROLES, Message, text_of
from vlm_sft.chat.places import MARK, Edit, Places, Spans, Tails, edited, moved
from vlm_sft.common import ends_within, eos_ids
from vlm_sft.upstream import check_template_kwargs

Style = Callable[[Sequence[Message]], list[Message]]
"""How the same messages are handed to a template."""

_PROBES = [Image.new("RGB", (width, 48)) for width in (64, 48, 96, 256)]
_OTHER_MEDIA = ("<video>", "<audio>")  # as datasets write them, whatever the model knows
_LIMIT_S = 10.0  # of a conversation; 100 messages take milliseconds


class RenderedDifferently(ValueError):
    """The template writes an answer within a conversation differently from how the model is asked for it."""


class Turn(NamedTuple):
    """An assistant message as characters [start, end) of the rendered text: all that the model has to write after the
    prompt, the stop token included (`stop` is None where there is none); and whether it is trained on."""

    message: int
    start: int
    end: int
    stop: str | None
    trained: bool


class Rendered(NamedTuple):
    """The text of a conversation (image placeholders not yet expanded), its turns, and the style that gave it."""

    text: str
    turns: list[Turn]
    style: Style


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations by `processor.apply_chat_template(..., **kwargs)`. `stop_token`: `"auto"` keeps the one the
    template writes and inserts EOS after an answer where it writes none (LLaVA-1.5); a token to insert instead; `None`
    none. Raises `ValueError` without a chat or pad token, and for an unknown stop token or keyword of the template."""

    processor: Any
    kwargs: Mapping[str, Any] | None = None
    stop_token: str | None = "auto"
    _places: Places = field(default_factory=Places, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        processor, kind = self.processor, type(self.processor).__name__
        if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
            raise ValueError(f"{kind} is not an image-text processor; pass load_processor(...) of a VLM")
        if processor.chat_template is None and "chat_template" not in (self.kwargs or {}):
            how = "for prefix and suffix without a chat (PaliGemma) write a collator of your own"
            raise ValueError(f"{kind} has no chat template; for a base model set processor.chat_template, and {how}")
        if processor.tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token; set processor.tokenizer.pad_token (it is never trained)")
        if self.stop_token not in ("auto", None) and self.stop_token not in processor.tokenizer.get_added_vocab():
            known = f"an added token of {type(processor.tokenizer).__name__}"  # which it splits from any text
            raise ValueError(f"stop_token={self.stop_token!r} is not {known}")
        check_template_kwargs(processor, self.kwargs or {})

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False, style: Style = list) -> str:
        """The template's own text of the messages. Raises `ValueError` where it fails or does not end."""
        with ends_within(_LIMIT_S):
            return self._render(messages, add_generation_prompt, style)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False, style: Style = list) -> str:
        given, tools = without_tools(style(messages))
        settings = {"add_generation_prompt": add_generation_prompt, **(self.kwargs or {}), **tools}
        try:
            return str(self.processor.apply_chat_template(given, tokenize=False, **settings))
        except Exception as error:  # a template may raise anything
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise ValueError(f"the chat template fails with {kind}{error or type(error).__name__}") from error

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that the model continues, equal to what is trained before the answer to these messages."""
        return self.locate(messages, add_generation_prompt=True).text

    def locate(
        self, messages: Sequence[Message], trained: Container[int] = (), *, add_generation_prompt: bool = False
    ) -> Rendered:
        """The conversation as it is trained on, with the span of each assistant message.

        A span starts where the generation prompt ends; where the template writes the header of an answer with other
        white space (LLaVA-OneVision), the prompt's is used. It ends with the last added token that the template writes
        after the answer; where there is none (LLaVA-1.5), the stop token to insert takes the place of the white space
        there, as in the original LLaVA (`conv_vicuna_v1`, haotian-liu/LLaVA llava/conversation.py).

        Raises `ValueError` where the template refuses the messages or leaves out a text, and `RenderedDifferently`
        where it renders a message of `trained` differently from its generation prompt (thinking templates)."""
        messages = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        with ends_within(_LIMIT_S):  # once, and not at each rendering, which it makes slower
            try:
                return self._locate(messages, trained, add_generation_prompt, self._places)
            except RenderedDifferently:  # which must not come of what is remembered of other texts
                return self._locate(messages, trained, add_generation_prompt, Places())

    def _locate(
        self, messages: Sequence[Message], trained: Container[int], add_generation_prompt: bool, places: Places
    ) -> Rendered:
        style, plain, texts, tails = self._find_style(messages, add_generation_prompt, places)
        for what in ("tools", "tool_calls"):
            bare = [{key: value for key, value in message.items() if key != what} for message in messages]
            if bare != messages and self._render(bare, add_generation_prompt, style) == plain:
                raise ValueError(f"the chat template does not know {what}, and would leave them out; use another one")
        edits, turns = list[Edit](), list[Turn]()
        for number in [number for number, message in enumerate(messages) if message["role"] == "assistant"]:
            prompt = self._render(messages[:number], True, style)
            found = [texts[number, part] for part in range(len(messages[number]["content"])) if (number, part) in texts]
            # A blank answer may leave no trace; it lies right after the prompt.
            words_start, words_end = (found[0][0], found[-1][1]) if found else (None, len(prompt))
            begin = words_end if words_start is None else words_start
            same = len(_common(plain[:begin], prompt))
            if same == len(prompt):
                begin = same
            elif words_start is not None and not (plain[same:begin] + prompt[same:]).strip():
                edits.append((same, begin, prompt[same:]))
            elif number in trained:
                raise RenderedDifferently(
                    f"messages[{number}]: the chat template renders this answer differently from its generation "
                    f"prompt: that ends with {prompt[-40:]!r}, the conversation reads {plain[:words_start][-40:]!r}. "
                    "Train one answer a row (ChatCollator.split, as check_rows does), or use another template"
                )
            start = moved(begin, edits)
            if number not in tails:
                is_whole = number + 1 == len(messages) and not add_generation_prompt
                up_to_here = _common(plain if is_whole else self._render(messages[: number + 1], style=style), plain)
                later = [at for (n, _), (at, _) in texts.items() if n > number and at is not None and at >= words_end]
                following = min(later, default=None)
                tails[number] = up_to_here[words_end:following] if len(up_to_here) >= words_end else None
            tail = tails[number] or ""  # what belongs to no other message
            written = list(self.added.finditer(tail))
            # An earlier answer that the template writes differently once the conversation continues stays as it is.
            stop = written[-1].group() if written else None if tails[number] is None else self.stop_to_insert
            end = words_end + written[-1].end() if written else words_end
            if stop and not written:
                after = end + len(tail) if tail.isspace() else end
                edits.append((end, after, stop))
                end = after
            turns.append(Turn(number, start, moved(end, edits), stop, number in trained))
        return Rendered(edited(plain, edits), turns, style)

    def _find_style(self, messages: Sequence[Message], prompt: bool, places: Places) -> tuple[Style, str, Spans, Tails]:
        """The first style that loses no text, the text of the messages in it, where their parts stand there, and what
        is known of the tails."""
        if any(MARK.search(text_of(message)) for message in messages):
            raise ValueError("a text holds private-use characters of Unicode plane 16; remove them")
        refusal = lost = ""  # the first of each explains best
        for style in (list, _system_as_string, _as_strings):
            try:
                plain = self._render(messages, prompt, style)
            except ValueError as error:
                refusal = refusal or f"refuses the conversation: {error.__cause__ or error}; fix the messages"
                continue
            render = partial(self._render, add_generation_prompt=prompt, style=style)
            texts, tails = places.of(messages, render, plain, prompt, style)
            missing = [
                f"messages[{number}] ({message['role']})"
                for number, message in enumerate(messages)
                for n, part in enumerate(message["content"])
                if part.get("text", "").strip() and (number, n) not in texts
            ]
            if not missing:
                return style, plain, texts, tails
            lost = lost or f"does not write the text of {missing[0]} as it is; join its text parts, or move it"
        how = "(a system text may go to the start of the first user message) or use another chat template"
        raise ValueError(f"the chat template {lost or refusal} {how}")

    def stop_ids(self, generation_config: Any) -> list[int]:
        """Where generation ends: at the stop token of an answer, the one to insert, and those of the config."""
        tokens = {*self.stops, self.stop_to_insert} - {None}
        ids = {self.processor.tokenizer.convert_tokens_to_ids(token) for token in tokens}
        return sorted(ids | {*eos_ids(generation_config.eos_token_id)})

    def add_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer has to add BOS, which some templates write themselves."""
        return not text.startswith(self.processor.tokenizer.bos_token or "\0")

    @property
    def stop_to_insert(self) -> str | None:
        """What ends an answer after which the template writes no added token."""
        return self.processor.tokenizer.eos_token if self.stop_token == "auto" else self.stop_token

    @cached_property
    def stops(self) -> tuple[str, ...]:
        """The stop token of a one-turn conversation as it is trained on, if it has one.

        Raises `ValueError` where the template writes another one than `stop_token`."""
        messages = [{"role": role, "content": [{"type": "text", "text": "x"}]} for role in ("user", "assistant")]
        found = tuple(turn.stop for turn in self.locate(messages, {1}).turns if turn.stop)
        if self.stop_token not in ("auto", None) and found != (self.stop_token,):
            written = f"but the chat template itself writes {found[0]!r} after an answer"
            raise ValueError(f"stop_token={self.stop_token!r}, {written}; use stop_token='auto', or another template")
        return found

    @cached_property
    def added_tokens(self) -> Mapping[int, AddedToken]:
        """The tokenizer's added tokens by id; which makes them anew when asked: 17 ms for the 6,000 of Gemma."""
        return dict(self.processor.tokenizer.added_tokens_decoder)

    @cached_property
    def added(self) -> re.Pattern[str]:
        """Matches the tokenizer's added tokens in a text."""
        return _any_of(token.content for token in self.added_tokens.values())

    @cached_property
    def reserved(self) -> re.Pattern[str]:
        """Matches control tokens: typed as text, the tokenizer would take them for its own."""
        control = {token.content for i, token in self.added_tokens.items() if token.special or i in self.image_ids}
        return _any_of(control | {self.placeholder, *_OTHER_MEDIA})

    def _question(self, images: int) -> str:
        """A prompt that asks of so many images."""
        content = [{"type": "image"}] * images + [{"type": "text", "text": "x"}]
        return self.render([{"role": "user", "content": content}], True)

    @cached_property
    def placeholder(self) -> str:
        """What the processor replaces by an image: its `image_token`, or the added token that the template writes."""
        with_image, without = self._question(1), self._question(0)
        own = getattr(self.processor, "image_token", None)
        if own and own in with_image:
            return str(own)
        start = len(_common(with_image, without))
        written = with_image[start : len(with_image) - len(_common(with_image[start:][::-1], without[::-1]))]
        brought = self.added.findall(written)
        if len(brought) != 1:
            raise ValueError(f"the chat template writes {written!r} for an image, in which no placeholder can be told")
        return str(brought[0])

    def _encode(self, *images: Sequence[Image.Image]) -> Any:
        """The ids of a question about the images of each row."""
        texts, given = [self._question(len(row)) for row in images], [[*row] for row in images]
        options = {"images_kwargs": {"return_tensors": "pt"}, "padding": True}
        return self.processor(text=texts, images=given if any(given) else None, **options)["input_ids"]

    @cached_property
    def needs_images(self) -> bool:
        """Whether the processor takes no batch in which one row has an image and another has none."""
        try:
            self._encode([], _PROBES[:1])
        except Exception:  # each processor has its own
            return True
        return False

    @cached_property
    def image_ids(self) -> frozenset[int]:
        """Ids of added tokens that only an image brings, found by encoding a question with and without one; but for
        white space, which answers have as well (a tokenizer may have line breaks as added tokens).

        Raises `ValueError` where the processor cannot encode it, or no two images of different shapes together."""
        kind = type(self.processor).__name__
        try:
            [with_image], [without] = self._encode(_PROBES[:1]), self._encode([])
        except (AttributeError, TypeError, ValueError) as error:
            how = "choose a chat model, or write a collator of your own"
            raise ValueError(f"{kind} cannot encode a question as a chat has it: {error}; {how}") from error
        try:
            self._encode(_PROBES)
        except Exception as error:  # each processor has its own
            found = f"{kind} cannot encode images of different shapes together: {str(error).partition(chr(10))[0]}"
            how = "let it make one tile of each (processor.image_processor.max_num_tiles = 1), or choose another model"
            raise ValueError(f"{found}; {how}") from error
        brought = {int(i) for i in with_image} - {int(i) for i in without}
        return frozenset(i for i in brought & self.added_tokens.keys() if self.added_tokens[i].content.strip())

    @cached_property
    def image_run(self) -> tuple[re.Pattern[str], list[int]]:
        """Matches a run of one of the image tokens, itself group 1, and their ids; those aside that take the white
        space around them or whole words, whose copies may differ."""
        brought = [(i, self.added_tokens[i]) for i in self.image_ids]
        plain = {i: t.content for i, t in brought if not (t.lstrip or t.rstrip or t.single_word or t.normalized)}
        return re.compile(rf"({_any_of(plain.values()).pattern})\1*"), [*plain]


def without_tools(messages: Sequence[Message]) -> tuple[list[Message], dict[str, Any]]:
    """The messages as a template takes them, and the keyword that hands it the tools, which the first one holds."""
    tools = messages[0].get("tools") if messages else None
    given = [{key: value for key, value in message.items() if key != "tools"} for message in messages]
    return given, {"tools": tools} if tools else {}


def _common(a: str, b: str) -> str:
    """The characters that two texts share at their start."""
    shorter, longer = sorted((a, b), key=len)
    if longer.startswith(shorter):  # mostly so, and `commonprefix` takes 0.1 us for each character
        return shorter
    return os.path.commonprefix([a, b])  # noqa: RUF071


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of the tokens; white space is text, not a token. Equal tokens make an equal pattern."""
    spelled = sorted({token for token in tokens if token.strip()}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, spelled)) or r"(?!)")


def _as_strings(messages: Sequence[Message], roles: Container[str] = ROLES) -> list[Message]:
    """Contents as strings where they are all text."""
    return [
        {**message, "content": text_of(message)}
        if message["role"] in roles and all(part["type"] == "text" for part in message["content"])
        else message
        for message in messages
    ]


_system_as_string = partial(_as_strings, roles=("system",))
