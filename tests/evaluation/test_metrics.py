"""Each metric on cases worked out by hand, and what it refuses."""

from __future__ import annotations

import pytest

from vlm_sft.evaluation import metrics

ALL = [metrics.exact_match, metrics.anls, metrics.cer]


def test_exact_match_minds_case_but_not_outer_white_space():
    assert metrics.exact_match(["7", " 7\n", "Seven", "8"], ["7", "7", "seven", ["7", "8"]]) == 0.75


def test_anls_forgives_up_to_half_the_characters():
    assert metrics.anls(["Hallo World"], ["hello  world"]) == pytest.approx(1 - 1 / 11)
    assert metrics.anls(["ab"], ["ac"]) == 0.5
    assert metrics.anls(["abc"], ["axy"]) == 0.0
    assert metrics.anls(["yes", "abc"], [["no", "yes"], "axy"]) == 0.5


def test_the_error_rate_counts_edits_over_all_rows():
    # 1 edit in 4 characters and 0 in 8: 1/12, not the mean of 1/4 and 0.
    assert metrics.cer(["abxd", "12345678"], ["abcd", "12345678"]) == pytest.approx(1 / 12)
    assert metrics.cer(["ab"], [["abcd", "abc"]]) == pytest.approx(1 / 3)
    assert metrics.cer(["ab"], [""]) == 2.0


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.__name__)
def test_every_metric_refuses_what_it_cannot_compare(metric):
    with pytest.raises(ValueError, match="0 predictions and 0 references"):
        metric([], [])
    with pytest.raises(ValueError, match="2 predictions and 1 references"):
        metric(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="references 1 are empty"):
        metric(["a", "b"], ["a", []])


@pytest.mark.parametrize(
    ("metric", "said", "right", "score"),
    [
        (metrics.exact_match, "cat", ["dog", "cat"], 1.0),
        (metrics.anls, "cats", "cat", 0.75),
        (metrics.cer, "cut!", "cat!", 0.75),
        (metrics.cer, "a dog and a cat", "cat", 0.0),
        (metrics.cer, "a cat", "a cat", 1.0),
    ],
)
def test_row_score_is_1_where_the_row_is_right(metric, said, right, score):
    assert metrics.row_score(metric, said, right) == score


def test_an_error_rate_of_ones_own_says_so_itself():
    def wrong(predictions, references):
        return float(predictions != references)

    assert metrics.row_score(wrong, "a", "a") == 0.0
    wrong.lower_is_better = True
    assert metrics.row_score(wrong, "a", "a") == 1.0
