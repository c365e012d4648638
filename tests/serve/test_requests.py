"""lorakit.serve.requests: whatever the values of the fields are, the server answers or names a mistake."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.serve.faults import HttpFault
from lorakit.serve.requests import ChatRequest, CompletionRequest, parse

from .conftest import Running

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
SMALL = st.integers(-3, 20) | st.floats(-1, 3) | st.sampled_from(["", "a", "<|im_end|>", "auto", "text", "user"])
VALUES = st.recursive(
    SCALARS | SMALL,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "role", "content", "1"]) | st.text(), inner, max_size=3)
    ),
    max_leaves=5,
)
START: dict[type, dict[str, Any]] = {
    CompletionRequest: {"model": "one", "prompt": "a", "max_tokens": 3},
    ChatRequest: {"model": "one", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3},
}
PATHS = {CompletionRequest: "/v1/completions", ChatRequest: "/v1/chat/completions"}


@pytest.mark.costly(cases=1)
@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_no_values_of_fields_make_a_server_error(running: Running, kind: Any) -> None:
    names = sorted(set(kind.model_fields) - {"model", "max_tokens", "max_completion_tokens"})
    statuses = set()

    @settings(max_examples=150, deadline=None, suppress_health_check=[*HealthCheck])
    @given(st.dictionaries(st.sampled_from(names), VALUES, max_size=3))
    def ask(fields: dict[str, Any]) -> None:
        reply = running.client.post(PATHS[kind], json={**START[kind], **fields})
        assert reply.status_code in (200, 400), (fields, reply.text)
        statuses.add(reply.status_code)

    ask()
    assert statuses == {200, 400}
    assert running.client.post(PATHS[kind], json=START[kind]).status_code == 200


@given(st.binary(max_size=200))
def test_no_bytes_make_another_error(data: bytes) -> None:
    with pytest.raises(HttpFault) as caught:
        parse(CompletionRequest, data)
    assert caught.value.status == 400


def test_null_is_absent_and_names_of_fields_are_exact() -> None:
    body = b'{"model": "one", "prompt": "a", "stop": null, "seed": null, "unknown": null}'
    assert parse(CompletionRequest, body) == CompletionRequest(model="one", prompt="a")
    with pytest.raises(HttpFault) as caught:
        parse(CompletionRequest, b'{"model": "one", "prompt": "a", "Stop": "b"}')
    assert (caught.value.param, caught.value.code) == ("Stop", "unknown_parameter")


def test_seeds_of_answers_follow_each_other() -> None:
    request = CompletionRequest(model="one", prompt="a", seed=2**63 - 1)
    assert [request.sampling(request.chosen_seed + index).seed for index in range(2)] == [2**63 - 1, 0]
    free = CompletionRequest(model="one", prompt="a")
    assert free.chosen_seed != free.chosen_seed


def test_messages_of_lm_eval() -> None:
    body = b'{"model": "one", "messages": [{"role": "user", "content": "a", "type": "text"}]}'
    assert [message.as_dict() for message in parse(ChatRequest, body).messages] == [{"role": "user", "content": "a"}]


def test_messages_are_as_templates_take_them() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = ChatRequest.model_validate(
        {"model": "one", "messages": [{"role": "developer", "content": parts, "name": None}]}
    )
    assert request.messages[0].as_dict() == {"role": "system", "content": "ab"}
