"""The eleven combination types against their steps, written out; options that a type rejects."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorakit.core.operations.combination_types import COMBINATION_TYPES, CombinationType, added_up, clamped
from lorakit.errors import ConfigError


def way(name: str, **fields: Any) -> CombinationType:
    density = {} if name in ("svd", "linear", "cat") else {"density": 0.5}
    return CombinationType(name, **{**density, **fields})


def test_the_names_say_the_steps() -> None:
    assert len(COMBINATION_TYPES) == len(set(COMBINATION_TYPES)) == 11
    found = {name: way(name) for name in COMBINATION_TYPES}
    assert {n for n, w in found.items() if w.decomposes} == {n for n in COMBINATION_TYPES if n.endswith("svd")}
    assert {n for n, w in found.items() if not w.prunes} == {"svd", "linear", "cat"}
    assert {n for n, w in found.items() if w.draws} == {n for n in COMBINATION_TYPES if n.startswith("dare")}
    assert {n for n, w in found.items() if w.elects} == {n for n in COMBINATION_TYPES if "ties" in n}


def test_a_weighted_sum() -> None:
    one, other = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(added_up([one, other], [0.5, -2.0], way("linear")), 0.5 * one - 2 * other)


def test_pruning_by_size_keeps_the_largest() -> None:
    tensor = torch.tensor([[4.0, -1.0, 3.0], [0.5, -5.0, 2.0]])
    found = added_up([tensor], [1.0], way("magnitude_prune", density=0.5))
    assert torch.equal(found, torch.tensor([[4.0, 0.0, 3.0], [0.0, -5.0, 0.0]]))
    assert torch.equal(added_up([tensor], [1.0], way("magnitude_prune", density=1)), tensor)


def test_pruning_at_random_keeps_the_mean_and_follows_its_seed() -> None:
    tensor = torch.randn(40, 40)
    dropped = way("dare_linear", density=0.25)
    again = [added_up([tensor], [1.0], dropped, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)
    kept = again[0] != 0
    assert float(kept.float().mean()) == pytest.approx(0.25, abs=0.05)
    torch.testing.assert_close(again[0][kept], tensor[kept] / 0.25)
    many = torch.stack([added_up([tensor], [1.0], dropped) for _ in range(600)]).mean(0)
    assert float((many - tensor).abs().mean()) < 0.1


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_the_election(majority: str) -> None:
    tensors = [torch.tensor([3.0, 1.0, -1.0, 0.0]), torch.tensor([-1.0, 2.0, -2.0, 0.0])]
    tensors.append(torch.tensor([-1.0, -1.0, 5.0, 0.0]))
    found = added_up(tensors, [1.0, 2.0, 0.5], way("ties", density=1, majority_sign=majority))
    total = torch.tensor([3.0, (1.0 + 2 * 2) / 2, 2.5, 0.0])
    frequency = torch.tensor([(-2.0 - 0.5) / 2, (1.0 + 2 * 2) / 2, (-1.0 - 4.0) / 2, 0.0])
    torch.testing.assert_close(found, total if majority == "total" else frequency)


def test_what_is_subtracted_votes_against() -> None:
    """One adapter with weight −1 equals the negated adapter with +1, for every type without random pruning."""
    one, other = torch.randn(5, 6), torch.randn(5, 6)
    for name in ("linear", "ties", "magnitude_prune"):
        torch.testing.assert_close(
            added_up([one, other], [0.7, -1.3], way(name)), added_up([one, -other], [0.7, 1.3], way(name))
        )


def test_clamping_cuts_at_a_quantile_whatever_the_signs() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(1, 4, 30, generator=generator), torch.randn(1, 20, 4, generator=generator)
    found = clamped(A, B, 0.9)
    both = torch.cat([A.flatten(), B.flatten()])
    limit = float(torch.quantile(torch.cat([both, -both]), 0.9))
    assert float(torch.cat([f.flatten() for f in found]).abs().max()) == pytest.approx(limit, rel=1e-2)
    flipped = clamped(-A, -B, 0.9)
    assert torch.equal(flipped[0], -found[0]) and torch.equal(flipped[1], -found[1])
    assert torch.equal(clamped(A, B, 1.0)[0], A)


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"name": "tie"}, "combination_type", "Did you mean ties"),
        ({"name": "ties"}, "density", r"density is None; .*\(0, 1\]"),
        ({"name": "ties", "density": 0.0}, "density", "density is 0.0"),
        ({"name": "dare_linear", "density": 1.5}, "density", "density is 1.5"),
        ({"name": "svd", "density": 0.5}, "density", "'svd' does not prune"),
        ({"name": "cat", "rank": 4}, "rank", "'cat' does not use an SVD"),
        ({"name": "linear", "clamp": 0.9}, "clamp", "clamp is 0.9"),
        ({"name": "svd", "rank": 0}, "rank", "integer >= 1"),
        ({"name": "svd", "clamp": 0.3}, "clamp", r"\(0.5, 1\]"),
        ({"name": "ties", "density": 1, "majority_sign": "most"}, "majority_sign", "total, frequency"),
    ],
)
def test_what_a_way_refuses(fields: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        CombinationType(**fields)
    assert raised.value.field == field
