"""Answers as a page: picture, question, reference, what the model said before and says now. Opens from disk.

Every process may call it; the main one writes.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image

from vlm_sft.chat.images import to_rgb


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


def write_samples_html(
    samples: Sequence[Sample], path: str | Path, *, title: str = "Samples", subtitle: str = "", picture_px: int = 480
) -> None:
    """Writes the samples as one page that opens from disk: sortable columns, filters for right, wrong and changed rows.

    Pictures lie inside the file, at most `picture_px` on their longer side. Every text is escaped, and the page's
    policy lets no script run but its own.

    Raises `ValueError` for no samples, and for samples of which only some tell what was said before.
    """
    if not PartialState().is_main_process:
        return
    compared = {sample.before is not None and sample.score_before is not None for sample in samples}
    if len(compared) != 1:
        found = "some have it" if samples else "no samples"
        raise ValueError(f"expected samples that all have `before` and `score_before`, or none of them; found: {found}")
    before = compared.pop()
    kinds = [_kinds(sample) for sample in samples]
    counts = {kind: sum(kind in of for of in kinds) for kind in ("all", "right", "wrong", "fixed", "broken")}
    columns = ["#", "Picture", "Question", "Reference", *(["Before"] if before else []), "After", "Score"]
    template = importlib.resources.files("vlm_sft.evaluation").joinpath("samples.html").read_text(encoding="utf-8")
    values = {
        "title": escape(title),
        "subtitle": escape(subtitle),
        "figures": _figures(samples, before),
        "filters": _filters(counts, before),
        "heads": "".join(map(_head, columns)),
        "rows": "\n".join(
            _row(number, sample, of, columns, picture_px)
            for number, (sample, of) in enumerate(zip(samples, kinds, strict=True), start=1)
        ),
        "style_hash": _csp_hash(template, "style"),
        "script_hash": _csp_hash(template, "script"),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, encoding="utf-8")


def _kinds(sample: Sample) -> list[str]:
    right, was_right = sample.score == 1, sample.score_before == 1
    changed = [] if sample.score_before is None or right == was_right else ["fixed" if right else "broken"]
    return ["all", "right" if right else "wrong", *changed]


def _figures(samples: Sequence[Sample], before: bool) -> str:
    scores = {"mean score after training": [sample.score for sample in samples]}
    if before:
        scores["before"] = [sample.score_before for sample in samples if sample.score_before is not None]
    shown = [(f"{sum(values) / len(values):.1%}", name) for name, values in scores.items()]
    shown.append((str(len(samples)), "rows"))
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for value, name in shown)


def _filters(counts: Mapping[str, int], before: bool) -> str:
    names = {"all": "All", "right": "Right", "wrong": "Wrong"}
    if before:
        names |= {"fixed": "Newly right", "broken": "Newly wrong"}
    return "".join(
        f'<button type="button" data-kind="{kind}" aria-pressed="{str(kind == "all").lower()}">{name}'
        f"<span>{counts[kind]}</span></button>"
        for kind, name in names.items()
    )


def _head(column: str) -> str:
    if column == "Picture":
        return "<th><span>Picture</span></th>"
    kind = "number" if column in ("#", "Score") else "text"
    return f'<th data-kind="{kind}"><button type="button">{column}</button></th>'


def _row(number: int, sample: Sample, kinds: Sequence[str], columns: Sequence[str], picture_px: int) -> str:
    pictures = "".join(_img(image, picture_px) for image in sample.images)
    cells = {
        "#": f'<td class="number">{number}</td>',
        "Picture": f'<td class="pictures"><div>{pictures}</div></td>',
        "Question": _text("Question", escape(sample.question)),
        "Reference": _text("Reference", escape(sample.reference)),
        "Before": _text("Before", _answer(sample.before or "", sample.score_before)),
        "After": _text("After", _answer(sample.after, sample.score)),
        "Score": f'<td class="number" data-label="Score">{sample.score:.3g}</td>',
    }
    return f'<tr data-kinds="{" ".join(kinds)}">{"".join(cells[column] for column in columns)}</tr>'


def _text(label: str, content: str) -> str:
    return f'<td class="text" data-label="{label}">{content}</td>'


def _answer(answer: str, score: float | None) -> str:
    text = escape(answer) or '<span class="nothing">(nothing)</span>'
    return f'<span class="mark {"right" if score == 1 else "wrong"}">{text}</span>'


def _img(image: Any, picture_px: int) -> str:
    """The picture as a data URI: exact if it is tiny (then shown with sharp pixels), else a small WebP."""
    picture = to_rgb(image)
    tiny = max(picture.size) <= 64
    if max(picture.size) > picture_px:
        picture = picture.copy()
        picture.thumbnail((picture_px, picture_px), Image.Resampling.LANCZOS)
    data = BytesIO()
    picture.save(data, "WEBP", lossless=tiny, quality=80)
    source = base64.b64encode(data.getvalue()).decode()
    kind = ' class="small"' if tiny else ""
    return f'<img{kind} src="data:image/webp;base64,{source}" alt="" loading="lazy">'


def _csp_hash(template: str, element: str) -> str:
    """What the page's policy allows: exactly the text between the tags of this element."""
    inside = template.split(f"<{element}>")[1].split(f"</{element}>")[0]
    return "sha256-" + base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
