"""Spans of tags agree with seqeval, and with the entities from which another writer makes tags in each scheme."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.choices import TAG_SCHEMES
from lorakit.errors import ConfigError
from lorakit.tasks import Target
from lorakit.tasks.metrics import SCHEMES, SpanReader, check_scheme, scheme_of, span_metrics

WRITTEN = {
    "IOB1": ("IOB1", "BIO"),
    "IOB2": ("BIO", "BIO"),
    "IOE1": ("IOE", "IOE"),
    "IOE2": ("IOE", "IOE"),
    "IOBES": ("BIOES", "BIOES"),
    "BILOU": ("BILOU", "BILOU"),
    "BMES": ("BMES", "BMES"),
    "BMEWO": ("BMES", "BMES"),
}
"""Scheme in which the test writes tags -> its name in lorakit, and the name that is recognized if all letters occur."""

Part = tuple[str, int]
SENTENCES = st.lists(st.tuples(st.sampled_from(["O", "PER", "LOC"]), st.integers(1, 3)), min_size=1, max_size=8)
LOOSE = st.lists(
    st.lists(st.sampled_from(["O", *(f"{letter}-{kind}" for letter in "BIES" for kind in ("PER", "LOC"))]), max_size=9),
    min_size=1,
    max_size=3,
)
FULL: list[Part] = [("PER", 2), ("PER", 1), ("PER", 3), ("PER", 1), ("LOC", 1), ("LOC", 3), ("LOC", 2), ("O", 1)]


def written(parts: list[Part], scheme: str) -> list[str]:
    """Write entities, each with its number of words, as the tags of a scheme, by the scheme's definition."""
    whole = {"IOBES": "BIES", "BILOU": "BILU", "BMES": "BMES", "BMEWO": "BMEW"}
    found = list[str]()
    for at, (kind, count) in enumerate(parts):
        before = parts[at - 1][0] if at else ""
        after = parts[at + 1][0] if at + 1 < len(parts) else ""
        if kind == "O":
            found += ["O"] * count
            continue
        if scheme in whole:
            first, inside, last, single = whole[scheme]
            letters = single if count == 1 else first + inside * (count - 2) + last
        elif scheme.startswith("IOB"):
            letters = ("B" if scheme == "IOB2" or before == kind else "I") + "I" * (count - 1)
        else:
            letters = "I" * (count - 1) + ("E" if scheme == "IOE2" or after == kind else "I")
        found += [f"{letter}-{kind}" for letter in letters]
    return found


def entities(parts: list[Part]) -> list[tuple[str, int, int]]:
    found, at = [], 0
    for kind, count in parts:
        if kind != "O":
            found.append((kind, at, at + count))
        at += count
    return found


def resized(parts: list[Part], length: int) -> list[Part]:
    """Return parts with a total of `length` words."""
    found = list[Part]()
    for kind, count in [*parts, ("O", length)]:
        left = length - sum(size for _, size in found)
        if left:
            found.append((kind, min(count, left)))
    return found


def of_seqeval(guess: list[list[str]], truth: list[list[str]], **mode: Any) -> dict[str, float]:
    from seqeval import metrics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"f1": metrics.f1_score, "precision": metrics.precision_score, "recall": metrics.recall_score}
        found = {name: float(of(truth, guess, zero_division=0, **mode)) for name, of in names.items()}
        return {**found, "accuracy": float(metrics.accuracy_score(truth, guess))}


@settings(deadline=None, max_examples=60)  # the first example imports scikit-learn
@given(SENTENCES, SENTENCES)
@pytest.mark.parametrize("scheme", WRITTEN)
def test_valid_tags_of_all_schemes(scheme: str, truth: list[Part], guess: list[Part]) -> None:
    from seqeval import scheme as schemes

    guess = resized(guess, sum(count for _, count in truth))
    names = sorted({*written(FULL, scheme), *written([("PER", 1), ("PER", 2), *FULL], scheme)})
    assert scheme_of(names) == (WRITTEN[scheme][1], "")
    reader, tags, said = SpanReader(names, WRITTEN[scheme][0]), written(truth, scheme), written(guess, scheme)
    assert [tuple(span) for span in reader.spans(tags)] == entities(truth)
    found = span_metrics([said], [tags], reader)
    # seqeval has neither BMES nor BMEWO, and does not read an entity of IOE1 that is a single E
    is_in_seqeval = all(count > 1 or kind == "O" for kind, count in truth + guess) or scheme != "IOE1"
    if is_in_seqeval and not scheme.startswith("BM"):
        expected = of_seqeval([said], [tags], mode="strict", scheme=getattr(schemes, scheme))
        assert {name: found[name] for name in expected} == pytest.approx(expected)


@settings(deadline=None, max_examples=200)
@given(LOOSE, st.randoms(use_true_random=False))
def test_tags_out_of_order_are_read_as_by_the_default_of_seqeval(truth: list[list[str]], random: Any) -> None:
    from seqeval.metrics.sequence_labeling import get_entities

    names = [f"{letter}-{kind}" for letter in "BIES" for kind in ("PER", "LOC")]
    guess = [[random.choice([tag, random.choice([*names, "O"])]) for tag in tags] for tags in truth]
    reader = SpanReader(["O", *names], "BIOES")
    for tags in (*truth, *guess):
        assert [(kind, begin, end - 1) for kind, begin, end in reader.spans(tags)] == get_entities(tags)
    found = span_metrics(guess, truth, reader)
    if any(truth):
        expected = of_seqeval(guess, truth)
        assert {name: found[name] for name in expected} == pytest.approx(expected)
    other = str.maketrans("ES", "LU")
    renamed = SpanReader(["O", *(name[0].translate(other) + name[1:] for name in names)], "BILOU")
    for tags in truth:
        assert renamed.spans([tag[0].translate(other) + tag[1:] for tag in tags]) == reader.spans(tags)


def test_the_examples_of_seqeval() -> None:
    truth = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    guess = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    found = span_metrics(guess, truth, SpanReader(["O", "B-MISC", "I-MISC", "B-PER", "I-PER"], "BIO"))
    assert found["f1"] == pytest.approx(0.50)
    assert found["accuracy"] == pytest.approx(0.80)
    assert found["majority"] == pytest.approx(0.50)
    assert (found["f1/MISC"], found["f1/PER"]) == (0.0, 1.0)
    assert (found["precision"], found["recall"]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("names", "scheme"),
    [
        ("O B-PER I-PER B-LOC", "BIO"),
        ("O I-PER I-LOC", "BIO"),
        ("O I-PER E-PER", "IOE"),
        ("O B-PER I-PER L-PER U-PER", "BILOU"),
        ("O B-PER I-PER E-PER S-PER", "BIOES"),
        ("B M E S", "BMES"),
        ("B I O", "BIO"),
        ("O PER-B PER-I", "BIO"),
        ("O B_PER I_PER", "BIO"),
        ("O B- I-", "BIO"),
        ("O PER LOC", "IO"),
        ("O PER-B PER-I X", "none"),
        ("O E-mail Phone", "IO"),
        ("0 1 2", "none"),
        ("NOUN VERB", "none"),
        ("O B-PER I-PER X", "none"),
        ("O B-PER M-PER L-PER", "none"),
    ],
)
def test_the_scheme_is_recognized_in_any_order(names: str, scheme: str) -> None:
    for order in (names.split(), names.split()[::-1], sorted(names.split())):
        found, note = scheme_of(order)
        assert found == scheme
        assert bool(note) == (scheme == "none")
        assert Target("tags", tuple(order)).scheme == scheme


@pytest.mark.parametrize(
    ("names", "tags", "expected"),
    [
        ("B I O", "B I O B", [("_", 0, 2), ("_", 3, 4)]),
        ("B M E S", "B M E S", [("_", 0, 3), ("_", 3, 4)]),
        ("O PER-B PER-I", "PER-B PER-I PER-B", [("PER", 0, 2), ("PER", 2, 3)]),
        ("O B- I-", "B- I- B-", [("_", 0, 2), ("_", 2, 3)]),
        ("O PER LOC", "PER PER O LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("O B-a-b I-a-b", "B-a-b I-a-b", [("a-b", 0, 2)]),
        ("O E-mail Phone", "E-mail E-mail O", [("E-mail", 0, 2)]),
    ],
)
def test_forms_of_tags(names: str, tags: str, expected: list[tuple[str, int, int]]) -> None:
    reader = SpanReader(names.split(), scheme_of(names.split())[0])
    assert [tuple(span) for span in reader.spans(tags.split())] == expected


def test_numbers_without_names_have_no_spans() -> None:
    reader = SpanReader(["0", "1", "2"], scheme_of(["0", "1", "2"])[0])
    assert not reader.has_spans and reader.spans(["1", "1"]) == []
    assert span_metrics([["0", "0", "1"]], [["0", "0", "2"]], reader) == pytest.approx(
        {"accuracy": 2 / 3, "majority": 2 / 3}
    )


def test_a_scheme_that_does_not_fit() -> None:
    assert tuple(SCHEMES) == TAG_SCHEMES
    for scheme in ("IO", "none"):
        check_scheme(scheme, ["X", "B-PER"])
    with pytest.raises(ConfigError) as caught:
        check_scheme("BIO", ["O", "B-PER", "X"])
    assert (caught.value.what, caught.value.field) == ("X", "tag_scheme")
    with pytest.raises(ConfigError) as caught:
        check_scheme("BIOX", ["O"])
    assert caught.value.field == "tag_scheme"
