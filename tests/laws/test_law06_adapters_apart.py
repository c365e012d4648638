"""Law 6: nothing that happens to one adapter can be seen in another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lorakit.core import (
    activate,
    attach,
    detach,
    load_adapter,
    merge,
    route,
    save_adapter,
    trainable_parameters,
    unmerge,
    use,
)

from .snapshots import bits, same_bits
from .tolerances import assert_differs
from .zoo import ARCHITECTURES, EVERY_KIND, Case, Specimen, cases, randomise, run, with_adapters


def train(model: nn.Module, specimen: Specimen, name: str, dtype: torch.dtype = torch.float32, steps: int = 3) -> None:
    """Train one adapter with an optimizer that has hold of every adapter's parameters."""
    from .zoo import output

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.5)
    with use(model, name):
        for _ in range(steps):
            optimizer.zero_grad()
            output(model, specimen.given(dtype)).float().pow(2).mean().backward()
            optimizer.step()


def numbers(model: nn.Module, name: str) -> dict[str, str]:
    return {path: bits(parameter) for path, parameter in trainable_parameters(model, name)}


@pytest.mark.parametrize("case", cases())
def test_training_one_leaves_the_other(case: Case) -> None:
    model, given = case.adapted("a", "b"), case.specimen.given(case.dtype)
    with use(model, "a"):
        before = run(model, given)
    numbers_a, numbers_b = numbers(model, "a"), numbers(model, "b")
    train(model, case.specimen, "b", case.dtype)
    assert numbers(model, "a") == numbers_a
    assert all(numbers(model, "b")[path] != numbers_b[path] for path in numbers_b), "every number of b must learn"
    with use(model, "a"):
        assert same_bits(run(model, given), before)


@pytest.mark.parametrize("specimen", ARCHITECTURES, ids=str)
def test_training_one_leaves_the_other_in_architectures(specimen: Specimen) -> None:
    model, given = with_adapters(specimen, "a", "b"), specimen.given()
    with use(model, "a"):
        before = run(model, given)
    train(model, specimen, "b")
    with use(model, "a"):
        assert same_bits(run(model, given), before)


def _attach(model: nn.Module, _: Path) -> None:
    attach(model, EVERY_KIND.config(r=2, use_rslora=True), "new")
    randomise(model, "new", 9)


def _attach_detach(model: nn.Module, folder: Path) -> None:
    _attach(model, folder)
    detach(model, "new")


def _load(model: nn.Module, folder: Path) -> None:
    save_adapter(with_adapters(EVERY_KIND, "x", "y"), folder, "y")
    load_adapter(model, folder, "new")


def _merge_unmerge(model: nn.Module, _: Path) -> None:
    merge(model, "b")
    unmerge(model, "b")


def _activate(model: nn.Module, _: Path) -> None:
    activate(model, "b")
    run(model, EVERY_KIND.given())
    activate(model, "a")


def _route(model: nn.Module, _: Path) -> None:
    with route(model, ["b", None, "b", "b"]):
        run(model, EVERY_KIND.given())


def _fail_inside(model: nn.Module, _: Path) -> None:
    with pytest.raises(ZeroDivisionError), use(model, "b"):
        1 / 0  # noqa: B018


def _detach_b(model: nn.Module, _: Path) -> None:
    detach(model, "b")


EVENTS = (_attach, _attach_detach, _load, _merge_unmerge, _activate, _route, _fail_inside, _detach_b)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__.strip("_"))
def test_what_happens_beside_it_changes_no_bit(event: Callable[[nn.Module, Path], None], tmp_path: Path) -> None:
    model, given = with_adapters(EVERY_KIND, "a", "b"), EVERY_KIND.given()
    before, numbers_a = run(model, given), numbers(model, "a")
    with use(model, "b"):
        assert_differs(run(model, given), before, torch.float32)
    event(model, tmp_path)
    assert numbers(model, "a") == numbers_a
    assert same_bits(run(model, given), before)


@pytest.mark.parametrize("other", ["embed", "weight", "a2", "lora_A", "default"])
def test_names_of_adapters_do_not_mix(other: str) -> None:
    """Names that are parts of each other, or of paths in the model."""
    model = EVERY_KIND.model()
    for seed, name in enumerate(("a", other)):
        attach(model, EVERY_KIND.config(), name)
        randomise(model, name, seed)
    paths = [{path for path, _ in trainable_parameters(model, name)} for name in ("a", other)]
    assert paths[0] and paths[1] and not paths[0] & paths[1]
    assert len(paths[0] | paths[1]) == len(trainable_parameters(model))
