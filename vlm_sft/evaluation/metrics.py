"""How right an answer is: plain functions of (predictions, references).

Each returns one number over all rows; called with one pair it scores one row. A metric of your own is a function of
the same two arguments; where less is better, it has the attribute `lower_is_better = True`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

from rapidfuzz.distance import Levenshtein

Reference = str | Sequence[str]
"""The right answer, or several that count as right."""
Metric = Callable[[Sequence[str], Sequence[Reference]], float]
"""(predictions, references) -> one number."""


def exact_match(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """Share of the rows whose answer equals a reference, outer white space aside."""
    return fmean(
        float(answer.strip() in {right.strip() for right in rights})
        for answer, rights in _pairs(predictions, references)
    )


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """VQA accuracy: an answer is right to the degree that three people gave it, both sides normalised.

    With ten references, the mean over each nine of them of min(1, matches / 3). One reference: it must match. Source:
    Antol et al. 2015, "VQA", and the normalisation of its evaluation code (GT-Vision-Lab/VQA, vqaEval.py); apostrophes
    are dropped in place of its table of contractions.
    """
    return fmean(_vqa_score(answer, rights) for answer, rights in _pairs(predictions, references))


def anls(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """Average normalised Levenshtein similarity: 1 - edits / longer length to the nearest reference, 0 below one half.

    Case and runs of white space do not count. Source: Biten et al. 2019, "Scene Text Visual Question Answering".
    """

    def same(text: str) -> str:
        return " ".join(text.lower().split())

    return fmean(
        max(Levenshtein.normalized_similarity(answer, right, processor=same, score_cutoff=0.5) for right in rights)
        for answer, rights in _pairs(predictions, references)
    )


def cer(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """Character error rate: edits to the nearest reference, per character of it, over all rows; 0 is best."""
    return _error_rate(predictions, references, str.strip)


def wer(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """Word error rate: as `cer`, in words between white space."""
    return _error_rate(predictions, references, str.split)


cer.lower_is_better = wer.lower_is_better = True  # type: ignore[attr-defined]


def json_validity(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """Share of the answers that are one JSON value, alone or in a Markdown fence. References are not looked at."""
    return fmean(float(_json_leaves(answer) is not None) for answer, _ in _pairs(predictions, references))


def json_field_f1(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """F1 over all fields of all rows; a field is the keys that lead to a leaf, and its value as text.

    An answer that is not JSON has no fields; the order of a list does not count. Source: Kim et al. 2022, "OCR-free
    Document Understanding Transformer" (clovaai/donut, JSONParseEvaluator.cal_f1).
    """
    right = fields = 0
    for row, (answer, rights) in enumerate(_pairs(predictions, references)):
        found, expected = _json_leaves(answer) or Counter(), _json_leaves(rights[0])
        if expected is None:
            raise ValueError(f"references[{row}] is not JSON: {rights[0][:80]!r}; fix or drop the row")
        right += (found & expected).total()
        fields += found.total() + expected.total()
    return 2 * right / fields if fields else 1.0


def row_score(metric: Metric, prediction: str, reference: Reference) -> float:
    """The metric of one row, where 1 is right; where `metric.lower_is_better`, what is left of 1, at least 0."""
    value = metric([prediction], [reference])
    return max(0.0, 1 - value) if getattr(metric, "lower_is_better", False) else value


_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n?```", re.DOTALL)

# The normalisation of vqaEval.py: marks that go, words that are numbers, words that go.
_VQA_MARKS = re.compile(r"""[;/\[\]"{}()=+\\_\-><@`,?!]""")
_VQA_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_VQA_WORDS = {word: str(number) for number, word in enumerate(_VQA_NUMBERS)} | {"none": "0"}
_VQA_ARTICLES = {"a", "an", "the"}


def _pairs(predictions: Sequence[str], references: Sequence[Reference]) -> list[tuple[str, list[str]]]:
    """(answer, its references), with a single reference made a list."""
    if not predictions or len(predictions) != len(references):
        found = f"{len(predictions)} predictions and {len(references)} references"
        raise ValueError(f"{found}; expected as many of both, at least one")
    rights = [[reference] if isinstance(reference, str) else list(reference) for reference in references]
    if empty := [str(row) for row, right in enumerate(rights) if not right]:
        raise ValueError(f"references {', '.join(empty)} are empty; give at least one right answer for each row")
    return list(zip(predictions, rights, strict=True))


def _vqa_score(answer: str, rights: list[str]) -> float:
    answer, rights = _vqa_normal(answer), [_vqa_normal(right) for right in rights]
    if len(rights) == 1:
        return float(answer == rights[0])
    matches = [answer == right for right in rights]
    enough = min(3, len(rights) - 1)
    return fmean(min(1.0, (sum(matches) - match) / enough) for match in matches)


def _vqa_normal(answer: str) -> str:
    answer = " ".join(answer.lower().split())
    # vqaEval.py drops a mark next to a blank (everywhere in the answer) and every mark of an answer with "1,000".
    commas_in_numbers = re.search(r"\d,\d", answer) is not None
    for mark in set(_VQA_MARKS.findall(answer)):
        drop = commas_in_numbers or f"{mark} " in answer or f" {mark}" in answer
        answer = answer.replace(mark, "" if drop else " ")
    answer = re.sub(r"\.(?!\d)", "", answer).replace("'", "")
    return " ".join(_VQA_WORDS.get(word, word) for word in answer.split() if word not in _VQA_ARTICLES)


def _error_rate(
    predictions: Sequence[str], references: Sequence[Reference], units: Callable[[str], Sequence[str]]
) -> float:
    """Edits per unit of the nearest references; without any unit in them, each edit counts as one."""
    nearest = [
        min((Levenshtein.distance(units(answer), units(right)), len(units(right))) for right in rights)
        for answer, rights in _pairs(predictions, references)
    ]
    return sum(edits for edits, _ in nearest) / max(sum(length for _, length in nearest), 1)


def _json_leaves(text: str) -> Counter[tuple[str, ...]] | None:
    """(keys ..., text of the leaf) of the JSON value that the text is, alone or in a fence, or None."""
    fence = _FENCE.fullmatch(text.strip())
    try:
        value = json.loads(fence[1] if fence else text, parse_constant=int)  # which refuses NaN and Infinity
    except ValueError:
        return None
    return Counter(_leaves(value))


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    match value:
        case dict():
            for key, item in value.items():
                yield from _leaves(item, (*path, key))
        case list():
            for item in value:
                yield from _leaves(item, path)
        case _:
            yield (*path, value.strip() if isinstance(value, str) else json.dumps(value))
