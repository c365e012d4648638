"""lorakit.cli.chat: a conversation line by line; each answer is what the library says for the conversation so far."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit import open_session
from lorakit.cli import main
from lorakit.generate import Sampling


def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: str, *words: object) -> list[str]:
    """Return what is written to standard output and to standard error."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", *map(str, words), "--max-new-tokens", "6"]) == 0
    captured = capsys.readouterr()
    return [captured.out, captured.err]


def test_each_answer_is_that_of_the_conversation_so_far(
    tiny_model_directory: Path,
    save_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = save_adapter("it", 3)
    lines = "hello\nhello\n/base\nagain?\n/again\n/reset\nhello\n/quit\nnot read\n"
    out, _ = talk(monkeypatch, capsys, lines, "--adapter", adapter, "--model", tiny_model_directory, "--system", "be")
    expected, messages, seed = [], [{"role": "system", "content": "be"}], 0
    with open_session(str(tiny_model_directory), {"it": adapter}) as session:
        for text, name in (("hello", "it"), ("hello", "it"), ("again?", None), ("again?", None), ("hello", None)):
            if seed == 3:
                messages = messages[:-2]
            if seed == 4:
                messages = messages[:1]
            messages.append({"role": "user", "content": text})
            sampling = Sampling(temperature=0.7, top_p=0.95, seed=seed)
            answer = session.chat(messages, adapter=name, max_new_tokens=6, sampling=sampling)
            messages.append({"role": "assistant", "content": answer.text})
            expected.append(answer.text + ("" if answer.text.endswith("\n") else "\n"))
            seed += 1
    assert out == "".join(expected)


def test_what_is_not_possible_is_said_and_the_conversation_goes_on(
    tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", tiny_model_directory, "--temperature", "0")
    plain, _ = talk(monkeypatch, capsys, "hello\n", *words)
    out, err = talk(monkeypatch, capsys, "/again\n/adapter it\n/nothing\n/help\n\nhello\n", *words)
    assert out == plain
    assert err.count("is not possible here") == 3
    assert "/reset" in err


def test_a_message_that_is_too_long_is_not_part_of_the_conversation(
    tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", tiny_model_directory, "--temperature", "0")
    plain, _ = talk(monkeypatch, capsys, "hello\n", *words)
    out, err = talk(monkeypatch, capsys, "word " * 500 + "\nhello\n", *words)
    assert out == plain
    assert "tokens, but the model supports at most" in err


def test_wrong_flags_are_rejected_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat"]) == 2
    assert main(["chat", "--model", "smollm2", "--temperature", "-1"]) == 2
    assert main(["chat", "--model", "smollm2", "--max-new-tokens", "0"]) == 2
    assert capsys.readouterr().out == ""
