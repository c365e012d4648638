"""Law 5: a batch whose rows use different adapters gives each row what it would get alone."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.core import attach, disable, route, use
from lorakit.errors import RouteError

from .tolerances import assert_close, assert_differs
from .zoo import (
    ARCHITECTURES,
    BERT,
    EVERY_KIND,
    GPT2,
    LINEARS,
    LLAMA,
    Case,
    Specimen,
    cases,
    randomise,
    run,
    with_adapters,
)


def one_by_one(model: nn.Module, given: Any, rows: list[str | None]) -> Tensor:
    """Return each row of the output with its adapter, computed in a batch where all rows have that adapter."""
    whole = {}
    for name in set(rows):
        with use(model, name) if name else disable(model):
            whole[name] = run(model, given)
    return torch.stack([whole[name][row] for row, name in enumerate(rows)])


def assert_told_apart(model: nn.Module, given: Any, names: list[str | None], dtype: torch.dtype) -> None:
    """Check that any two adapters, and the base, give different outputs for every row."""
    answers = [one_by_one(model, given, [name] * 4) for name in names]
    for first, second in itertools.combinations(answers, 2):
        for row in range(4):
            assert_differs(first[row], second[row], dtype)


@pytest.mark.parametrize("case", cases())
def test_rows(case: Case) -> None:
    model, given = case.adapted("a", "b"), case.specimen.given(case.dtype)
    assert_told_apart(model, given, ["a", "b", None], case.dtype)
    for rows in (["a", "b", None, "a"], [None, None, "b", None], ["b", "a", "b", "a"], ["a"] * 4, [None] * 4):
        with route(model, rows, keep=True):
            if len(set(rows)) > 1 and not case.takes_rows:
                with pytest.raises(RouteError, match=f"a {case.kind} has one weight for all rows"):
                    run(model, given)
                continue
            kept = run(model, given)
        with route(model, rows):
            mixed = run(model, given)
        expected = one_by_one(model, given, rows)
        assert_close(mixed, expected, case.dtype)
        assert_close(kept, expected, case.dtype)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("specimen", ARCHITECTURES, ids=str)
def test_architectures(specimen: Specimen, keep: bool) -> None:
    model, given = with_adapters(specimen, "a", "b", "c"), specimen.given()
    assert_told_apart(model, given, ["a", "b", "c", None], torch.float32)
    for rows in itertools.islice(itertools.permutations(["a", "b", "c", None]), 0, 24, 5):
        with route(model, list(rows), keep=keep):
            mixed = run(model, given)
        assert_close(mixed, one_by_one(model, given, list(rows)), torch.float32)


def test_base_rows_have_the_bases_own_answer() -> None:
    base = run(EVERY_KIND.model(), EVERY_KIND.given())
    model = with_adapters(EVERY_KIND, "a")
    with route(model, [None, "a", None, "a"]):
        mixed = run(model, EVERY_KIND.given())
    assert_close(mixed[[0, 2]], base[[0, 2]], torch.float32)
    assert_differs(mixed[1], base[1], torch.float32)


@pytest.mark.parametrize("keep", [False, True])
def test_adapters_of_different_make_in_one_batch(keep: bool) -> None:
    """Plain LoRA, DoRA, rsLoRA of another rank, and an adapter on other sites only."""
    model, given = LINEARS.model(), LINEARS.given()
    attach(model, LINEARS.config(), "plain")
    attach(model, LINEARS.config(use_dora=True, r=3), "dora")
    attach(model, LINEARS.config(use_rslora=True, r=7, lora_alpha=5), "rs")
    attach(model, LINEARS.config(target_modules=["out"]), "elsewhere")
    names = ["plain", "dora", "rs", "elsewhere"]
    for seed, name in enumerate(names):
        randomise(model, name, seed)
    assert_told_apart(model, given, [*names, None], torch.float32)
    for rows in ([*names], [*reversed(names)], ["dora", None, "dora", "elsewhere"]):
        with route(model, rows, keep=keep):
            mixed = run(model, given)
        assert_close(mixed, one_by_one(model, given, rows), torch.float32)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("specimen", [LINEARS, LLAMA, GPT2], ids=str)
def test_many_adapters_of_different_rank(specimen: Specimen, dtype: torch.dtype, keep: bool) -> None:
    """Rows of one token and of many, in every order of adapters and base rows, in stacks of more than one rank."""
    model, ranks = specimen.model(dtype), {"a": 4, "b": 1, "c": 3, "d": 4, "e": 9, "f": 2}
    for seed, (name, rank) in enumerate(ranks.items()):
        attach(model, specimen.config(r=rank, lora_alpha=2 * rank + seed), name)
        randomise(model, name, seed, 0.3)
    dealt = [*ranks, None, *reversed(ranks), None, "a", "a", "e"]
    given = specimen.given(dtype, rows=len(dealt))
    for rows in (dealt, [*reversed(dealt)], [*ranks, *[None] * 11], ["c"] * 16 + [None]):
        with route(model, rows, keep=keep):
            mixed, again = run(model, given), run(model, given)
        alone = one_by_one(model, given, rows)
        assert torch.equal(mixed, again)
        if specimen is LINEARS or dtype not in (torch.bfloat16, torch.float16):
            assert_close(mixed, alone, dtype)
        else:  # what whole models make of other roundings: as near to the truth as the rows alone are
            exact = one_by_one(copy.deepcopy(model).double(), specimen.given(torch.float64, len(dealt)), rows)
            errors = [(answer.double() - exact).norm() / exact.norm() for answer in (mixed, alone)]
            assert errors[0] <= 1.5 * errors[1]


def test_module_copies_go_with_their_rows() -> None:
    model, given = BERT.model(), BERT.given()
    attach(model, BERT.config(modules_to_save=["classifier"]), "a")
    attach(model, BERT.config(modules_to_save=["classifier"]), "b")
    attach(model, BERT.config(), "c")
    for seed, name in enumerate("abc"):
        randomise(model, name, seed)
    assert_told_apart(model, given, ["a", "b", "c", None], torch.float32)
    for rows in (["a", "b", "c", None], [None, "b", None, "a"]):
        with route(model, rows):
            mixed = run(model, given)
        assert_close(mixed, one_by_one(model, given, rows), torch.float32)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_go_with_their_rows(bias: str) -> None:
    model, given = BERT.model(), BERT.given()
    attach(model, BERT.config(bias=bias), "a")
    attach(model, BERT.config(), "b")
    randomise(model, "a", 1)
    randomise(model, "b", 2)
    rows = ["a", "b", None, "a"]
    with route(model, rows):
        mixed = run(model, given)
    assert_close(mixed, one_by_one(model, given, rows), torch.float32)
    base = run(BERT.model(), given)
    assert_close(mixed[2], base[2], torch.float32)


def test_gradients_of_a_mixed_batch_are_those_of_its_rows() -> None:
    model, given = with_adapters(EVERY_KIND, "a", "b", dtype=torch.float64), EVERY_KIND.given()
    rows = ["a", "b", None, "a"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    with route(model, rows):
        model(given).pow(2).sum().backward()
    mixed = [p.grad.clone() for p in parameters]
    model.zero_grad()
    for row, name in enumerate(rows):
        if name is not None:
            with use(model, name):
                model(given[row : row + 1]).pow(2).sum().backward()
    for parameter, gradient in zip(parameters, mixed, strict=True):
        assert gradient.abs().max() > 0
        assert_close(gradient, parameter.grad, torch.float64)
