"""lorakit.serve.app: replies to OpenAI's client equal those of a session; errors have OpenAI's form."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorakit import open_session
from lorakit.generate import Sampling
from lorakit.machine import rss_bytes
from lorakit.serve import templates
from lorakit.serve.app import MOST_BODY_BYTES, Access
from lorakit.serve.keys import Key
from lorakit.session import Session

from .conftest import Running, Start
from .test_app_tools import TOOLS

openai = pytest.importorskip("openai")

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is two plus two? 🦊"}]
TEXT = "The quick brown fox"


@pytest.fixture
def session(running: Running, tiny_model_directory: Path) -> Any:
    """A session with the same adapters, alone."""
    with open_session(str(tiny_model_directory), running.folders) as session:
        yield session


def answer(session: Session, adapter: str | None, new: int, sampling: Sampling, stop: tuple[str, ...] = ()) -> str:
    whole = session.chat(CHAT, adapter=adapter, max_new_tokens=new, sampling=sampling, stop=stop)
    return whole.text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_chats_equal_a_sessions_and_parts_equal_the_whole(
    client: Any, session: Session, running: Running, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, seed=11)
    texts = set()
    for model, adapter in {"one": "one", running.id("two"): "two", "base:one": "one", "tiny": None}.items():
        given = {"model": model, "messages": CHAT, "max_tokens": 24, "temperature": temperature, "seed": 11}
        whole = client.chat.completions.create(**given)
        (choice,) = whole.choices
        assert choice.message.content == answer(session, adapter, 24, sampling)
        assert whole.model == ("tiny" if adapter is None else running.id(adapter))
        assert whole.system_fingerprint == running.service.fingerprint and whole.lorakit == {"seed": 11}
        assert whole.usage.completion_tokens == 24 and choice.finish_reason == "length"
        parts = [*client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})]
        assert {part.model for part in parts} == {whole.model} and len({part.id for part in parts}) == 1
        assert parts[0].choices[0].delta.role == "assistant"
        assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == choice.message.content
        assert [part.choices[0].finish_reason for part in parts[:-1]][-1] == "length"
        assert parts[-1].choices == [] and parts[-1].usage == whole.usage
        assert all(part.usage is None for part in parts[:-1])
        texts.add(choice.message.content)
    assert len(texts) >= (2 if temperature else 3)  # with one seed, close distributions can give the same tokens


def test_completions_equal_a_sessions(client: Any, session: Session, running: Running) -> None:
    ids = running.service.find("one").encode_text(TEXT)
    want = session.generate(TEXT, adapter="one", chat=False, max_new_tokens=16).text
    for prompt in (TEXT, ids):
        assert client.completions.create(model="one", prompt=prompt, temperature=0).choices[0].text == want
    several = client.completions.create(model="one", prompt=[TEXT, "def add"], n=2, seed=5, max_tokens=6)
    for choice in several.choices:
        sampling = Sampling(temperature=1, seed=5 + choice.index)
        prompt = [TEXT, "def add"][choice.index // 2]
        alone = session.generate(prompt, adapter="one", chat=False, max_new_tokens=6, sampling=sampling).text
        assert choice.text == alone
    assert several.usage.prompt_tokens == len(ids) + len(running.service.find("one").encode_text("def add"))
    assert several.usage.completion_tokens == 24
    parts = client.completions.create(model="one", prompt=[TEXT, "def add"], n=2, seed=5, max_tokens=6, stream=True)
    joined = dict.fromkeys(range(4), "")
    for part in parts:
        joined[part.choices[0].index] += part.choices[0].text
    assert [*joined.values()] == [choice.text for choice in several.choices]


def test_a_reply_without_seed_names_the_one_that_repeats_it(client: Any) -> None:
    given = {"model": "two", "messages": CHAT, "max_tokens": 12}
    first = client.chat.completions.create(**given)
    again = client.chat.completions.create(**given, seed=first.lorakit["seed"])
    other = client.chat.completions.create(**given)
    assert first.choices == again.choices
    assert first.lorakit != other.lorakit and first.choices != other.choices


def test_stop_strings_end_an_answer_and_its_row(client: Any, session: Session, running: Running) -> None:
    free = answer(session, "one", 40, Sampling())
    stop = free[5:9]
    given = {"model": "one", "messages": CHAT, "max_tokens": 100, "temperature": 0}
    whole = client.chat.completions.create(**given, stop=stop)
    assert whole.choices[0].message.content == free[: free.index(stop)]
    assert whole.choices[0].finish_reason == "stop" and whole.usage.completion_tokens < 40
    parts = client.chat.completions.create(**given, stop=[stop, "never"], stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    late = client.chat.completions.create(**given, stop=stop, extra_body={"min_tokens": 30})
    assert late.choices[0].message.content.startswith(free[: free.index(stop) + len(stop)])
    wait_for(lambda: idle(running))


def test_end_tokens(client: Any, running: Running) -> None:
    given = {"model": "one", "messages": CHAT, "max_tokens": 10, "temperature": 0}
    more = {"return_token_ids": True, "logit_bias": {"2": 100}}
    ended = client.chat.completions.create(**given, extra_body=more)
    assert (ended.choices[0].message.content, ended.choices[0].finish_reason) == ("", "stop")
    assert ended.choices[0].token_ids == [2] and ended.usage.completion_tokens == 1
    served = running.service.find("one")
    assert ended.prompt_token_ids == served.encode_chat(CHAT)
    on = client.chat.completions.create(**given, extra_body={**more, "ignore_eos": True})
    assert on.choices[0].token_ids == [2] * 10 and on.choices[0].finish_reason == "length"
    free = client.chat.completions.create(**given, extra_body={"return_token_ids": True}).choices[0].token_ids
    cut = client.chat.completions.create(**given, extra_body={"return_token_ids": True, "stop_token_ids": [free[4]]})
    assert cut.choices[0].token_ids == free[: free.index(free[4]) + 1] and cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].message.content == served.tokenizer.decode(free[: free.index(free[4])])


def test_a_completion_ends_where_that_of_vllm_ends(start: Start, tiny_model_directory: Path) -> None:
    """vLLM: the ids of the generation config and the tokenizer's. The chat template's end of a turn, 2, ends chats."""
    for name, change in [
        ("generation_config.json", {"eos_token_id": [0, 7]}),
        ("tokenizer_config.json", {"eos_token": "<|pad|>"}),
    ]:
        path = tiny_model_directory / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    running = start()
    pad = running.service.find("tiny").tokenizer.eos_token_id
    assert len({0, 2, 7, pad}) == 4
    for token, reason in {0: "stop", 7: "stop", pad: "stop", 2: "length"}.items():
        given = {"model": "tiny", "prompt": TEXT, "max_tokens": 3, "temperature": 0, "logit_bias": {str(token): 100}}
        found = running.client.post("/v1/completions", json={**given, "return_token_ids": True}).json()["choices"][0]
        ended = (found["token_ids"], found["finish_reason"])
        assert ended == ([token] * (1 if reason == "stop" else 3), reason), token


def test_log_probabilities_are_those_of_the_model(client: Any, session: Session, running: Running) -> None:
    import torch

    from lorakit import core

    served = running.service.find("two")
    ids = served.encode_text(TEXT)
    echoed = client.completions.create(model="two", prompt=ids, echo=True, logprobs=3, max_tokens=1, temperature=0)
    found = echoed.choices[0].logprobs
    with torch.inference_mode(), core.use(session.model, "two"):
        whole = torch.log_softmax(session.model(torch.tensor([ids])).logits[0].float(), -1)
    want = [whole[at, token].item() for at, token in enumerate(ids[1:])]
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert found.token_logprobs[1:-1] == pytest.approx(want, abs=1e-4)
    assert found.token_logprobs[-1] == pytest.approx(whole[-1].max().item(), abs=1e-4)
    assert len(found.tokens) == len(ids) + 1 and "".join(found.tokens[:-1]) == TEXT
    assert all(TEXT[at:].startswith(token) for at, token in zip(found.text_offset[:-1], found.tokens, strict=False))
    assert echoed.choices[0].text.startswith(TEXT)
    nothing = client.completions.create(model="two", prompt=TEXT, echo=True, logprobs=1, max_tokens=0)
    assert nothing.choices[0].text == TEXT and nothing.usage.completion_tokens == 0
    assert nothing.choices[0].logprobs.token_logprobs[1:] == pytest.approx(want, abs=1e-4)
    given = {"model": "two", "messages": CHAT, "max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    chat = client.chat.completions.create(**given).choices[0].logprobs.content
    assert len(chat) == 8
    assert all(one.logprob == one.top_logprobs[0].logprob and len(one.top_logprobs) == 2 for one in chat)
    parts = [part.choices[0] for part in client.chat.completions.create(**given, stream=True)]
    assert [one for part in parts if part.logprobs for one in part.logprobs.content] == chat


SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["fox", "dog"]}, "quick": {"type": "boolean"}},
    "required": ["animal", "quick"],
    "additionalProperties": False,
}


def test_answers_follow_a_json_schema(client: Any, running: Running) -> None:
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
    given = {"model": "one", "messages": CHAT, "response_format": form, "n": 4, "seed": 3, "max_tokens": 80}
    tokenizer = running.service.find("one").tokenizer
    spaces = [token for token in range(len(tokenizer)) if not tokenizer.decode([token]).strip()]
    given["logit_bias"] = dict.fromkeys(map(str, spaces), -100)  # this model would write little else
    whole = client.chat.completions.create(**given)
    texts = [choice.message.content for choice in whole.choices]
    for choice in whole.choices:
        found = json.loads(choice.message.content)
        assert set(found) == {"animal", "quick"} and found["animal"] in ("fox", "dog")
        assert isinstance(found["quick"], bool) and choice.finish_reason == "stop"
    parts = [part.choices[0] for part in client.chat.completions.create(**given, stream=True)]
    assert texts == ["".join(p.delta.content or "" for p in parts if p.index == index) for index in range(4)]
    wrong = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "fox"}}}
    for form, param in [
        (wrong, "response_format"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema"),
    ]:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{**given, "response_format": form})
        assert caught.value.param == param


def test_models(client: Any, running: Running) -> None:
    ids = ["tiny", running.id("one"), running.id("two")]
    assert [model.id for model in client.models.list()] == ids
    assert client.models.retrieve("one").id == ids[1] and client.models.retrieve(ids[2]).root == "two"
    assert client.models.retrieve("one").lorakit == {"has_chat_template": True, "r": 4, "base_name": "tiny"}
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("three")


def test_requests_with_mistakes_name_the_field(client: Any) -> None:
    cases = [
        ({"best_of": 2}, "best_of", "unknown_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", None),
        ({"messages": [{"role": "user"}]}, None, None),
        ({"n": 17}, "n", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"functions": []}, "functions", "unknown_parameter"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_object"}, "tools": TOOLS}, "response_format", "invalid_value"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "invalid_value"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "invalid_value"),
        ({"messages": [{"role": "user", "content": "long " * 200}]}, "messages", "context_length_exceeded"),
    ]
    for change, param, code in cases:
        body = {"model": "one", "messages": CHAT, **change}
        with pytest.raises(openai.BadRequestError) as caught:
            client.post("/chat/completions", body=body, cast_to=object)
        assert caught.value.type == "invalid_request_error", change
        assert (param is None or caught.value.param == param) and (code is None or caught.value.code == code), change
    for change, param in [
        ({"suffix": "x"}, "suffix"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, -1], "echo": True}, "prompt[0]"),
        ({"prompt": [1, 5_000_000], "echo": True}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
    ]:
        with pytest.raises(openai.BadRequestError) as caught:
            client.post("/completions", body={"model": "one", "prompt": TEXT, **change}, cast_to=object)
        assert caught.value.param == param, change
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="three", prompt=TEXT)
    assert unknown.value.code == "model_not_found"
    ignored = {"user": "me", "metadata": {"a": "b"}, "store": False, "functions": None}
    assert client.post("/completions", body={"model": "one", "prompt": TEXT, **ignored}, cast_to=object)


BODIES = {
    "not JSON": b"{",
    "NaN": b'{"model": "one", "prompt": "a", "temperature": NaN}',
    "infinity": b'{"model": "one", "prompt": "a", "temperature": 1e999}',
    "a repeated key": b'{"model": "one", "model": "two", "prompt": "a"}',
    "a surrogate": b'{"model": "one", "prompt": "\\ud800"}',
    "deep": b'{"model": "one", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a long number": b'{"model": "one", "prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
    "a large number": b'{"model": "one", "prompt": "a", "temperature": ' + b"9" * 400 + b"}",
    "bytes": b"\xff\xfe{}",
    "a list": b"[]",
    "nothing": b"",
}


def test_faults_of_the_transport_have_the_same_form(running: Running) -> None:
    post, head = running.client.post, {"Content-Type": "application/json"}
    for name, body in BODIES.items():
        reply = post("/v1/completions", content=body, headers=head)
        assert reply.status_code == 400 and set(reply.json()["error"]) == {"message", "type", "param", "code"}, name
    large = b'{"model": "one", "prompt": "' + b"a" * MOST_BODY_BYTES + b'"}'
    others = {
        404: running.client.get("/v1/other"),
        405: running.client.get("/v1/completions"),
        413: post("/v1/completions", content=large, headers=head),
        415: post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}),
        421: running.client.get("/v1/models", headers={"Host": "evil.example"}),
        403: running.client.get("/v1/models", headers={"Origin": "https://evil.example"}),
    }
    for status, reply in others.items():
        assert reply.status_code == status and reply.json()["error"]["message"], status
    assert running.client.get("/v1/models", headers={"Origin": running.url}).status_code == 200
    assert running.client.options("/v1/models").status_code == 405
    assert "access-control-allow-origin" not in running.client.get("/health").headers


BOMBS = ["{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'a' * 10**10 }}"]


def test_a_template_that_takes_too_much_ends_its_request_only(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0)
    tokenizer = running.service.find("one").tokenizer
    right, before = tokenizer.chat_template, rss_bytes()
    given = {"model": "one", "messages": CHAT, "max_tokens": 2}
    running.service._templates.close()  # its processes have another limit of time
    for bomb in BOMBS:
        tokenizer.chat_template = bomb
        reply = running.client.post("/v1/chat/completions", json=given)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "messages"
        assert "takes more than" in reply.json()["error"]["message"]
        assert "another template" in reply.json()["error"]["message"]
    assert running.client.post("/v1/completions", json={"model": "tiny", "prompt": TEXT}).status_code == 200
    assert rss_bytes() - before < 1 << 28
    tokenizer.chat_template = right
    assert running.client.post("/v1/chat/completions", json=given).status_code == 200


def idle(running: Running) -> bool:
    return not any(running.service.counts()[state] for state in ("waiting", "reading", "open"))


def wait_for(is_true: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


LONG = {"model": "one", "prompt": "a", "max_tokens": 120, "ignore_eos": True}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of the engine take a while."""
    from lorakit.generate import Engine

    step = Engine.step

    def waiting(engine: Engine, chunks: int | None = 1) -> Any:
        time.sleep(0.05)
        return step(engine, chunks)

    monkeypatch.setattr(Engine, "step", waiting)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_disconnect_ends_the_row(slow: None, running: Running, is_stream: bool) -> None:
    timeout = httpx.Timeout(30, read=0.4)
    with (
        contextlib.suppress(httpx.ReadTimeout),
        running.client.stream("POST", "/v1/completions", json={**LONG, "stream": is_stream}, timeout=timeout) as reply,
    ):
        next(reply.iter_lines())
        assert is_stream and not idle(running)
    wait_for(lambda: idle(running), 2)


def test_a_deadline_ends_the_row(slow: None, start: Start) -> None:
    running = start(Access(timeout=0.5))
    reply = running.client.post("/v1/completions", json=LONG)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    wait_for(lambda: idle(running), 2)
    header = {"X-Request-Timeout": "0.2"}
    begin = time.monotonic()
    with running.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}, headers=header) as parts:
        lines = [line for line in parts.iter_lines() if line]
    assert time.monotonic() - begin < 5
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    wait_for(lambda: idle(running), 2)
    assert running.client.post("/v1/completions", json=LONG, headers={"X-Request-Timeout": "no"}).status_code == 400


def test_a_full_queue_and_draining(slow: None, start: Start) -> None:
    running = start(rows=1, waiting=1)
    got: list[int] = []
    given = {**LONG, "max_tokens": 20}
    threads = [
        threading.Thread(
            target=lambda: got.append(
                httpx.post(f"{running.url}/v1/completions", json=given, timeout=60, trust_env=False).status_code
            )
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: running.service.counts()["open"] + running.service.counts()["waiting"] == 2)
    full = running.client.post("/v1/completions", json=LONG)
    assert full.status_code == 429 and full.headers["Retry-After"] == "1"
    assert full.json()["error"]["code"] == "queue_full"
    assert running.client.get("/ready").status_code == 200
    running.service.drain()
    late = running.client.post("/v1/completions", json=LONG)
    assert late.status_code == 503 and late.json()["error"]["code"] == "draining"
    assert running.client.get("/ready").status_code == 503
    for thread in threads:
        thread.join(60)
    assert got == [200, 200]


def test_a_failed_row_is_a_server_error(monkeypatch: pytest.MonkeyPatch, running: Running) -> None:
    from lorakit.generate import Engine

    def fail(engine: Engine, chunks: int | None = 1) -> Any:
        raise RuntimeError(f"a secret: {TEXT}")

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "step", fail)
        reply = running.client.post("/v1/completions", json={"model": "one", "prompt": TEXT})
    assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error"
    assert running.client.post("/v1/completions", json={"model": "one", "prompt": TEXT}).status_code == 200


def test_keys(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    texts = {"admin": "a-secret", "team": "t-secret"}
    hashes = {name: sha256(text.encode()).hexdigest() for name, text in texts.items()}
    keys = [Key(name="admin", sha256=hashes["admin"], admin=True)]
    keys += [Key(name="team", sha256=hashes["team"], models=["one"])]
    running = start(Access(keys))

    def status(name: str | None, path: str, body: dict[str, Any] | None = None) -> int:
        headers = {} if name is None else {"Authorization": f"Bearer {texts.get(name, name)}"}
        method = "GET" if body is None else "POST"
        return running.client.request(method, path, json=body, headers=headers).status_code

    given = {"model": "one", "prompt": TEXT, "max_tokens": 2}
    for name, want in {None: 401, "wrong": 401, "team": 200, "admin": 200}.items():
        assert status(name, "/v1/completions", given) == want, name
        assert status(name, "/v1/models") == want, name
    for model, want in {"two": 404, "tiny": 404, running.id("one"): 200, running.id("two"): 404}.items():
        assert status("team", "/v1/completions", {**given, "model": model}) == want, model
        assert status("admin", "/v1/completions", {**given, "model": model}) == 200, model
    listed = running.client.get("/v1/models", headers={"Authorization": "Bearer t-secret"}).json()["data"]
    assert [one["id"] for one in listed] == [running.id("one")]
    assert status(None, "/health") == status(None, "/ready") == 200
    assert (status("team", "/metrics"), status("admin", "/metrics")) == (403, 200)
    unload = {"lora_name": "two"}
    assert status("team", "/v1/unload_lora_adapter", unload) == 403 and len(running.service.models()) == 3
    log = capfd.readouterr().err
    assert '"key": "team"' in log and TEXT not in log and "secret" not in log


def test_adapters_are_unloaded_and_loaded_by_name(running: Running) -> None:
    def post(path: str, **body: str) -> httpx.Response:
        return running.client.post(f"/v1/{path}_lora_adapter", json=body)

    id = running.id("one")
    for _ in range(2):
        assert post("unload", lora_name="one").status_code == 200
    assert running.client.post("/v1/completions", json={"model": "one", "prompt": TEXT}).status_code == 404
    for _ in range(2):
        assert post("load", lora_name="one").json() == {"lora_name": "one", "id": id}
    assert running.client.post("/v1/completions", json={"model": "one", "prompt": TEXT}).status_code == 200
    assert post("load", lora_name="three").status_code == 404
    for path in ("../one", "/etc", str(running.folders["one"]), ""):
        assert post("load", lora_name=path).status_code == 400
    named = post("load", lora_name="one", lora_path=str(running.folders["one"]))
    assert (named.status_code, named.json()["error"]["param"]) == (400, "lora_path")


def test_metrics_count_requests_and_tokens(running: Running) -> None:
    running.client.post("/v1/completions", json={"model": "one", "prompt": TEXT, "max_tokens": 3, "ignore_eos": True})
    running.client.post("/v1/completions", json={"model": "unknown\nmodel", "prompt": TEXT})
    lines = running.client.get("/metrics").text.splitlines()
    assert 'lorakit_requests_total{model="one",route="/v1/completions",status="200"} 1.0' in lines
    assert 'lorakit_requests_total{model="",route="/v1/completions",status="404"} 1.0' in lines
    assert 'lorakit_completion_tokens_total{model="one"} 3.0' in lines
    assert 'lorakit_rows{state="open"} 0.0' in lines
    if sys.platform == "linux":
        (resident,) = (float(line.split()[1]) for line in lines if line.startswith("process_resident_memory_bytes "))
        assert resident == pytest.approx(rss_bytes(), rel=0.1)
