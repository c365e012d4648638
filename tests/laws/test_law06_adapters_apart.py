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
from lorakit.errors import TargetError

from .snapshots import bits, same_bits, snapshot
from .tolerances import assert_differs
from .zoo import ARCHITECTURES, BERT, EVERY_KIND, MIXTRAL, Case, Specimen, cases, randomise, run, with_adapters


def train(model: nn.Module, specimen: Specimen, name: str, dtype: torch.dtype = torch.float32, steps: int = 3) -> None:
    """Train one adapter in training mode, with an optimizer over all adapters' parameters."""
    from .zoo import output

    training = model.training
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.5)
    with use(model, name):
        for _ in range(steps):
            optimizer.zero_grad()
            output(model, specimen.given(dtype)).float().pow(2).mean().backward()
            optimizer.step()
    model.train(training)


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


@pytest.mark.parametrize("specimen", [*ARCHITECTURES, MIXTRAL], ids=str)
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


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_copy_is_made_of_the_base_not_of_what_another_adapter_trained(bias: str, tmp_path: Path) -> None:
    model, given = BERT.model(), BERT.given()
    base = run(model, given)
    attach(model, BERT.config(bias=bias), "a")
    randomise(model, "a", 1)
    attach(model, BERT.config(modules_to_save=["classifier", "pooler"]), "b")
    with use(model, "b"):
        assert same_bits(run(model, given), base)
    randomise(model, "b", 2)
    with use(model, "b"):
        expected = run(model, given)
    save_adapter(model, tmp_path, "b")
    detach(model, "a")
    with use(model, "b"):
        assert same_bits(run(model, given), expected)
    fresh = BERT.model()
    load_adapter(fresh, tmp_path, "b")
    assert same_bits(run(fresh, given), expected)


def test_a_file_does_not_depend_on_what_sat_beside_the_adapter(tmp_path: Path) -> None:
    """Biases are the hard case: those of another adapter's sites are deeper in the model."""
    model = BERT.model()
    attach(model, BERT.config(target_modules=["key"], modules_to_save=["classifier"]), "a")
    attach(model, BERT.config(bias="all"), "b")
    alone = BERT.model()
    attach(alone, BERT.config(bias="all"), "b")
    for either in (model, alone):
        randomise(either, "b", 2)
    one, other = save_adapter(model, tmp_path / "1", "b"), save_adapter(alone, tmp_path / "2", "b")
    assert one.weights_sha256 == other.weights_sha256
    for target in (BERT.model(), with_adapters(BERT, "x", target_modules=["value"], modules_to_save=["classifier"])):
        load_adapter(target, tmp_path / "1", "b")
        with use(target, "b"), use(alone, "b"):
            assert same_bits(run(target, BERT.given()), run(alone, BERT.given()))


@pytest.mark.parametrize("targets", [["query", "pooler.dense"], ["query", "classifier"]])
def test_a_copy_of_a_module_that_holds_another_adapters_sites_is_refused(targets: list[str]) -> None:
    model = with_adapters(BERT, "a", target_modules=targets)
    before = snapshot(model)
    inside = targets[1].split(".")[0]
    with pytest.raises(TargetError, match=f"modules_to_save names .*{inside}.*another adapter"):
        attach(model, BERT.config(modules_to_save=[inside]), "b")
    assert snapshot(model) == before
