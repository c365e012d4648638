"""Law 2: the merged model computes what the adapted model computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit.core import disable, merge, merge_and_unload, merged_state_dict, route, sites, use

from .snapshots import same_bits, snapshot
from .tolerances import assert_close, assert_differs
from .zoo import ARCHITECTURES, MIXTRAL, Case, Specimen, cases, run, with_adapters


@pytest.mark.parametrize("case", cases(mergeable=True))
def test_merge(case: Case) -> None:
    model, given = case.adapted("a"), case.specimen.given(case.dtype)
    base = run(case.specimen.model(case.dtype), given)
    expected = run(model, given)
    assert_differs(expected, base, case.dtype)
    report = merge(model, "a")
    assert report.names == ("a",)
    assert_close(run(model, given), expected, case.dtype)


@pytest.mark.parametrize("case", cases(mergeable=True))
def test_merge_of_two_is_both_active(case: Case) -> None:
    model, given = case.adapted("a", "b"), case.specimen.given(case.dtype)
    with use(model, "a", "b"):
        expected = run(model, given)
    assert_differs(expected, run(model, given), case.dtype)
    merge(model, "a")
    merge(model, "b")
    with use(model, "b", "a"):
        assert_close(run(model, given), expected, case.dtype)
    plain = case.specimen.model(case.dtype, seed=99)
    plain.load_state_dict(merged_state_dict(model, "b", "a"))
    assert_close(run(plain, given), expected, case.dtype)


@pytest.mark.parametrize("case", cases(mergeable=True))
def test_what_is_merged_does_not_leak_into_other_routes(case: Case) -> None:
    model, given = case.adapted("a", "b", "c"), case.specimen.given(case.dtype)
    routes = [("a",), ("b",), ("c",), ("a", "b"), ("b", "c")]
    expected = []
    for names in routes:
        with use(model, *names):
            expected.append(run(model, given))
    with disable(model):
        base = run(model, given)
    merge(model, "a", "b")
    for names, before in zip(routes, expected, strict=True):
        with use(model, *names):
            assert_close(run(model, given), before, case.dtype)
    with disable(model):
        assert same_bits(run(model, given), base)
    if not case.takes_rows:
        return
    with route(model, ["a", None, "b", "c"]):
        mixed = run(model, given)
    for row, before in enumerate((expected[0], base, expected[1], expected[2])):
        assert_close(mixed[row], before[row], case.dtype)


@pytest.mark.parametrize("case", cases(mergeable=True))
def test_merged_beside_one_that_is_not(case: Case) -> None:
    """A variant that reads the base's output gets the unmerged one, whatever was merged into the weight."""
    model, given = case.adapted("a", "b"), case.specimen.given(case.dtype)
    with use(model, "a", "b"):
        expected = run(model, given)
    merge(model, "a")
    with use(model, "a", "b"):
        assert_close(run(model, given), expected, case.dtype)


@pytest.mark.parametrize("case", cases(mergeable=True))
def test_merged_state_dict_in_a_plain_model(case: Case) -> None:
    model, given = case.adapted("a"), case.specimen.given(case.dtype)
    expected, before = run(model, given), snapshot(model)
    tensors = merged_state_dict(model, "a")
    assert snapshot(model) == before
    plain = case.specimen.model(case.dtype, seed=99)
    plain.load_state_dict(tensors, strict=True)
    assert_close(run(plain, given), expected, case.dtype)


@pytest.mark.parametrize("case", cases(mergeable=True))
def test_merge_and_unload_leaves_a_plain_model(case: Case) -> None:
    model, given = case.adapted("a", "b"), case.specimen.given(case.dtype)
    expected = run(model, given)
    merge_and_unload(model, "a")
    assert_close(run(model, given), expected, case.dtype)
    assert sites(model) == []
    assert list(model.state_dict()) == list(case.specimen.model(case.dtype).state_dict())


@pytest.mark.parametrize("specimen", [*ARCHITECTURES, MIXTRAL], ids=str)
def test_architectures(specimen: Specimen) -> None:
    model, given = with_adapters(specimen, "a"), specimen.given()
    expected = run(model, given)
    assert_differs(expected, run(specimen.model(), given), torch.float32)
    plain = specimen.model(seed=99)
    plain.load_state_dict(merged_state_dict(model, "a"), strict=True)
    assert_close(run(plain, given), expected, torch.float32)
    merge(model, "a")
    assert_close(run(model, given), expected, torch.float32)


def test_merged_state_dict_equals_what_merge_writes() -> None:
    specimen = ARCHITECTURES[0]
    model = with_adapters(specimen, "a")
    apart = merged_state_dict(model, "a")
    merge_and_unload(model, "a")
    present = model.state_dict()
    assert set(apart) == set(present)
    assert all(same_bits(apart[name], present[name]) for name in present)


def test_module_copies_and_biases_are_merged_too() -> None:
    specimen = ARCHITECTURES[2]
    model = with_adapters(specimen, "a", modules_to_save=["classifier"], bias="all")
    given = specimen.given()
    expected = run(model, given)
    plain: nn.Module = specimen.model(seed=99)
    plain.load_state_dict(merged_state_dict(model, "a"), strict=True)
    assert_close(run(plain, given), expected, torch.float32)
    merge_and_unload(model, "a")
    assert_close(run(model, given), expected, torch.float32)
    assert list(model.state_dict()) == list(plain.state_dict())
