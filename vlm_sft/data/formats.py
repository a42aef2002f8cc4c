"""Rows as people write them - LLaVA, ShareGPT, Alpaca, JSON, CSV - read one at a time and turned into messages."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

_PLACEHOLDER = re.compile("\n?<image>\n?")
TEXT_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
FIELDS = ("messages", "prompt", "response", "system", "history", "images")
FLAGS = "--columns messages=... or prompt=... response=... images=..."
Layout = dict[str, tuple[str, ...]]
"""Which columns hold each of `FIELDS`; more than one for `prompt` alone."""

_ROLES = {"human": "user", "gpt": "assistant"}
_KNOWN: tuple[Layout, ...] = (
    {"messages": ("messages",)},
    {"messages": ("conversations",)},
    {"messages": ("conversation",)},
    {"prompt": ("instruction", "input"), "response": ("output",)},
    {"prompt": ("instruction",), "response": ("output",)},
    {"prompt": ("prompt",), "response": ("response",)},
    {"prompt": ("prompt",), "response": ("completion",)},
    {"prompt": ("question",), "response": ("answer",)},
)
_IMAGES = ("images", "image", "file_names", "file_name")
_BETWEEN = re.compile(r"[\s,]*")


def layout_of(found: Sequence[str], columns: Sequence[str] | None = None) -> Layout:
    """Where the parts of a conversation are among the columns found: as `columns` says, else as the common formats do.

    `columns` says which columns hold each of `FIELDS`, as flags do: `["prompt=instruction", "prompt=input"]`. Raises
    `ValueError` with the columns found, the closest match and the remedy.
    """
    layout: Layout = {}
    faults = []
    for pair in columns or ():
        field, _, name = pair.partition("=")
        layout[field] = (*layout.get(field, ()), name)
        if not name:
            faults.append(f"{pair!r} names no column; expected FIELD=COLUMN, as in prompt=question")
        elif field not in FIELDS:
            faults.append(f"{field!r} is not a field{closest(field, FIELDS)}; fields are {', '.join(FIELDS)}")
        elif name not in found:
            faults.append(f"there is no column {name!r} for {field!r}{closest(name, found)}")
    if "messages" not in layout and len({"prompt", "response"} & layout.keys()) == 1:
        faults.append("'prompt' and 'response' go together; name both")
    if faults:
        raise ValueError(f"--columns: {'; '.join(faults)}. Columns found: {', '.join(found)}")
    if not {"messages", "prompt"} & layout.keys():
        known = next((k for k in _KNOWN if {name for names in k.values() for name in names} <= set(found)), None)
        if known is None:
            raise ValueError(
                f"no column of conversations among {', '.join(found)}{closest('messages', found)}; expected messages, "
                f"conversations, or prompt and response: name yours with {FLAGS}, or edit to_conversation"
            )
        layout |= known
        layout |= {field: (field,) for field in ("system", "history") if "prompt" in known and field in found}
    if "images" not in layout and (images := next((name for name in _IMAGES if name in found), None)):
        layout["images"] = (images,)
    return layout


def to_messages(row: Mapping[str, Any], layout: Layout) -> Any:
    """The row's conversation with `role` and `content`; what is not a conversation is left as it is found.

    `from` and `value` are renamed (human and gpt to user and assistant), and in a string that is not the assistant's,
    each `<image>`, with the line break next to it, becomes an image part.
    """
    if "messages" in layout:
        messages = row.get(layout["messages"][0])
        if isinstance(messages, str):
            with suppress(ValueError):
                messages = json.loads(messages)
        return [_message(message) for message in messages] if isinstance(messages, list) else messages
    values = {field: row.get(names[0]) for field, names in layout.items()}
    prompts = [row.get(name) for name in layout["prompt"]]
    written = [prompt for prompt in prompts if prompt]
    prompt = "\n".join(written) if written and all(isinstance(p, str) for p in written) else prompts[0]
    turns = [("system", values["system"])] if values.get("system") else []
    history = values.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError(f"history is {history!s:.80}; expected a list of [question, answer] pairs")
    for question, answer in history:
        turns += [("user", question), ("assistant", answer)]
    turns += [("user", prompt), ("assistant", values["response"])]
    return [_message({"role": role, "content": content}) for role, content in turns]


def to_images(row: Mapping[str, Any], layout: Layout) -> list[Any]:
    """The row's images as a flat list; none where the column is absent, None or an empty string."""
    value = row.get(layout["images"][0]) if "images" in layout else None
    return [] if value is None or value == "" else _flat(value)


def read_rows(path: Path) -> Iterator[Any]:
    """Each row of a JSON array, of JSON lines, or of a CSV or TSV file (all strings), in the memory of one row.

    A line that is not JSON comes as the `ValueError` that says so. Raises `ValueError` where an array is broken.
    """
    if path.suffix.lower() in (".csv", ".tsv"):
        import pandas as pd  # half a second, for CSV alone

        separator = "," if path.suffix.lower() == ".csv" else "\t"
        # As strings: an answer may read "42", "NA" or "null".
        for frame in pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, chunksize=1000):
            yield from frame.to_dict("records")
        return
    # What is not UTF-8 becomes a lone surrogate, which is then found in its row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        if start == "[":
            yield from _read_array(file, path.name)
        else:
            for line in itertools.chain([start + file.readline()], file):
                if line.strip():
                    yield _parse(line)


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"the line is not JSON ({error}); fix or remove it")


def _read_array(file: TextIO, name: str) -> Iterator[Any]:
    """The array's elements, its opening bracket having been read."""
    decoder, buffer, at, count = json.JSONDecoder(), "", 0, 0
    while True:
        at = _BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]  # matches the empty string too
        if buffer.startswith("]", at):
            return
        try:
            element, at = decoder.raw_decode(buffer, at)
        except ValueError as error:
            if not (more := file.read(max(1 << 20, len(buffer)))):
                raise ValueError(f"{name}: row {count} cannot be read, nor what follows: {error}; fix it") from None
            buffer, at = buffer[at:] + more, 0
        else:
            yield element
            count += 1


def _message(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    fields = dict(message)
    if "from" in fields and "value" in fields:
        sender = fields.pop("from")
        fields = {"role": _ROLES.get(str(sender), sender), "content": fields.pop("value"), **fields}
    content = fields.get("content")
    if isinstance(content, str) and "<image>" in content and fields.get("role") != "assistant":
        fields["content"] = _parts(content)
    return fields


def _parts(text: str) -> list[dict[str, Any]]:
    """LLaVA sets the placeholder on a line of its own; the chat template brings its own line break."""
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(_PLACEHOLDER.split(text)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _flat(value: Any) -> list[Any]:
    return [image for item in value for image in _flat(item)] if isinstance(value, (list, tuple)) else [value]


def closest(name: str, among: Sequence[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no name is close."""
    close = difflib.get_close_matches(name, among, n=1, cutoff=0.7)
    return f" (did you mean {close[0]!r}?)" if close else ""
