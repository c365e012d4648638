"""lorakit.generate.sampling: distributions by hand and by transformers, one generator per row, errors."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as transformers_processors

from lorakit.errors import ConfigError
from lorakit.generate import Sampler, Sampling, TokenLogprobs, generate_batch, logprobs
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


@pytest.mark.parametrize("top_p", [1e-9, 1e-20])
def test_a_tiny_top_p_keeps_one_of_equal_tokens(top_p: float) -> None:
    """As for the logits of a saved head of zeros."""
    found = probabilities(torch.zeros(1000), Sampling(1.0, top_p=top_p))
    assert found.count_nonzero() == found.sum() == 1


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.9, 0.999, 1 - 1e-7])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 8.0])
def test_top_p_of_flat_and_peaked_distributions(top_p: float, spread: float) -> None:
    p = torch.softmax(torch.randn(20_000, generator=torch.Generator().manual_seed(4)).double() * spread, -1)
    order = p.sort(descending=True, stable=True).indices
    before = p[order].cumsum(-1) - p[order]
    found = probabilities(p.log(), Sampling(1.0, top_p=top_p)).nonzero().flatten()
    few, many = (int((before < top_p + error).sum()) for error in (-1e-5, 1e-5))  # float32 has such errors
    assert max(few, 1) <= len(found) <= many
    assert sorted(order[: len(found)].tolist()) == found.tolist() or spread == 0.01  # where float32 has equal values


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
        ({"min_p": 1.1}, "min_p is 1.1; it must be from 0 to 1"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"frequency_penalty": 2.1}, "frequency_penalty is 2.1; it must be from -2 to 2"),
        ({"presence_penalty": -2.1}, "presence_penalty is -2.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be from 0.01 to 100"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"min_tokens": -1}, "min_tokens is -1; it must be 0 or an integer above 0"),
        ({"logit_bias": {3: 100.5}}, "logit_bias is {3: 100.5}; it must be a number from -100 to 100 per token id"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias is {-1: 1.0}"),
        ({"logit_bias": {1: math.nan}}, "logit_bias is {1: nan}"),
    ],
)
def test_what_is_out_of_range_is_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match="must") as caught:
        Sampling(**values)
    assert said in str(caught.value)


# --- processing of logits: the oracles are transformers' processors and OpenAI's formula ----------------------------

VOCABULARY = 500
PROMPT = [3, 3, 7, 499, 120]
ENDS = [2, 11]


def draws(seed: int) -> tuple[torch.Tensor, list[int]]:
    """Return random logits and a random answer so far, with repeated tokens."""
    dice = random.Random(seed)
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4
    return logits, [dice.choice([3, 9, 9, 44, 120, dice.randrange(20, VOCABULARY)]) for _ in range(dice.randrange(12))]


def after(sampling: Sampling, answer: list[int]) -> Sampler:
    """Return a sampler that has picked the tokens of an answer, each from logits that leave no choice."""
    sampler = Sampler(sampling, PROMPT, ENDS)
    for token in answer:
        logits = torch.full((VOCABULARY,), -math.inf)
        logits[token] = 1000.0
        assert sampler.pick(logits) == token
    return sampler


def by_transformers(processors: list[Any], answer: list[int], logits: torch.Tensor) -> torch.Tensor:
    ids, scores = torch.tensor([PROMPT + answer]), logits[None]
    for processor in processors:
        scores = processor(ids, scores)
    return torch.softmax(scores[0], -1)


def distribution(sampler: Sampler, logits: torch.Tensor) -> torch.Tensor:
    return probabilities(sampler.processed(logits), sampler.sampling)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"repetition_penalty": 1.3}, {"RepetitionPenaltyLogitsProcessor": 1.3}),
        ({"repetition_penalty": 0.6}, {"RepetitionPenaltyLogitsProcessor": 0.6}),
        ({"min_p": 0.05}, {"MinPLogitsWarper": 0.05}),
        ({"min_p": 1.0}, {"MinPLogitsWarper": 1.0}),
        ({"top_k": 7}, {"TopKLogitsWarper": 7}),
        ({"top_p": 0.8}, {"TopPLogitsWarper": 0.8}),
        ({"logit_bias": {5: 9.5, 3: -100.0}}, {"SequenceBiasLogitsProcessor": {(5,): 9.5, (3,): -100.0}}),
        (
            {"logit_bias": {9: 8.0}, "repetition_penalty": 1.2, "temperature": 1.5, "min_p": 0.01, "top_k": 30, "top_p": 0.9},
            {
                "SequenceBiasLogitsProcessor": {(9,): 8.0},
                "RepetitionPenaltyLogitsProcessor": 1.2,
                "TemperatureLogitsWarper": 1.5,
                "MinPLogitsWarper": 0.01,
                "TopKLogitsWarper": 30,
                "TopPLogitsWarper": 0.9,
            },
        ),
    ],
    ids=lambda value: "-".join(value),
)  # fmt: skip
def test_distributions_equal_those_of_transformers(values: dict[str, Any], names: dict[str, Any], seed: int) -> None:
    logits, answer = draws(seed)
    processors = [getattr(transformers_processors, name)(value) for name, value in names.items()]
    expected = by_transformers(processors, answer, logits)
    found = distribution(after(Sampling(**{"temperature": 1.0, **values}), answer), logits)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("made", range(5))
def test_the_answer_cannot_end_before_min_tokens(made: int) -> None:
    logits = draws(made)[0].index_fill(0, torch.tensor(ENDS), 20.0)
    answer = [100 + i for i in range(made)]
    processor = transformers_processors.MinNewTokensLengthLogitsProcessor(len(PROMPT), 3, ENDS, device="cpu")
    expected = by_transformers([processor], answer, logits)
    for temperature in (0.0, 1.0):
        sampler = after(Sampling(temperature, min_tokens=3), answer)
        assert sampler.is_greedy == (temperature == 0 and made >= 3)
        torch.testing.assert_close(torch.softmax(sampler.processed(logits), -1), expected)
        assert (sampler.pick(logits) in ENDS) == (made >= 3)


def test_min_tokens_yields_where_only_an_end_is_allowed() -> None:
    logits = torch.full((VOCABULARY,), -math.inf)
    logits[ENDS[1]] = 0.5
    for temperature in (0.0, 1.0):
        assert Sampler(Sampling(temperature, min_tokens=9), PROMPT, ENDS).pick(logits) == ENDS[1]


@pytest.mark.parametrize("seed", range(6))
def test_penalties_follow_openais_formula_and_do_not_count_the_prompt(seed: int) -> None:
    logits, answer = draws(seed)
    frequency, presence = random.Random(seed).uniform(-2, 2), random.Random(-seed).uniform(-2, 2)
    sampling = Sampling(0.7, frequency_penalty=frequency, presence_penalty=presence)
    counts = [answer.count(token) for token in range(VOCABULARY)]
    expected = [z - c * frequency - (c > 0) * presence for z, c in zip(logits.tolist(), counts, strict=True)]
    found = after(sampling, answer).processed(logits)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_the_repetition_penalty_comes_after_the_bias_and_before_the_others() -> None:
    logits, answer = draws(5)
    values = {"repetition_penalty": 1.7, "frequency_penalty": 0.8, "presence_penalty": 0.3}
    found = after(Sampling(1.0, logit_bias={9: 3.0, 200: -4.0}, **values), [*answer, 9, 9]).processed(logits)
    z = float(logits[9]) + 3.0
    z = z / 1.7 if z > 0 else z * 1.7
    assert float(found[9]) == pytest.approx(z - 0.8 * (answer.count(9) + 2) - 0.3, abs=1e-5)


def test_a_greedy_row_with_penalties_does_not_repeat_itself() -> None:
    logits = torch.tensor([5.0, 4.5, 4.0, -1.0])
    sampler = Sampler(Sampling(frequency_penalty=0.4))
    assert not sampler.is_greedy
    assert [sampler.pick(logits) for _ in range(6)] == [0, 0, 1, 0, 1, 2]
    assert logits.tolist() == [5.0, 4.5, 4.0, -1.0]


@pytest.mark.parametrize(
    ("values", "greedy"),
    [
        ({}, True),
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.2, "seed": 4}, True),
        ({"min_tokens": 2}, False),
        *[
            ({name: 0.5}, False)
            for name in ("frequency_penalty", "presence_penalty", "repetition_penalty", "temperature")
        ],
        ({"logit_bias": {1: 2.0}}, False),
    ],
)
def test_greedy_means_that_logits_are_not_changed(values: dict[str, Any], greedy: bool) -> None:
    assert Sampler(Sampling(**values), PROMPT, ENDS).is_greedy == greedy


def test_min_tokens_needs_no_processing_without_tokens_that_end() -> None:
    assert Sampler(Sampling(min_tokens=2)).is_greedy


def test_masked_tokens_are_never_picked() -> None:
    logits = draws(1)[0]
    logits[::2] = -math.inf
    values = {"frequency_penalty": -2.0, "presence_penalty": -2.0, "repetition_penalty": 0.01, "min_p": 0.001}
    sampler = Sampler(Sampling(30.0, logit_bias=dict.fromkeys(range(0, VOCABULARY, 2), 100.0), **values), PROMPT, ENDS)
    assert all(sampler.pick(logits) % 2 for _ in range(200))


@pytest.mark.parametrize("temperature", [5e-324, 1e-38, 1e300])
def test_any_temperature_gives_a_distribution(temperature: float) -> None:
    found = probabilities(torch.tensor([900.0, 901.0, -math.inf]), Sampling(temperature))
    assert found.tolist() == ([0.5, 0.5, 0] if temperature > 1 else [0, 1, 0])


@pytest.mark.parametrize("penalty", [0.7, 1.4])
def test_greedy_answers_with_a_penalty_equal_those_of_transformers(tiny_llama: Any, penalty: float) -> None:
    for name, parameter in tiny_llama.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            parameter.data.mul_(12)  # otherwise it repeats one token
    prompts, bias = [[5, 17, 200, 3], [9, 9, 44]], {7: 3.0, 12: -2.0}
    sampling = Sampling(repetition_penalty=penalty, logit_bias=bias)
    found: list[list[int]] = [[], []]
    for new in generate_batch(tiny_llama.eval(), prompts, max_new_tokens=12, sampling=sampling):
        found[new.row].append(new.token)
    options = {"repetition_penalty": penalty, "sequence_bias": {(token,): value for token, value in bias.items()}}
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        whole = tiny_llama.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0, **options
        )
        assert answer == whole[0, len(prompt) :].tolist()


def test_rows_do_not_affect_each_other() -> None:
    settings = Sampling(1.0, seed=2, repetition_penalty=1.5, frequency_penalty=0.5, logit_bias={4: 2.0}, min_p=0.01)
    steps = [draws(seed)[0] for seed in range(30)]
    alone = Sampler(settings, PROMPT, ENDS)
    expected = [alone.pick(logits) for logits in steps]
    row, other = Sampler(settings, PROMPT, ENDS), Sampler(dataclasses.replace(settings, seed=9), [1, 2], [3])
    found = []
    for logits in steps:
        batch = torch.stack([logits, logits.flip(0)])
        other.pick(batch[1])
        found.append(row.pick(batch[0]))
    assert found == expected


def test_settings_with_a_bias_can_be_compared_and_hashed() -> None:
    one, other = Sampling(logit_bias={7: 1.0, 3: -2.0}), Sampling(logit_bias={3: -2.0, 7: 1.0})
    assert one == other == Sampling(logit_bias=one.logit_bias) and hash(one) == hash(other)
    assert one != Sampling(logit_bias={7: 1.0})


def test_a_bias_for_a_token_outside_the_vocabulary_is_named() -> None:
    Sampling(logit_bias={499: 1.0}).check_vocabulary(500)
    with pytest.raises(ConfigError, match="500") as caught:
        Sampling(logit_bias={500: 1.0, 3: 1.0}).check_vocabulary(500)
    assert caught.value.field == "logit_bias"


# --- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [0, 1, 5, VOCABULARY, VOCABULARY + 9])
def test_log_probabilities_equal_those_in_float64(top: int) -> None:
    logits = draws(8)[0]
    exact = torch.log_softmax(logits.double(), -1)
    order = sorted(range(VOCABULARY), key=lambda token: (-float(logits[token]), token))
    token = order[11]
    found = logprobs(logits, token, top)
    assert found.token == token and found.rank == 12
    assert found.logprob == pytest.approx(float(exact[token]), abs=1e-5)
    assert [one for one, _ in found.top] == order[:top]
    assert [value for _, value in found.top] == pytest.approx([float(exact[one]) for one in order[:top]], abs=1e-5)


def test_log_probabilities_of_equal_logits_are_ordered_by_id() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0], dtype=torch.bfloat16)
    found = logprobs(logits, 4, 4)
    assert [one for one, _ in found.top] == [1, 3, 2, 4]
    assert found.rank == 4
    assert isinstance(found, TokenLogprobs)
