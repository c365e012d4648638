"""Metrics of predictions: accuracy, F1, exact F1 of tagged spans, correlations.

All functions take plain sequences or numpy arrays; none depends on models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


OUTSIDE = "O"
"""The tag of words that belong to no entity."""


class Span(NamedTuple):
    """A group of adjacent words with the same entity type.

    Attributes:
        kind: Entity type, such as "PER".
        begin: Index of the first word.
        end: Index after the last word.
    """

    kind: str
    begin: int
    end: int


def f1(correct: int, predicted: int, actual: int) -> float:
    """Return the F1 score, 2·correct / (predicted + actual); 0 if there is nothing to predict."""
    return 2 * correct / (predicted + actual) if predicted + actual else 0.0


def class_metrics(
    predicted: Sequence[int] | Array, actual: Sequence[int] | Array, names: Sequence[str]
) -> dict[str, float]:
    """Return accuracy, macro F1 and the F1 score of each class.

    Args:
        predicted: Predicted class of each row, an index into `names`.
        actual: True class of each row.
        names: Names of the classes.

    Returns:
        "accuracy"; "f1_macro", the mean over all classes that are predicted or true for a row; and "f1/NAME" for these
        classes.
    """
    guess, truth = np.asarray(predicted), np.asarray(actual)
    scores = {}
    for number, name in enumerate(names):
        hits, said, meant = guess == number, int((guess == number).sum()), int((truth == number).sum())
        if said or meant:
            scores[f"f1/{name}"] = f1(int((hits & (truth == number)).sum()), said, meant)
    return {
        "accuracy": float((guess == truth).mean()),
        "f1_macro": float(np.mean(list(scores.values()))) if scores else 0.0,
        **scores,
    }


def classes_metrics(predicted: Array, actual: Array, names: Sequence[str]) -> dict[str, float]:
    """Return metrics for rows to which any number of classes may apply.

    Args:
        predicted: Whether each class is predicted for each row, shape (rows, classes).
        actual: Whether each class applies to each row, shape (rows, classes).
        names: Names of the classes.

    Returns:
        "accuracy", the fraction of rows in which all classes are right; "f1_micro", over all pairs of rows and classes;
        "f1_macro", the mean over classes; and "f1/NAME" for each class.
    """
    guess, truth = np.asarray(predicted, dtype=bool), np.asarray(actual, dtype=bool)
    correct = (guess & truth).sum(0)
    said, meant = guess.sum(0), truth.sum(0)
    scores = {f"f1/{name}": f1(int(correct[at]), int(said[at]), int(meant[at])) for at, name in enumerate(names)}
    return {
        "accuracy": float((guess == truth).all(1).mean()),
        "f1_micro": f1(int(correct.sum()), int(said.sum()), int(meant.sum())),
        "f1_macro": float(np.mean(list(scores.values()))),
        **scores,
    }


def score_metrics(predicted: Sequence[float] | Array, actual: Sequence[float] | Array) -> dict[str, float]:
    """Return the mean squared error and the correlations (Pearson, Spearman) of predicted numbers.

    A correlation is left out if all predictions or all true numbers are equal.
    """
    guess, truth = np.asarray(predicted, dtype=np.float64), np.asarray(actual, dtype=np.float64)
    found = {"mse": float(((guess - truth) ** 2).mean())}
    for name, values in (("pearson", (guess, truth)), ("spearman", (ranks(guess), ranks(truth)))):
        if all(np.ptp(one) > 0 for one in values):
            found[name] = float(np.corrcoef(*values)[0, 1])
    return found


def ranks(values: Array) -> Array:
    """Return the rank of each value, starting at 1; equal values have the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def spans(tags: Iterable[str]) -> list[Span]:
    """Return the entities in the tags of a sentence, in the schemes IOB1, IOB2, IOE and IOBES.

    A span begins at B or S, after E or S, when the type changes, and at the first I or E after O, as in the evaluation
    script of CoNLL-2000. A tag without a prefix, such as "PER", is treated as I.

    Args:
        tags: The tag of each word, such as "B-PER", "I-PER" and "O".
    """
    found, begin, before = list[Span](), 0, ("O", "")
    numbered = [_parts(tag) for tag in tags]
    for at, (prefix, kind) in enumerate([*numbered, ("O", "")]):
        if before[0] != "O" and (prefix in "OBS" or before[0] in "ES" or kind != before[1]):
            found.append(Span(before[1], begin, at))
            before = ("O", "")
        if prefix != "O" and before[0] == "O":
            begin = at
        before = (prefix, kind)
    return found


def _parts(tag: str) -> tuple[str, str]:
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefix, dash, kind = tag.partition("-")
    return (prefix, kind) if dash and prefix in ("B", "I", "E", "S") else ("I", tag)


def span_metrics(predicted: Sequence[Sequence[str]], actual: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return token accuracy and the exact F1 score of spans: a span counts only if its type and both ends are right.

    Args:
        predicted: Predicted tags of each sentence.
        actual: True tags of each sentence.

    Returns:
        "accuracy" over words; "f1" over all spans; "precision" and "recall"; and "f1/TYPE" for each entity type.
    """
    right = total = 0
    hits, said, meant = dict[str, int](), dict[str, int](), dict[str, int]()
    for guess, truth in zip(predicted, actual, strict=True):
        right += sum(one == other for one, other in zip(guess, truth, strict=True))
        total += len(truth)
        found, wanted = set(spans(guess)), set(spans(truth))
        for counts, group in ((hits, found & wanted), (said, found), (meant, wanted)):
            for span in group:
                counts[span.kind] = counts.get(span.kind, 0) + 1
    correct, claims, truths = sum(hits.values()), sum(said.values()), sum(meant.values())
    return {
        "accuracy": right / total if total else 0.0,
        "f1": f1(correct, claims, truths),
        "precision": correct / claims if claims else 0.0,
        "recall": correct / truths if truths else 0.0,
        **{
            f"f1/{kind}": f1(hits.get(kind, 0), said.get(kind, 0), meant.get(kind, 0))
            for kind in sorted({*said, *meant})
        },
    }
