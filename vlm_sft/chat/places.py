"""Where the texts of a conversation stand in what a chat template writes.

They are not searched for: the template is rendered again with invisible marks round each text.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Container, Hashable, Sequence
from functools import partial

from vlm_sft.chat.messages import Message, with_texts

Render = Callable[[Sequence[Message]], str]
Spans = dict[tuple[int, int], tuple[int | None, int]]
"""Where text parts (number of the message, number of the part in it) stand in a text."""
Tails = dict[int, str | None]
"""What a template writes after an answer and before the next text; None where it writes the answer anew."""
Edit = tuple[int, int, str]
"""Other words for the characters [start, end) of a text; several stand in their order."""

MARK = re.compile("[\U00100000-\U0010fffd]")
# One private-use character before and one after each text; plane 16 holds no assigned character.
_FIRST_MARK = 0x100000


class Places:
    """Finds texts, and remembers for each shape of a conversation (roles and kinds of parts) where they stood."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[str, dict[tuple[int, int], tuple[int, int]], list[bool], Tails]] = {}

    def of(self, messages: Sequence[Message], render: Render, plain: str, *key: Hashable) -> tuple[Spans, Tails]:
        """Where the text parts stand in `plain`, what `render` writes, and what follows the answers, as far as it is
        known. As in an earlier conversation of the same shape (and `key`: how it was rendered), if that one with these
        texts in the place of its own reads as `plain` does; else as `find_texts` has it."""
        shape = (*key, *((m["role"], *(part["type"] for part in m["content"])) for m in messages))
        texts = [part["text"] for m in messages for part in m["content"] if part["type"] == "text"]
        is_plain = all(text.strip() for text in texts) and all(m.keys() == {"role", "content"} for m in messages)
        if is_plain and shape in self._known:
            earlier, places, trims, tails = self._known[shape]
            words = [text.strip() if trim else text for text, trim in zip(texts, trims, strict=True)]
            edits = [(start, end, text) for (start, end), text in zip(places.values(), words, strict=True)]
            if edited(earlier, edits) == plain:
                starts = [moved(start, edits) for start, _, _ in edits]
                return {key: (at, at + len(text)) for key, at, text in zip(places, starts, words, strict=True)}, tails
        found = find_texts(messages, render, plain)
        places = {key: (start, end) for key, (start, end) in found.items() if start is not None}
        words, tails = [plain[start:end] for start, end in places.values()], {}
        in_order = [*places.values()] == sorted(places.values())
        if is_plain and in_order and [text.strip() for text in texts] == [text.strip() for text in words]:
            trims = [text != word for text, word in zip(texts, words, strict=True)]
            self._known[shape] = plain, places, trims, tails
        return found, tails


def find_texts(messages: Sequence[Message], render: Render, plain: str) -> Spans:
    """Where each text part stands in `plain`; the start is None where the template moved it (it may split an answer at
    `</think>`). Parts that it leaves out, repeats or rewrites are absent."""

    def found_in(chosen: Container[int]) -> Spans | None:
        outside = _marked(messages, render, plain, chosen, inside=False)
        return _marked(messages, render, plain, chosen, inside=True) if outside is None else outside

    numbers = range(len(messages))
    if (found := found_in(numbers)) is not None:
        return found
    # Marks changed what the template writes: one message at a time.
    return {place: span for number in numbers for place, span in (found_in([number]) or {}).items()}


def _marked(
    messages: Sequence[Message], render: Render, plain: str, chosen: Container[int], inside: bool
) -> Spans | None:
    """Spans of the text parts of the chosen messages, or None where marks change more than the marks' own places.
    `inside` puts them within a text's outer white space, for templates that trim."""
    cores: dict[tuple[int, int], str | None] = {}

    def mark(number: int, part: int, text: str) -> str:
        first = _FIRST_MARK + 2 * len(cores)
        core = text.strip() if inside else text
        before, _, after = text.partition(core) if core else ("", "", text)
        cores[number, part] = None if messages[number]["role"] == "tool" else core  # which some templates write as JSON
        return f"{before}{chr(first)}{core}{chr(first + 1)}{after}"

    marked = [
        with_texts(message, partial(mark, number)) if number in chosen else message
        for number, message in enumerate(messages)
    ]
    try:
        rendered = render(marked)
    except ValueError:  # a template that checks its texts
        return None
    places: dict[int, list[int]] = defaultdict(list)
    for count, match in enumerate(MARK.finditer(rendered)):
        places[ord(match.group()) - _FIRST_MARK].append(match.start() - count)
    if MARK.sub("", rendered) != plain:
        return None
    spans: Spans = {}
    for i, (key, core) in enumerate(cores.items()):
        start, end = places[2 * i], places[2 * i + 1]
        if len(start) <= 1 and len(end) == 1 and (not start or core in (None, plain[start[0] : end[0]])):
            spans[key] = (start[0] if start else None, end[0])
    return spans


def edited(text: str, edits: Sequence[Edit]) -> str:
    """The text with all edits made."""
    pieces, done = [], 0
    for start, end, words in edits:
        pieces += [text[done:start], words]
        done = end
    return "".join([*pieces, text[done:]])


def moved(position: int, edits: Sequence[Edit]) -> int:
    """Where a position lies after the edits that end at it or before."""
    return position + sum(len(words) - (end - start) for start, end, words in edits if end <= position)
