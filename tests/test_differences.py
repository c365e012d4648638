"""Differences of two evaluations: their intervals cover the truth, and their verdicts say no more than the documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.random import Generator

from lorakit.differences import Difference, mean_difference, metric_differences

stats = pytest.importorskip("scipy.stats")

DRAWS: dict[str, Callable[[Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(0, 1, n),
    "long tails": lambda rng, n: rng.standard_t(4, n) / 2**0.5,
}


def _documents(rng: Generator, n: int, mean: float, shape: str = "normal") -> tuple[np.ndarray, np.ndarray]:
    """Return the summed differences and the tokens of documents whose lengths are skewed."""
    tokens = np.maximum(1, np.rint(np.exp(rng.normal(4.5, 0.5, n))))
    noise = rng.normal(0, 0.5, n) / np.sqrt(tokens)
    return (mean + 0.2 * DRAWS[shape](rng, n) + noise) * tokens, tokens


def _difference(sums: np.ndarray, tokens: np.ndarray) -> Difference:
    return mean_difference((sums + 2 * tokens).tolist(), (2 * tokens).tolist(), tokens.astype(int).tolist())


def metric_difference(
    first: Callable[[np.ndarray], float], second: Callable[[np.ndarray], float], documents: Sequence[int], is_loss: bool
) -> Difference:
    (found,) = metric_differences(lambda rows: [first(rows)], lambda rows: [second(rows)], documents, [is_loss])
    return found


@pytest.mark.parametrize("shape", DRAWS)
@pytest.mark.parametrize("n", [20, 200, 2000])
def test_intervals_cover_the_truth(n: int, shape: str) -> None:
    rng, covered, reliable = np.random.default_rng(n), 0, 0
    for _ in range(2000):
        interval = _difference(*_documents(rng, n, 0.05, shape)).interval
        if interval is not None:
            reliable += 1
            covered += interval[0] <= 0.05 <= interval[1]
    assert 0.93 <= covered / reliable <= 0.97
    assert reliable >= 1700


def test_equal_models_are_rarely_said_to_differ() -> None:
    rng = np.random.default_rng(3)
    verdicts = [_difference(*_documents(rng, 60, 0.0)).verdict for _ in range(5000)]
    assert verdicts.count("undecided") >= 0.94 * 5000


def test_the_detectable_difference_is_found_in_four_of_five_cases() -> None:
    rng = np.random.default_rng(4)
    some = (_difference(*_documents(rng, 80, 0.0)).detectable for _ in range(200))
    least = float(np.mean([one for one in some if one is not None]))
    found = [_difference(*_documents(rng, 80, least)).verdict for _ in range(2000)]
    assert 0.77 <= found.count("worse") / 2000 <= 0.83
    assert found.count("better") == 0


def test_documents_of_equal_size_have_the_interval_of_a_paired_t_test() -> None:
    rng = np.random.default_rng(5)
    for n in range(20, 60, 3):
        first, second = rng.integers(0, 2, n) * 2.0 + 1, np.ones(n)
        first[:2] = 1, 3
        found = mean_difference(first.tolist(), second.tolist(), [1] * n)
        expected = stats.ttest_rel(first, second)
        assert found.error == pytest.approx(stats.sem(first - second))
        if found.freedom == n - 1:
            assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
        else:
            assert found.freedom < n - 1


def test_the_error_is_near_that_of_a_ratio() -> None:
    """The delta method: the variance of Σd/Σn is (s_dd − 2·R·s_dn + R²·s_nn)/(n·mean²), for many documents."""
    sums, tokens = _documents(np.random.default_rng(6), 4000, 0.1)
    ratio = sums.sum() / tokens.sum()
    (s_dd, s_dn), (_, s_nn) = np.cov(sums, tokens)
    variance = (s_dd - 2 * ratio * s_dn + ratio**2 * s_nn) / (len(sums) * tokens.mean() ** 2)
    found = _difference(sums, tokens)
    assert found.value == pytest.approx(ratio)
    assert found.error == pytest.approx(variance**0.5, rel=2e-3)


def test_a_mean_as_a_metric_has_the_same_interval_as_a_mean() -> None:
    rng = np.random.default_rng(7)
    first, second = rng.integers(0, 2, (2, 90)).astype(float)
    one = mean_difference(first.tolist(), second.tolist(), [1] * 90)
    other = metric_difference(
        lambda rows: float(first[rows].mean()), lambda rows: float(second[rows].mean()), range(90), is_loss=True
    )
    assert (other.value, other.error, other.freedom) == pytest.approx((one.value, one.error, one.freedom))
    assert other.interval == pytest.approx(one.interval)


@pytest.mark.parametrize(("n", "chance"), [(60, 0.7), (300, 0.9), (300, 0.5)])
def test_intervals_of_accuracies_cover_the_truth(n: int, chance: float) -> None:
    rng, covered, reliable = np.random.default_rng(n), 0, 0
    for _ in range(1000):
        shared = rng.random(n) < 0.5
        right = np.where(shared, rng.random(n) < chance, rng.random((2, n)) < chance).astype(float)
        interval = metric_difference(*(_accuracy(one) for one in right), range(n), is_loss=False).interval
        if interval is not None:
            reliable += 1
            covered += interval[0] <= 0 <= interval[1]
    assert 0.93 <= covered / reliable <= 0.975
    assert reliable >= 950


def _accuracy(right: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda rows: float(right[rows].mean())


def test_rows_of_a_document_count_as_one() -> None:
    """Each row ten times gives the same evidence as each row once."""
    rng = np.random.default_rng(8)
    right = rng.integers(0, 2, (2, 40)).astype(float)
    once = metric_difference(*map(_accuracy, right), range(40), is_loss=False)
    repeated = metric_difference(*map(_accuracy, right.repeat(10, axis=1)), np.arange(400) // 10, is_loss=False)
    assert (repeated.documents, repeated.value) == (40, pytest.approx(once.value))
    assert repeated.error == pytest.approx(once.error)


def test_too_few_documents_have_no_verdict() -> None:
    rng = np.random.default_rng(9)
    for n in (1, 2, 19):
        found = _difference(*_documents(rng, n, 5.0))
        assert (found.verdict, found.interval, found.detectable) == ("unknown", None, None)
        assert found.sentence("loss").startswith("no verdict (loss +")
    one_long = mean_difference([1e6, *[1.0] * 99], [2e6, *[1.1] * 99], [10**6, *[1] * 99])
    assert one_long.verdict == "unknown" and one_long.documents == 100
    assert mean_difference([1.0] * 29 + [float("nan")], [1.0] * 30, [1] * 30).verdict == "unknown"


def test_an_adapter_that_changes_nothing_makes_no_difference() -> None:
    found = mean_difference([2.0] * 30, [2.0] * 30, [5] * 30)
    assert (found.value, found.error, found.verdict) == (0.0, 0.0, "undecided")
    assert found.sentence("loss", "row").startswith("no difference that 30 rows can show (loss +0.0000")


def test_the_order_of_documents_does_not_matter() -> None:
    sums, tokens = _documents(np.random.default_rng(10), 50, 0.2)
    order = np.random.default_rng(11).permutation(50)
    one, other = _difference(sums, tokens), _difference(sums[order], tokens[order])
    assert (one.value, one.error, one.freedom) == pytest.approx((other.value, other.error, other.freedom))
    assert one.verdict == "worse" and _difference(-sums, tokens).verdict == "better"


def test_metrics_are_computed_together() -> None:
    """A share that rises is better, and each set of rows is measured once for all metrics."""
    rng, calls = np.random.default_rng(12), 0
    first, second = (rng.random((2, 200)) < [[0.9], [0.3]]).astype(float)

    def both(rows: np.ndarray) -> list[float]:
        nonlocal calls
        calls += 1
        return [float(first[rows].mean()), float(1 - first[rows].mean())]

    found = metric_differences(
        both, lambda rows: [second[rows].mean(), 1 - second[rows].mean()], range(200), [False, True]
    )
    assert [one.verdict for one in found] == ["better", "better"] and found[0].value == pytest.approx(-found[1].value)
    assert calls == 101
    mean = mean_difference(first, second, [1] * 200, is_loss=False)
    assert mean.verdict == "better" and mean.better == pytest.approx(float((first > second).mean()))


def test_a_metric_that_parts_of_the_rows_do_not_define_has_no_interval() -> None:
    value = lambda rows: float("nan") if 3 not in rows else 0.5  # noqa: E731
    found = metric_difference(value, lambda rows: 0.25, range(40), is_loss=False)
    assert (found.value, found.verdict) == (0.25, "unknown")
