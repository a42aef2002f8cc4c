"""What will be trained, checked and shown before the first step.

`audit` runs the collator on real rows and raises where what it makes does not fit the conversation, the prompts of
inference, or the model. From the shell: `python -m vlm_sft.chat.audit --model M --dataset D --html page.html`.
"""

from __future__ import annotations

import argparse
import base64
import math
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from io import BytesIO
from itertools import islice
from pathlib import Path
from string import Template
from typing import Any

import torch
from accelerate import PartialState
from PIL.Image import Image
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from vlm_sft import distributed as ranks
from vlm_sft.chat import labels, messages
from vlm_sft.chat.labels import IGNORE_INDEX
from vlm_sft.chat.template import Turn


@dataclass(frozen=True)
class AuditReport:
    """What the collator made of the audited rows (`ChatCollator.encode`); `str()` is a compact table.

    `tokens` counts by kind: trained, prompt, image, and pad as batches of these rows would have it. `answers` counts
    the trained ones by how they end, `prompts` the compared ones by how they compare. `model` is empty without one.
    """

    collator: Any
    rows: Sequence[Any]
    dropped: int
    tokens: Mapping[str, int]
    answers: Mapping[str, int]
    prompts: Mapping[str, int]
    model: Mapping[str, str]

    def facts(self) -> dict[str, str]:
        """The lines of the table: subject and sentence."""
        lengths, longest, total = sorted(map(len, self.rows)), max(self.rows, key=len), sum(self.tokens.values())
        return {
            "rows": f"{len(self.rows)} audited, {self.dropped} dropped for their length",
            "tokens": ", ".join(f"{kind} {count:,} ({count / total:.1%})" for kind, count in self.tokens.items()),
            "lengths": f"{lengths[0]:,} to {lengths[-1]:,} ({longest.name}), median {lengths[len(lengths) // 2]:,}",
            "answers": ", ".join(f"{count:,} {how}" for how, count in self.answers.items()),
            "prompts": ", ".join(f"{count:,} {how}" for how, count in self.prompts.items()),
            **self.model,
        }

    def __str__(self) -> str:
        decode = self.collator.processor.tokenizer.decode
        texts = {row.name: repr(decode(row.labels[row.labels != IGNORE_INDEX]))[:100] for row in self.rows[:3]}
        return "\n".join(f"{subject:<8} {sentence}" for subject, sentence in (self.facts() | texts).items())

    def to_html(self, path: str | Path) -> None:
        """Writes one page that needs nothing else: the pictures, and each token with its id, trained ones coloured."""
        kinds = {kind: count for kind, count in self.tokens.items() if count}
        page = Template(files("vlm_sft.evaluation").joinpath("audit.html").read_text("utf-8")).substitute(
            bar="".join(f'<i class="{kind}" style="flex-grow: {count}"></i>' for kind, count in kinds.items()),
            legend="".join(f'<li><i class="{kind}"></i>{kind} <b>{count:,}</b></li>' for kind, count in kinds.items()),
            facts="".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in self.facts().items() if k != "tokens"),
            rows="".join(_row_html(row, self.collator.processor.tokenizer) for row in self.rows),
        )
        if PartialState().is_main_process:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(page, encoding="utf-8")


def audit(
    collator: Any,
    dataset: Any,
    model: Any = None,
    num_rows: int = 64,
    *,
    batch_size: int = 8,
    require_stop_token: bool = True,
) -> AuditReport:
    """The report on `num_rows` rows, evenly spread over the dataset (the first ones of a stream), which is printed.

    Proved for each row: something is trained, and nothing but answers; each answer reads as in its message and ends
    with its stop token (or is cut by `max_length`); the tokens before the first and before the last trained answer,
    BOS and images included, are those of `processor.apply_chat_template(..., add_generation_prompt=True,
    tokenize=True)` on the messages before it (the last one's text suffices: generation may have cut its tokens
    elsewhere). They cannot be where the processor itself writes a prompt otherwise once the conversation goes on, or
    without stop tokens (LLaVA-1.5): such prompts are counted, and only BOS compared.

    With a model: generation ends at the trained stop tokens, no id lies beyond the embedding, and the shortest row with
    an image has a finite loss; the forward itself refuses another number of image tokens than of image features.

    `batch_size` serves to count padding; `require_stop_token=False` accepts answers without a stop token. Raises
    `ValueError` naming the rows.
    """
    examples = [{**row, "row": row.get("row", place)} for place, row in _sample(dataset, num_rows)]
    if not examples:
        raise ValueError("there are no rows to audit; expected at least one")
    batches = [collator.encode(examples[n : n + batch_size])[0] for n in range(0, len(examples), batch_size)]
    rows = [row for batch in batches for row in batch]
    answers, prompts, said = Counter[str](), Counter[str](), dict[str, str]()
    faults = [fault for row in rows for fault in _check_answers(collator, row, answers, require_stop_token)]
    faults += [fault for row in rows for fault in _check_prompts(collator, row, prompts)]
    if model is not None and not faults:
        faults += _check_model(collator, rows, model, said)
    if faults:
        raise ValueError("\n".join([f"faults in what would be trained: {len(faults)}", *faults[:10]]))
    tokens = _count_tokens(batches, collator.pad_to_multiple_of or 1)
    report = AuditReport(collator, rows, len(examples) - len(rows), tokens, answers, prompts, said)
    ranks.print_main(str(report))
    return report


def _sample(dataset: Any, num_rows: int) -> Iterator[tuple[int, Any]]:
    if not hasattr(dataset, "__len__"):
        return enumerate(islice(dataset, num_rows))
    count = min(num_rows, len(dataset))
    return ((place, dataset[place]) for place in (i * len(dataset) // count for i in range(count)))


def _count_tokens(batches: Sequence[Sequence[Any]], multiple: int) -> dict[str, int]:
    rows = [row for batch in batches for row in batch]
    trained = sum(int((row.labels != IGNORE_INDEX).sum()) for row in rows)
    image, real = sum(int(row.image.sum()) for row in rows), sum(map(len, rows))
    padded = sum(len(batch) * -(-max(map(len, batch)) // multiple) * multiple for batch in batches)
    return {"trained": trained, "prompt": real - trained - image, "image": image, "pad": padded - real}


def _check_answers(collator: Any, row: Any, answers: Counter[str], require_stop_token: bool) -> Iterator[str]:
    tokenizer, trained = collator.processor.tokenizer, row.labels != IGNORE_INDEX
    if not trained.any():
        yield f"{row.name}: no token is left to train on; give it an answer not marked 'train': false, or drop the row"
    stray = trained & (row.image if collator.train_on == "all" else row.image | ~_tokens_of(row, *row.trained))
    if stray.any():
        text = tokenizer.decode(row.labels[stray])[:80]
        yield f"{row.name}: {int(stray.sum())} tokens of no answer are trained, {text!r}; mend the collator"
    for turn in row.trained:
        if len(row) == collator.max_length and row.offsets.max() < turn.end:
            answers["cut by max_length"] += 1
            continue
        ids, where = row.labels[trained & _tokens_of(row, turn)], f"{row.name}: messages[{turn.message}]"
        stop = turn.stop if turn.stop and ids[-1:].tolist() == tokenizer.convert_tokens_to_ids([turn.stop]) else ""
        answers[f"end with {stop!r}" if stop else "end without a stop token"] += 1
        if require_stop_token and not stop:
            yield f"{where} is trained without a stop token, so the model would not learn to end; use stop_token='auto'"
        words, learned = messages.text_of(row.source.conversation.messages[turn.message]), tokenizer.decode(ids)
        if not _squeezed(learned).endswith(_squeezed(words + stop)):
            yield f"{where} reads {words[-60:]!r}, but {learned[-60:]!r} is trained; mend the text or the chat template"


def _check_prompts(collator: Any, row: Any, prompts: Counter[str]) -> Iterator[str]:
    tokenizer, turns = collator.processor.tokenizer, [turn for turn in row.trained if _tokens_of(row, turn).any()]
    for turn in dict.fromkeys([*turns[:1], *turns[-1:]]):
        first = int(_tokens_of(row, turn).int().argmax())
        here, there = row.tokens["input_ids"][:first].tolist(), _template_ids(collator, row, turn.message)
        bos = [ids.count(tokenizer.bos_token_id) for ids in (here, there)]
        # An answer trained before this one was cut from its prompt's tokens, as generation does: the text must agree.
        if here == there or (turn != turns[0] and tokenizer.decode(here) == tokenizer.decode(there)):
            prompts["equal those of inference"] += 1
        elif bos[0] == bos[1] and _is_rewritten(collator, row, turn.message, there):
            prompts["cannot, as the processor itself writes a longer conversation otherwise"] += 1
        else:
            place = next(
                (n for n, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there))
            )
            texts = [tokenizer.decode(ids[place:])[:60] for ids in (here, there)]
            yield (
                f"{row.name}: the prompt of messages[{turn.message}] has {len(here)} tokens ({bos[0]} BOS), but "
                f"{len(there)} ({bos[1]} BOS) at inference; from token {place} on they read {texts[0]!r} and "
                f"{texts[1]!r}: mend the chat template"
            )


def _is_rewritten(collator: Any, row: Any, end: int, prompt: list[int]) -> bool:
    """Whether the processor itself leaves out stop tokens of earlier answers, or writes this prompt otherwise once the
    conversation goes on. Never true of a first prompt behind which no image follows."""
    talk, images = row.source.conversation
    earlier = [turn for turn in row.turns if turn.message < end]
    if not earlier and messages.count_images(talk[:end]) == len(images):
        return False
    stops = collator.processor.tokenizer.convert_tokens_to_ids([turn.stop for turn in earlier if turn.stop])
    whole = _template_ids(collator, row, len(talk), add_generation_prompt=False)
    return any(prompt.count(stop) < len(stops) for stop in stops) or whole[: len(prompt)] != prompt


def _template_ids(collator: Any, row: Any, end: int, *, add_generation_prompt: bool = True) -> list[int]:
    """Ids of the messages before `end`, as a user has them made at inference."""
    talk, images = row.source.conversation
    left = iter(images)
    filled = [
        {**message, "content": [{**p, "image": next(left)} if p["type"] == "image" else p for p in message["content"]]}
        for message in talk[:end]
    ]
    settings = {"add_generation_prompt": add_generation_prompt, **(collator.chat_template_kwargs or {})}
    try:
        output = collator.processor.apply_chat_template(filled, tokenize=True, return_dict=True, **settings)
    except Exception:  # templates that want the system message as a string say so in many ways
        filled = [{**m, "content": messages.text_of(m)} if m["role"] == "system" else m for m in filled]
        output = collator.processor.apply_chat_template(filled, tokenize=True, return_dict=True, **settings)
    return [int(i) for i in output["input_ids"][0]]


def _check_model(collator: Any, rows: Sequence[Any], model: Any, said: dict[str, str]) -> Iterator[str]:
    tokenizer, size = collator.processor.tokenizer, model.get_input_embeddings().num_embeddings
    ends = model.generation_config.eos_token_id
    largest, name = max((int(row.tokens["input_ids"].max()), row.name) for row in rows)
    if largest >= size:
        yield f"{name}: token {largest} is beyond the {size} tokens of the embedding; use the model's own processor"
        return
    for stop, name in {turn.stop: row.name for row in rows for turn in row.trained if turn.stop}.items():
        if (stop_id := tokenizer.convert_tokens_to_ids(stop)) not in (ends if isinstance(ends, list) else [ends]):
            yield f"{name} ends with {stop!r}, generation at {ends}; add {stop_id} to generation_config.eos_token_id"
    row = min([row for row in rows if row.image.any()] or rows, key=len)
    talk, images = row.source.conversation
    batch = collator([{"messages": talk, "images": images, "row": row.source.number}])
    if is_deepspeed_zero3_enabled():  # type: ignore[no-untyped-call]
        said["model"] = "not run: it is held in shares (DeepSpeed ZeRO-3)"
        return
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "rows"}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
            loss = float(model(**inputs, use_cache=False).loss)
    except (ValueError, RuntimeError) as error:
        yield f"{row.name}: the model refuses it: {error}"
        return
    finally:
        for module, training in modes:
            module.training = training
    if not math.isfinite(loss):
        yield f"{row.name}: the loss is {loss}; look whether all weights were loaded, and at their dtype"
    count = int((inputs["input_ids"] == model.config.image_token_id).sum())
    said["model"] = f"loss {loss:.3f} on {row.name}, its {count} image tokens match the features, stops at {ends}"


def _tokens_of(row: Any, *turns: Turn) -> Tensor:
    return labels.tokens_in(row.offsets, [(turn.start, turn.end) for turn in turns])


def _squeezed(text: str) -> str:
    """The text as it compares: composed, and without white space, which templates trim and tokenizers move."""
    return "".join(unicodedata.normalize("NFC", text).split())


def _row_html(row: Any, tokenizer: Any) -> str:
    """Its pictures, and its tokens in one block for each answer and each prompt."""
    kinds = torch.where(row.image, 2, (row.labels != IGNORE_INDEX).long())
    turns = sum((n * _tokens_of(row, turn) for n, turn in enumerate(row.turns, 1)), torch.zeros_like(kinds))
    start, end = row.offsets.unbind(-1)
    # Shown as one: the tokens of an image, and the tokens of one character.
    one = row.image[1:] | ((start[1:] < end[:-1]) & (start[1:] < end[1:]))
    cuts = 1 + (~one | (kinds[1:] != kinds[:-1]) | (turns[1:] != turns[:-1])).nonzero().flatten()
    html, shown, block = "", 0, -1
    for piece in torch.arange(len(row)).tensor_split(cuts):
        first, last = int(piece[0]), int(piece[-1])
        if block != (block := int(turns[first])):
            html += f'<p class="{"answer" if block else "question"}">'
        counts = Counter(row.tokens["input_ids"][piece].tolist())
        [(most, count)] = counts.most_common(1)
        name, kind = tokenizer.convert_ids_to_tokens(most), ("prompt", "trained", "image")[int(kinds[first])]
        text = f"{name} x {count}" if kind == "image" else row.text[start[first] : end[last]] or name
        ids = ", ".join(f"{i}" if n == 1 else f"{n} x {i}" for i, n in counts.items())
        hint = f"id {ids} · position {first}" + f" to {last}" * (last > first)
        look = kind + " special" * (most in tokenizer.added_tokens_decoder)
        html += escape(row.text[shown : start[first]])
        html += f'<span class="{look}" data-hint="{hint}">{escape(text).replace(chr(10), "↵" + chr(10))}</span>'
        shown = max(shown, int(end[last]))
    pictures = "".join(f'<img alt="" src="{_data_uri(image)}">' for image in row.source.conversation.images)
    sizes = f"<small>{len(row):,} tokens, {int((kinds == 1).sum()):,} trained</small>"
    return f"<section><h2>{escape(row.name)}{sizes}</h2><figure>{pictures}</figure><div>{html}</div></section>\n"


def _data_uri(picture: Image) -> str:
    small, file = picture.copy(), BytesIO()
    small.thumbnail((400, 400))
    small.save(file, "PNG" if max(small.size) < 100 else "JPEG")
    return f"data:image;base64,{base64.b64encode(file.getvalue()).decode()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Audits rows of a dataset as a model's processor has them; 1 where they would be trained wrongly."""
    from vlm_sft import ChatCollator, load_conversations, load_processor

    parser = argparse.ArgumentParser(prog="python -m vlm_sft.chat.audit", description="Shows what would be trained.")
    parser.add_argument("--model", required=True, help="Hub id or folder; only its processor is loaded")
    parser.add_argument("--dataset", required=True, help="Hub id, file or folder")
    parser.add_argument("--columns", nargs="*", metavar="FIELD=COLUMN", help="as in prompt=question")
    parser.add_argument("--image_folder", help="what file names in rows are relative to")
    parser.add_argument("--train_on", default="assistant", choices=["assistant", "last_assistant", "all"])
    parser.add_argument("--num_rows", type=int, default=64, help="how many rows, evenly spread")
    parser.add_argument("--html", metavar="FILE", help="write a page with each row's pictures and tokens")
    options = parser.parse_args(arguments)
    try:
        where = {"columns": options.columns, "image_folder": options.image_folder}
        rows = load_conversations(options.dataset, eval_fraction=0, **where)["train"]
        collator = ChatCollator(load_processor(options.model), train_on=options.train_on)
        report = audit(collator, rows, num_rows=options.num_rows)
    except ValueError as error:
        print(error)
        return 1
    if options.html:
        report.to_html(options.html)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
