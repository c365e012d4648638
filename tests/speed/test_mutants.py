"""Mutants of transformers' source code: an accelerated model computes what the plain model computes with the mutant.

Only mutants count with which the plain model runs and gives other results. A failure lists each mutant that was missed,
with its file, function, line and edit.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .mutant_models import FAMILIES, WAYS, order, unseen

SEED = 0
PER_CASE = 10
"""Mutants that count in one case of the slow test."""

SAMPLE = ("llama", "gemma3", "gpt2", "bert", "t5")
"""Families in the usual suite."""


def missed(family: str, way: str, count: int, folder: Path) -> list[str]:
    """Try mutants until a number of them counted, and return those that the accelerated model does not follow."""
    found, wrong = 0, []
    for target, mutant in enumerate(order(family, way, SEED)):
        place = folder / str(target)
        place.mkdir()
        verdict = unseen(family, way, mutant, place)
        found += verdict is not None
        wrong += [f"{mutant}: {verdict}"] if verdict else []
        if found == count:
            return wrong
    raise AssertionError(f"only {found} mutants count")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", SAMPLE)
def test_a_sample_of_mutants(family: str, way: str, tmp_path: Path) -> None:
    wrong = missed(family, way, 2, tmp_path)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_mutants(family: str, way: str, tmp_path: Path) -> None:
    wrong = missed(family, way, PER_CASE, tmp_path)
    assert not wrong, "\n".join(wrong)


def test_at_least_300_mutants_count() -> None:
    assert len(FAMILIES) * len(WAYS) * PER_CASE >= 300
