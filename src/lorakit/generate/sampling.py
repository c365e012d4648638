"""Choose one row's tokens from logits: greedy decoding or sampling, with penalties; log-probabilities.

Each row has its own settings, history and random number generator on the CPU, so the same seed gives the same tokens
regardless of the other rows in the batch, the device, or the state of torch's global generator.

Source:
    The order of the steps (`Sampler.processed`, then `probabilities`) and log-probabilities of unchanged logits: vLLM
    0.32, vllm/v1/sample/sampler.py, docstring of `Sampler`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.choices import SAMPLING_RULES
from lorakit.errors import ConfigError
from lorakit.generate.grammar import Constraint


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
        min_p: Sample only from tokens whose probability is at least this fraction of the largest one; 0 means all.
        frequency_penalty: Subtracted from a token's logit for each time that the token occurs in the answer.
        presence_penalty: Subtracted from a token's logit if the token occurs in the answer.
        repetition_penalty: Divides positive logits and multiplies negative ones of the tokens in prompt and answer.
        logit_bias: Token id -> number from -100 to 100 that is added to the token's logit; stored as sorted pairs.
        min_tokens: Number of tokens before which the tokens that end an answer are not picked.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name, (is_allowed, rule) in SAMPLING_RULES.items():
            value = getattr(self, name)
            if not is_allowed(value):
                raise ConfigError.of(name, value, rule)
        bias = dict(self.logit_bias)
        wrong = {token: value for token, value in bias.items() if token < 0 or not -100 <= value <= 100}
        if wrong:
            raise ConfigError.of("logit_bias", wrong, "a number from -100 to 100 per token id")
        object.__setattr__(self, "logit_bias", tuple(sorted(bias.items())))  # can be hashed, unlike a mapping

    def check_vocabulary(self, size: int | None) -> None:
        """Raise ConfigError if `logit_bias` has a token id that is not below the size of the vocabulary, if known."""
        odd = [token for token in dict(self.logit_bias) if size is not None and token >= size]
        if odd:
            raise ConfigError.of("logit_bias", odd[0], f"for token ids below {size:,}, the size of the vocabulary")


class Sampler:
    """A sampler for one row, with its own settings, tokens so far, and random number generator.

    Args:
        sampling: The settings.
        prompt_ids: Tokens of the prompt.
        end_ids: Tokens that end the answer, which are not picked before `min_tokens`.
        constraint: Restricts the tokens, or None; it must not be shared with other rows.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Iterable[int] = (),
        end_ids: Collection[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        self.sampling, self._constraint = sampling, constraint
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._prompt_ids, self._ends, self._made = prompt_ids, sorted(end_ids), 0
        self._is_repeating = sampling.repetition_penalty != 1
        self._is_counting = self._is_repeating or bool(sampling.frequency_penalty or sampling.presence_penalty)
        self._counts: Tensor | None = None  # (vocabulary,) how often each token occurs in the answer
        self._prompt: Tensor | None = None  # (vocabulary,) whether each token occurs in the prompt

    @property
    def is_greedy(self) -> bool:
        """Return whether the most likely token of unchanged logits is picked, for now and all further tokens."""
        is_changed = self._is_counting or bool(self.sampling.logit_bias) or self._waits
        return self.sampling.temperature == 0 and self._constraint is None and not is_changed

    @property
    def _waits(self) -> bool:
        return bool(self._ends) and self._made < self.sampling.min_tokens

    def pick(self, logits: Tensor) -> int:
        """Choose a token from logits (vocabulary,) for the next position, on any device, note it and return its id.

        Logits of -inf mark tokens that are never picked; at least one must be finite.

        Raises:
            ConfigError: The constraint cannot be followed further.
        """
        if self._constraint is not None:
            logits = self._constraint.mask(logits)
        logits = logits if self.is_greedy else self.processed(logits)
        if self.sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            # one random number; torch.multinomial draws one per token of the vocabulary
            total = probabilities(logits, self.sampling).double().cumsum(-1)
            drawn = torch.rand(1, dtype=torch.float64, generator=self._generator) * total[-1]
            token = int(torch.searchsorted(total, drawn, right=True))
        self._made += 1
        if self._counts is not None:
            self._counts[token] += 1
        if self._constraint is not None:
            self._constraint.advance(token)
        return token

    def processed(self, logits: Tensor) -> Tensor:
        """Return the logits (vocabulary,), in float32 on the CPU, from which the next token is chosen.

        The steps, in order: tokens that end the answer get -inf before `min_tokens`, unless no other token is allowed;
        the bias is added; the repetition penalty r maps z to z / r if z > 0, else z · r, for tokens in prompt or
        answer; and z decreases by c · `frequency_penalty` + [c > 0] · `presence_penalty`, where c is the number of
        times that the token occurs in the answer.

        Source:
            Repetition penalty: Keskar et al. 2019, "CTRL", arXiv:1909.05858, section 4.1, with negative logits
            multiplied as in transformers. Frequency and presence penalties: OpenAI's API reference, parameter details.
        """
        z = logits.to("cpu", torch.float32, copy=True)
        sampling = self.sampling
        if self._waits:
            others = z.clone()
            others[[end for end in self._ends if end < z.numel()]] = -torch.inf
            z = others if others.amax() > -torch.inf else z
        if sampling.logit_bias:
            tokens, values = zip(*dict(sampling.logit_bias).items(), strict=True)
            z[list(tokens)] += torch.tensor(values)
        if self._is_counting:
            counts = self._counted(z.numel())
            if self._prompt is not None:
                seen, penalty = (self._prompt | (counts > 0)).nonzero().flatten(), sampling.repetition_penalty
                z[seen] = torch.where(z[seen] > 0, z[seen] / penalty, z[seen] * penalty)
            answered = counts.nonzero().flatten()
            z[answered] -= sampling.frequency_penalty * counts[answered] + sampling.presence_penalty
        return z

    def _counted(self, vocabulary: int) -> Tensor:
        """Return the counts of the answer's tokens; rows without penalties never allocate them."""
        if self._counts is None:
            self._counts = torch.zeros(vocabulary)
            if self._is_repeating:
                self._prompt = torch.zeros(vocabulary, dtype=torch.bool)
                self._prompt[list(self._prompt_ids)] = True
        return self._counts


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the distribution from which a token is sampled, (vocabulary,) in float32, for logits (vocabulary,).

    With z the logits and T > 0 the temperature, p_i = exp(z_i / T) / Σ_j exp(z_j / T). Min-p sets every p below `min_p`
    times the largest p to 0, and top-k every p below the k-th largest. Top-p renormalizes the remaining probabilities,
    sorts them so that p_(1) ≥ p_(2) ≥ …, and keeps p_(i) if p_(1) + … + p_(i-1) < `top_p`. The kept tokens, which
    always include the most likely one, are the smallest set whose probabilities sum to at least `top_p`. All other
    probabilities become 0, and the result is normalized.

    Source:
        top-p: Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, eqs. (2) and (3).
        min-p: Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling", arXiv:2407.01082, section 3.
    """
    z = logits.float()
    float32 = torch.finfo(torch.float32)
    temperature = min(max(sampling.temperature, float32.tiny), float32.max)
    z = (z - z.max()) / temperature  # the largest z is now 0, so exp() cannot overflow
    if sampling.min_p:
        z = z.masked_fill(z < math.log(sampling.min_p), -torch.inf)
    if 0 < sampling.top_k < z.numel():
        z = z.masked_fill(z < z.topk(sampling.top_k).values[-1], -torch.inf)
    p = torch.softmax(z, dim=-1)
    if sampling.top_p < 1:
        # all tokens below this value together have at most 1 - top_p, so none of them is kept or need be sorted
        least = p.amax().clamp_max((1 - sampling.top_p) / p.numel())  # not above the maximum of equal probabilities
        largest = (p >= least).nonzero().flatten()
        ordered, order = p[largest].sort(descending=True, stable=True)
        reached_before = ordered.cumsum(-1) - ordered
        kept = largest[order[reached_before < sampling.top_p]]
        p = torch.zeros_like(p).index_copy(0, kept, p[kept])
    return p / p.sum()


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position.

    Attributes:
        token: Id of the token at this position.
        logprob: Its log-probability.
        top: Ids and log-probabilities of the most likely tokens, most likely first, equal logits ordered by id.
        rank: 1-based position of the token in that order.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    rank: int


def logprobs(logits: Tensor, token: int, top: int) -> TokenLogprobs:
    """Return the log-probabilities of a token and of the `top` most likely ones, for a model's logits (vocabulary,).

    They are the log-softmax in float32 of the logits that the model computes, before bias, penalties and temperature.
    """
    z = logits.float()
    values = torch.log_softmax(z, -1)
    top = min(top, z.numel())
    best = z.new_empty(0, dtype=torch.long)
    if top:
        best = (z >= z.topk(top).values[-1]).nonzero().flatten()  # ordered by id, as topk does not promise
        best = best[z[best].sort(descending=True, stable=True).indices[:top]]
    rank = 1 + int((z > z[token]).sum() + (z[:token] == z[token]).sum())
    pairs = zip(best.tolist(), values[best].tolist(), strict=True)
    return TokenLogprobs(token, float(values[token]), tuple(pairs), rank)
