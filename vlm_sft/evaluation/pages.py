"""Two pages that open from disk and need nothing else: answers next to their references, and what is trained.

Every process may call the writers; the main one writes."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from jinja2 import Environment
from PIL import Image

from vlm_sft.chat.audit import PICTURE_PX, AuditReport, kinds_of
from vlm_sft.chat.collator import EncodedRow
from vlm_sft.chat.images import to_rgb
from vlm_sft.chat.messages import text_of
from vlm_sft.chat.template import ChatTemplate
from vlm_sft.evaluation.generate import split_reference
from vlm_sft.evaluation.metrics import Metric, Reference, row_score


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row of the page. Scores run from 0 to 1; a score of 1 counts as right, any other as wrong."""

    images: Sequence[Any]
    question: str
    reference: str
    after: str
    score: float
    before: str | None = None
    score_before: float | None = None


def make_samples(
    rows: Any,
    references: Sequence[Reference],
    metric: Metric,
    after: Sequence[str],
    before: Sequence[str] | None = None,
) -> list[Sample]:
    """The rows' answers and, where there are, those before training, each scored by the metric (`row_score`)."""
    samples = []
    for n, reference in enumerate(references):
        messages, images, _ = split_reference(rows[n])
        text = reference if isinstance(reference, str) else " | ".join(reference)
        shown: dict[str, Any] = {"images": images, "question": text_of(messages[-1]), "reference": text}
        shown |= {"after": after[n], "score": row_score(metric, after[n], reference)}
        if before:
            shown |= {"before": before[n], "score_before": row_score(metric, before[n], reference)}
        samples.append(Sample(**shown))
    return samples


def write_samples_html(
    samples: Sequence[Sample], path: str | Path, *, title: str = "Samples", subtitle: str = ""
) -> None:
    """Writes the samples as one page: sortable columns, filters for right, wrong and changed rows.

    Images lie inside the file; no script runs but the page's own. Raises `ValueError` for no samples, and for samples
    of which only some have the answer before training."""
    compared = {sample.before is not None and sample.score_before is not None for sample in samples}
    if len(compared) != 1:
        found = "some have it" if samples else "no samples"
        raise ValueError(f"expected samples that all have `before` and `score_before`, or none of them; found: {found}")
    _write("samples.html", path, samples=samples, before=compared.pop(), image_px=480, title=title, subtitle=subtitle)


def write_audit_html(report: AuditReport, path: str | Path) -> None:
    """Writes what `audit` found as one page: the images, and each token with its id, trained ones coloured."""
    _write("audit.html", path, report=report, pieces=_pieces, image_px=PICTURE_PX)


def small_image(image: Any, image_px: int) -> Image.Image:
    """The image at most `image_px` on its longer side."""
    rgb = to_rgb(image).copy()
    rgb.thumbnail((image_px, image_px), Image.Resampling.BILINEAR)  # half the time of Lanczos
    return rgb


def _thumbnail(image: Any, image_px: int) -> tuple[str, bool]:
    """The image as an address that holds it, and whether it is tiny: then it is exact, else a small JPEG (WebP is no
    smaller here, and takes ten times as long: a first step waits for 64 of them)."""
    small, data = small_image(image, image_px), BytesIO()
    is_tiny = max(small.size) <= 64
    kind = "png" if is_tiny else "jpeg"
    small.save(data, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}", is_tiny


def _pieces_of(text: str, before: str | None) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether it is new against `before`, word by word."""
    old, new = (re.findall(r"\s*\S+|\s+", each) for each in (text if before is None else before, text))
    for kind, _, _, start, end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        yield "".join(new[start:end]), kind != "equal"


def _write(name: str, path: str | Path, **values: Any) -> None:
    if not PartialState().is_main_process:
        return
    source = Path(__file__).with_name(name).read_text("utf-8")
    for element in ("style", "script"):  # the page's policy allows exactly the text between these tags
        inside = source.partition(f"<{element}>")[2].partition(f"</{element}>")[0]
        values[f"{element}_hash"] = "sha256-" + base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    page = Environment(autoescape=True).from_string(source).render(thumbnail=_thumbnail, pieces_of=_pieces_of, **values)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, encoding="utf-8")


def _pieces(row: EncodedRow, template: ChatTemplate) -> Iterator[dict[str, Any]]:
    """What is shown as one: a token, all tokens of an image, or those of one character; `turn` is the number of the
    answer that it belongs to, or 0."""
    numbers = torch.zeros(len(row), dtype=torch.long)
    for number, turn in enumerate(row.turns, 1):
        numbers[row.tokens_of(turn)] = number
    kinds = [*zip(kinds_of(row), numbers.tolist(), strict=True)]
    start, end = row.offsets.T.tolist()
    read = row.tokens["input_ids"].tolist()
    firsts, shown = [0], 0
    for token in range(1, len(row)):
        same_character = start[token] < min(end[token - 1], end[token])
        if kinds[token] != kinds[token - 1] or not (kinds[token][0] == "image" or same_character):
            firsts.append(token)
    for first, last in zip(firsts, [*firsts[1:], len(row)], strict=True):
        kind, number = kinds[first]
        counts = Counter(read[first:last])
        [(most, count)] = counts.most_common(1)
        name = template.processor.tokenizer.convert_ids_to_tokens(most)
        ids = ", ".join(f"{i}" if n == 1 else f"{n} x {i}" for i, n in counts.items())
        text = f"{name} x {count}" if kind == "image" else row.text[start[first] : end[last - 1]] or name
        yield {
            "turn": number,
            "before": row.text[shown : start[first]],
            "look": kind + " special" * (most in template.added_tokens),
            "hint": f"id {ids} · position {first}" + f" to {last - 1}" * (last - first > 1),
            "text": text.replace("\n", "↵\n"),
        }
        shown = max(shown, end[last - 1])
