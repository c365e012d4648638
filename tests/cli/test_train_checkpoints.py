"""A checkpoint is a complete adapter: its files, its metadata, and what every command makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lorakit import cli

OF_RUNS = {"manifest.json", "state.json", "optimizer.safetensors", "random.safetensors"}
"""Files of a checkpoint that are not the adapter's."""

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

ROWS: dict[str, list[dict[str, Any]]] = {
    "causal-lm": [{"prompt": f"What is {at}?", "completion": f"It is {at}."} for at in range(12)],
    "classification": [
        {"text": f"{'fine' if at % 2 else 'poor'} film {at}", "label": "ab"[at % 2]} for at in range(12)
    ],
    "token-classification": [{"tokens": ["Ann", str(at)], "tags": ["B-PER", "O"]} for at in range(12)],
    "seq2seq": [{"source": f"say {word}", "target": word} for word in ("yes", "no", "maybe") * 4],
    "embedding": [{"anchor": f"question {at}", "positive": f"answer {at}"} for at in range(12)],
}

Cell = tuple[str, str]
"""A task, and the setting of the chat template."""

CELLS: list[Cell] = [("causal-lm", "given"), ("classification", "of the base")]
SLOW_CELLS: list[Cell] = [
    *[("causal-lm", setting) for setting in ("of the base", "none", "given with new tokens")],
    *[(task, "of the base") for task in ("token-classification", "seq2seq")],
    ("embedding", "none"),
]


@pytest.fixture
def model(request: pytest.FixtureRequest, cell: Cell) -> Path:
    name = {"causal-lm": "tiny_model_directory", "seq2seq": "t5"}.get(cell[0], "bert")
    folder: Path = request.getfixturevalue(name)
    if cell[1] == "none":
        (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture
def run(model: Path, cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    data, folder = tmp_path / "data.jsonl", tmp_path / "run"
    rows = ROWS[cell[0]]
    if cell[0] == "causal-lm" and cell[1] != "none":
        rows = [
            {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
            for r in rows
        ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "--max-steps",
        "4",
        "--save-steps",
        "2",
        "--eval-steps",
        "2",
        "--save-total-limit",
        "9",
        "--max-length",
        "64",
        "--r",
        "2",
    ]
    if "given" in cell[1]:
        (tmp_path / "template.jinja").write_text(TEMPLATE)
        words += ["--chat-template", str(tmp_path / "template.jinja")]
    if "tokens" in cell[1]:
        words += ["--new-tokens", "<a>"]
    words += ["--model", str(model), "--data", str(data), "--output-dir", str(folder), "--lr", "1e-2"]
    assert cli.main(["train", *words, "--eval-fraction", "0.2", "--device", "cpu", "--dtype", "float32"]) == 0
    return folder


def _keys(values: Any) -> Any:
    """Return the keys of nested objects; those of sites, files and metrics are data."""
    if not isinstance(values, dict):
        return None
    return {
        key: None if key in ("samples", "sites", "data_sha256", "metrics") else _keys(values[key]) for key in values
    }


@pytest.mark.costly
@pytest.mark.parametrize(
    "cell",
    [*CELLS, *(pytest.param(cell, marks=pytest.mark.slow) for cell in SLOW_CELLS)],
    ids=" ".join,
)
def test_a_checkpoint_is_a_complete_adapter(run: Path, model: Path, tmp_path: Path, cell: Cell, capsys: Any) -> None:
    final, steps = run / "adapter", sorted(run.glob("checkpoint-*"))
    names, keys = {path.name for path in final.iterdir()}, _keys(json.loads((final / "lorakit.json").read_text()))
    assert {"tokenizer.json", "README.md"} <= names
    assert ("chat_template.jinja" in names) == (cell[1] != "none")
    assert len(steps) == 2
    for step in steps:
        assert {path.name for path in step.iterdir()} - OF_RUNS == names
        assert _keys(json.loads((step / "lorakit.json").read_text())) == keys
    same = run / f"checkpoint-{json.loads((run / 'run.json').read_text())['result']['adapter_step']}"
    for name in names:
        assert (same / name).read_bytes() == (final / name).read_bytes()
    outputs = [_outputs(adapter, model, tmp_path, cell[0], capsys) for adapter in (final, same)]
    assert outputs[0] == outputs[1]


def _outputs(adapter: Path, model: Path, tmp_path: Path, task: str, capsys: Any) -> list[Any]:
    """Return what each command prints for an adapter, and the first losses of a run that starts from it."""
    data = ["--data", str(tmp_path / "data.jsonl")]
    options = ["--adapter", str(adapter), "--model", str(model), "--device", "cpu", "--dtype", "float32", "--json"]
    commands = [["eval", *options, *data]]
    if task == "causal-lm":
        commands.append(["generate", *options, "--prompt", "What is 5?", "--max-new-tokens", "8"])
    else:
        commands.append(["predict", data[1], *options])
    found = []
    for command in commands:
        capsys.readouterr()
        assert cli.main(command) == 0
        said = re.sub(r'"seconds": [0-9.e-]+', "", capsys.readouterr().out)
        found.append(said.replace(str(adapter), "ADAPTER"))
    further = tmp_path / f"from-{adapter.name}"
    words = ["train", "--from-adapter", str(adapter), *data, "--output-dir", str(further), "--max-steps", "1"]
    assert cli.main([*words, "--max-length", "64", "--eval-fraction", "0.2", "--device", "cpu"]) == 0
    record = json.loads((further / "run.json").read_text())
    sidecar = json.loads((further / "adapter" / "lorakit.json").read_text())
    hashes = [sidecar[name] for name in ("tokenizer_sha256", "chat_template_sha256")]
    return [*found, record["result"]["first_loss"], record["result"]["adapter_loss"], hashes]
