"""A prefix that the base processes once serves base rows and aLoRA rows: same tokens, same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit.core import attach
from lorakit.errors import UsageError
from lorakit.generate import generate_batch, read_prefix
from lorakit.generate.prefixes import WORTHWHILE_TOKENS, shared_tokens

from ..laws.tolerances import assert_close
from ..laws.zoo import GPT2, INVOCATION, LLAMA, Specimen, randomise

SHARED = [9, 8, 7, 11, 12, 13]
MODELS = pytest.mark.parametrize("specimen", [LLAMA, GPT2], ids=str)


def adapted(specimen: Specimen) -> nn.Module:
    """Return a model with two aLoRA adapters, each with its own invocation, and a plain adapter."""
    model = specimen.model()
    for seed, (name, tokens) in enumerate({"a": list(INVOCATION), "b": [5], "plain": None}.items()):
        words = {} if tokens is None else {"alora_invocation_tokens": tokens, "task_type": "CAUSAL_LM"}
        attach(model, specimen.config(**words), name)
        randomise(model, name, 80 + seed)
    return model


def tokens_of(model: nn.Module, prompts: list[list[int]], adapters: list[str | None], **more: Any) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for new in generate_batch(model, prompts, max_new_tokens=5, adapters=adapters, **more):
        rows[new.row].append(new.token)
    return rows


@MODELS
def test_mixed_rows_continue_as_each_does_alone(specimen: Specimen) -> None:
    model = adapted(specimen)
    prompts = [[*SHARED, 3, 4, 20], [*SHARED, 5], [*SHARED, 3, 4, 21, 22, 23], [1, 2], [*SHARED, 14]]
    names = ["a", "b", None, "plain", "a"]
    together = tokens_of(model, prompts, names)
    for row, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        assert tokens_of(model, [prompt], [name]) == [together[row]]
    assert together[0] != tokens_of(model, prompts[:1], [None])[0]
    assert together[4] == tokens_of(model, prompts[4:], [None])[0]


@MODELS
def test_a_batch_of_prompts_uses_one_base_cache(specimen: Specimen) -> None:
    model = adapted(specimen)
    prompts, names = [[*SHARED, 3, 4, 20], [*SHARED, 5], [*SHARED, 30, 31, 32]], ["a", "b", None]
    prefix = read_prefix(model, SHARED)
    held = prefix.cache.get_seq_length()
    seen: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = tokens_of(model, prompts, names, prefix=prefix)
    handle.remove()
    assert seen[0] == (3, 3)  # the rows' own tokens
    assert found == tokens_of(model, prompts, names)
    assert prefix.cache.get_seq_length() == held == len(SHARED)
    assert found == tokens_of(model, prompts, names, prefix=prefix)


def test_the_logits_are_those_without_the_cache() -> None:
    model = adapted(LLAMA)
    prefix, prompt = read_prefix(model, SHARED), torch.tensor([[*SHARED, 3, 4, 20]])
    with torch.no_grad():
        whole = model(input_ids=prompt).logits
        rest = model(input_ids=prompt[:, len(SHARED) :], cache=prefix.of_rows(1)).logits
    assert_close(rest, whole[:, len(SHARED) :], torch.float32)


def test_who_may_not_share() -> None:
    model, prefix = adapted(LLAMA), None
    prefix = read_prefix(model, [*SHARED, 3, 4])
    with pytest.raises(UsageError, match="Adapter 'a' is active within the prefix of 8 tokens in row 1"):
        tokens_of(model, [[*SHARED, 3, 4, 20]], ["a"], prefix=prefix)
    with pytest.raises(UsageError, match="Adapter 'plain' is active within the prefix"):
        tokens_of(model, [[*SHARED, 3, 4, 20]], ["plain"], prefix=prefix)
    with pytest.raises(UsageError, match="prompt 2 of 2 does not start with the prefix of 8 tokens"):
        tokens_of(model, [[*SHARED, 3, 4, 20], [*SHARED, 20]], [None, None], prefix=prefix)
    with pytest.raises(UsageError, match="prompt 1 of 1 has no tokens after the prefix; add at least one"):
        tokens_of(model, [[*SHARED, 3, 4]], [None], prefix=prefix)


def test_what_rows_share_is_read_once_by_itself() -> None:
    model, long = adapted(LLAMA), [6 + i % 9 for i in range(WORTHWHILE_TOKENS + 2)]
    long = [token for token in long if token not in (3, 4, 5)]
    prompt = [*long, 3, 4, 20]
    assert shared_tokens(model, [prompt, prompt], [("a",), ()]) == len(long)
    assert shared_tokens(model, [prompt, prompt], [("a",), ("plain",)]) == 0
    assert shared_tokens(model, [prompt], [("a",)]) == 0
    assert shared_tokens(model, [prompt, prompt], [(), ()]) == 0
    assert shared_tokens(model, [prompt, prompt[2:]], [("a",), ()]) == 0
    seen: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = tokens_of(model, [prompt, prompt], ["a", None])
    handle.remove()
    assert seen[:2] == [(1, len(long)), (2, 3)]
    assert found == [tokens_of(model, [prompt], ["a"])[0], tokens_of(model, [prompt], [None])[0]]
