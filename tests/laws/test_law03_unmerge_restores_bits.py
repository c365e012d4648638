"""Law 3: unmerging restores the bits of the base, in any order; it raises if they were not kept."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lorakit.core import detach, disable, merge, unmerge
from lorakit.errors import MergeError

from .snapshots import BaseBits, bits, same_bits, snapshot
from .tolerances import assert_differs
from .zoo import ARCHITECTURES, BERT, EVERY_KIND, MIXTRAL, Case, Specimen, base_tensors, cases, run, with_adapters

ORDERS = list(itertools.permutations("abc"))


def hashes(model: nn.Module) -> dict[str, str]:
    return {name: bits(tensor) for name, tensor in base_tensors(model).items()}


@pytest.mark.parametrize("case", cases(mergeable=True))
def test_in_any_order(case: Case) -> None:
    plain = BaseBits(case.specimen.model(case.dtype)).before
    model = case.adapted("a", "b", "c")
    standing = hashes(model)  # an init may have replaced the base weights by a residual
    assert (standing == plain) is not case.moves_base
    merged: dict[tuple[str, ...], dict[str, str]] = {}
    for left in itertools.chain.from_iterable(itertools.combinations("abc", n) for n in (1, 2, 3)):
        merge(model, *left)
        merged[left] = hashes(model)
        unmerge(model)
        assert hashes(model) == standing
    assert len({tuple(sorted(h.items())) for h in merged.values()}) == 7  # all sets of adapters differ
    for order in ORDERS:
        for name in "abc":
            merge(model, name)
        assert hashes(model) == merged["a", "b", "c"]
        for count, name in enumerate(order):
            unmerge(model, name)
            left = tuple(other for other in "abc" if other not in order[: count + 1])
            assert hashes(model) == (merged[left] if left else standing)
    detach(model)
    assert hashes(model) == plain


@pytest.mark.parametrize("keep_base", [True, "cpu"])
@pytest.mark.parametrize("specimen", [EVERY_KIND, *ARCHITECTURES, MIXTRAL], ids=str)
def test_architectures(specimen: Specimen, keep_base: bool | str) -> None:
    plain = BaseBits(specimen.model(torch.bfloat16)).before
    model, given = with_adapters(specimen, "a", "b", dtype=torch.bfloat16), specimen.given()
    before = run(model, given)
    merge(model, "a", keep_base=keep_base)
    merge(model, "b", keep_base=keep_base)
    assert hashes(model) != plain
    unmerge(model, "a")
    unmerge(model, "b")
    assert hashes(model) == plain
    assert same_bits(run(model, given), before)


def test_a_hundred_cycles_drift_by_no_bit() -> None:
    model = with_adapters(EVERY_KIND, "a", dtype=torch.bfloat16)
    before = hashes(model)
    for _ in range(100):
        merge(model, "a")
        unmerge(model, "a")
    assert hashes(model) == before


def test_disable_while_merged_is_the_original_base() -> None:
    base = run(EVERY_KIND.model(torch.bfloat16), EVERY_KIND.given())
    model = with_adapters(EVERY_KIND, "a", dtype=torch.bfloat16)
    merge(model, "a")
    assert_differs(run(model, EVERY_KIND.given()), base, torch.bfloat16)
    with disable(model):
        assert same_bits(run(model, EVERY_KIND.given()), base)


def test_module_copies_and_biases_come_back() -> None:
    plain = BaseBits(BERT.model()).before
    model, given = with_adapters(BERT, "a", modules_to_save=["classifier"], bias="all"), BERT.given()
    before = run(model, given)
    merge(model, "a")
    unmerge(model, "a")
    assert same_bits(run(model, given), before)
    detach(model, "a")
    assert hashes(model) == plain


def test_without_kept_bits_unmerge_and_disable_and_detach_refuse() -> None:
    model = with_adapters(EVERY_KIND, "a")
    report = merge(model, "a", keep_base=False)
    assert report.kept_bytes == 0
    before = snapshot(model)
    with pytest.raises(MergeError, match="keep_base"):
        unmerge(model, "a")
    with pytest.raises(MergeError):
        detach(model, "a")
    with pytest.raises(MergeError):
        detach(model)
    assert snapshot(model) == before
    with pytest.raises(MergeError), disable(model):
        run(model, EVERY_KIND.given())
    assert snapshot(model) == before


def test_kept_bytes_are_those_of_the_merged_weights() -> None:
    model = with_adapters(EVERY_KIND, "a", dtype=torch.bfloat16)
    weights = sum(getattr(model, name).base_layer.weight.numel() for name in EVERY_KIND.targets)
    assert merge(model, "a").kept_bytes == 2 * weights
