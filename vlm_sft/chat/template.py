"""Where the assistant's words lie in a rendered conversation, and what stops them.

Nothing is searched for: the template is rendered again with invisible marks round each text, and up to each prompt.
So text that imitates a turn changes nothing, and text that the template leaves out is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from vlm_sft.chat.messages import Message, text_of

Render = Callable[[Sequence[Message], bool], str]
"""(messages, add_generation_prompt) -> text, by the processor's chat template."""
Style = Callable[[Sequence[Message]], Sequence[Message]]
"""How the same messages are handed to a template."""
Part = tuple[int, int]
"""A text part: number of the message, number of the part in it."""

# One private-use character before and one behind each text; plane 16 holds no assigned character.
_FIRST_MARK = 0x100000
_MARK = re.compile("[\U00100000-\U0010fffd]")
# Breaks the spelling of a reserved token for the tokenizer, unseen by a reader.
_WORD_JOINER = "\u2060"


class Turn(NamedTuple):
    """An assistant message as characters [start, end) of the rendered text: all that the model has to write after the
    generation prompt, the stop token included (`stop` is None where there is none)."""

    message: int
    start: int
    end: int
    stop: str | None


class Rendered(NamedTuple):
    """The text of a conversation (image placeholders not yet expanded) and its assistant turns."""

    text: str
    turns: list[Turn]


def locate(
    messages: Sequence[Message],
    render: Render,
    *,
    added_tokens: re.Pattern[str],
    stop_to_insert: str | None,
    trained: Container[int],
) -> Rendered:
    """The conversation as it is trained on, with the span of each assistant message.

    A span starts where the generation prompt ends, so that training and inference meet at the same character. Where
    the template writes the header of an answer with other white space than its generation prompt (LLaVA-OneVision),
    the generation prompt's is used. A span ends with the last added token that the template writes behind the answer;
    where there is none (LLaVA-1.5), `stop_to_insert` takes the place of the white space there, as in the original
    LLaVA (`conv_vicuna_v1`, haotian-liu/LLaVA llava/conversation.py).

    Raises `ValueError` where the template refuses the messages, leaves out a text, or prompts for a message of
    `trained` otherwise than it writes it (thinking templates).
    """
    messages, render, plain, texts = _render_whole(messages, render)
    pieces: list[str] = []
    turns: list[Turn] = []
    copied = length = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(messages[:number], True)
        found = [texts[number, part] for part in range(len(message["content"])) if (number, part) in texts]
        # A blank answer may leave no trace; it lies right behind the prompt.
        words_start, words_end = (found[0][0], found[-1][1]) if found else (None, len(prompt))
        if plain.startswith(prompt) and len(prompt) <= (words_end if words_start is None else words_start):
            header, begin = "", len(prompt)
        elif words_start is not None and (common := _same_but_white_space(plain[:words_start], prompt)) is not None:
            header, begin = prompt[common:], words_start
            pieces.append(plain[copied:common])
            copied, length = words_start, length + common - copied
        elif number in trained:
            raise ValueError(
                f"messages[{number}]: the chat template writes this answer otherwise than it prompts for it, so "
                f"training would not meet inference: the prompt ends with {prompt[-40:]!r}, the conversation reads "
                f"{plain[:words_start][-40:]!r}. Train one answer a row (vlm_sft.chat.messages.split_turns with "
                "train_on='last_assistant'), or use other chat_template_kwargs or another chat template"
            )
        else:
            header, begin = "", words_end if words_start is None else words_start
        whole = number + 1 == len(messages)
        tail = _tail(plain, plain if whole else render(messages[: number + 1], False), words_end)
        written = list(added_tokens.finditer(tail))
        stop = written[-1].group() if written else stop_to_insert
        end = words_end + written[-1].end() if written else words_end
        inserted = "" if written else stop or ""
        pieces += [plain[copied:begin], header, plain[begin:end], inserted]
        start = length + begin - copied + len(header)
        length = start + end - begin + len(inserted)
        turns.append(Turn(number, start, length, stop))
        copied = end + len(tail) if inserted and tail.isspace() else end
    return Rendered("".join([*pieces, plain[copied:]]), turns)


def guard_reserved(messages: Sequence[Message], reserved: re.Pattern[str], *, escape: bool) -> list[Message]:
    """The messages, free of reserved tokens typed as text; with `escape` a word joiner (U+2060) is put behind the
    first character of each, so that the model reads the text and the tokenizer sees no token.

    Raises `ValueError` naming message and token, also for a token that two neighbouring parts form together.
    """
    guarded = []
    for number, message in enumerate(messages):
        if escape:
            message = _with_texts(
                message, lambda _, text: reserved.sub(lambda m: m[0][0] + _WORD_JOINER + m[0][1:], text)
            )
        if found := sorted(set(reserved.findall(text_of(message)))):
            raise ValueError(
                f"messages[{number}] ({message['role']}) holds {', '.join(map(repr, found))} as text, which the "
                "tokenizer would read as control tokens; remove them, write an image as {'type': 'image'}, or set "
                "reserved_tokens='escape'"
            )
        guarded.append(message)
    return guarded


def _render_whole(
    messages: Sequence[Message], render: Render
) -> tuple[list[Message], Render, str, dict[Part, tuple[int | None, int]]]:
    """The first way of handing the messages to the template that loses no text: messages, render, the plain text, and
    the span of each text part in it."""
    if any(_MARK.search(text_of(message)) for message in messages):
        raise ValueError("a text holds private-use characters of Unicode plane 16; remove them")
    refusal: Exception | None = None
    lost: int | None = None
    parts = [{"role": message["role"], "content": message["content"]} for message in messages]
    joined = [{**message, "content": _join_texts(message["content"])} for message in parts]
    for form, style in ((parts, _as_parts), (parts, _system_as_string), (parts, _as_strings), (joined, _as_parts)):

        def styled(these: Sequence[Message], prompt: bool, style: Style = style) -> str:
            return render(style(these), prompt)

        try:
            plain = styled(form, False)
        except Exception as error:  # a template may raise anything; the first refusal explains best
            refusal = refusal or error
            continue
        texts = _find_texts(form, styled, plain)
        missing = [key for key, text in _texts(form) if key not in texts and text.strip()]
        if not missing:
            return form, styled, plain, texts
        lost = missing[0][0] if lost is None else lost
    advice = "(a system text may go to the start of the first user message) or use another chat template"
    if lost is not None:
        role = messages[lost]["role"]
        raise ValueError(
            f"the chat template does not write the text of messages[{lost}] ({role}) as it is; move it {advice}"
        )
    raise ValueError(f"the chat template refuses the conversation: {refusal}; mend the messages {advice}")


def _find_texts(messages: list[Message], render: Render, plain: str) -> dict[Part, tuple[int | None, int]]:
    """Where each text part stands in `plain`: (start, end); the start is None where the template moved it (it may split
    an answer at `</think>`). Parts that it leaves out, repeats or rewrites are absent."""
    for inside in (False, True):
        if (found := _marked(messages, render, plain, range(len(messages)), inside)) is not None:
            return found
    found = {}
    for number in range(len(messages)):  # marks changed what the template writes: one message at a time
        for inside in (False, True):
            if (one := _marked(messages, render, plain, [number], inside)) is not None:
                found |= one
                break
    return found


def _marked(
    messages: list[Message], render: Render, plain: str, chosen: Iterable[int], inside: bool
) -> dict[Part, tuple[int | None, int]] | None:
    """Spans of the text parts of the chosen messages, or None where marks change more than the marks' own places.
    `inside` puts them within a text's outer white space, for templates that trim."""
    keys: list[Part] = []

    def mark(number: int, part: int, text: str) -> str:
        first = _FIRST_MARK + 2 * len(keys)
        keys.append((number, part))
        core = text.strip() if inside else text
        before, _, behind = text.partition(core) if core else ("", "", text)
        return f"{before}{chr(first)}{core}{chr(first + 1)}{behind}"

    chosen = set(chosen)
    marked = [
        _with_texts(message, partial(mark, number)) if number in chosen else message
        for number, message in enumerate(messages)
    ]
    try:
        rendered = render(marked, False)
    except Exception:  # a template that checks its texts
        return None
    places: dict[int, int] = {}
    repeated = set()
    for count, match in enumerate(_MARK.finditer(rendered)):
        mark_number = ord(match.group()) - _FIRST_MARK
        repeated |= {mark_number} & places.keys()
        places[mark_number] = match.start() - count
    if _MARK.sub("", rendered) != plain:
        return None
    return {
        key: (places.get(2 * i), places[2 * i + 1])
        for i, key in enumerate(keys)
        if 2 * i + 1 in places and not {2 * i, 2 * i + 1} & repeated
    }


def _same_but_white_space(text: str, prompt: str) -> int | None:
    """The length of the common start, if only white space follows it in both."""
    common = _common(text, prompt)
    return common if not text[common:].strip() and not prompt[common:].strip() else None


def _tail(plain: str, up_to_here: str, words_end: int) -> str:
    """What the template writes behind an answer before anything that belongs to the next message."""
    if not up_to_here.startswith(plain[:words_end]):
        return ""
    return plain[words_end : _common(up_to_here, plain)]


def _common(a: str, b: str) -> int:
    """How many characters two texts share at their start."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def _texts(messages: Sequence[Message]) -> list[tuple[Part, str]]:
    return [
        ((number, part), content["text"])
        for number, message in enumerate(messages)
        for part, content in enumerate(message["content"])
        if content["type"] == "text"
    ]


def _with_texts(message: Message, change: Callable[[int, str], str]) -> Message:
    content = [
        {**part, "text": change(number, part["text"])} if part["type"] == "text" else part
        for number, part in enumerate(message["content"])
    ]
    return {**message, "content": content}


def _join_texts(content: Sequence[Message]) -> list[Message]:
    joined: list[Message] = []
    for part in content:
        if joined and part["type"] == joined[-1]["type"] == "text":
            joined[-1] = {"type": "text", "text": joined[-1]["text"] + part["text"]}
        else:
            joined.append(part)
    return joined


def _as_parts(messages: Sequence[Message]) -> Sequence[Message]:
    return messages


def _system_as_string(messages: Sequence[Message]) -> list[Message]:
    return [_as_string(message) if message["role"] == "system" else message for message in messages]


def _as_strings(messages: Sequence[Message]) -> list[Message]:
    return [_as_string(message) for message in messages]


def _as_string(message: Message) -> Message:
    only_text = all(part["type"] == "text" for part in message["content"])
    return {**message, "content": text_of(message)} if only_text else message
