"""Adapters behind HTTP: a server that computes with PEFT agrees, and each fault of a server is found."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.verify.peft_server import Change, Models, late, serving

from lorakit.cli import main
from lorakit.errors import LorakitError, ModelError, NonFiniteError, UsageError
from lorakit.verify import Comparison, VerifyOptions, verify

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


def test_values_of_other_dtypes_are_not_judged(adapters: dict[str, Path], tiny_model_directory: Path) -> None:
    from lorakit.session import SessionOptions

    noisy = with_values(lambda values: [None, *(value + 0.01 for value in values[1:])])
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


def test_two_adapters_with_one_name_in_llama_cpp(adapters: dict[str, Path], tiny_model_directory: Path) -> None:
    replies = {
        "/v1/models": {"data": [{"id": "base", "owned_by": "llamacpp"}]},
        "/lora-adapters": [{"id": 0, "path": "a/notes.gguf"}, {"id": 1, "path": "b/notes.gguf"}],
    }
    models: Any = SimpleNamespace(reply=lambda path, body: replies.get(path, {}))
    with serving(models) as url, pytest.raises(ModelError) as caught:
        compared(url, adapters, tiny_model_directory, served_model="notes")
    assert (caught.value.where, caught.value.what) == (url, "notes")


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


@pytest.mark.parametrize("url", ["http://", "http:localhost"])
def test_no_url(adapters: dict[str, Path], tiny_model_directory: Path, url: str) -> None:
    with pytest.raises(UsageError) as caught:
        compared(url, adapters, tiny_model_directory)
    assert caught.value.field == "against"
