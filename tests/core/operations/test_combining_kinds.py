"""Combining on kinds and variants with more than plain matrices: DoRA, convolutions, attention, biases, aLoRA."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.core import (
    adapters,
    attach,
    combine,
    compress,
    load_adapter,
    merged_state_dict,
    rescale,
    save_adapter,
)
from lorakit.core.operations.combination_types import CombinationType
from lorakit.errors import (
    AdapterError,
)

from ...laws.zoo import (
    CONV1,
    CONV1DS,
    CONV2,
    EMBEDDING,
    INVOCATION,
    LINEARS,
    MHA,
    MHA_WIDTHS,
    WAITING_LINEARS,
    Specimen,
    randomise,
)
from .updates import deltas, effect, made, same, scales, total

# --- DoRA


@pytest.mark.parametrize("specimen", [LINEARS, CONV1DS], ids=str)
def test_dora_is_combined_exactly(specimen: Specimen) -> None:
    """Two DoRA adapters and a plain one: W' − W of the result is the weighted sum of the changes of W by each."""
    model = made(specimen, "a", "b", use_dora=True)
    attach(model, specimen.config(**scales("d", specimen)), "d")
    randomise(model, "d", 77)
    weights = {"a": 0.7, "b": -0.4, "d": 1.5}
    base = specimen.model(torch.float64).state_dict()
    combine(model, list(weights), list(weights.values()), "sum", way="cat")
    assert adapters(model)["sum"].use_dora
    merged = {name: merged_state_dict(model, name) for name in [*weights, "sum"]}
    for leaf in ("up.weight", "square.weight"):
        expected = base[leaf] + sum(weight * (merged[name][leaf] - base[leaf]) for name, weight in weights.items())
        torch.testing.assert_close(merged["sum"][leaf], expected, rtol=1e-9, atol=1e-9)


def test_dora_of_several_active_adapters_is_their_combination() -> None:
    model = made(LINEARS, "a", "c", use_dora=True)
    combine(model, ["a", "c"], [1.0, 1.0], "sum", way="cat")
    torch.testing.assert_close(effect(model, LINEARS, "sum"), effect(model, LINEARS, "a", "c"))


def test_dora_cut_to_a_rank_keeps_its_gains() -> None:
    model = made(LINEARS, "a", "c", use_dora=True)
    report = combine(model, ["a", "c"], [1.0, 0.5], "near", way=CombinationType("svd", rank=2))
    assert 0 < report.deviation < 1
    combine(model, ["a", "c"], [1.0, 0.5], "all", way=CombinationType("svd", rank=20))
    combine(model, ["a", "c"], [1.0, 0.5], "cat", way="cat")
    torch.testing.assert_close(effect(model, LINEARS, "all"), effect(model, LINEARS, "cat"))


def test_what_dora_cannot_do() -> None:
    model = made(LINEARS, "a", "c", use_dora=True)
    with pytest.raises(AdapterError, match="a uses DoRA, and allows only 'cat' and 'svd'"):
        combine(model, ["a", "c"], [1.0, 1.0], "x", way="linear")
    twin = made(LINEARS, "a", use_dora=True)
    with torch.no_grad():
        twin.up.lora_magnitude_vector["a"].weight.mul_(0)
    with pytest.raises(
        AdapterError, match=r"At up, the scales of the DoRA adapters cancel out \(affected outputs: 20\)"
    ):
        combine(twin, ["a"], [1.0], "x", way="cat")


# --- kinds with factors other than plain matrices


def _grouped() -> nn.Module:
    up, square = nn.Conv1d(4, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1, groups=2)
    return nn.Sequential(OrderedDict(up=up, act=nn.Tanh(), square=square, flat=nn.Flatten(), out=nn.Linear(48, 7)))


def _four_channels(rows: int) -> Tensor:
    return torch.randn(rows, 4, 6, generator=torch.Generator().manual_seed(7))


GROUPED = Specimen("grouped", _grouped, ("up", "square"), _four_channels, "Conv1d")
SHAPES = [
    (CONV1, {}),
    (CONV2, {}),
    (GROUPED, {}),
    (MHA, {}),
    (MHA_WIDTHS, {}),
    (CONV2, {"use_dora": True}),
    (GROUPED, {"use_dora": True}),
    (EMBEDDING, {"use_dora": True}),
    (LINEARS, {"lora_bias": True}),
    (CONV1, {"lora_bias": True}),
    (WAITING_LINEARS, {"alora_invocation_tokens": list(INVOCATION), "task_type": "CAUSAL_LM"}),
]


@pytest.mark.parametrize(
    ("specimen", "fields"), SHAPES, ids=[f"{specimen}-{'-'.join(fields)}" for specimen, fields in SHAPES]
)
def test_combined_and_compressed_on_every_kind(specimen: Specimen, fields: dict[str, Any], tmp_path: Path) -> None:
    """One adapter has the effect of two together, at any sufficient rank, and after saving and loading."""
    model = specimen.model(torch.float64)
    attach(model, specimen.config(**fields), "a")
    attach(model, specimen.config(**{**fields, "r": 2, "use_rslora": True}), "b")
    for number, name in enumerate("ab"):
        randomise(model, name, number + 1)
    both = effect(model, specimen, "a", "b")
    combine(model, ["a", "b"], [1.0, 1.0], "cat", way="cat")
    report = combine(model, ["a", "b"], [1.0, 1.0], "svd", way=CombinationType("svd", rank=8))
    assert {site.r for site in report.sites} == {8}
    compressed = compress(model, "svd", energy=1.0)
    assert max(site.r for site in compressed.sites) == 6
    for number, name in enumerate(("cat", "svd", "compressed")):
        torch.testing.assert_close(effect(model, specimen, name), both, rtol=1e-9, atol=1e-9)
        save_adapter(model, tmp_path / name, name)
        load_adapter(model, tmp_path / name, f"again{number}")
        assert torch.equal(effect(model, specimen, f"again{number}"), effect(model, specimen, name))


def test_a_bias_on_b_of_one_adapter_alone(tmp_path: Path) -> None:
    model = LINEARS.model(torch.float64)
    attach(model, LINEARS.config(target_modules=["up"], lora_bias=True), "a")
    attach(model, LINEARS.config(r=2), "b")
    for number, name in enumerate("ab"):
        randomise(model, name, number + 1)
    combine(model, ["a", "b"], [1.0, 1.0], "sum", way="cat")
    torch.testing.assert_close(effect(model, LINEARS, "sum"), effect(model, LINEARS, "a", "b"))
    save_adapter(model, tmp_path, "sum")
    load_adapter(model, tmp_path, "again")


def test_adapters_that_wait_for_different_tokens_are_refused() -> None:
    model = WAITING_LINEARS.model()
    attach(model, WAITING_LINEARS.config(alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM"), "a")
    attach(model, WAITING_LINEARS.config(), "b")
    with pytest.raises(AdapterError, match="have different invocation tokens"):
        combine(model, ["a", "b"], [1.0, 1.0], "x")


def test_an_adapter_that_was_loaded_in_part_is_combined_as_far_as_it_is_there(tmp_path: Path) -> None:
    wider = LINEARS.model()
    attach(wider, LINEARS.config(target_modules=["up", "square", "out"]), "a")
    randomise(wider, "a", 1)
    save_adapter(wider, tmp_path / "a", "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(weights).items() if ".out." not in n}, weights)
    (tmp_path / "a" / "lorakit.json").unlink()
    model = LINEARS.model()
    with pytest.warns(UserWarning, match="loaded in part as allowed"):
        load_adapter(model, tmp_path / "a", "a", allow=("key_mismatch",))
    report = rescale(model, "a", 2.0)
    assert report.config.target_modules == {"up", "square"}
    same(deltas(model, "rescaled"), total(model, {"a": 2.0}), 1e-5)
