"""Runs on labeled rows: streamed, with the labels read beforehand, and with tokens from the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.data import streaming, token_cache
from lorakit.errors import ConfigError, DataError
from lorakit.train import run
from lorakit.train.settings.settings import TrainSettings

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TASKS = ["classification", "scores", "token-classification", "seq2seq", "embedding"]
NAMES = {"classification": ["class 0", "class 1", "class 2"], "token-classification": ["B-FOX", "O"]}


def rows_of(task: str, count: int = 24) -> list[dict[str, Any]]:
    if task == "classification":
        return [{"text": f"the fox {n} jumps", "label": f"class {n % 3}"} for n in range(count)]
    if task == "scores":
        return [{"text": f"the fox {n} jumps", "label": n / 7} for n in range(count)]
    if task == "token-classification":
        return [{"tokens": ["the", "fox", str(n)], "tags": ["O", "B-FOX", "O"]} for n in range(count)]
    if task == "seq2seq":
        return [{"source": f"the fox {n}", "target": f"jumps {n}"} for n in range(count)]
    return [{"anchor": f"the fox {n}", "positive": f"jumps {n}"} for n in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def model_for(tmp_path: Path, tiny_tokenizer: Any) -> Callable[[str], Path]:
    import torch
    import transformers

    def make(task: str) -> Path:
        if task == "embedding":
            pytest.importorskip("sentence_transformers")
        vocabulary = {"vocab_size": len(tiny_tokenizer), "pad_token_id": tiny_tokenizer.pad_token_id}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            if task == "seq2seq":
                sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
                ends = {"eos_token_id": tiny_tokenizer.eos_token_id, "decoder_start_token_id": 0}
                config = transformers.T5Config(**sizes, **vocabulary, **ends)
                model: Any = transformers.T5ForConditionalGeneration(config)
            elif task == "embedding":
                model = transformers.BertModel(transformers.BertConfig(**SIZES, **vocabulary))
            else:
                model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **vocabulary))
        model.save_pretrained(tmp_path / "model")
        tiny_tokenizer.chat_template = None
        tiny_tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


@pytest.fixture
def settings(short_run: dict[str, Any], model_for: Callable[[str], Path]) -> Callable[..., TrainSettings]:
    def make(task: str, **values: Any) -> TrainSettings:
        name = "classification" if task == "scores" else task
        given = {**short_run, "model": model_for(task), "task": name, "max_steps": 6, "streaming": "on", **values}
        return TrainSettings(**given)

    return make


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.costly(cases=0)
@pytest.mark.parametrize("task", TASKS)
def test_a_streamed_run_that_is_resumed_gives_the_same_bits(
    task: str, settings: Callable[..., TrainSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "BUFFER", 4)
    path = write(tmp_path / "a.jsonl", rows_of(task))
    whole = settings(task, data=path, eval_fraction=0.2, output_dir=tmp_path / "whole", lr_scheduler_type="constant")
    found = run(whole)
    assert found.ending == "finished" and found.steps == 6
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["data_sha256"][path].startswith("partial:")
    assert record["resolved"].get("labels", {}).get("names", []) == NAMES.get(task, [])
    assert record["result"]["adapter_loss"] is not None
    part = whole.model_copy(update={"output_dir": str(tmp_path / "part"), "max_steps": 3, "save_steps": 1})
    run(part)
    run(part.model_copy(update={"max_steps": 6, "resume": True}))
    assert weights(tmp_path / "part") == weights(tmp_path / "whole")


def test_labels_after_the_first_part_are_known(
    settings: Callable[..., TrainSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "SAMPLE_BYTES", 400)
    monkeypatch.setattr(streaming, "_LEAST_BYTES", 400)
    rows = [*rows_of("classification"), {"text": "the last fox", "label": "rare"}]
    path = write(tmp_path / "a.jsonl", rows)
    run(settings("classification", data=path, eval_fraction=0))
    labels = json.loads((tmp_path / "run" / "run.json").read_text())["resolved"]["labels"]
    assert labels["names"] == [*NAMES["classification"], "rare"]


@pytest.mark.parametrize(
    ("bad", "word"),
    [({"text": "x", "label": None}, "no label"), ({"text": "x"}, "missing"), ({"text": "x", "label": ["a"]}, "list")],
)
def test_a_bad_label_after_the_first_part_is_an_error_before_the_first_step(
    settings: Callable[..., TrainSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: Any, word: str
) -> None:
    monkeypatch.setattr(streaming, "SAMPLE_BYTES", 400)
    monkeypatch.setattr(streaming, "_LEAST_BYTES", 400)
    path = write(tmp_path / "a.jsonl", [*rows_of("classification"), bad])
    with pytest.raises(DataError, match=word) as caught:
        run(settings("classification", data=path, eval_fraction=0, label_type="class"))
    assert caught.value.where == f"{path}:25" and not (tmp_path / "run" / "run.json").exists()


def test_a_streamed_run_from_an_adapter_checks_its_classes_first(
    settings: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    run(settings("classification", data=write(tmp_path / "a.jsonl", rows_of("classification")), eval_fraction=0))
    more = [{"text": "the fox", "label": "class 7"}, *rows_of("classification")]
    again = settings(
        "classification",
        data=write(tmp_path / "b.jsonl", more),
        from_adapter=str(tmp_path / "run" / "adapter"),
        output_dir=tmp_path / "again",
        eval_fraction=0,
        r=2,
    )
    with pytest.raises(DataError) as caught:
        run(again)
    assert caught.value.what == "class 7" and caught.value.field == "label_map"
    write(tmp_path / "b.jsonl", more[1:9])
    assert run(again).ending == "finished"


def test_overlong_rows_of_a_stream(settings: Callable[..., TrainSettings], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows_of("classification"))
    with pytest.raises(ConfigError) as caught:
        run(settings("classification", data=path, overlong="split"))
    assert caught.value.field == "overlong"


@pytest.mark.costly
@pytest.mark.parametrize("task", TASKS)
def test_a_second_run_reads_its_tokens_from_the_cache(
    task: str, settings: Callable[..., TrainSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.tasks import encoding

    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "LEAST_BYTES", 1)
    given = settings(task, data=write(tmp_path / "a.jsonl", rows_of(task)), streaming="off", max_steps=3)
    run(given.model_copy(update={"token_cache": False}))
    plain = weights(tmp_path / "run")
    for again in (False, True):
        if again:
            monkeypatch.setattr(encoding, "_encoded", None)
        run(given.model_copy(update={"overwrite": True}))
        assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2
        assert weights(tmp_path / "run") == plain
