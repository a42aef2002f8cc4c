"""Each metric on cases worked out by hand, and what it refuses."""

from __future__ import annotations

import pytest

from vlm_sft.evaluation import metrics

ALL = [
    metrics.exact_match,
    metrics.vqa_accuracy,
    metrics.anls,
    metrics.cer,
    metrics.wer,
    metrics.json_validity,
    metrics.json_field_f1,
]


def test_exact_match_minds_case_but_not_outer_white_space():
    assert metrics.exact_match(["7", " 7\n", "Seven", "8"], ["7", "7", "seven", ["7", "8"]]) == 0.75


@pytest.mark.parametrize(
    ("said", "right", "same"),
    [
        ("The cat.", "cat", True),
        ("two", "2", True),
        ("None", "0", True),
        ("1,000", "1000", True),
        ("3.5", "35", False),
        ("don't", "dont", True),
        ("red, white", "red white", True),
        ("black/white", "black white", True),
        ("yes", "no", False),
    ],
)
def test_vqa_accuracy_of_one_reference_is_equality_after_normalising(said, right, same):
    assert metrics.vqa_accuracy([said], [right]) == float(same)


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_people_is_the_official_score(agreeing, score):
    people = ["cat"] * agreeing + ["dog"] * (10 - agreeing)
    assert metrics.vqa_accuracy(["a cat"], [people]) == pytest.approx(score)


def test_vqa_accuracy_of_two_people_asks_for_one_of_the_others():
    assert metrics.vqa_accuracy(["cat", "cat", "cat"], [["cat", "cat"], ["cat", "dog"], ["dog", "dog"]]) == 0.5


def test_anls_forgives_up_to_half_the_characters():
    assert metrics.anls(["Hallo World"], ["hello  world"]) == pytest.approx(1 - 1 / 11)
    assert metrics.anls(["ab"], ["ac"]) == 0.5
    assert metrics.anls(["abc"], ["axy"]) == 0.0
    assert metrics.anls(["yes", "abc"], [["no", "yes"], "axy"]) == 0.5


def test_error_rates_count_edits_over_all_rows():
    # 1 edit in 4 characters and 0 in 8: 1/12, not the mean of 1/4 and 0.
    assert metrics.cer(["abxd", "12345678"], ["abcd", "12345678"]) == pytest.approx(1 / 12)
    assert metrics.wer(["the cat sat", "yes"], ["the dog sat", "yes"]) == pytest.approx(1 / 4)
    assert metrics.cer(["ab"], [["abcd", "abc"]]) == pytest.approx(1 / 3)
    assert metrics.wer(["one two"], [""]) == 2.0


@pytest.mark.parametrize(
    ("said", "valid"),
    [
        ('{"a": 1}', 1.0),
        ('```json\n{"a": [1, null]}\n```', 1.0),
        ("null", 1.0),
        ('{"a": NaN}', 0.0),
        ('{"a": 1', 0.0),
        ('Here it is: {"a": 1}', 0.0),
        ("", 0.0),
    ],
)
def test_json_validity_is_strict(said, valid):
    assert metrics.json_validity([said], ["not looked at"]) == valid


def test_json_field_f1_counts_leaves_with_their_keys():
    reference = '{"shop": "Kiosk", "items": [{"name": "tea", "price": 2}, {"name": "cake", "price": "3"}]}'
    reordered = '{"items": [{"price": 3, "name": "cake"}, {"name": "tea ", "price": "2"}], "shop": "Kiosk"}'
    assert metrics.json_field_f1([reordered], [reference]) == 1.0
    # 1 right, 1 wrong value (one found and one missed), 3 missed: F1 = 1 / (1 + 5/2)
    assert metrics.json_field_f1(['{"shop": "Kiosk", "items": [{"name": "pie"}]}'], [reference]) == pytest.approx(
        1 / (1 + 5 / 2)
    )
    assert metrics.json_field_f1(["no json", '{"a": 1}'], ['{"a": 1}', '{"a": 1}']) == pytest.approx(1 / 1.5)
    assert metrics.json_field_f1(["{}"], ["{}"]) == 1.0
    assert metrics.json_field_f1(["nothing"], ['{"a": 1}']) == 0.0


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.__name__)
def test_every_metric_refuses_what_it_cannot_compare(metric):
    with pytest.raises(ValueError, match="0 predictions and 0 references"):
        metric([], [])
    with pytest.raises(ValueError, match="2 predictions and 1 references"):
        metric(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="references 1 are empty"):
        metric(["a", "b"], ["a", []])


def test_a_reference_that_cannot_be_read_is_named():
    with pytest.raises(ValueError, match=r"references\[1\] is not JSON: 'plain words'"):
        metrics.json_field_f1(['{"a": 1}'] * 2, ['{"a": 1}', "plain words"])


@pytest.mark.parametrize(
    ("metric", "said", "right", "score"),
    [
        (metrics.exact_match, "cat", ["dog", "cat"], 1.0),
        (metrics.anls, "cats", "cat", 0.75),
        (metrics.cer, "cut!", "cat!", 0.75),
        (metrics.cer, "a dog and a cat", "cat", 0.0),
        (metrics.wer, "a cat", "a cat", 1.0),
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
