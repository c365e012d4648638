"""`lorakit eval`: base and adapters on the same tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import cli, core
from lorakit.config import LoraConfig
from lorakit.core.files import adapter_folder
from lorakit.session import GENERAL_TEXT

from ..conftest import CHAT_TEMPLATE


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick fox jumps over lazy dogs. " * 20, encoding="utf-8")
    return path


def _adapter(model: Any, folder: Path, seed: int) -> Path:
    core.attach(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False), seed=seed)
    core.save_adapter(model, folder)
    core.detach(model)
    return folder


def test_side_by_side(
    tmp_path: Path, tiny_model_directory: Path, tiny_llama: Any, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [_adapter(tiny_llama, tmp_path / f"adapter-{n}", n) for n in (1, 2)]
    words = ["eval", "--model", str(tiny_model_directory), "--data", str(text), "--dtype", "float32", "--device", "cpu"]
    assert cli.main([*words, "--adapter", str(folders[0]), "--adapter", str(folders[1]), "--json"]) == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)["results"]
    assert [row["name"] for row in results] == ["base", *map(str, folders)]
    assert len({row["loss"] for row in results}) == 3
    assert len({row["tokens"] for row in results}) == 1
    for row in results:
        assert row["perplexity"] == pytest.approx(torch.tensor(row["loss"]).exp().item(), rel=1e-4)
    assert captured.err.startswith("warning: 2 rows show little")
    assert cli.main([*words, "--adapter", *map(str, folders), "--verbose"]) == 0
    captured = capsys.readouterr()
    assert "data: 1 document" in captured.err and "precision: float32, as requested." in captured.err
    lines = captured.out.splitlines()
    assert lines[0].split() == ["loss", "perplexity", "tokens"]
    assert [line.split()[0] for line in lines[2:5]] == ["base", *map(str, folders)]
    assert [line.partition(" against base: no verdict")[0] for line in lines[6:]] == [*map(str, folders)]
    assert cli.main(words) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


TOOLS_TEMPLATE = "{{ tools | tojson if tools else '' }}" + CHAT_TEMPLATE


@pytest.mark.parametrize("kind", ["template", "new tokens"])
def test_data_that_only_the_adapters_template_renders(
    tmp_path: Path, tiny_model_directory: Path, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """A run measures before training what eval measures of the base, if both have the same tokens."""
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "It is four."}]
    tools = [{"type": "function", "function": {"name": "lookup", "description": "tide"}}]
    data, template, run = tmp_path / "talks.jsonl", tmp_path / "tools.jinja", tmp_path / "run"
    rows = [{"messages": [{**talk[0], "content": f"hello {n}"}, talk[1]], "tools": tools} for n in range(2)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    template.write_text(TOOLS_TEMPLATE, encoding="utf-8")
    common = ["--data", str(data), "--dtype", "float32", "--device", "cpu"]
    words = [*common, "--eval-data", str(data), "--chat-template", str(template), "--max-steps", "1"]
    more = ["--new-tokens", "<tide>"] if kind == "new tokens" else []
    assert (
        cli.main(
            ["train", "--model", str(tiny_model_directory), *words, *more, "--output-dir", str(run), "--lr", "1e-2"]
        )
        == 0
    )
    first = json.loads((run / "run.json").read_text(encoding="utf-8"))["result"]["first_loss"]
    capsys.readouterr()
    assert cli.main(["eval", *common, "--adapter", str(run), "--json"]) == 0
    captured = capsys.readouterr()
    found = {row["name"]: row["loss"] for row in json.loads(captured.out)["results"]}
    if kind == "template":
        assert found.pop("base") == pytest.approx(first, rel=1e-5)
    else:
        assert "The base is not measured" in captured.err
    assert list(found) == [str(run / "adapter")]


def test_each_adapter_is_read_once(
    tmp_path: Path, tiny_model_directory: Path, tiny_llama: Any, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [_adapter(tiny_llama, tmp_path / f"adapter-{n}", n) for n in (1, 2)]
    read, real = [], adapter_folder.read_tensors
    monkeypatch.setattr(adapter_folder, "read_tensors", lambda path, *more: read.append(path) or real(path, *more))
    words = ["eval", "--model", str(tiny_model_directory), "--data", str(text), "--dtype", "float32", "--device", "cpu"]
    assert cli.main([*words, "--adapter", *map(str, folders)]) == 0
    assert [path.parent for path in read] == folders


@pytest.mark.filterwarnings("default:.*loaded on another base")
def test_what_is_refused(
    tmp_path: Path, tiny_model_directory: Path, tiny_llama: Any, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--model", str(tiny_model_directory), "--dtype", "float32", "--device", "cpu"]

    def refused(*more: str) -> str:
        assert cli.main([*words, *more]) in (1, 2)
        return capsys.readouterr().err

    assert f"{tmp_path / 'nope'}: adapter directory not found" in refused(
        "--data", str(text), "--adapter", str(tmp_path / "nope")
    )
    assert "data file not found" in refused("--data", str(tmp_path / "nope.txt"))
    assert "batch_size is 0; it must be at least 1." in refused("--data", str(text), "--batch-size", "0")
    assert "supports at most 128 tokens" in refused("--data", str(text), "--max-length", "999")
    tiny_llama.model.embed_tokens.weight.data.mul_(-1.5)
    other = _adapter(tiny_llama, tmp_path / "other", 1)
    said = refused("--data", str(text), "--adapter", str(other))
    assert "a different base" in said and "pass --allow-base-mismatch." in said
    assert cli.main([*words, "--data", str(text), "--adapter", str(other), "--allow-base-mismatch"]) == 0


def _answers(path: Path, order: list[int]) -> Path:
    rows = [
        {"prompt": f"{n} plus {n % 7} is", "completion": f" {n + n % 7}." * (1 + n % 3), "who": n % 24} for n in order
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_verdicts_against_the_base_and_another_adapter(
    tmp_path: Path, tiny_model_directory: Path, tiny_llama: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The order and the batches of the rows do not matter; equal adapters do not differ; groups count as one."""
    first, second = (str(_adapter(tiny_llama, tmp_path / name, 1)) for name in ("first", "second"))
    data, shuffled = _answers(tmp_path / "a.jsonl", [*range(48)]), _answers(tmp_path / "b.jsonl", [*range(47, -1, -1)])
    words = ["eval", "--model", str(tiny_model_directory), "--dtype", "float32", "--device", "cpu", "--adapter", first]

    def results(path: Path, *more: str) -> dict[str, Any]:
        assert cli.main([*words, "--data", str(path), *more, "--json"]) == 0
        return {row["name"]: row for row in json.loads(capsys.readouterr().out)["results"]}

    whole = results(data)
    assert "differences" not in whole["base"] and whole[first]["compared_with"] == "base"
    found = whole[first]["differences"]["loss"]
    assert results(data, "--compare", "base") == whole
    assert found["difference"] == pytest.approx(whole[first]["loss"] - whole["base"]["loss"])
    assert found["documents"] == 48 and found["interval"][0] < found["difference"] < found["interval"][1]
    again = results(shuffled, "--batch-size", "1")[first]["differences"]["loss"]
    assert again.pop("verdict") == found.pop("verdict")
    assert again.pop("interval") == pytest.approx(found.pop("interval"), abs=1e-5)
    assert again == pytest.approx(found, abs=1e-5)
    written = tmp_path / "rows.jsonl"
    grouped = results(data, "--group", "who", "--output-file", str(written))
    assert grouped[first]["differences"]["loss"]["documents"] == 24
    rows = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    assert [(row["name"], row["line"]) for row in rows] == [(one, n) for one in ("base", first) for n in range(1, 49)]
    assert [row["document"] for row in rows[:24]] == [row["document"] for row in rows[24:48]]  # row n and n + 24
    for name, found in grouped.items():
        own = [row for row in rows if row["name"] == name]
        assert sum(row["tokens"] for row in own) == found["tokens"]
        assert sum(row["loss_sum"] for row in own) / found["tokens"] == pytest.approx(found["loss"], rel=1e-6)
    same = results(data, "--compare", second)
    assert list(same) == ["base", second, first] and same[first]["compared_with"] == second
    assert same[first]["differences"]["loss"]["verdict"] == "undecided"
    assert "differences" not in same[second]
    assert cli.main([*words, "--data", str(data)]) == 0
    assert f"{first} against base: " in capsys.readouterr().out.splitlines()[-1]


def test_one_text_is_compared_by_its_parts(
    tmp_path: Path, tiny_model_directory: Path, tiny_llama: Any, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = str(_adapter(tiny_llama, tmp_path / "adapter", 1))
    words = [
        "eval",
        "--model",
        str(tiny_model_directory),
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--adapter",
        adapter,
    ]
    assert cli.main([*words, "--data", str(text), "--max-length", "16"]) == 0
    assert "parts" in capsys.readouterr().out.splitlines()[-1]
    assert cli.main([*words, "--data", str(text)]) == 0
    assert "no verdict (loss " in capsys.readouterr().out


def test_an_adapter_to_compare_with_needs_an_adapter(
    tiny_model_directory: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "--model", str(tiny_model_directory), "--data", str(text), "--compare", "base"]) == 2
    assert "--compare needs --adapter" in capsys.readouterr().err


def test_text_outside_the_task(
    tmp_path: Path, tiny_model_directory: Path, tiny_llama: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same numbers as those of an evaluation of this text alone; the text that is part of lorakit is enough for a
    verdict."""
    adapter, data = str(_adapter(tiny_llama, tmp_path / "adapter", 1)), _answers(tmp_path / "a.jsonl", [*range(4)])
    other = _answers(tmp_path / "b.jsonl", [*range(24)])
    words = ["eval", "--model", str(tiny_model_directory), "--dtype", "float32", "--device", "cpu"]

    def results(*more: str) -> dict[str, Any]:
        assert cli.main([*words, "--adapter", adapter, *more, "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    both = results("--data", str(data), "--forgetting", str(other))
    assert both["forgetting"] == {"data": [str(other)], "results": results("--data", str(other))["results"]}
    assert both["results"] == results("--data", str(data))["results"]
    assert cli.main([*words, "--adapter", adapter, "--data", str(data), "--forgetting", "default"]) == 0
    shown = capsys.readouterr().out
    assert "Text outside the task (default):" in shown
    assert "42 documents" in shown.splitlines()[-1] and "no verdict" not in shown.splitlines()[-1]
    assert cli.main([*words, "--data", str(data), "--forgetting", "default"]) == 2
    assert "--forgetting needs --adapter" in capsys.readouterr().err


def test_the_text_that_is_part_of_lorakit_is_known() -> None:
    """Its SHA-256 is in docs/command-line.md, and its license is next to it."""
    content = GENERAL_TEXT.read_bytes()
    page = Path(__file__).parents[2] / "docs" / "command-line.md"
    assert hashlib.sha256(content).hexdigest() in page.read_text(encoding="utf-8")
    assert len(content) <= 100_000 and len(content.splitlines()) == 42
    assert "Python Software Foundation" in GENERAL_TEXT.with_suffix(".LICENSE.txt").read_text(encoding="utf-8")
