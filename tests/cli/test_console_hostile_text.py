"""No file can control the terminal: names and values of untrusted adapters are printed as visible characters."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pty
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.cli import console, main
from lorakit.errors import printable
from lorakit.terminal import json_line
from lorakit.train.progress import LiveProgress, PlainProgress

Save = Callable[..., Path]
HOSTILE = "MARK\x1b[2J\x1b]0;own\x07\x9b31m\x7f\r\x00\u202egpj\u2066\u200f\u2028\nhealthy: forged [bold red]x[/bold red]\ud800"
CONFIG, SIDECAR, WEIGHTS = "adapter_config.json", "lorakit.json", "adapter_model.safetensors"


def commands_the_terminal(text: str) -> set[str]:
    """Return control characters and those that change the direction of text, except the line feeds and tabs of tables."""
    bidi = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    marks = {"\u200e", "\u200f", "\u061c", "\u2028", "\u2029"}
    return {
        char
        for char in text
        if char not in "\n\t"
        and (unicodedata.category(char) in {"Cc", "Cs"} or unicodedata.bidirectional(char) in bidi or char in marks)
    }


@pytest.fixture
def hostile(save_adapter: Save) -> Callable[[str, int], Path]:
    """A valid adapter of the tiny model in which every free text is hostile."""

    def make(name: str, seed: int) -> Path:
        folder = save_adapter(name, seed)
        tensors = {key: value.clone() for key, value in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        config = json.loads((folder / CONFIG).read_text())
        config |= {
            "base_model_name_or_path": HOSTILE,
            "revision": HOSTILE,
            HOSTILE: HOSTILE,
            "init_lora_weights": HOSTILE,
        }
        config["target_modules"] = [*config["target_modules"], HOSTILE]
        (folder / CONFIG).write_text(json.dumps(config))
        values = json.loads((folder / SIDECAR).read_text())
        values |= {"base_name": HOSTILE, "training": {HOSTILE: HOSTILE}}
        del values["seal"]  # not a signature: anybody can compute it
        values["seal"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        (folder / SIDECAR).write_text(json.dumps(values))
        (folder / HOSTILE.replace("\x00", "").replace("\ud800", "").replace("/", "")).write_text("")
        return folder

    return make


@pytest.fixture
def foreign(hostile: Any) -> Path:
    """The same with a tensor of a hostile name, which fits no model."""
    folder = hostile("foreign", 3)
    tensors = {key: value.clone() for key, value in load_file(folder / WEIGHTS).items()}
    name = HOSTILE.replace("\x00", "").replace("\ud800", "")
    tensors |= {f"base_model.model.{name}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def do(*words: Any) -> tuple[int, str]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return do


pytestmark = pytest.mark.filterwarnings("default")  # printed as the command line prints them


def test_inspect(hostile: Any, foreign: Path, run: Run) -> None:
    for folder in (hostile("one", 1), foreign):
        code, text = run("inspect", folder)
        assert "MARK" in text and "[bold red]" in text
        assert not commands_the_terminal(text)
        assert code == 1 and not any(line.startswith("healthy") for line in text.splitlines())


@pytest.mark.costly
@pytest.mark.axes(alone=("verb", "as_json"))
@pytest.mark.parametrize("verb", ["inspect", "compare", "combine", "compress", "merge", "generate", "eval"])
@pytest.mark.parametrize("as_json", [False, True])
def test_every_command_that_reads_adapters(
    verb: str, as_json: bool, hostile: Any, foreign: Path, run: Run, tmp_path: Path, tiny_model_directory: Path
) -> None:
    one, other, more = hostile("one", 1), hostile("other", 2), ["--json"] if as_json else []
    data = tmp_path / "text.txt"
    data.write_text("one two three four five six seven eight nine ten\n" * 9)
    model, out = ["--model", tiny_model_directory], ["--output-dir", tmp_path / "out"]

    def words(folder: Path) -> list[Any]:
        return {
            "inspect": [folder],
            "compare": [folder, other],
            "combine": ["--adapter", folder, other, *out],
            "compress": ["--adapter", folder, "--rank", 1, *out],
            "merge": [*model, "--adapter", folder, *out],
            "generate": [*model, "--adapter", folder, "--prompt", "one", "--max-new-tokens", 1, "--device", "cpu"],
            "eval": [*model, "--adapter", folder, "--data", data, "--device", "cpu"],
        }[verb]

    printed = [run(verb, *words(folder), *more)[1] for folder in (one, foreign)]
    assert all(printed)
    assert not commands_the_terminal("".join(printed)), printed
    assert "MARK" in "".join(printed)


def test_a_traceback(run: Run, tmp_path: Path) -> None:
    code, text = run("inspect", tmp_path / "MARK\x1b[2J", "--traceback")
    assert code == 1 and text.count("MARK") >= 2
    assert not commands_the_terminal(text)


def test_a_table_keeps_its_lines() -> None:
    lines = console.table(["a", "c"], [[HOSTILE, "1"], ["x", "2"]]).splitlines()
    assert len(lines) == 4
    assert not commands_the_terminal("".join(lines))


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_lines_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "400")
    plain, drawn = io.StringIO(), Terminal()
    PlainProgress(plain).say(HOSTILE)
    LiveProgress(drawn).say(HOSTILE)
    for shown in (plain.getvalue(), drawn.getvalue()):
        assert "MARK" in shown and "[bold red]x[/bold red]" in shown
        assert not commands_the_terminal(shown)


def test_a_terminal_gets_no_more_than_a_pipe(monkeypatch: pytest.MonkeyPatch, hostile: Any) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", Terminal())
    main(["inspect", str(hostile("one", 1))])
    assert "MARK" in sys.stdout.getvalue()
    assert not commands_the_terminal(sys.stdout.getvalue())


def test_printable() -> None:
    assert printable("plain ΔW 中文 🙂\n\t") == "plain ΔW 中文 🙂\n\t"
    assert printable("a\x1b[2J\r\x7f\x9b\u202e") == "a␛[2J␍␡\\x9b\\u202e"
    assert printable("a\nb\tc", one_line=True) == "a␊b␉c"
    assert printable("\ud800") == "\\ud800"
    every = "".join(map(chr, range(0x3000)))
    assert not commands_the_terminal(printable(every))
    assert "\n" not in printable(every, one_line=True)


@contextlib.contextmanager
def _terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[bytearray]:
    """Make both streams of this process a pseudo-terminal of 100 columns, and yield what it receives."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 1 << 16):
                shown.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with monkeypatch.context() as patch, os.fdopen(theirs, "w", encoding="utf-8") as stream:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            yield shown
    finally:
        reader.join()
        os.close(ours)


NAME = "MARK\x1b]0;own\x07\x9b31m\x7f\r\u202egpj\u2066"
"""Characters that the name of a file may have."""


@pytest.mark.costly(cases=0)
def test_names_of_files_and_labels_in_a_terminal(
    tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / NAME
    folder.mkdir()
    data = folder / f"{NAME}.jsonl"
    rows = [{"text": f"one two {at}", "label": f"{NAME} {'ab'[at % 2]}"} for at in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common, run, small = ["--model", tiny_model_directory, "--device", "cpu"], folder / NAME, ["--max-length", "32"]
    adapter = ["--adapter", run / "adapter"]
    for code, *words in (
        (0, "train", *common, *small, "--data", data, "--output-dir", run, "--max-steps", "1", "--r", "2"),
        (0, "data", data, "--model", tiny_model_directory),
        (0, "predict", data, *common, *adapter),
        (0, "eval", *common, "--data", data, *adapter),
        (0, "list", folder),
        (2, "convert-config", data),
        (1, "inspect", folder / "no"),
        (1, "inspect", folder / "no", "--traceback"),
    ):
        with _terminal(monkeypatch) as shown:
            found = main([str(word) for word in words])
        text = shown.decode().replace("\r\n", "\n")  # the terminal adds the carriage returns
        assert found == code, text
        assert "u202e" in text
        assert not commands_the_terminal(text), text


def test_predictions_are_the_same_json_with_escaped_controls() -> None:
    row = {"label": NAME, "text": "é狐🙂\ud800"}
    line = json_line(row)
    assert json.loads(line) == row and "é狐🙂" in line
    assert not commands_the_terminal(line)
