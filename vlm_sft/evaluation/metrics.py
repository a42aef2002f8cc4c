"""How right an answer is: plain functions of (predictions, references).

Each returns one number over all rows; called with one pair it scores one row. A metric of your own is a function of
the same two arguments; where less is better, it has the attribute `lower_is_better = True`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

from rapidfuzz.distance import Levenshtein

Reference = str | Sequence[str]
"""The right answer, or several that count as right."""
Metric = Callable[[Sequence[str], Sequence[Reference]], float]
"""(predictions, references) -> one number."""


def exact_match(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """Share of the rows whose answer equals a reference, outer white space aside."""
    return fmean(answer.strip() in map(str.strip, rights) for answer, rights in _pairs(predictions, references))


def anls(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """Average normalised Levenshtein similarity: 1 - edits / longer length to the nearest reference, 0 below one half.

    Case and runs of white space do not count. Source: Biten et al. 2019, "Scene Text Visual Question Answering"."""
    same = partial(Levenshtein.normalized_similarity, processor=lambda text: " ".join(text.lower().split()))
    pairs = _pairs(predictions, references)
    return fmean(max(same(answer, right, score_cutoff=0.5) for right in rights) for answer, rights in pairs)


def cer(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """Character error rate: edits to the nearest reference, per character of it, over all rows; 0 is best.

    Without any character in the references, each edit counts as one."""
    nearest = [
        min((Levenshtein.distance(answer.strip(), right.strip()), len(right.strip())) for right in rights)
        for answer, rights in _pairs(predictions, references)
    ]
    return sum(edits for edits, _ in nearest) / max(sum(length for _, length in nearest), 1)


cer.lower_is_better = True  # type: ignore[attr-defined]


def row_score(metric: Metric, prediction: str, reference: Reference) -> float:
    """The metric of one row, where 1 is right; where `metric.lower_is_better`, what is left of 1, at least 0."""
    value = metric([prediction], [reference])
    return max(0.0, 1 - value) if getattr(metric, "lower_is_better", False) else value


def _pairs(predictions: Sequence[str], references: Sequence[Reference]) -> list[tuple[str, list[str]]]:
    """(answer, its references), with a single reference made a list."""
    if not predictions or len(predictions) != len(references):
        found = f"{len(predictions)} predictions and {len(references)} references"
        raise ValueError(f"{found}; expected as many of both, at least one")
    rights = [[reference] if isinstance(reference, str) else list(reference) for reference in references]
    if empty := [str(row) for row, right in enumerate(rights) if not right]:
        raise ValueError(f"references {', '.join(empty)} are empty; give at least one right answer for each row")
    return list(zip(predictions, rights, strict=True))
