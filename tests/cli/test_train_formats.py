"""`lorakit train` on the formats that people have: CSV, alpaca, ShareGPT, Parquet and tool calls, and what generation does."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit import cli, hub
from lorakit.session.prompts import encode_prompts, prompt_format

Train = Callable[..., int]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m['content'] or '' }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + (call.function.arguments | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def train(tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Run the command on one data file; each call uses its own run directory."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)

    def call(data: object, *more: str, model: str | None = None) -> int:
        flags = [
            "--model",
            model or tiny_model_directory,
            "--data",
            data,
            "--output-dir",
            tmp_path / "run",
            "--max-length",
            64,
        ]
        words = ["train", *map(str, flags), "--device", "cpu", "--dtype", "float32", "--eval-fraction", "0"]
        return cli.main([*words, "--r", "2", "--max-steps", "2", *more])

    return call


def record(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "run" / "run.json").read_text())
    return found


def facts(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "run" / "adapter" / "lorakit.json").read_text())
    return found


EXCHANGES = [{"question": f"what is {n} plus {n}?", "answer": f"{2 * n}, of course"} for n in range(4)]


def write_csv(path: Path) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(EXCHANGES)
    return path


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_csv_of_questions_and_answers(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_csv(tmp_path / "qa.csv")
    assert train(path) == 0
    assert f"{path}: question-answer rows." in capsys.readouterr().out
    assert record(tmp_path)["data"]["conversations"] == 4
    assert facts(tmp_path)["training"]["prompt_format"] == "chat"
    assert list(record(tmp_path)["data_sha256"]) == [str(path)]


def test_alpaca_and_sharegpt_in_a_directory(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    alpaca = [{"instruction": one["question"], "input": "", "output": one["answer"]} for one in EXCHANGES]
    (folder / "a.json").write_text(json.dumps(alpaca))
    talk = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "world"}]
    write_rows(folder / "b.jsonl", {"conversations": talk})
    assert train(folder) == 0
    assert record(tmp_path)["data"]["conversations"] == 5
    assert sorted(record(tmp_path)["data_sha256"]) == [str(folder / "a.json"), str(folder / "b.jsonl")]


def test_parquet_with_other_columns(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"frage": one["question"], "antwort": one["answer"]} for one in EXCHANGES]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    assert train(tmp_path / "a.parquet", "--columns", "prompt=frage", "completion=antwort") == 0
    assert record(tmp_path)["data"]["completions"] == 4
    assert facts(tmp_path)["training"]["prompt_format"] == "text"
    assert len(record(tmp_path)["data_sha256"][str(tmp_path / "a.parquet")]) == 64


def test_tool_calls_need_a_template_that_renders_them(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    path = write_rows(tmp_path / "calls.jsonl", {"messages": turns})
    assert train(path) == 1
    assert "does not render the tool calls of an assistant turn" in capsys.readouterr().err
    template = tmp_path / "template.jinja"
    template.write_text(CHATML)
    assert train(path, "--chat-template", str(template), "--overwrite") == 0
    assert hub.adapter_tokenizer(tmp_path / "run" / "adapter").chat_template == CHATML  # type: ignore[union-attr]


def test_an_end_that_is_never_trained_stops_unless_it_is_allowed(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "endless.jinja"
    template.write_text(CHATML.replace("<|im_end|>", ""))
    path = write_csv(tmp_path / "qa.csv")
    assert train(path, "--chat-template", str(template)) == 1
    assert "No end marker contributes to the loss" in capsys.readouterr().err
    assert train(path, "--chat-template", str(template), "--allow-missing-end", "--overwrite") == 0
    assert "will not learn where to stop" in capsys.readouterr().out


def test_a_bad_row_stops_before_the_model_is_looked_for(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"text": "a b c"}, {"text": 3}, {"text": "d e f"})
    assert train(path, model="no/such/model") != 0
    assert f"{path}:2: the field 'text' is the number 3" in capsys.readouterr().err
    assert train(path, "--on-bad-row", "skip") == 0
    assert "1 row skipped; the first is line 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "alpacca"], "Did you mean alpaca?"),
        (["--columns", "prompt"], "each entry must be FIELD=COLUMN"),
        (["--columns", "promt=x"], "Did you mean prompt?"),
        (["--on-bad-row", "ignore"], "stop"),
        (["--chat-template", "none.jinja"], "none.jinja cannot be read"),
    ],
)
def test_wrong_choices(
    train: Train, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(write_rows(tmp_path / "a.jsonl", {"text": "a b c"}), *words) != 0
    assert message in capsys.readouterr().err


def test_short_names_and_names_of_other_tools(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"text": "a b c"})
    assert train(path, "--lr", "0.5", "--epochs", "7", "--batch-size", "1") == 0
    settings = record(tmp_path)["settings"]
    assert (settings["learning_rate"], settings["num_train_epochs"]) == (0.5, 7)
    assert settings["per_device_train_batch_size"] == 1
    capsys.readouterr()
    assert train(path, "--micro-batch-size", "1") == 2
    said = capsys.readouterr().err
    assert "the corresponding option is --per-device-train-batch-size" in said and "lorakit convert-config" in said
    assert train(path, "--lora_r", "8") == 2
    assert "the corresponding option is --r" in (said := capsys.readouterr().err) and "convert-config" in said
    config = tmp_path / "axolotl.yaml"
    config.write_text("lora_r: 8\n")
    assert train(path, "--config", str(config), "--overwrite") == 2
    assert "lora_r is not a setting" in (said := capsys.readouterr().err) and "corresponding setting is r" in said
    config.write_text("base_model: x\ndatasets:\n  - path: owner/rows\n    type: alpaca\n")
    assert train(path, "--config", str(config), "--overwrite") == 2
    said = capsys.readouterr().err
    assert "corresponding setting is data" in said and "lorakit convert-config FILE" in said
    config.write_text("lr: 0.1\nlearning_rate: 0.2\n")
    assert train(path, "--config", str(config), "--overwrite") == 2
    assert "lr and learning_rate are the same setting" in capsys.readouterr().err


def test_prompts_are_formatted_as_in_training(tiny_tokenizer: Any) -> None:
    def form(trained: list[Any], chat: bool | None = None) -> tuple[str, str]:
        found, remark = prompt_format(tiny_tokenizer, trained, chat)
        return found, remark.text if remark else ""

    plain, chat, none = ({"training": {"prompt_format": form}} for form in ("text", "chat", None))
    instruction = {"training": {"prompt_format": "instruction"}}
    assert form([]) == form([none]) == form([chat]) == ("chat", "")
    for odd in ({"training": None}, {"training": {"prompt_format": "verse"}}, {"training": [1]}, {}):
        assert form([odd]) == ("chat", "")
    followed, text = form([plain])
    assert followed == "text" and "as in the adapter's training data (as plain text)" in text
    assert form([plain, chat]) == ("chat", "")
    asked, text = form([plain], chat=True)
    assert asked == "chat" and "trained on prompts in another format (as plain text)" in text
    tiny_tokenizer.chat_template = None
    assert form([instruction])[0] == "instruction"
    (ids,) = encode_prompts(["hello"], tiny_tokenizer, "instruction", "be brief")
    assert tiny_tokenizer.decode(ids) == "be brief\n\nhello\n\n"
