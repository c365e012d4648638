"""IncrementalPCA: attributes and transformed data equal those of the installed peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorakit.errors import ConfigError
from lorakit.peft.utils.incremental_pca import IncrementalPCA

theirs = pytest.importorskip("peft.utils.incremental_pca").IncrementalPCA

ATTRIBUTES = (
    *("components_", "singular_values_", "explained_variance_", "explained_variance_ratio_"),
    *("mean_", "var_", "noise_variance_", "n_samples_seen_"),
)


def data(rows: int = 60, width: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(rows, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return mixed + torch.arange(width)


@pytest.mark.parametrize(
    "options",
    [
        {"n_components": 3, "batch_size": 20},
        {"n_components": None, "batch_size": 17},
        {"n_components": 2},
        {"n_components": 2, "batch_size": 20, "lowrank": True, "lowrank_q": 6, "lowrank_niter": 20, "lowrank_seed": 1},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fit_is_pefts(options: dict[str, Any], dtype: torch.dtype) -> None:
    x = data().to(dtype)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-9}
    ours, other = (kind(**options).fit(x) for kind in (IncrementalPCA, theirs))
    assert ours.n_components == other.n_components
    for name in ATTRIBUTES:
        one, expected = getattr(ours, name), getattr(other, name)
        torch.testing.assert_close(torch.as_tensor(one).double(), torch.as_tensor(expected).squeeze().double(), **close)
    torch.testing.assert_close(ours.transform(x), other.transform(x), **close)


def test_parts_give_the_fit_of_the_whole() -> None:
    x = data()
    parts = IncrementalPCA(n_components=2)
    for part in x.split(15):
        parts.partial_fit(part)
    whole = IncrementalPCA(n_components=2, batch_size=15).fit(x)
    torch.testing.assert_close(parts.components_, whole.components_)
    assert x.equal(data())


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: IncrementalPCA(8, batch_size=10).fit(data()), "n_components"),
        (lambda: IncrementalPCA(5).partial_fit(data(4)), "n_components"),
        (lambda: IncrementalPCA(2).fit(data()).partial_fit(data(width=5)), "X"),
        (lambda: IncrementalPCA(None, lowrank=True), "n_components"),
        (lambda: IncrementalPCA(4, lowrank=True, lowrank_q=3), "lowrank_q"),
        (lambda: IncrementalPCA(2).transform(data()), "X"),
    ],
)
def test_what_does_not_fit_is_an_error(make: Any, field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert refused.value.field == field
