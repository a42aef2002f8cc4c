"""Rows as people write them, judged one at a time: which columns hold the conversation, and the same as messages.
docs/data.md has a row of each format."""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from vlm_sft.chat.images import looks_like_image
from vlm_sft.chat.messages import NO_MEDIA, OTHER_MEDIA, flat

_PLACEHOLDER = re.compile("\n?<image>\n?|\n?<img>(.*?)</img>\n?")  # the second one holds a file name: Qwen-VL, ms-swift
FIELDS = ("messages", "prompt", "response", "system", "history", "images", "tools", "ignore")
Layout = dict[str, tuple[str, ...]]
"""Which columns hold each of `FIELDS`; more than one for `prompt`, `images` and `ignore` alone."""

_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system", "observation": "tool"}
_ASKED = {"output": "instruction", "response": "prompt", "completion": "prompt", "answer": "question"}
_KNOWN: list[Layout] = [
    *[Layout(messages=(name,)) for name in ("messages", "conversations", "conversation", "texts")],
    Layout(prompt=("instruction", "input"), response=("output",)),
    *[Layout(prompt=(asked,), response=(answer,)) for answer, asked in _ASKED.items()],
    Layout(prompt=("query",), response=("response",)),
]
_CAPTIONS = ("caption", "text", "response", "answer", "output")  # where the question is a constant
IMAGES = ("images", "image", "file_names", "file_name")
_HELD = ("image", "image_url", "url", "path", "source", "base64", "bytes", "data")  # an image in a part
_ABOUT = ("type", "detail", "image_wh", "media_type", "mime_type")
_IMAGE_NAME = re.compile(r"(?i)ima?ge?|photo|picture")


def layout_of(row: Mapping[str, Any], columns: Sequence[str] = (), *, prompt: bool = False) -> Layout:
    """Where the parts of a conversation are in this row: as `columns` (`["prompt=instruction", "prompt=input"]`) says,
    else as the common formats do; with `prompt`, the question is a constant. Columns that are empty in this row count
    only where it has no others. Raises `ValueError` with the columns found, the closest match and the flags to set."""
    filled = tuple(name for name, value in row.items() if is_filled(value))
    if (layout := _layout(filled, tuple(columns), prompt) or _layout(tuple(row), tuple(columns), prompt)) is not None:
        return layout
    lists = [name for name, held in row.items() if isinstance(held, list) and held and isinstance(held[0], Mapping)]
    of = f". {lists[0]!r} is a list of objects: if these are the rows, give a file of that list alone" if lists else ""
    if caption := next((name for name in _CAPTIONS if name in row), None):
        of += f'. For images with a caption in {caption!r}, give their question by --prompt "..."'
    near = closest("messages", [name for name in row if name not in IMAGES])
    found = f"no column of conversations among {', '.join(row)}{near}"
    expected = "messages, conversations, or prompt and response"
    raise ValueError(f"{found}; expected {expected}: name yours with {flags(row)}, or edit to_conversation{of}")


@functools.lru_cache(4096)
def _layout(found: tuple[str, ...], columns: tuple[str, ...], prompt: bool) -> Layout | None:
    layout = named_columns(columns)
    if not {"messages", "response"} & layout.keys():
        known = next((k for k in _KNOWN if {name for names in k.values() for name in names} <= {*found}), None)
        if prompt and known:
            own = f"this one has its own in {next(iter(known.values()))[0]!r}"
            raise ValueError(f"--prompt is the question of every row, and {own}: leave it out")
        if prompt:
            known = next((Layout(response=(name,)) for name in _CAPTIONS if name in found), None)
        if known is None:
            return None
        layout |= known
    for field in ("system", "tools", *(["history"] if "prompt" in layout else [])):
        layout |= {field: (field,)} if field not in layout and field in found else {}
    images = next((name for name in IMAGES if name in found), None)
    return layout if "images" in layout or not images else layout | {"images": (images,)}


def named_columns(columns: Sequence[str], found: Sequence[str] | None = None, *, prompt: bool = False) -> Layout:
    """What the flags of `--columns` say. With the names of all columns, raises `ValueError` for all that is wrong."""
    layout: Layout = {}
    faults = []
    for pair in columns:
        field, _, name = pair.partition("=")
        layout[field] = (*layout.get(field, ()), name)
        if not name:
            faults.append(f"{pair!r} names no column; expected FIELD=COLUMN, as in prompt=question")
        elif field not in FIELDS:
            faults.append(f"{field!r} is not a field{closest(field, FIELDS)}; fields are {', '.join(FIELDS)}")
        elif found and name not in found:
            faults.append(f"there is no column {name!r} for {field!r}{closest(name, found)}")
    if "messages" not in layout and not prompt and len({"prompt", "response"} & layout.keys()) == 1:
        faults.append("'prompt' and 'response' go together; name both (or a constant question by --prompt)")
    if prompt and {"messages", "prompt"} & layout.keys():
        faults.append("--prompt is the question of every row; leave it out, or name 'response' and 'images' alone")
    if found and faults:
        raise ValueError(f"--columns: {'; '.join(faults)}. Columns found: {', '.join(found)}")
    return layout


def unused_columns(row: Mapping[str, Any], layout: Layout) -> list[str]:
    """Names of the columns that hold something and are not read. Raises `ValueError` for one of video or sound, for
    those that look like images, unless one only repeats the name of an image that is read, and for ms-swift's boxes."""
    used = {name for names in layout.values() for name in names}
    unused = [name for name, value in row.items() if name not in used and is_filled(value)]
    if other := sorted(filter(OTHER_MEDIA.match, unused)):
        raise ValueError(f"the column {other[0]!r} is not empty: {NO_MEDIA}")
    names = {os.path.basename(image) if isinstance(image, str) else None for image in to_images(row, layout)}
    lost = []
    for name in unused:
        value = row[name]
        is_url = isinstance(value, str) and value.startswith("http") and _IMAGE_NAME.search(name)
        repeats = isinstance(value, str) and not names.isdisjoint({None, os.path.basename(value)})
        lost += [name] if (is_url or looks_like_image(value)) and not repeats else []
    if lost:
        value = row[lost[0]]
        said = repr(value)[:60] if isinstance(value, (str, list)) else f"a {type(value).__name__}"
        found = f"the column {', '.join(map(repr, lost))} looks like images ({said}) and is not used"
        ignored = " ".join(f"ignore={name}" for name in lost)
        raise ValueError(f"{found}: read it with {flags(row, layout, lost)}, or leave it out with --columns {ignored}")
    if "objects" in unused and re.search("<bbox>|<ref-object>", str(row)):
        found = "the column 'objects' is not read, and <bbox> and <ref-object> would be trained as they stand"
        raise ValueError(f"{found}: write its boxes into the texts in to_conversation (vlm_sft.scale_boxes)")
    return unused


def flags(row: Mapping[str, Any], layout: Layout | None = None, images: Sequence[str] = ()) -> str:
    """The flags to set: those of this layout, or what to fill in; `images` names the columns that look like some."""
    layout = layout or {}
    words = [f"{field}={name}" for field in ("messages", "prompt", "response") for name in layout.get(field, ())]
    images = [*layout.get("images", ()), *(images or [name for name in row if looks_like_image(row[name])])]
    words = words or ["messages=... or prompt=... response=..."]
    return " ".join(["--columns", *words, *(f"images={name}" for name in images or ["..."])])


def to_messages(row: Mapping[str, Any], layout: Layout, prompt: str | None = None, system: str | None = None) -> Any:
    """The row's conversation with `role` and `content`; what is not a conversation is left as it is found. `from` and
    `value` are renamed (human and gpt to user and assistant), as are the parts of OpenAI, Anthropic and Qwen; in a
    string that is not the assistant's, each `<image>`, with the line break next to it, becomes an image part; `loss`
    and `weight` become `train`. `prompt` and `system` are for a row that has none."""
    values: dict[str, Any] = {field: row.get(names[0]) for field, names in layout.items()}
    if "messages" in layout:
        messages = _parsed(values["messages"])
        if not isinstance(messages, list):
            return messages
    else:
        answer = values["response"]
        if isinstance(answer, list) and answer and all(isinstance(each, str) for each in answer):
            if len(answer) > 1:
                found = f"{layout['response'][0]!r} holds {len(answer)} answers"
                raise ValueError(f"{found}; choose one in to_conversation")
            answer = answer[0]
        answers = answer if _are_messages(answer) else [{"role": "assistant", "content": answer}]
        messages = [*_turns_before(row, layout, values.get("history"), prompt), *answers]
    turns: list[Any] = []
    for turn in messages:
        both = isinstance(turn, Mapping) and turn.keys() >= {"user", "assistant"}  # the_cauldron's
        turns += [{"role": role, "content": turn[role]} for role in ("user", "assistant")] if both else [turn]
    messages = [_message(turn, number) for number, turn in enumerate(turns)]
    first = messages[0] if messages and isinstance(messages[0], Mapping) else {}
    has_system = first.get("role") == "system"
    if (own := values.get("system")) and has_system:
        raise ValueError(f"the column {layout['system'][0]!r} beside a system message in the conversation; keep one")
    if (text := own or (None if has_system else system)) is not None:
        first = _message({"role": "system", "content": text}, 0)
        messages = [first, *messages]
    if (tools := _parsed(values.get("tools"))) and first:
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise ValueError(f"tools is {tools!r:.80}; expected a list of JSON schemas")
        messages[0] = {**first, "tools": tools}
    return messages


def _turns_before(row: Mapping[str, Any], layout: Layout, history: Any, prompt: str | None) -> Iterator[dict[str, Any]]:
    """Earlier turns and the question. Of a prompt that is a list of messages, no answer is trained (as in TRL)."""
    history = history or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError(f"history is {history!s:.80}; expected a list of [question, answer] pairs")
    for pair in history:
        yield from ({"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True))
    asked: list[Any] = [row.get(name) for name in layout["prompt"]] if "prompt" in layout else [prompt]
    if _are_messages(asked[0]):
        for message in asked[0]:
            role = message.get("role", message.get("from"))
            yield {**message, "train": False} if _ROLES.get(role, role) == "assistant" else message
        return
    written = [each for each in asked if each]
    joined = "\n".join(written) if written and all(isinstance(each, str) for each in written) else asked[0]
    yield {"role": "user", "content": joined}


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def is_message(value: Any) -> bool:
    """Whether this is a message, of ours or ShareGPT's."""
    names = value.keys() if isinstance(value, Mapping) else set()
    return {"from", "value"} <= names or {"role", "content"} <= names or {"role", "tool_calls"} <= names


def is_filled(value: Any) -> bool:
    """Whether a column holds something in this row."""
    return value is not None and not (isinstance(value, (str, list)) and not value)


def _parsed(value: Any) -> Any:
    if isinstance(value, str):
        with suppress(ValueError):
            return json.loads(value)
    return value


def to_images(row: Mapping[str, Any], layout: Layout) -> list[Any]:
    """The row's images as a flat list; none where the column is absent, None or an empty string."""
    values = [row.get(name) for name in layout.get("images", ())]
    return [image for value in values if not isinstance(value, str) or value for image in flat(value)]


def _message(message: Any, number: int) -> Any:
    if not isinstance(message, Mapping):
        return message
    fields = dict(message)
    if "from" in fields and "value" in fields:
        fields = {"role": fields.pop("from"), "content": fields.pop("value"), **fields}
    if fields.get("role") == "function_call":  # ShareGPT's and LLaMA-Factory's: the call is the text
        fields |= {"role": "assistant", "tool_calls": [_parsed(fields.get("content"))], "content": ""}
    if fields.get("tool_calls") is not None:
        fields["tool_calls"] = [_call(call) for call in flat(fields["tool_calls"])]
        fields["content"] = fields.get("content") or []  # a template may write a line for a blank text
    role, content = fields.get("role"), fields.get("content")
    if isinstance(role, str):
        fields["role"] = role = _ROLES.get(role, role)
    if isinstance(content, str) and role != "assistant" and _PLACEHOLDER.search(content):
        fields["content"] = _parts(content)
    elif isinstance(content, list):
        fields["content"] = [_part(part) for part in content]
    for name in ("loss", "weight"):  # ms-swift's, OpenAI's
        if (value := fields.pop(name, None)) is None:
            continue
        if value not in (0, 1):
            raise ValueError(f"messages[{number}] has the {name} {value!r}; expected true or false, 1 or 0")
        if value and role != "assistant":
            raise ValueError(f"messages[{number}] ({role}) has the {name} {value!r}; only answers are trained: drop it")
        if fields.get("train") not in (None, bool(value)):
            raise ValueError(f"messages[{number}] says otherwise by {name} than by another of train, loss, weight")
        fields["train"] = bool(value)
    return fields


def _call(call: Any) -> Any:
    """A call with its arguments as a dict, which OpenAI writes as JSON, in a dict of its own as templates expect it."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise ValueError(f"a tool call is {call!r:.80}; expected a name and arguments")
    return {"type": "function", "function": {**function, "arguments": _parsed(function.get("arguments") or {})}}


def _part(part: Any) -> Any:
    """A part of a message as ours: `{"type": "text", "text"}` or `{"type": "image", "image"}`."""
    if not isinstance(part, Mapping):
        return part
    kind = part.get("type")
    if kind in ("input_text", "output_text") or (kind is None and isinstance(part.get("text"), str)):
        return {**part, "type": "text"}
    held = {name: part[name] for name in _HELD if part.get(name) is not None}
    if len(held) == 1 and kind in (None, "image", "image_url", "input_image"):
        rest = {key: field for key, field in part.items() if key not in (*_HELD, *_ABOUT) and field is not None}
        return {"type": "image", "image": held.get("image", held), **rest}
    return part


def _parts(text: str) -> list[dict[str, Any]]:
    """LLaVA sets the placeholder on a line of its own; the chat template brings its own line break."""
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(_PLACEHOLDER.split(text)):  # text, file name or None, text, ...
        if number % 2:
            parts.append({"type": "image", **({"image": piece} if piece else {})})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def closest(name: str, among: Sequence[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no name is close."""
    close = difflib.get_close_matches(name, among, n=1, cutoff=0.7)
    return f" (did you mean {close[0]!r}?)" if close else ""
