"""Mutants of transformers' source code and of settings: an accelerated model computes what the plain model computes
with the mutant.

Only mutants count with which the plain model runs and gives other results. A failure lists each mutant that was missed,
with its file, function, line and edit.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import pytest

from lorakit.speed import accelerate

from . import mutant_checks, mutant_settings
from .mutant_models import FAMILIES, TOLERANCE, difference, results, usual
from .mutants import Mutant, chosen

SEED = 0
SOURCE, SETTINGS = 8, 3
"""Mutants that count in one case of the slow tests."""

LEAST = 300
SAMPLE = ("llama", "gemma3", "gpt2", "bert", "t5")
"""Families in `make test`."""

One = TypeVar("One")


def missed(found: Iterable[One], unseen: Callable[[One], str | None], count: int) -> str:
    """Try mutants until a number of them counted, and return those that the accelerated model does not follow."""
    counted, wrong = 0, []
    for one in found:
        verdict = unseen(one)
        counted += verdict is not None
        wrong += [f"{one}: {verdict}"] if verdict else []
        if counted == count:
            return "\n".join(wrong)
    raise AssertionError(f"only {counted} mutants count")


def missed_in_source(family: str, way: str, count: int, folder: Path) -> str:
    def unseen(mutant: Mutant) -> str | None:
        place = folder / str(len(list(folder.iterdir())))
        place.mkdir()
        return mutant_checks.unseen(family, way, mutant, place)

    return missed(mutant_checks.order(family, way, SEED), unseen, count)


def missed_in_settings(family: str, way: str, count: int) -> str:
    found = mutant_settings.order(family, way, SEED)
    return missed(found, lambda setting: mutant_settings.unseen(family, way, setting), count)


@pytest.mark.costly
@pytest.mark.parametrize("way", mutant_checks.WAYS)
@pytest.mark.parametrize("family", SAMPLE)
def test_a_sample_of_mutants(family: str, way: str, tmp_path: Path) -> None:
    wrong = missed_in_source(family, way, 2, tmp_path)
    assert not wrong, wrong


@pytest.mark.costly
@pytest.mark.parametrize("way", mutant_settings.WAYS)
@pytest.mark.parametrize("family", SAMPLE[:3])
def test_a_sample_of_settings(family: str, way: str) -> None:
    wrong = missed_in_settings(family, way, 1)
    assert not wrong, wrong


@pytest.mark.slow
@pytest.mark.parametrize("way", mutant_checks.WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_mutants(family: str, way: str, tmp_path: Path) -> None:
    wrong = missed_in_source(family, way, SOURCE, tmp_path)
    assert not wrong, wrong


@pytest.mark.slow
@pytest.mark.parametrize("way", mutant_settings.WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_mutants_of_settings(family: str, way: str) -> None:
    wrong = missed_in_settings(family, way, SETTINGS)
    assert not wrong, wrong


def test_enough_mutants_count() -> None:
    assert len(FAMILIES) * (len(mutant_checks.WAYS) * SOURCE + len(mutant_settings.WAYS) * SETTINGS) >= LEAST


@pytest.mark.costly(cases=6)
@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_mutant_the_results_agree(family: str, logits: bool) -> None:
    """Otherwise a mutant that is seen proves nothing."""
    model = FAMILIES[family].build()
    acceleration = accelerate(model, logits=logits)
    assert acceleration.swaps
    assert difference(results(model), usual(family)) <= TOLERANCE


def test_a_mutant_is_another_program_at_the_same_lines() -> None:
    source = mutant_checks.source_of(FAMILIES["llama"].module)[1]
    own, lines = ast.dump(ast.parse(source)), source.count("\n")
    found = [mutant for mutant in mutant_checks.mutants_of("llama") if mutant.module == FAMILIES["llama"].module]
    for mutant in chosen(found, str(SEED))[:40]:
        for one in (mutant, mutant.hidden()):
            changed = one.apply(source)
            assert ast.dump(ast.parse(changed)) != own, str(one)
            assert changed.count("\n") == lines


def test_the_same_seed_gives_the_same_mutants() -> None:
    first, second, other = (mutant_checks.order("llama", mutant_checks.WAYS[1], seed) for seed in (0, 0, 1))
    assert first == second and first != other


def test_a_patch_and_a_release_are_taken_back(tmp_path: Path) -> None:
    name = FAMILIES["llama"].module
    source, module = mutant_checks.source_of(name)[1], importlib.import_module(name)
    mutant = next(one for one in mutant_checks.mutants_of("llama") if one.function == "rotate_half")
    own, rotate = dict(vars(module)), module.rotate_half
    with mutant_checks.patched(mutant, tmp_path):
        assert module.rotate_half is not rotate and inspect.getsource(module.rotate_half) != inspect.getsource(rotate)
    with mutant_checks.released(name, mutant.apply(source), tmp_path) as made:
        assert importlib.import_module(name) is made and inspect.getsource(made.LlamaMLP.forward)
        assert inspect.getsource(made.rotate_half) != inspect.getsource(rotate)
    assert vars(module) == own and importlib.import_module(name) is module
