"""From the logits of one position to one token: greedy, temperature, top-k, top-p; every row has its own dice.

Random numbers come from a generator that belongs to the row, on the CPU: the same seed gives the same tokens whatever
else is in the batch, whatever the device, and whatever others draw from torch's global generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token (greedy); above 0 the logits are divided by it and a token is drawn.
        top_k: Only so many of the most likely tokens can be drawn; 0 means all.
        top_p: Only the most likely tokens that together reach this probability can be drawn; 1 means all.
        seed: Where the row's random numbers begin; it has no effect on greedy choices.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(
                f"temperature is {self.temperature}; it must be 0 (greedy) or a number above 0, such as 0.7."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must lie above 0 and at most at 1 (all tokens).")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0 (all tokens) or a whole number above 0.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be a whole number from 0 to 2**63 - 1.")


class Sampler:
    """One row's choices: its settings and its own random numbers."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, without dice."""
        return self.sampling.temperature == 0

    def pick(self, logits: Tensor) -> int:
        """Choose a token.

        Args:
            logits: Of the next position, (vocabulary,), on any device.

        Returns:
            The token's id.
        """
        if self.is_greedy:
            return int(logits.argmax())
        weights = probabilities(logits.to("cpu"), self.sampling)
        return int(torch.multinomial(weights, 1, generator=self._generator))


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that a token is drawn from.

    With z the logits and T the temperature, p_i = exp(z_i / T) / Σ_j exp(z_j / T). top-k sets every p below the k-th
    largest to 0. top-p sorts what is left, p_(1) ≥ p_(2) ≥ …, renormalised, and keeps i where p_(1) + … + p_(i-1) <
    top_p: the fewest tokens that together reach it, the first of them always. The rest is 0, and the sum 1 again.

    Args:
        logits: (vocabulary,).
        sampling: With a temperature above 0.

    Returns:
        (vocabulary,), float32, on the logits' device.

    Source:
        top-p: Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, eq. (2), (3).
    """
    z = logits.float()
    z = (z - z.max()) / sampling.temperature  # the largest is 0: no temperature can make exp() overflow
    if 0 < sampling.top_k < z.numel():
        z = z.masked_fill(z < z.topk(sampling.top_k).values[-1], -torch.inf)
    p = torch.softmax(z, dim=-1)
    if sampling.top_p < 1:
        ordered, order = p.sort(descending=True, stable=True)
        reached_before = ordered.cumsum(-1) - ordered
        p = p.index_fill(0, order[reached_before >= sampling.top_p], 0.0)
    return p / p.sum()
