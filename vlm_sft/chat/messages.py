"""One conversation: its shape, which datasets write in many ways, made uniform; its faults named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant", "tool")
_FOLLOWS = {"": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
_FIELDS = {"assistant": ("tool_calls",), "tool": ("name", "tool_call_id")}  # beside role, content and train
Message = dict[str, Any]
OTHER_MEDIA = re.compile("^(input_)?(video|audio)s?(_url)?$")
NO_MEDIA = "video and sound are not trained on; give some frames as images, in their order, or drop the row"

# `sanitize_control_tokens` of transformers 5.23 writes them; typed in front of an image part, they undo it in silence.
_PROCESSOR_MARKS = re.compile("[\U000f0000\U000f0001]")
# Breaks the spelling of a reserved token for the tokenizer, unseen by a reader.
_WORD_JOINER = "\u2060"


class Conversation(NamedTuple):
    """Messages whose content is a list of `{"type": "text", "text"}` and bare `{"type": "image"}` parts, and one
    image per image part, in the order in which the parts are read."""

    messages: list[Message]
    images: list[Any]


def normalise(messages: Any, images: Any = None) -> Conversation:
    """A `Conversation` with the same words and images; the arguments are left as they are.

    Content given as a string becomes one text part. Fields that are None (Arrow fills structs with them) count as
    absent. An image part takes the image it holds (`image`), else the one at its `index`, else the next one. Where
    every content is a plain string, the images stand in front of the first user message, as in TRL's own data format.
    Raises `ValueError` naming message, part, what was found, and what to do."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise ValueError(f"`messages` is {_kind(messages)}; expected a list of messages (parse JSON strings first)")
    if not messages:
        raise ValueError("`messages` is empty; expected at least a user and an assistant message")
    pool = flat(images)
    in_front = pool and all(isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in messages)
    used, ordered, normalised = set[int](), list[Any](), list[Message]()
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        its_own = _FIELDS.get(str(message.get("role")), ()) if isinstance(message, Mapping) else ()
        tools = ("tools",) if number == 0 else ()  # of the whole conversation
        fields = _fields(message, where, allowed=("role", "content", "train", *its_own, *tools))
        role, parts = fields.get("role"), fields.get("content", [] if fields.get("tool_calls") else None)
        if role not in ROLES:
            raise ValueError(f"{where} has the role {role!r}; expected one of {', '.join(ROLES)}")
        if not isinstance(fields.get("train", True), bool):
            raise ValueError(f"{where} has 'train': {fields['train']!r}; expected true or false")
        if isinstance(parts, str):
            parts = [{"type": "text", "text": parts}]
        if isinstance(parts, Mapping) or not isinstance(parts, Sequence):
            raise ValueError(f"{where} has a content that is {_kind(parts)}; expected a string or a list of parts")
        if in_front and role == "user":
            parts, in_front = [*({"type": "image"} for _ in pool), *parts], False
        fields["content"] = [_part(p, f"{where}.content[{i}]", role, pool, used, ordered) for i, p in enumerate(parts)]
        normalised.append(fields)
    if len(used) < len(pool):
        found = f"{len(pool)} images but the messages hold {len(used)} image parts"
        how = "add {'type': 'image'} to a user message for each image, or drop the images that are not meant"
        raise ValueError(f"{found}; {how}")
    return Conversation(normalised, ordered)


def check_turns(messages: Sequence[Message]) -> None:
    """Raises `ValueError` unless user and assistant alternate after at most one system message, an assistant last; a
    tool's messages may stand between two of the assistant's."""
    roles = [message["role"] for message in messages]
    first = int(roles[0] == "system")
    for number, (before, role) in enumerate(zip(["", *roles[first:]], roles[first:], strict=False), first):
        if role not in _FOLLOWS[before]:
            found = f"messages[{number}] is from {role}; expected {_FOLLOWS[before][0]}"
            how = "join neighbours of one role, drop what comes before the first question"
            raise ValueError(f"{found}: after at most one system message, user and assistant alternate ({how})")
    if roles[-1] != "assistant":
        last = f"messages[{len(roles) - 1}] is from {roles[-1]}"
        raise ValueError(f"{last} and nothing answers it; end with an assistant message or drop it")


def guard_reserved(messages: Sequence[Message], reserved: re.Pattern[str], *, escape: bool) -> list[Message]:
    """The messages, free of reserved tokens typed as text; with `escape` a word joiner (U+2060) is put after the
    first character of each, so that the model reads the text and the tokenizer sees no token.

    Raises `ValueError` naming message and token, also for one that two neighbouring parts form together."""

    def escaped(_: int, text: str) -> str:
        return reserved.sub(lambda token: token[0][0] + _WORD_JOINER + token[0][1:], text)

    guarded = [with_texts(message, escaped) if escape else message for message in messages]
    for number, message in enumerate(guarded):
        called = json.dumps([message.get("tools"), message.get("tool_calls")], ensure_ascii=False)
        if found := sorted({*reserved.findall(text_of(message)), *reserved.findall(called)}):
            holds = f"messages[{number}] ({message['role']}) holds"
            if other := [token for token in found if OTHER_MEDIA.match(token.strip("<|>"))]:
                raise ValueError(f"{holds} {other[0]!r}: {NO_MEDIA} (as plain text, by reserved_tokens='escape')")
            typed = f"{', '.join(map(repr, found))} as text, which the tokenizer would read as control tokens"
            how = "remove them, write an image as {'type': 'image'}, or set reserved_tokens='escape'"
            raise ValueError(f"{holds} {typed}; {how}")
    return guarded


def with_texts(message: Message, change: Callable[[int, str], str]) -> Message:
    """The message with each text replaced by `change(number of the part, text)`."""
    content = [
        {**part, "text": change(number, part["text"])} if part["type"] == "text" else part
        for number, part in enumerate(message["content"])
    ]
    return {**message, "content": content}


def text_of(message: Message) -> str:
    """The words of a normalised message, its text parts joined without a separator."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def split_turns(conversation: Conversation) -> list[Conversation]:
    """One conversation per assistant message, each ending with it and holding the images up to there."""
    messages, images = conversation
    ends = [number for number, message in enumerate(messages, 1) if message["role"] == "assistant"]
    return [Conversation(messages[:end], images[: count_images(messages[:end])]) for end in ends]


def answers_of(messages: Sequence[Message]) -> list[int]:
    """The numbers of the messages that are answers to train on."""
    return [n for n, message in enumerate(messages) if message["role"] == "assistant" and message.get("train", True)]


def one_answer(conversation: Conversation, answer: int) -> Conversation:
    """The conversation up to the answer in this message, the answers before it not trained: for templates that render
    an earlier answer differently from the last one (thinking models)."""
    *history, last = conversation.messages[: answer + 1]
    history = [{**message, "train": False} if message["role"] == "assistant" else message for message in history]
    return Conversation([*history, last], conversation.images[: count_images([*history, last])])


def count_images(messages: Sequence[Message]) -> int:
    """How many image parts normalised messages hold."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def _part(part: Any, where: str, role: str, pool: list[Any], used: set[int], ordered: list[Any]) -> Message:
    """The part in its uniform shape; an image part also moves its image from `pool` to `ordered`."""
    if isinstance(part, Mapping):
        named = [str(part.get("type")), *(str(key) for key, value in part.items() if value is not None)]
        if other := [*filter(OTHER_MEDIA.match, named)]:
            raise ValueError(f"{where} is a part of the kind {other[0]!r}: {NO_MEDIA}")
    fields = _fields(part, where, allowed=("type", "text", "image", "index"))
    match fields.get("type"):
        case "text":
            text = fields.get("text")
            if not isinstance(text, str):
                raise ValueError(f"{where} is a text part whose text is {_kind(text)}; expected a string")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{where} holds a lone surrogate at character {error.start}; remove it") from None
            if mark := _PROCESSOR_MARKS.search(text):
                found = f"U+{ord(mark[0]):05X} at character {mark.start()}"
                raise ValueError(f"{where} holds {found}, a mark that processors keep for themselves; remove it")
            return {"type": "text", "text": text}
        case "image":
            if role == "assistant":
                raise ValueError(f"{where} is an image in an assistant message; images belong to user messages")
            if "image" not in fields:
                index = fields.get("index", max(used, default=-1) + 1)
                if not isinstance(index, int) or not 0 <= index < len(pool):
                    found = f"stands for image {index} but the row has {len(pool)} images"
                    raise ValueError(f"{where} {found}; add the image, fix the index, or drop the part")
                used.add(index)
            ordered.append(fields["image"] if "image" in fields else pool[index])
            return {"type": "image"}
        case kind:
            raise ValueError(f"{where} has the type {kind!r}; expected 'text' or 'image'")


_WRONG_NAMES = {"path": "image", "url": "image", "image_url": "image", "base64": "image", "value": "content"}


def _fields(value: Any, where: str, *, allowed: tuple[str, ...]) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {_kind(value)}; expected a dict with {', '.join(allowed)}")
    fields = {key: field for key, field in value.items() if field is not None}
    if unknown := fields.keys() - set(allowed):
        renames = [f"rename {name!r} to {_WRONG_NAMES[name]!r}" for name in sorted(unknown & _WRONG_NAMES.keys())]
        found = f"{where} has the keys {', '.join(sorted(map(str, unknown)))}, which no template would be given"
        how = ", ".join(renames) or "remove them or write their content into the text"
        raise ValueError(f"{found}; expected only {', '.join(allowed)}: {how}")
    return fields


def flat(images: Any) -> list[Any]:
    """What nested lists hold. A None among images is an image that is missing, and is named when it is opened."""
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in ([None] if item is None else flat(item))]
    return [] if images is None else [images]


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
