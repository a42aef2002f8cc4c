"""What will be trained, checked and shown before the first step (from the shell: `python -m vlm_sft audit`): `audit`
compares what the collator makes with the conversation and the prompts of inference, `check_...` with the model."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from transformers import BatchFeature
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from vlm_sft.chat.boxes import boxes_in, draw_boxes
from vlm_sft.chat.collator import IGNORE_INDEX, NOTHING_TRAINED, ChatCollator, EncodedRow
from vlm_sft.chat.messages import count_images, text_of
from vlm_sft.chat.packing import kind_of
from vlm_sft.chat.template import RenderedDifferently, without_tools
from vlm_sft.common import base_of, core_count, eos_ids, evaluating, in_processes

PICTURE_PX = 400  # of the longer side of an image on the page
_BATCH_SIZE = 8  # of the calls of the processor
_WORTH_S = 2.0  # what the rest has to take for other processes to be started


@dataclass(frozen=True)
class AuditReport:
    """What the collator made of the audited rows (`ChatCollator.encode`); `str()` is a table. `tokens` counts by kind:
    trained, prompt, image; `answers` by how they end; `prompts` by how they compare. `shortest_of_kinds` are the rows
    that still hold their images, one for each kind there is (`kind_of`); of all, `pictures` are small, with words."""

    collator: ChatCollator
    rows: Sequence[EncodedRow]
    tokens: Mapping[str, int]
    answers: Mapping[str, int]
    prompts: Mapping[str, int]
    shortest_of_kinds: Sequence[EncodedRow]
    pictures: Sequence[Sequence[tuple[Image, str]]]

    @property
    def shortest(self) -> EncodedRow:
        """The shortest row, with an image where any row has one: for `check_forward` and `draw_mask`."""
        kinds = self.shortest_of_kinds
        return min([row for row in kinds if row.image.any()] or kinds, key=len)

    def facts(self) -> dict[str, str]:
        """The lines of the table: subject and sentence."""
        lengths, longest, total = sorted(map(len, self.rows)), max(self.rows, key=len), sum(self.tokens.values())
        return {
            "rows": f"{len(self.rows)} audited",
            "tokens": ", ".join(f"{kind} {count:,} ({count / total:.1%})" for kind, count in self.tokens.items()),
            "lengths": f"{lengths[0]:,} to {lengths[-1]:,} ({longest.name}), median {lengths[len(lengths) // 2]:,}",
            "answers": ", ".join(f"{count:,} {how}" for how, count in self.answers.items()),
            "prompts": ", ".join(f"{count:,} {how}" for how, count in self.prompts.items()),
        }

    def __str__(self) -> str:
        decode = self.collator.processor.tokenizer.decode
        texts = {row.name: repr(decode(row.labels[row.labels != IGNORE_INDEX]))[:100] for row in self.rows[:3]}
        return "\n".join(f"{subject:<8} {sentence}" for subject, sentence in (self.facts() | texts).items())


def audit(collator: ChatCollator, rows: Any, num_rows: int = 64, require_stop_token: bool = True) -> AuditReport:
    """The report on `num_rows` rows, evenly spread over `rows` (the first ones of a stream).

    Proved for each row: something is trained, and nothing but answers; each reads as in its message and ends with its
    stop token (or is cut by `max_length`); the tokens before the first and the last trained answer, BOS and images
    included, are those of `processor.apply_chat_template` on the messages before it (before the last, the text
    suffices: generation may have cut its tokens elsewhere). Where the processor itself writes a longer conversation
    differently, or without stop tokens (LLaVA-1.5), they cannot be: such prompts are counted, and only BOS compared.

    `require_stop_token=False`: answers are trained without one, as captions are; one that has it is then a fault.
    Raises `ValueError` naming the rows."""
    if num_rows < 1:
        raise ValueError(f"num_rows={num_rows} (--num_rows): expected at least 1 row to audit; left out, it is 64")
    rows = rows if hasattr(rows, "__len__") else [*islice(rows, num_rows)]
    count = min(num_rows, len(rows))
    if not count:
        raise ValueError("there are no rows to audit; expected at least one")
    places, look = [n * len(rows) // count for n in range(count)], partial(_look, collator, rows, require_stop_token)
    first, *others = [places[n : n + _BATCH_SIZE] for n in range(0, count, _BATCH_SIZE)]
    start = time.monotonic()
    looks = [look(first)]
    takes_long = (time.monotonic() - start) * len(others) > _WORTH_S
    may_fork = multiprocessing.get_start_method() == "fork" and not multiprocessing.current_process().daemon
    if (num_proc := min(core_count(), len(others))) > 1 and takes_long and may_fork:
        found = in_processes(partial(_look_or_none, look), places[_BATCH_SIZE:], _BATCH_SIZE, num_proc)
        looks += (each or look(batch) for each, batch in zip(found, others, strict=True))
    else:
        looks += map(look, others)
    if faults := [fault for each in looks for fault in each.faults]:
        raise ValueError("\n".join([f"faults in what would be trained: {len(faults)}", *faults[:10]]))
    counts = Counter(kind for each in looks for row in each.rows for kind in kinds_of(row))
    return AuditReport(
        collator,
        rows=[row for each in looks for row in each.rows],
        tokens={kind: counts[kind] for kind in ("trained", "prompt", "image")},
        answers=sum((each.answers for each in looks), Counter[str]()),
        prompts=sum((each.prompts for each in looks), Counter[str]()),
        shortest_of_kinds=_shortest_of_kinds([row for each in looks for row in each.shortest_of_kinds]),
        pictures=[pictures for each in looks for pictures in each.pictures],
    )


class _Look(NamedTuple):
    """What is found of some rows, as in `AuditReport`, and what is wrong with them."""

    rows: list[EncodedRow]
    shortest_of_kinds: list[EncodedRow]
    pictures: list[list[tuple[Image, str]]]
    answers: Counter[str]
    prompts: Counter[str]
    faults: list[str]


def _look(collator: ChatCollator, rows: Any, require_stop: bool, places: Sequence[int]) -> _Look:
    examples = [{"row": place, **rows[place]} for place in places]
    try:
        found = collator.encode(examples)[0]
    except RenderedDifferently:
        found = collator.encode([part for example in examples for part in collator.split(example)])[0]
    answers, prompts = Counter[str](), Counter[str]()
    faults = [fault for row in found for fault in _check_answers(collator, row, answers, require_stop)]
    faults += [fault for row in found for fault in _check_prompts(collator, row, prompts)]
    pictures = [_pictures(row, collator.processor) for row in found]
    return _Look(found, _shortest_of_kinds(found), pictures, answers, prompts, faults)


def _look_or_none(look: Callable[[Sequence[int]], _Look], places: Sequence[int]) -> _Look | None:
    """None where it fails: then it fails again in the process that asked, which can say where."""
    try:
        return look(places)
    except Exception:
        return None


def _shortest_of_kinds(rows: Sequence[EncodedRow]) -> list[EncodedRow]:
    """The shortest row of each kind, in their order. The others no longer hold their images."""
    shortest = {kind_of(row.conversation._asdict()): row for row in sorted(rows, key=len)[::-1]}
    kept = {*map(id, shortest.values())}
    for row in rows:
        if id(row) not in kept:
            row.conversation.images.clear()  # decoded, 64 photos of 12 million pixels take 2.3 GB
    return [row for row in rows if id(row) in kept]


def check_stops(collator: ChatCollator, rows: Sequence[EncodedRow], generation_config: Any) -> None:
    """Raises `ValueError` naming a row where generation does not end at the stop token of a trained answer."""
    ends = eos_ids(generation_config.eos_token_id)
    for stop, name in {turn.stop: row.name for row in rows for turn in row.trained if turn.stop}.items():
        if (learned := collator.processor.tokenizer.convert_tokens_to_ids(stop)) not in ends:
            found = f"the model learns to stop with {stop!r} (id {learned}), but generation ends at {ends}"
            raise ValueError(f"{name}: {found}; set model.generation_config.eos_token_id = {[*ends, learned]}")


def check_embedding(rows: Sequence[EncodedRow], model: Any) -> None:
    """Raises `ValueError` naming a row with a token beyond the embedding, or an image in another token than its own."""
    size = model.get_input_embeddings().num_embeddings
    largest, name = max((int(row.tokens["input_ids"].max()), row.name) for row in rows)
    how = "use the model's own processor"
    if largest >= size:
        raise ValueError(f"{name}: token {largest} is beyond the {size} tokens of the embedding; {how}")
    config = base_of(model).config
    own = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    for row in rows:
        if row.image.any() and own is not None and own not in row.tokens["input_ids"][row.image]:
            raise ValueError(f"{row.name}: no token of its image is {own}, the model's image token; {how}")


def check_forward(collator: ChatCollator, row: EncodedRow, model: Any) -> str:
    """One forward on the row, said in a sentence, in the precision that the Trainer has prepared the model for. Raises
    `ValueError` naming the row where the model refuses it (image tokens without features), or its loss is no number."""
    if is_deepspeed_zero3_enabled():  # type: ignore[no-untyped-call]
        return "not run: the model is sharded (DeepSpeed ZeRO-3)"
    inputs = BatchFeature(collator([row.conversation._asdict()])).to(model.device)
    try:
        with evaluating(model), torch.no_grad():
            loss = float(model(**inputs, use_cache=False).loss)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{row.name}: the model refuses it: {error}") from error
    if not math.isfinite(loss):
        raise ValueError(f"{row.name}: the loss is {loss}; look whether all weights were loaded, and at their dtype")
    return f"loss {loss:.3f} on {row.name}, its {int(row.image.sum())} image tokens match the features"


def draw_mask(row: EncodedRow, tokenizer: Any, width: int = 400, colour: bool | None = None) -> str:
    """The row's text with what is trained in green, or in [brackets] without `colour` (None: if stderr is a terminal),
    an image as one, pieces of more than `width` characters shortened. After nanochat's `visualize_tokenization`."""
    looks = {"prompt": "\033[2m{}\033[0m", "trained": "\033[32m{}\033[0m", "image": "\033[34m{}\033[0m"}
    if not (sys.stderr.isatty() if colour is None else colour):
        looks = {"prompt": "{}", "trained": "[{}]", "image": "{}"}
    added = tokenizer.decode(row.tokens["input_ids"][row.offsets[:, 1] == 0])  # BOS, where the tokenizer adds it
    drawn, start = looks["prompt"].format(added) if added else "", 0
    for kind, group in groupby(zip(kinds_of(row), row.offsets[:, 1].tolist(), strict=True), key=itemgetter(0)):
        ends = [end for _, end in group]
        # Characters that a terminal would obey are written out.
        text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in row.text[start : max(ends)])
        text = text if len(text) <= width else f"{text[: width // 2]} ... {text[-width // 2 :]}"
        drawn += looks[kind].format(f"<image x {len(ends)}>" if kind == "image" else text)
        start = max(start, *ends)
    return drawn


def kinds_of(row: EncodedRow) -> list[str]:
    """What each token is: "trained", "image" or "prompt"."""
    numbers = (2 * row.image + ((row.labels != IGNORE_INDEX) & ~row.image)).tolist()
    return [("prompt", "trained", "image")[number] for number in numbers]


def _pictures(row: EncodedRow, processor: Any) -> list[tuple[Image, str]]:
    """The row's images, each with words for it; those that an answer writes boxes of, on the last one before it, as the
    model sees them with the boxes."""
    messages, images = row.conversation
    # Shown 184 pixels wide. A whole number of times smaller takes a sixth of the time, and a first step waits for it.
    seen = [(image.reduce(math.ceil(max(image.size) / PICTURE_PX)), "") for image in images]
    for number, message in enumerate(messages):
        last = count_images(messages[:number]) - 1
        if message["role"] == "assistant" and last >= 0 and (boxes := boxes_in(text_of(message))):
            drawn, scale = draw_boxes(images[last], boxes, processor)
            seen[last] = drawn, f"{len(boxes)} boxes, read as {scale}"
    return seen


def _check_answers(collator: ChatCollator, row: EncodedRow, answers: Counter[str], require_stop: bool) -> Iterator[str]:
    tokenizer, settings, trained = collator.processor.tokenizer, collator.settings, row.labels != IGNORE_INDEX
    if not trained.any():
        yield f"{row.name}: {NOTHING_TRAINED}"
    stray = trained & (row.image if settings.train_on == "all" else row.image | ~row.tokens_of(*row.trained))
    if stray.any():
        text = tokenizer.decode(row.labels[stray])[:80]
        yield f"{row.name}: {int(stray.sum())} tokens of no answer are trained, {text!r}; fix the collator"
    for turn in row.trained:
        if len(row) == settings.max_length and row.offsets.max() < turn.end:
            answers["cut by max_length"] += 1
            continue
        ids, where = row.labels[trained & row.tokens_of(turn)], f"{row.name}: messages[{turn.message}]"
        stop = turn.stop if turn.stop and ids[-1:].tolist() == tokenizer.convert_tokens_to_ids([turn.stop]) else ""
        answers[f"end with {stop!r}" if stop else "end without a stop token"] += 1
        if require_stop and not stop:
            yield f"{where} is trained without a stop token; use stop_token='auto', or require_stop_token=False"
        if stop and not require_stop:
            found = f"{where} is trained with the stop token {stop!r}, in spite of require_stop_token=False"
            yield f"{found}; pass stop_token=None to ChatCollator, or leave require_stop_token out"
        message = row.conversation.messages[turn.message]
        words, learned = text_of(message), tokenizer.decode(ids)
        end = stop if message.get("tool_calls") else words + stop  # the calls stand between
        # The prompt may hold the start of the answer already, as <think>.
        tries = _squeezed(learned), _squeezed(row.text[: turn.start]) + _squeezed(learned)
        if not any(text.endswith(_squeezed(end)) and _squeezed(words) in text for text in tries):
            yield f"{where} reads {words[-60:]!r}, but {learned[-60:]!r} is trained; fix the text or the chat template"


def _check_prompts(collator: ChatCollator, row: EncodedRow, prompts: Counter[str]) -> Iterator[str]:
    tokenizer, turns = collator.processor.tokenizer, [turn for turn in row.trained if row.tokens_of(turn).any()]
    for turn in dict.fromkeys([*turns[:1], *turns[-1:]]):
        first = int(row.tokens_of(turn).int().argmax())
        here, there = row.tokens["input_ids"][:first].tolist(), _template_ids(collator, row, turn.message)
        bos = [ids.count(tokenizer.bos_token_id) for ids in (here, there)]
        # An answer trained before this one was cut from its prompt's tokens, as generation does: the text must agree.
        if here == there or (turn != turns[0] and tokenizer.decode(here) == tokenizer.decode(there)):
            prompts["equal those of inference"] += 1
        elif bos[0] == bos[1] and _is_rewritten(collator, row, turn.message, there):
            prompts["cannot, as the processor itself writes a longer conversation differently"] += 1
        else:
            place = len(os.path.commonprefix([here, there]))  # noqa: RUF071 (it takes lists as well)
            first_text, other = (repr(tokenizer.decode(ids[place:])[:60]) for ids in (here, there))
            counts = f"{len(here)} tokens ({bos[0]} BOS), but {len(there)} ({bos[1]} BOS) at inference"
            found = f"the prompt of messages[{turn.message}] has {counts}; from token {place} on they read {first_text}"
            yield f"{row.name}: {found} and {other}: fix the chat template"


def _is_rewritten(collator: ChatCollator, row: EncodedRow, end: int, prompt: list[int]) -> bool:
    """Whether the processor itself leaves out stop tokens of earlier answers, or writes this prompt differently once
    the conversation continues. Never true of a first prompt that no image follows."""
    earlier = [turn.stop for turn in row.turns if turn.message < end]
    if not earlier and not count_images(row.conversation.messages[end:]):
        return False
    stops = collator.processor.tokenizer.convert_tokens_to_ids([stop for stop in earlier if stop])
    is_left_out = any(prompt.count(stop) < len(stops) for stop in stops)
    return is_left_out or _template_ids(collator, row, None)[: len(prompt)] != prompt


def _template_ids(collator: ChatCollator, row: EncodedRow, end: int | None) -> list[int]:
    """Ids of the prompt, the messages before `end`, as a user has them made at inference; None: of all messages."""
    left = iter(row.conversation.images)
    filled = [
        {**message, "content": [{**p, "image": next(left)} if p["type"] == "image" else p for p in message["content"]]}
        for message in row.conversation.messages[:end]
    ]
    given, tools = without_tools(row.rendered.style(filled))
    settings = {"add_generation_prompt": end is not None, **(collator.settings.chat_template_kwargs or {})}
    settings |= {**tools, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    output = collator.processor.apply_chat_template(given, **settings)
    return [int(i) for i in output["input_ids"][0]]


def _squeezed(text: str) -> str:
    """The text as it compares: composed, and without white space, which templates trim and tokenizers move."""
    return "".join(unicodedata.normalize("NFC", text).split())
