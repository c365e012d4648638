"""Intruders are found and weakened by the paper's definition, for every kind and layout of the base."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core import adapters, attach, reduce_intruders
from lorakit.core.model.index import layers
from lorakit.errors import AdapterError, ConfigError

from ...laws.snapshots import same_bits, snapshot
from ...laws.zoo import CONV1DS, EMBEDDING, EVERY_KIND, LINEARS, Specimen, randomise, with_adapters


def delta(model: nn.Module, path: str, name: str) -> Tensor:
    factor = dict(layers(model))[path].factor(name)
    return (factor.B.double() @ factor.A.double() * factor.scale).detach()


def by_hand(W: Tensor, change: Tensor, r: int, top: int, threshold: float, keep: float) -> tuple[Tensor, list[int]]:
    U0 = torch.linalg.svd(W, full_matrices=False).U
    U, S, Vh = torch.linalg.svd(W + change, full_matrices=False)
    found = [i for i in range(min(top, len(S))) if float((U[:, i] @ U0).abs().max()) < threshold]
    weaker = change + (keep - 1) * sum((S[i] * torch.outer(U[:, i], Vh[i]) for i in found), torch.zeros_like(W))
    u, s, vh = torch.linalg.svd(weaker, full_matrices=False)
    return u[:, :r] * s[:r] @ vh[:r], found


@pytest.mark.parametrize("specimen", [LINEARS, CONV1DS, EMBEDDING, EVERY_KIND], ids=str)
@pytest.mark.parametrize("threshold", [0.5, 0.8, 999.0])
def test_against_the_definition(specimen: Specimen, threshold: float) -> None:
    model = specimen.model(torch.float64)
    attach(model, specimen.config(use_rslora=True), "a")
    randomise(model, "a", 3, 1.0)
    told = reduce_intruders(model, "a", top=6, threshold=threshold, keep=0.3)
    assert adapters(model)["intruder_reduced"].r == 4
    for site in told:
        W, change = dict(layers(model))[site.path].read().double(), delta(model, site.path, "a")
        expected, found = by_hand(W, change, 4, 6, threshold, 0.3)
        assert list(site.indices) == found and len(site.cosines) == len(found)
        assert all(cosine < threshold for cosine in site.cosines)
        torch.testing.assert_close(delta(model, site.path, "intruder_reduced"), expected, rtol=1e-7, atol=1e-7)
        assert 0 <= site.energy_lost < 1


def test_the_base_s_own_directions_are_no_intruders() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).double()
    attach(model, LoraConfig(r=1, lora_alpha=1, target_modules=["0"]), "a")
    U, _, Vh = torch.linalg.svd(model[0].read())
    for factor, side in ((model[0].lora_B, U[:, :1] * 5), (model[0].lora_A, Vh[:1])):
        factor["a"].weight.data = side.clone()
    (site,) = reduce_intruders(model, "a")
    assert site.indices == ()
    assert same_bits(model[0].lora_B["intruder_reduced"].weight, model[0].lora_B["a"].weight)
    model[0].lora_B["a"].weight.data = 500 * U.mean(1, keepdim=True)  # its cosine with each of them is 1/√8
    (site,) = reduce_intruders(model, "a", "second", keep=0.0)
    assert site.indices[0] == 0 and site.cosines[0] == pytest.approx(8**-0.5, abs=0.02)


def test_keeping_all_changes_nothing() -> None:
    model = with_adapters(EVERY_KIND, "a", dtype=torch.float64)
    reduce_intruders(model, "a", threshold=999.0, keep=1.0)
    for path, _ in layers(model):
        torch.testing.assert_close(delta(model, path, "intruder_reduced"), delta(model, path, "a"))


def test_a_refused_call_changes_nothing() -> None:
    model = with_adapters(LINEARS, "a", use_dora=True)
    before = snapshot(model)
    with pytest.raises(AdapterError, match="a uses DoRA; intruder dimensions are only defined"):
        reduce_intruders(model, "a")
    with pytest.raises(AdapterError, match="Adapter 'typo' not found"):
        reduce_intruders(model, "typo")
    with pytest.raises(ConfigError, match="top is 0"):
        reduce_intruders(model, "a", top=0)
    assert snapshot(model) == before
