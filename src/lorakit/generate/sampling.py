"""Choose tokens from logits: greedy decoding, or sampling with temperature, top-k and top-p.

Each row has its own random number generator on the CPU, so the same seed gives the same tokens regardless of the other
rows in the batch, the device, or the state of torch's global generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Settings for choosing the next token.

    Attributes:
        temperature: 0 always picks the most likely token (greedy); otherwise, the logits are divided by the temperature
            and a token is sampled.
        top_k: Sample only from the `top_k` most likely tokens; 0 means all tokens.
        top_p: Sample only from the smallest set of most likely tokens whose total probability reaches this value; 1
            means all tokens.
        seed: Seed for the row's random number generator; it has no effect on greedy decoding.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError.of("temperature", self.temperature, "0 (greedy) or a number above 0, such as 0.7")
        if not 0 < self.top_p <= 1:
            raise ConfigError.of("top_p", self.top_p, "above 0 and at most 1 (all tokens)")
        if self.top_k < 0:
            raise ConfigError.of("top_k", self.top_k, "0 (all tokens) or an integer above 0")
        if not 0 <= self.seed < 2**63:
            raise ConfigError.of("seed", self.seed, "an integer from 0 to 2**63 - 1")


class Sampler:
    """A sampler for one row, with its own settings and random number generator."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    @property
    def is_greedy(self) -> bool:
        """Return whether the most likely token is always picked."""
        return self.sampling.temperature == 0

    def pick(self, logits: Tensor) -> int:
        """Choose a token from logits (vocabulary,) for the next position, on any device, and return its id."""
        if self.is_greedy:
            return int(logits.argmax())
        weights = probabilities(logits.to("cpu"), self.sampling)
        return int(torch.multinomial(weights, 1, generator=self._generator))


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the distribution from which a token is sampled, (vocabulary,) in float32, for logits (vocabulary,).

    With z the logits and T > 0 the temperature, p_i = exp(z_i / T) / Σ_j exp(z_j / T). Top-k sets every p below the
    k-th largest to 0. Top-p renormalizes the remaining probabilities, sorts them so that p_(1) ≥ p_(2) ≥ …, and keeps
    p_(i) if p_(1) + … + p_(i-1) < `top_p`. The kept tokens, which always include the most likely one, are the smallest
    set whose probabilities sum to at least `top_p`. All other probabilities become 0, and the result is normalized.

    Source:
        top-p: Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, eqs. (2) and (3).
    """
    z = logits.float()
    z = (z - z.max()) / sampling.temperature  # the largest z is now 0, so exp() cannot overflow at any temperature
    if 0 < sampling.top_k < z.numel():
        z = z.masked_fill(z < z.topk(sampling.top_k).values[-1], -torch.inf)
    p = torch.softmax(z, dim=-1)
    if sampling.top_p < 1:
        ordered, order = p.sort(descending=True, stable=True)
        reached_before = ordered.cumsum(-1) - ordered
        p = p.index_fill(0, order[reached_before >= sampling.top_p], 0.0)
    return p / p.sum()
