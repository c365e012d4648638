"""Metrics of predictions: accuracy, F1, correlations, and exact F1 of the spans that tags of words form in a tag
scheme.

A scheme marks the words of an entity by a letter, which has one meaning in all schemes, so one rule reads them all:
that of the evaluation script of CoNLL-2000, which also says what tags out of order mean.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from lorakit.errors import ConfigError

OUTSIDE = "O"
"""The tag of words that belong to no entity."""

PLAIN, UNMARKED = "IO", "none"

SCHEMES: Mapping[str, str] = {
    "BIO": "BI",
    "IOB1": "BI",
    "IOE": "IE",
    "BIOES": "BIES",
    "BILOU": "BILU",
    "BMES": "BMESW",
    PLAIN: "",
    UNMARKED: "",
}
"""Name of a tag scheme -> its letters; tags of IO are types without a letter, "none" compares single words only."""

_MEANING = {"M": "I", "L": "E", "U": "S", "W": "S"}
"""Letter -> the letter of BIOES with the same meaning, if it is another one."""

_UNTYPED = "_"
"""Type of the entities of tags that are only a letter, as in seqeval."""

_FORMS = (
    re.compile(r"(?P<letter>[A-Z])[^A-Za-z0-9](?P<type>.*)", re.DOTALL),
    re.compile(r"(?P<type>.+)[^A-Za-z0-9](?P<letter>[A-Z])", re.DOTALL),
    re.compile(r"(?P<letter>[A-Z])(?P<type>)"),
)
"""Forms of tags with a letter: "B-PER", "PER-B" and "B"; all tags of a scheme have the same form."""


class Span(NamedTuple):
    """A group of adjacent words, from `begin` up to `end`, with the same entity type, such as "PER"."""

    kind: str
    begin: int
    end: int


def scheme_of(names: Sequence[str]) -> tuple[str, str]:
    """Return the scheme that all tags of the data or the model follow, and a message if it is "none"."""
    for scheme, letters in SCHEMES.items():
        parts = _parts(names, letters) if letters else None
        if parts and {"B", "I"} & {letter for letter, _ in parts.values()}:
            return scheme, ""
    tags = [name for name in names if name != OUTSIDE]
    if all(re.fullmatch(r"[+-]?\d+", name) for name in names):
        return UNMARKED, (
            "The tags are numbers without names, so the metric is the accuracy per word, not the F1 of spans; name "
            "them, such as --label-map 0=O 1=B-PER."
        )
    marked = [match for form in _FORMS for tag in tags if (match := form.fullmatch(tag)) and match["letter"] in "BI"]
    if len(tags) < len(names) and not marked:
        return PLAIN, ""
    return UNMARKED, (
        f"The tags ({', '.join(list(names)[:4])} ...) follow no known scheme, so the metric is the accuracy per word, "
        f"not the F1 of spans; see --tag-scheme ({', '.join(SCHEMES)})."
    )


def check_scheme(scheme: str, names: Sequence[str]) -> None:
    """Check that all tags can be read in a scheme.

    Raises:
        ConfigError: The scheme is not a key of `SCHEMES`, or a tag does not have one of its letters.
    """
    if scheme not in SCHEMES:
        raise ConfigError.of("tag_scheme", scheme, allowed=SCHEMES)
    letters = SCHEMES[scheme]
    if letters and _parts(names, letters) is None:
        wrong = next((name for name in names if name != OUTSIDE and _parts([name], letters) is None), names[0])
        text = (
            f"tag_scheme is {scheme}, whose tags have one of the letters {', '.join(letters)} such as "
            f"{letters[0]}-PER, or are O; the tag {wrong!r} has none. Pass another --tag-scheme, or rename the tag "
            f"with --label-map {wrong}=NAME."
        )
        raise ConfigError(text, what=wrong, field="tag_scheme", allowed=tuple(SCHEMES))


def _parts(names: Iterable[str], letters: str) -> dict[str, tuple[str, str]] | None:
    """Return a dict from each tag to its letter in BIOES and its type; None if a tag has none of the letters."""
    tags = [name for name in names if name != OUTSIDE]
    for form in _FORMS:
        matches = [form.fullmatch(tag) for tag in tags]
        if all(match is not None and match["letter"] in letters for match in matches):
            return {
                tag: (_MEANING.get(match["letter"], match["letter"]), match["type"] or _UNTYPED)
                for tag, match in zip(tags, matches, strict=True)
                if match is not None
            }
    return None


class SpanReader:
    """Reads the entities in tags, in one scheme in which all tags can be read.

    A span begins at B or S, after E or S, when the type changes, and at the first I or E after O.
    """

    def __init__(self, names: Sequence[str], scheme: str) -> None:
        letters = SCHEMES[scheme]
        plain = {name: ("I", name) for name in names if name != OUTSIDE}
        self.has_spans = scheme != UNMARKED
        self._parts = ((_parts(names, letters) if letters else None) or plain) if self.has_spans else {}

    def spans(self, tags: Iterable[str | None]) -> list[Span]:
        """Return the entities in the tags of a sentence; a word whose tag is None belongs to no entity."""
        entities, begin, before = list[Span](), 0, (OUTSIDE, "")
        for at, tag in enumerate([*tags, None]):
            letter, kind = self._parts.get(tag or OUTSIDE, (OUTSIDE, ""))
            if before[0] != OUTSIDE and (letter in "OBS" or before[0] in "ES" or kind != before[1]):
                entities.append(Span(before[1], begin, at))
                before = (OUTSIDE, "")
            if letter != OUTSIDE and before[0] == OUTSIDE:
                begin = at
            before = (letter, kind)
        return entities


Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

Score: TypeAlias = float | str
"""The value of a metric, or the reason why the data does not define it."""

LOSSES = ("mse",)
"""Names of metrics whose smaller values are better."""

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
    parts = (guess[guess == truth], guess, truth)
    counts = zip(*(np.bincount(part, minlength=len(names)).tolist() for part in parts), strict=True)
    scores = {f"f1/{name}": f1(*each) for name, each in zip(names, counts, strict=True) if any(each)}
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
