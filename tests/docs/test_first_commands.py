"""docs/first-commands.md: all its commands run in order, with small models in place of the named ones."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import cli

from ..small_gguf import own_gguf_cache as own_gguf_cache
from ..small_gguf import write_gguf

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "first-commands.md").read_text()
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]

TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def commands(section: str) -> list[list[str]]:
    lines = "".join(re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)).splitlines()
    return [shlex.split(line)[1:] for line in lines]


def save(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def models(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> dict[str, str]:
    """Name of a model on the page -> a small model of the same family."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(1)
    config = transformers.BertConfig(**sizes, vocab_size=len(tiny_tokenizer), pad_token_id=tiny_tokenizer.pad_token_id)
    bert = save(tmp_path / "bert", transformers.BertForMaskedLM(config), tiny_tokenizer)
    (bert / "chat_template.jinja").unlink()
    tiny_llama.config.max_position_embeddings = 1024  # rotary positions need no weights
    llama = save(tmp_path / "llama", tiny_llama, tiny_tokenizer)
    gguf = write_gguf(tmp_path / "model.Q8_0.gguf", tiny_llama, tiny_tokenizer, "Q8_0")
    tiny_tokenizer.chat_template = TOOLS
    tools = save(tmp_path / "tools", tiny_llama, tiny_tokenizer)
    return {
        "smollm2": str(llama),
        "Qwen/Qwen3-0.6B": str(tools),
        "model.Q8_0.gguf": str(gguf),
        "bert-base-uncased": str(bert),
        "sentence-transformers/all-MiniLM-L6-v2": str(bert),
    }


def test_the_page_has_ten_examples() -> None:
    assert [section.split(".")[0] for section in SECTIONS] == [str(number) for number in range(1, 11)]


@pytest.mark.costly(cases=0)
def test_all_commands_run(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    folder = tmp_path / "work"
    shutil.copytree(ROOT / "examples" / "data", folder)
    monkeypatch.chdir(folder)
    rows = {"frage": ["Was ist A?", "Was ist B?", "Was ist r?"], "antwort": ["eine Matrix", "eine zweite", "der Rang"]}
    datasets.Dataset.from_dict(rows).to_parquet("train.parquet")
    for section in SECTIONS:
        for words in commands(section):
            more = []
            if words[0] == "train":
                more = ["--max-steps", "2", "--device", "cpu", "--dtype", "float32", "--max-length", "512"]
                more += [] if "--from-adapter" in words else ["--r", "2"]
            given = [models.get(word, word) for word in words]
            assert cli.main([*given, *more]) == 0, f"{words}: {capsys.readouterr().err}"
    assert len(Path("labels.jsonl").read_text().splitlines()) == 12
    record = json.loads(Path("runs/further/run.json").read_text())
    assert record["from_adapter"]["name"] == "runs/questions"
    tasks = {
        path.parent.name: json.loads(path.read_text())["resolved"]["task"] for path in Path("runs").glob("*/run.json")
    }
    assert tasks["sentiment"] == "classification"
    assert tasks["pairs"] == "embedding"
    assert {tasks[name] for name in ("questions", "alpaca", "sharegpt", "parquet", "tools", "gguf")} == {"causal-lm"}
