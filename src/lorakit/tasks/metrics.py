"""Metrics of predictions: accuracy, F1, exact F1 of tagged spans, correlations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from lorakit.tasks.spans import SpanReader

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

Score: TypeAlias = float | str
"""The value of a metric, or the reason why the data does not define it."""

BASELINES: Mapping[str, str] = {"accuracy": "majority"}
"""Name of a metric -> name of the metric with the value that a model reaches without reading the rows."""


def majority(labels: Iterable[Hashable]) -> float:
    """Return the accuracy of always predicting the most frequent label of these rows; 0 without rows."""
    counts = Counter(labels)
    return max(counts.values()) / counts.total() if counts else 0.0


def f1(correct: int, predicted: int, actual: int) -> float:
    """Return the F1 score, 2·correct / (predicted + actual); 0 if there is nothing to predict."""
    return 2 * correct / (predicted + actual) if predicted + actual else 0.0


def class_metrics(
    predicted: Sequence[int] | Array, actual: Sequence[int] | Array, names: Sequence[str]
) -> dict[str, float]:
    """Return accuracy, macro F1 and the F1 score of each class; classes of rows are indices into `names`.

    The keys are "accuracy" and its baseline; "f1_macro", the mean over all classes that are predicted or true for a
    row; and "f1/NAME" for these classes.
    """
    guess, truth = np.asarray(predicted), np.asarray(actual)
    scores = {}
    for number, name in enumerate(names):
        hits, predictions, meant = guess == number, int((guess == number).sum()), int((truth == number).sum())
        if predictions or meant:
            scores[f"f1/{name}"] = f1(int((hits & (truth == number)).sum()), predictions, meant)
    return {
        "accuracy": float((guess == truth).mean()),
        BASELINES["accuracy"]: majority(truth.tolist()),
        "f1_macro": float(np.mean(list(scores.values()))) if scores else 0.0,
        **scores,
    }


def classes_metrics(predicted: Array, actual: Array, names: Sequence[str]) -> dict[str, float]:
    """Return metrics for rows to which any number of classes may apply, as booleans (rows, classes).

    The keys are "accuracy", the fraction of rows in which all classes are right, and its baseline; "f1_micro", over all
    pairs of rows and classes; "f1_macro", the mean over classes; and "f1/NAME" for each class.
    """
    guess, truth = np.asarray(predicted, dtype=bool), np.asarray(actual, dtype=bool)
    correct = (guess & truth).sum(0)
    predictions, meant = guess.sum(0), truth.sum(0)
    scores = {f"f1/{name}": f1(int(correct[at]), int(predictions[at]), int(meant[at])) for at, name in enumerate(names)}
    return {
        "accuracy": float((guess == truth).all(1).mean()),
        BASELINES["accuracy"]: majority(map(tuple, truth.tolist())),
        "f1_micro": f1(int(correct.sum()), int(predictions.sum()), int(meant.sum())),
        "f1_macro": float(np.mean(list(scores.values()))),
        **scores,
    }


def score_metrics(predicted: Sequence[float] | Array, actual: Sequence[float] | Array) -> dict[str, Score]:
    """Return the mean squared error and the correlations (Pearson, Spearman) of predicted numbers."""
    guess, truth = np.asarray(predicted, dtype=np.float64), np.asarray(actual, dtype=np.float64)
    reason = no_correlation(guess, truth)
    return {
        "mse": float(((guess - truth) ** 2).mean()),
        "pearson": reason or float(np.corrcoef(guess, truth)[0, 1]),
        "spearman": reason or float(np.corrcoef(ranks(guess), ranks(truth))[0, 1]),
    }


def no_correlation(predicted: Array, actual: Array) -> str:
    """Return why predicted and actual numbers have no correlation, or ""."""
    if len(actual) < 2:
        return f"a correlation needs at least 2 rows, but the evaluation data has {len(actual)}"
    equal = [name for name, values in (("true", actual), ("predicted", predicted)) if np.ptp(values) == 0]
    return f"all {equal[0]} scores are equal" if equal else ""


def ranks(values: Array) -> Array:
    """Return the rank of each value, starting at 1; equal values have the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def span_metrics(
    predicted: Sequence[Sequence[str]], actual: Sequence[Sequence[str]], reader: SpanReader
) -> dict[str, float]:
    """Return token accuracy and, if the tags form spans, the exact F1 score: type and both ends must be right.

    The keys are "accuracy" over words, and its baseline; "f1" over all spans; "precision" and "recall"; and "f1/TYPE"
    for each entity type.
    """
    pairs = [pair for guess, truth in zip(predicted, actual, strict=True) for pair in zip(guess, truth, strict=True)]
    right = {
        "accuracy": sum(one == other for one, other in pairs) / len(pairs) if pairs else 0.0,
        BASELINES["accuracy"]: majority(truth for _, truth in pairs),
    }
    if not reader.has_spans:
        return right
    hits, predictions, meant = Counter[str](), Counter[str](), Counter[str]()
    for guess, truth in zip(predicted, actual, strict=True):
        guessed, wanted = set(reader.spans(guess)), set(reader.spans(truth))
        for counts, group in ((hits, guessed & wanted), (predictions, guessed), (meant, wanted)):
            counts.update(span.kind for span in group)
    correct, claims, truths = hits.total(), predictions.total(), meant.total()
    return {
        **right,
        "f1": f1(correct, claims, truths),
        "precision": correct / claims if claims else 0.0,
        "recall": correct / truths if truths else 0.0,
        **{f"f1/{kind}": f1(hits[kind], predictions[kind], meant[kind]) for kind in sorted({*predictions, *meant})},
    }
