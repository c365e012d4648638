"""The formulas (50) to (59) of docs/math.md, written out densely and compared with the code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core import attach, combine, merged_state_dict, reduce_intruders
from lorakit.core.linalg import Product, cosines, inner, rank_for, spectrum, stacked, truncated
from lorakit.core.operations.combination_types import CombinationType, added_up

OUT, IN = 7, 6


def drawn(r: int, seed: int) -> Product:
    g = torch.Generator().manual_seed(seed)
    return Product(torch.randn(1, r, IN, generator=g).double(), torch.randn(1, OUT, r, generator=g).double())


def dense(product: Product) -> Tensor:
    return (product.B @ product.A)[0]


def test_stacked_factors_are_the_sum() -> None:
    one, other = drawn(3, 1), drawn(2, 2)
    torch.testing.assert_close(dense(stacked([one, other], [0.5, -2.0])), 0.5 * dense(one) - 2 * dense(other))
    assert stacked([one, other], [1.0, 1.0]).rank == 5


def test_spectrum_needs_no_product() -> None:
    found, (U, S, Vh) = spectrum(drawn(3, 1)), torch.linalg.svd(dense(drawn(3, 1)), full_matrices=False)
    torch.testing.assert_close(found.S[0], S[:3])
    torch.testing.assert_close((found.U[0].T @ U[:, :3]).abs(), torch.eye(3).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close((found.Vh[0] @ Vh[:3].T).abs(), torch.eye(3).double(), atol=1e-9, rtol=0)


def test_lost_energy_is_that_of_what_was_cut() -> None:
    whole = dense(drawn(4, 1))
    S = torch.linalg.svdvals(whole)
    apart = whole - dense(truncated(spectrum(drawn(4, 1)), 2))
    assert float(apart.square().sum() / whole.square().sum()) == pytest.approx(
        float(S[2:].square().sum() / S.square().sum())
    )
    held = S.square().cumsum(0) / S.square().sum()
    for energy in (0.3, 0.7, 0.95):
        assert rank_for(S[None], energy) == 1 + int((held < energy).sum())


def test_inner_product_needs_no_product() -> None:
    one, other = drawn(3, 1), drawn(2, 2)
    assert inner(one, other) == pytest.approx(float((dense(one) * dense(other)).sum()))


def test_angles_between_subspaces() -> None:
    one, other = (torch.linalg.svd(dense(drawn(r, r)), full_matrices=False).U[:, :r] for r in (3, 2))
    found = cosines(one[None], other[None])[0]
    torch.testing.assert_close(found, torch.linalg.svdvals(one.T @ other))
    assert float(found.square().mean()) == pytest.approx(float((one.T @ other).square().sum()) / 2)


def test_pruning() -> None:
    tensor = torch.tensor([3.0, -1.0, 2.0, -4.0])
    torch.testing.assert_close(
        added_up([tensor], [1.0], CombinationType("magnitude_prune", density=0.5)), torch.tensor([3.0, 0, 0, -4.0])
    )
    drawn_at_random = added_up(
        [tensor], [1.0], CombinationType("dare_linear", density=0.5), torch.Generator().manual_seed(0)
    )
    assert set((drawn_at_random / tensor).tolist()) <= {0.0, 2.0}


def test_election() -> None:
    one, other = torch.tensor([2.0, -1.0, 1.0]), torch.tensor([-1.0, -3.0, 1.0])
    ties = CombinationType("ties", density=1)
    torch.testing.assert_close(added_up([one, other], [1.0, 0.5], ties), torch.tensor([2.0, (-1 - 1.5) / 2, 1.5 / 2]))
    minus = added_up([one, other], [1.0, -0.5], ties)  # the second votes with [1, 3, −1]
    torch.testing.assert_close(minus, torch.tensor([(2 + 0.5) / 2, 1.5, 1.0]))


def adapted(*names: str, **fields: object) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)).double()
    for name in names:
        attach(model, LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False, **fields), name)
    return model


def test_dora_adapters_add_up_to_dora() -> None:
    model = adapted("a", "b", use_dora=True)
    with torch.no_grad():
        for name in "ab":
            model[0].lora_magnitude_vector[name].weight.mul_(torch.rand(OUT).double() + 0.5)
    W = model[0].base_layer.weight.detach().clone()
    combine(model, ["a", "b"], [0.7, -0.4], "sum", way="cat")
    wanted = W + sum(w * (merged_state_dict(model, n)["0.weight"] - W) for n, w in (("a", 0.7), ("b", -0.4)))
    torch.testing.assert_close(merged_state_dict(model, "sum")["0.weight"], wanted)


def test_weakened_intruders() -> None:
    model = adapted("a")
    W = model[0].base_layer.weight.detach()
    factor = model[0].factor("a")
    change = (factor.scale * factor.B @ factor.A).detach()
    (site,) = reduce_intruders(model, "a", threshold=0.9, keep=0.25)
    U, S, Vh = torch.linalg.svd(W + change, full_matrices=False)
    nearest = (U.T @ torch.linalg.svd(W, full_matrices=False).U).abs().max(1).values
    chosen = [i for i in range(len(S)) if nearest[i] < 0.9]
    assert list(site.indices) == chosen and chosen
    weaker = change + (0.25 - 1) * sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in chosen)
    u, s, vh = torch.linalg.svd(weaker, full_matrices=False)
    found = model[0].factor("intruder_reduced")
    torch.testing.assert_close((found.scale * found.B @ found.A).detach(), u[:, :2] * s[:2] @ vh[:2])


def test_rows_of_tokens() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, IN), nn.Linear(IN, OUT)).double()
    config = LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": [4, 1]})
    table = model[0].weight.detach().clone()
    rows = {}
    for name in "ab":
        attach(model, config, name)
        rows[name] = torch.randn(2, IN).double()
        model[0].token_adapter.trainable_tokens_delta[name].data.copy_(rows[name])
    combine(model, ["a", "b"], [0.7, -0.4], "sum", way="cat")
    W = table[[4, 1]]
    wanted = W + 0.7 * (rows["a"] - W) - 0.4 * (rows["b"] - W)
    torch.testing.assert_close(merged_state_dict(model, "sum")["0.weight"][[4, 1]], wanted)
