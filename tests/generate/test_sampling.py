"""lorakit.generate.sampling: distributions by hand, one generator per row, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lorakit.errors import ConfigError
from lorakit.generate import Sampler, Sampling
from lorakit.generate.sampling import probabilities

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0]).log()  # probabilities 1/6, 1/2, 1/3, 0


def test_temperature_divides_the_logits() -> None:
    z = torch.tensor([0.3, -1.2, 2.0])
    expected = torch.softmax(z / 0.5, -1)
    assert torch.allclose(probabilities(z, Sampling(temperature=0.5)), expected)


def test_top_k_keeps_the_largest() -> None:
    assert torch.allclose(probabilities(LOGITS, Sampling(1.0, top_k=2)), torch.tensor([0, 0.6, 0.4, 0]))
    assert torch.allclose(probabilities(LOGITS, Sampling(1.0, top_k=1)), torch.tensor([0.0, 1, 0, 0]))
    assert torch.allclose(probabilities(LOGITS, Sampling(1.0, top_k=9)), LOGITS.exp() / 6)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, [0, 1, 0, 0]), (0.49, [0, 1, 0, 0]), (0.6, [0, 0.6, 0.4, 0]), (0.9, [1 / 6, 1 / 2, 1 / 3, 0])],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: list[float]) -> None:
    assert torch.allclose(probabilities(LOGITS, Sampling(1.0, top_p=top_p)), torch.tensor(kept).float(), atol=1e-6)


def test_a_temperature_near_zero_is_greedy_and_does_not_overflow() -> None:
    assert probabilities(torch.tensor([5.0, 900.0, -3.0]), Sampling(temperature=1e-30)).tolist() == [0, 1, 0]


def test_greedy_takes_the_most_likely() -> None:
    assert Sampler(Sampling()).pick(LOGITS) == 1


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(Sampling(temperature=1.0, seed=3))
    drawn = [sampler.pick(LOGITS) for _ in range(3000)]
    shares = [drawn.count(token) / len(drawn) for token in range(4)]
    assert shares == pytest.approx([1 / 6, 1 / 2, 1 / 3, 0], abs=4 * math.sqrt(0.25 / 3000))


def test_the_dice_are_the_rows_own() -> None:
    settings = Sampling(temperature=1.0, seed=7)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, other = Sampler(settings), Sampler(settings)
    first = [one.pick(LOGITS) for _ in range(20)]
    torch.rand(5)
    assert [other.pick(LOGITS) for _ in range(20)] == first
    torch.set_rng_state(state)
    third = Sampler(Sampling(temperature=1.0, seed=8))
    assert [third.pick(LOGITS) for _ in range(20)] != first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0 (greedy) or a number above 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1; it must be 0 (all tokens)"),
        ({"seed": -1}, "seed is -1; it must be an integer from 0"),
    ],
)
def test_what_is_out_of_range_is_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match="must") as caught:
        Sampling(**values)
    assert said in str(caught.value)
