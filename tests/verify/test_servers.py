"""Adapters behind HTTP: a server that computes with PEFT agrees, and each fault of a server is found."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.verify.peft_server import Change, Models, late, serving

from lorakit.cli import main
from lorakit.errors import LorakitError, ModelError, NonFiniteError, UsageError
from lorakit.verify import Comparison, VerifyOptions, verify
from lorakit.verify.http_client import JsonClient

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads it


@pytest.fixture
def adapters(save_adapter: Callable[..., Path]) -> dict[str, Path]:
    return {
        "notes": save_adapter("notes", 1, use_rslora=True, alpha_pattern={"q_proj": 3}),
        "other": save_adapter("other", 2),
    }


def compared(url: str, adapters: dict[str, Path], base: Path, **fields: Any) -> Comparison:
    options = VerifyOptions(model=str(base), **{"prompts": 3, "new_tokens": 4, **fields})
    (one,) = verify(adapters["notes"], [url], options).comparisons
    return one


def on_completions(change: Callable[[dict[str, Any]], Any]) -> Change:
    return lambda path, reply: change(reply) if path == "/v1/completions" else reply


def with_values(change: Callable[[list[Any]], Any]) -> Change:
    def changed(reply: dict[str, Any]) -> Any:
        logs = reply["choices"][0]["logprobs"]
        if logs is not None:
            logs["token_logprobs"] = change(logs["token_logprobs"])
        return reply

    return on_completions(changed)


def test_a_server_that_computes_with_peft(adapters: dict[str, Path], tiny_model_directory: Path) -> None:
    with serving(Models(tiny_model_directory, adapters)) as url:
        one = compared(url + "/v1/", adapters, tiny_model_directory, prompts=20)
    assert one.problems == []
    assert 0 < one.difference < 1e-4
    assert (one.other_tokens, one.greedy_same, one.greedy_first) == ((), 20, None)
    assert set(one.distances) == {"lorakit's base", "other", "base"} and min(one.distances.values()) > 0.1
    assert one.base_difference is not None and one.base_difference < 1e-4
    assert one.versions == {"peft": "1.2.3"}


def test_a_server_that_tells_only_log_probabilities(adapters: dict[str, Path], tiny_model_directory: Path) -> None:
    def change(path: str, reply: dict[str, Any]) -> Any:
        if path in ("/tokenize", "/version"):
            return 404
        for choice in reply.get("choices", ()):
            choice.pop("token_ids", None)
        return reply

    with serving(Models(tiny_model_directory, adapters), change) as url:
        one = compared(url, adapters, tiny_model_directory)
    assert one.problems == []
    assert (one.other_tokens, one.greedy_same) == (None, None)


def test_a_server_that_answers_as_the_base(adapters: dict[str, Path], tiny_model_directory: Path) -> None:
    models = Models(tiny_model_directory, adapters)
    scores = models.scores
    models.scores = lambda name, ids: scores("base", ids)  # type: ignore[method-assign]
    with serving(models) as url:
        one = compared(url, adapters, tiny_model_directory)
    assert one.difference > one.bound
    assert len(one.problems) >= 4  # the bound, and lorakit's base, the base and the other adapter are not farther


@pytest.mark.parametrize("served", [{"notes": "notes", "copy": "notes"}, {"notes": "other", "copy": "notes"}])
def test_two_names_for_one_model(adapters: dict[str, Path], tiny_model_directory: Path, served: dict[str, str]) -> None:
    models = Models(tiny_model_directory, {name: adapters[folder] for name, folder in served.items()})
    with serving(models) as url:
        one = compared(url, adapters, tiny_model_directory)
    assert any("copy" in problem for problem in one.problems)


@pytest.mark.parametrize("shift", [0.01, -0.01])
def test_values_of_other_dtypes_are_not_judged(
    adapters: dict[str, Path], tiny_model_directory: Path, shift: float
) -> None:
    from lorakit.session import SessionOptions

    noisy = with_values(lambda values: [None, *(value + shift for value in values[1:])])
    with serving(Models(tiny_model_directory, adapters), noisy) as url:
        judged = compared(url, adapters, tiny_model_directory)
        other = compared(url, adapters, tiny_model_directory, session=SessionOptions(dtype="bfloat16", device="cpu"))
    assert any("log-probabilities" in problem for problem in judged.problems)
    assert not other.is_judged and other.problems == [] and other.difference > 0.009


def test_other_token_ids(adapters: dict[str, Path], tiny_model_directory: Path) -> None:
    def change(path: str, reply: dict[str, Any]) -> Any:
        return {"tokens": [0, *reply["tokens"]]} if path == "/tokenize" else reply

    with serving(Models(tiny_model_directory, adapters), change) as url:
        one = compared(url, adapters, tiny_model_directory)
    assert one.other_tokens == (0, 1, 2) and len(one.problems) == 1


def test_another_greedy_token(adapters: dict[str, Path], tiny_model_directory: Path) -> None:
    def change(reply: dict[str, Any]) -> Any:
        choice = reply["choices"][0]
        if "token_ids" in choice:
            choice["token_ids"][1] = 300
        return reply

    with serving(Models(tiny_model_directory, adapters), on_completions(change)) as url:
        one = compared(url, adapters, tiny_model_directory)
    assert one.greedy_same == 0 and one.greedy_first is not None
    assert (one.greedy_first.position, one.greedy_first.theirs) == (1, 300)
    assert len(one.problems) == 1


FAULTS: dict[str, tuple[Change, type[LorakitError]]] = {
    "another model": (on_completions(lambda reply: {**reply, "model": "base"}), ModelError),
    "no model": (on_completions(lambda reply: {**reply, "model": None}), ModelError),
    "late": (late(3.0), ModelError),
    "no log-probabilities": (with_values(lambda values: None), ModelError),
    "log-probabilities of the answer": (with_values(lambda values: values[-1:]), ModelError),
    "null": (with_values(lambda values: [*values[:2], None, *values[3:]]), ModelError),
    "text": (with_values(lambda values: [*values[:2], "-1.5", *values[3:]]), ModelError),
    "NaN": (with_values(lambda values: [*values[:2], math.nan, *values[3:]]), NonFiniteError),
    "infinity": (with_values(lambda values: [*values[:2], -math.inf, *values[3:]]), NonFiniteError),
    "a number that no float has": (with_values(lambda values: [*values[:2], -(10**400), *values[3:]]), ModelError),
    "more tokens": (on_completions(lambda reply: {**reply, "usage": {"prompt_tokens": 1}}), ModelError),
    "no choices": (on_completions(lambda reply: {**reply, "choices": []}), ModelError),
    "not an object": (on_completions(lambda reply: [reply]), ModelError),
    "not JSON": (on_completions(lambda reply: b"<html>"), ModelError),
    "deep JSON": (on_completions(lambda reply: b"[" * 100_000), ModelError),
    "error": (on_completions(lambda reply: 500), ModelError),
    "redirect": (on_completions(lambda reply: 307), ModelError),
    "no completions": (on_completions(lambda reply: 404), ModelError),
    "no models": (lambda path, reply: {"data": []} if path == "/v1/models" else reply, ModelError),
    "models of another form": (lambda path, reply: {"data": "notes"} if path == "/v1/models" else reply, ModelError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_servers(
    adapters: dict[str, Path], tiny_model_directory: Path, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, error = FAULTS[fault]
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with (
        serving(Models(tiny_model_directory, {"notes": adapters["notes"]}), change) as url,
        pytest.raises(error) as caught,
    ):
        compared(url, adapters, tiny_model_directory, timeout=1.0 if fault == "late" else 20.0)
    assert caught.value.where == url
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("fault", ["another model", "late", "no log-probabilities", "NaN"])
def test_a_command_writes_one_message_and_no_file(
    adapters: dict[str, Path], tiny_model_directory: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in adapters["notes"].iterdir()}

    before, (change, error) = files(), FAULTS[fault]
    words = ["--model", str(tiny_model_directory), "--prompts", "2", "--max-new-tokens", "2", "--device", "cpu"]
    with serving(Models(tiny_model_directory, {"notes": adapters["notes"]}), change) as url:
        timeout = "1" if fault == "late" else "20"
        given = ["verify", str(adapters["notes"]), "--against", f"reloaded,{url}", "--timeout", timeout]
        assert main([*given, *words]) == error.exit_code
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("error:") == 1 and url in shown.err
    assert files() == before


@contextmanager
def answering(content: bytes) -> Iterator[str]:
    """Answer every request with bytes, and yield the URL; the connection stays open for a while."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(content)
                done.wait(0 if b"chunked" in content else 10)

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        done.set()
        thread.join()


@pytest.mark.parametrize(
    "content",
    [
        b"HTTP/1.1 500 Error\r\nContent-Length: 1000\r\n\r\n",
        b"HTTP/1.1 500 Error\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 429 Busy\r\nContent-Length: 1000\r\n\r\nlater\n",
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{"data":',
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01 chunked",
    ],
)
def test_answers_that_end_early(content: bytes) -> None:
    with answering(content) as url, pytest.raises(ModelError) as caught:
        JsonClient(url, timeout=0.3).get("/v1/models")
    assert caught.value.where == url and ("429" in str(caught.value)) == (b"429" in content)


@pytest.mark.parametrize("key", ["secret\n", "söcret", "se\u0000cret"])
def test_a_key_that_no_header_can_carry_is_not_shown(key: str) -> None:
    with pytest.raises(UsageError) as caught:
        JsonClient("http://127.0.0.1:9", key)
    assert caught.value.field == "api_key_env" and "cret" not in str(caught.value)


def in_llama_server(url_replies: dict[str, Any], adapters: dict[str, Path], base: Path) -> tuple[str, LorakitError]:
    """Return the URL of a server with these replies, and the error that they cause."""
    replies = {"/v1/models": {"data": [{"id": "base", "owned_by": "llamacpp"}]}, **url_replies}
    models: Any = SimpleNamespace(reply=lambda path, body: replies.get(path, {}))
    with serving(models) as url, pytest.raises(ModelError) as caught:
        compared(url, adapters, base, served_model="notes")
    return url, caught.value


def test_two_adapters_with_one_name_in_llama_cpp(adapters: dict[str, Path], tiny_model_directory: Path) -> None:
    listed = [{"id": 0, "path": "a/notes.gguf"}, {"id": 1, "path": "b/notes.gguf"}]
    url, error = in_llama_server({"/lora-adapters": listed}, adapters, tiny_model_directory)
    assert (error.where, error.what) == (url, "notes")


@pytest.mark.parametrize(
    "replies",
    [
        {"/lora-adapters": [{"id": 0}, {"path": "a/other.gguf"}, 3]},
        {"/lora-adapters": [{"path": "notes.gguf"}]},
        {
            "/lora-adapters": [{"id": 0, "path": "notes.gguf"}],
            "/detokenize": {"content": "\ufffd"},
            "/completion": {"model": "base", "completion_probabilities": [{"top_logprobs": [{"id": [1]}]}]},
        },
        {
            "/lora-adapters": [{"id": 0, "path": "notes.gguf"}],
            "/completion": {"model": "base", "completion_probabilities": [{"id": 1, "logprob": -1.0}] * 9},
        },
    ],
)
def test_faults_of_llama_servers(
    adapters: dict[str, Path], tiny_model_directory: Path, replies: dict[str, Any]
) -> None:
    for slots in (4, "many"):
        url, error = in_llama_server({**replies, "/props": {"total_slots": slots}}, adapters, tiny_model_directory)
        assert error.where == url


def test_ids_that_are_not_tokens_are_unknown(adapters: dict[str, Path], tiny_model_directory: Path) -> None:
    def change(path: str, reply: dict[str, Any]) -> Any:
        if path == "/tokenize":
            return {"tokens": ["1", 2]}
        for choice in reply.get("choices", ()):
            choice["token_ids"] = [True, 10**300]
        return reply

    with serving(Models(tiny_model_directory, adapters), change) as url:
        one = compared(url, adapters, tiny_model_directory)
    assert (one.other_tokens, one.greedy_same, one.problems) == (None, None, [])


def test_long_names_of_servers_are_cut(adapters: dict[str, Path], tiny_model_directory: Path) -> None:
    def change(path: str, reply: dict[str, Any]) -> Any:
        if path == "/version":
            return {"version": "9" * 100_000}
        if path == "/v1/models":
            for model in reply["data"]:
                model["owned_by"] = "x" * 100_000
            reply["data"].append({"id": "notes@" + "x" * 100_000})
        return reply

    with serving(Models(tiny_model_directory, adapters), change) as url:
        one = compared(url, adapters, tiny_model_directory)
    assert one.problems == [] and len(str(one.as_dict())) < 3000


@pytest.mark.parametrize(
    ("names", "wanted"), [(["x"], None), (["notes@1", "notes@2"], None), (["notes@1"], "notes"), ([], "x")]
)
def test_a_server_without_the_adapter(
    adapters: dict[str, Path], tiny_model_directory: Path, names: list[str], wanted: str | None
) -> None:
    models = Models(tiny_model_directory, {"notes": adapters["notes"]})
    models.names = [*names, "base"]
    with serving(models) as url, pytest.raises(ModelError) as caught:
        compared(url, adapters, tiny_model_directory, served_model=wanted)
    assert caught.value.where == url


def test_the_adapter_is_found_by_its_name_without_the_hash(
    adapters: dict[str, Path], tiny_model_directory: Path
) -> None:
    models = Models(tiny_model_directory, {"notes@0123456789ab": adapters["notes"], "other": adapters["other"]})
    with serving(models) as url:
        one = compared(url, adapters, tiny_model_directory)
    assert one.title.startswith("notes@0123456789ab") and one.problems == []


def test_nobody_listens(adapters: dict[str, Path], tiny_model_directory: Path) -> None:
    with pytest.raises(ModelError) as caught:
        compared("http://127.0.0.1:9", adapters, tiny_model_directory)
    assert caught.value.where == "http://127.0.0.1:9"


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://[::1",
        "http://h:port",
        "http://h:99999",
        "http://name:secret@h",
        "http://h/?x=1",
        "http://h/#x",
        "http://h/a b",
        "http://h/a\nb",
    ],
)
def test_no_url(adapters: dict[str, Path], tiny_model_directory: Path, url: str) -> None:
    with pytest.raises(UsageError) as caught:
        compared(url, adapters, tiny_model_directory)
    assert caught.value.field == "against" and "secret" not in str(caught.value)
