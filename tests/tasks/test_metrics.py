"""Metrics agree with scikit-learn and scipy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.tasks.metrics import class_metrics, classes_metrics, ranks, score_metrics

CLASSES = ["a", "b", "c"]
ROWS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30)


@settings(deadline=None)  # the first example imports scikit-learn
@given(ROWS)
def test_classes_agree_with_scikit_learn(rows: list[tuple[int, int]]) -> None:
    from sklearn.dummy import DummyClassifier
    from sklearn.metrics import accuracy_score, f1_score

    guess, truth = zip(*rows, strict=True)
    found = class_metrics(guess, truth, CLASSES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        single = f1_score(truth, guess, labels=[0, 1, 2], average=None, zero_division=0)
        macro = f1_score(truth, guess, average="macro", zero_division=0)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    assert found["f1_macro"] == pytest.approx(macro)
    constant = DummyClassifier(strategy="most_frequent").fit(guess, truth)
    assert found["majority"] == pytest.approx(constant.score(guess, truth))
    for number, name in enumerate(CLASSES):
        if number in {*guess, *truth}:
            assert found[f"f1/{name}"] == pytest.approx(single[number])
        else:
            assert f"f1/{name}" not in found


@settings(deadline=None)  # the first example imports scikit-learn
@given(st.lists(st.tuples(*[st.booleans()] * 6), min_size=1, max_size=20))
def test_several_classes_agree_with_scikit_learn(rows: list[tuple[bool, ...]]) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    values = np.array(rows)
    guess, truth = values[:, :3], values[:, 3:]
    found = classes_metrics(guess, truth, CLASSES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess))
        constant = [accuracy_score(truth, np.tile(row, (len(truth), 1))) for row in truth]
        assert found["majority"] == pytest.approx(max(constant))
        for average in ("micro", "macro"):
            expected = f1_score(truth, guess, average=average, zero_division=0)
            assert found[f"f1_{average}"] == pytest.approx(expected)


@settings(deadline=None)  # the first example imports scikit-learn
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30))
def test_scores_agree_with_scipy(rows: list[tuple[int, int]]) -> None:
    from scipy.stats import pearsonr, rankdata, spearmanr

    guess, truth = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    assert np.array_equal(ranks(guess), rankdata(guess))
    found = score_metrics(guess, truth)
    assert found["mse"] == pytest.approx(((guess - truth) ** 2).mean())
    if np.ptp(guess) == 0 or np.ptp(truth) == 0:
        assert found["pearson"] == found["spearman"]
        assert "scores are equal" in str(found["pearson"])
    else:
        assert found["pearson"] == pytest.approx(pearsonr(guess, truth).statistic)
        assert found["spearman"] == pytest.approx(spearmanr(guess, truth).statistic)


def test_one_score_has_no_correlation() -> None:
    found = score_metrics([1.0], [3.0])
    assert found["mse"] == 4.0
    assert "at least 2 rows" in str(found["spearman"])
