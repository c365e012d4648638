"""lorakit.serve.app with a vocabulary of 12 tokens: `min_tokens`, and limits that are above the vocabulary's size."""

from __future__ import annotations

import math
from typing import Any

import pytest

from .conftest import Running

SIZE = 12
PROMPT = [5, 6, 7]


@pytest.fixture
def tiny_llama() -> Any:
    """The base of `running`; its tokenizer has more tokens, whose ids it does not accept."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=SIZE, eos_token_id=0, **sizes)).eval()


def test_limits_above_the_vocabulary(running: Running) -> None:
    given = {"model": "one", "prompt": PROMPT, "temperature": 0, "max_tokens": 4, "logprobs": 20, "ignore_eos": True}
    refused: dict[str, Any] = {"logit_bias": {str(SIZE): 1}, "prompt": [SIZE]}
    for param, value in refused.items():
        reply = running.client.post("/v1/completions", json={**given, param: value})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == param, param
    more = {"echo": True, "return_token_ids": True, "logit_bias": {str(SIZE - 1): 100}, "top_k": 10**6}
    (choice,) = running.client.post("/v1/completions", json={**given, **more}).json()["choices"]
    assert choice["token_ids"] == [SIZE - 1] * 4
    tops = choice["logprobs"]["top_logprobs"]
    assert tops[0] is None and len(tops) == len(PROMPT) + 4
    for top in tops[1:]:  # of the whole vocabulary, so probabilities have the sum 1
        assert len(top) == SIZE and sum(map(math.exp, top.values())) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("ending", [{}, {"ignore_eos": True, "stop_token_ids": [9]}])
def test_an_answer_does_not_end_before_min_tokens(running: Running, ending: dict[str, Any]) -> None:
    (end,) = ending.get("stop_token_ids", [0])
    given = {"model": "one", "prompt": PROMPT, "seed": 3, "return_token_ids": True, "logit_bias": {str(end): 100}}
    for least, most, reason in [(0, 8, "stop"), (3, 8, "stop"), (8, 8, "length"), (9, 4, "length")]:
        body = {**given, "min_tokens": least, "max_tokens": most, **ending}
        reply = running.client.post("/v1/completions", json=body).json()
        ids = reply["choices"][0]["token_ids"]
        assert reply["choices"][0]["finish_reason"] == reason, (least, most)
        assert ids.count(end) == (reason == "stop") and len(ids) == (least + 1 if reason == "stop" else most)
        assert reply["usage"]["completion_tokens"] == len(ids)
