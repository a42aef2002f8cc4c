"""Two pages that open from disk and need nothing else: answers next to their references, and what is trained.

Every process may call the writers; the main one writes. Every text is escaped (jinja2's autoescape).
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from jinja2 import Environment, PackageLoader
from PIL import Image

from vlm_sft.chat.audit import AuditReport, kinds_of
from vlm_sft.chat.collator import EncodedRow, tokens_in
from vlm_sft.chat.images import to_rgb

SMALL_PX = 64
"""Images up to this size are kept exactly, and shown with sharp pixels."""


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

    @property
    def kinds(self) -> list[str]:
        """The filters of the page that show the row."""
        right, was_right = self.score == 1, self.score_before == 1
        changed = [] if self.score_before is None or right == was_right else ["fixed" if right else "broken"]
        return ["all", "right" if right else "wrong", *changed]


def write_samples_html(
    samples: Sequence[Sample], path: str | Path, *, title: str = "Samples", subtitle: str = "", image_px: int = 480
) -> None:
    """Writes the samples as one page: sortable columns, filters for right, wrong and changed rows.

    Images lie inside the file, at most `image_px` on their longer side. The page's policy lets no script run but its
    own.

    Raises `ValueError` for no samples, and for samples of which only some have the answer before training.
    """
    compared = {sample.before is not None and sample.score_before is not None for sample in samples}
    if len(compared) != 1:
        found = "some have it" if samples else "no samples"
        raise ValueError(f"expected samples that all have `before` and `score_before`, or none of them; found: {found}")
    scores = {"mean score after training": [sample.score for sample in samples]}
    if before := compared.pop():
        scores["before"] = [sample.score_before or 0.0 for sample in samples]
    values = {
        "title": title,
        "subtitle": subtitle,
        "before": before,
        "figures": {name: f"{sum(found) / len(found):.1%}" for name, found in scores.items()},
        "counts": Counter(kind for sample in samples for kind in sample.kinds),
    }
    _write("samples.html", path, samples=samples, image_px=image_px, **values)


def write_audit_html(report: AuditReport, path: str | Path) -> None:
    """Writes what `audit` found as one page: the images, and each token with its id, trained ones coloured."""
    rows = [(row, _blocks(row, report.collator.processor.tokenizer)) for row in report.rows]
    counts = {kind: count for kind, count in report.tokens.items() if count}
    facts = {subject: sentence for subject, sentence in report.facts().items() if subject != "tokens"}
    _write("audit.html", path, rows=rows, counts=counts, facts=facts, image_px=400)


def small_image(image: Any, image_px: int) -> Image.Image:
    """The image at most `image_px` on its longer side."""
    rgb = to_rgb(image).copy()
    rgb.thumbnail((image_px, image_px), Image.Resampling.LANCZOS)
    return rgb


def data_uri(image: Any, image_px: int) -> str:
    """The image inside an address: exact if it is tiny, else a small WebP."""
    small, data = small_image(image, image_px), BytesIO()
    small.save(data, "WEBP", lossless=max(small.size) <= SMALL_PX, quality=80)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def _write(name: str, path: str | Path, **values: Any) -> None:
    if not PartialState().is_main_process:
        return
    pages = Environment(loader=PackageLoader("vlm_sft.evaluation", "."), autoescape=True, trim_blocks=True)
    source, _, _ = pages.loader.get_source(pages, name)  # type: ignore[union-attr]
    pages.globals |= {"data_uri": data_uri, "tiny": lambda image: max(to_rgb(image).size) <= SMALL_PX}
    hashes = {f"{element}_hash": _csp_hash(source, element) for element in ("style", "script")}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(pages.get_template(name).render(**hashes, **values), encoding="utf-8")


def _csp_hash(source: str, element: str) -> str:
    """What the page's policy allows: exactly the text between the tags of this element."""
    inside = source.partition(f"<{element}>")[2].partition(f"</{element}>")[0]
    return "sha256-" + base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()


def _blocks(row: EncodedRow, tokenizer: Any) -> list[tuple[str, list[dict[str, str]]]]:
    """The row's tokens in one block for each answer and each prompt: ("answer" or "question", pieces)."""
    blocks: list[tuple[str, list[dict[str, str]]]] = []
    last = -1
    for turn, piece in _pieces(row, tokenizer):
        if turn != last:
            blocks.append(("answer" if turn else "question", []))
        blocks[-1][1].append(piece)
        last = turn
    return blocks


def _pieces(row: EncodedRow, tokenizer: Any) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of the answer or 0, what is shown as one: a token, all tokens of an image, or those of one character)."""
    kinds = kinds_of(row)
    turns = torch.zeros(len(row), dtype=torch.long)
    for number, turn in enumerate(row.turns, 1):
        turns[tokens_in(row.offsets, [(turn.start, turn.end)])] = number
    start, end = row.offsets.unbind(-1)
    joined = row.image[1:] | ((start[1:] < end[:-1]) & (start[1:] < end[1:]))
    cuts = [
        n + 1
        for n, join in enumerate(joined.tolist())
        if not join or kinds[n] != kinds[n + 1] or turns[n] != turns[n + 1]
    ]
    shown = 0
    for first, after in zip([0, *cuts], [*cuts, len(row)], strict=True):
        last, begin, stop = after - 1, int(start[first]), int(end[after - 1])
        counts = Counter(row.tokens["input_ids"][first:after].tolist())
        [(most, count)] = counts.most_common(1)
        name, kind = tokenizer.convert_ids_to_tokens(most), kinds[first]
        text = f"{name} x {count}" if kind == "image" else row.text[begin:stop] or name
        ids = ", ".join(f"{i}" if n == 1 else f"{n} x {i}" for i, n in counts.items())
        yield (
            int(turns[first]),
            {
                "before": row.text[shown:begin],
                "look": kind + " special" * (most in tokenizer.added_tokens_decoder),
                "hint": f"id {ids} · position {first}" + f" to {last}" * (last > first),
                "text": text.replace("\n", "↵\n"),
            },
        )
        shown = max(shown, stop)
