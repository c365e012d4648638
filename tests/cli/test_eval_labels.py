"""Labels in the commands: saved names decide, label columns of rows to predict are not read, and bytes do not depend
on the order of rows or names, or on the process."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import cli

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def finished(tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., Path]:
    """Save a model with its own random head for these names, in this order."""
    import transformers

    def make(names: list[str], kind: str = "SequenceClassification") -> Path:
        torch.manual_seed(5)
        config = transformers.BertConfig(
            **SIZES,
            vocab_size=len(tiny_tokenizer),
            pad_token_id=tiny_tokenizer.pad_token_id,
            id2label=dict(enumerate(names)),
            label2id={name: at for at, name in enumerate(names)},
            initializer_range=0.5,
        )
        model = getattr(transformers, f"BertFor{kind}")(config)
        model.save_pretrained(tmp_path / "finished")
        tiny_tokenizer.chat_template = None
        tiny_tokenizer.save_pretrained(tmp_path / "finished")
        return tmp_path / "finished"

    return make


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    def run(command: str, *words: object) -> int:
        return cli.main([command, *map(str, words), "--device", "cpu", "--dtype", "float32"])

    return run


def train(call: Callable[..., int], model: Path, data: Path, run: Path, *more: object, steps: int = 2) -> int:
    flags = ["--model", model, "--data", data, "--output-dir", run, "--max-length", 32, "--r", 2, "--batch-size", 4]
    return call("train", *flags, "--max-steps", steps, "--lr", "1e-2", *more)


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def saved_names(run: Path) -> list[str]:
    names: list[str] = json.loads((run / "adapter" / "lorakit.json").read_text())["training"]["labels"]["names"]
    return names


def test_a_finished_classifier_is_measured_by_its_own_names(
    finished: Callable[..., Path], call: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    import transformers

    model = finished(["spam", "ham"])
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = [f"mail number {at} {'buy' * (at % 5)}" for at in range(20)]
    with torch.no_grad():
        guesses = [int(loaded(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    labels = [("spam", "ham")[guess if at % 4 else 1 - guess] for at, guess in enumerate(guesses)]  # 15 of 20 are right
    flags = ["--model", model, "--json"]
    lower = jsonl(tmp_path / "lower.jsonl", [{"text": t, "label": n} for t, n in zip(texts, labels, strict=True)])
    upper = jsonl(
        tmp_path / "upper.jsonl", [{"text": t, "label": n.title()} for t, n in zip(texts, labels, strict=True)]
    )
    written = tmp_path / "rows.jsonl"
    assert call("eval", "--data", lower, *flags, "--output-file", written) == 0
    expected = json.loads(capsys.readouterr().out)["results"]
    assert expected[0]["accuracy"] == 0.75
    rows = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    assert [row["line"] for row in rows] == [*range(1, 21)] and {row["tokens"] for row in rows} == {1}
    assert [row["accuracy"] for row in rows] == [float(at % 4 != 0) for at in range(20)]
    assert sum(row["loss_sum"] for row in rows) / 20 == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert call("eval", "--data", lower, *flags, "--exact-match") == 2
    assert "the task classification does not continue text" in capsys.readouterr().err
    assert expected[0]["majority"] == max(map(labels.count, set(labels))) / 20
    assert call("eval", "--data", upper, *flags) == 1
    assert "the model has `" in capsys.readouterr().err
    assert call("eval", "--data", upper, *flags, "--label-map", "Spam=spam", "Ham=ham") == 0
    assert json.loads(capsys.readouterr().out)["results"] == expected
    assert call("eval", "--data", upper, *flags, "--label-map", "Spam=spma") == 2
    assert "spma" in capsys.readouterr().err


def test_the_label_map_of_training_is_remembered(
    finished: Callable[..., Path], call: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    model, run = finished(["spam", "ham"]), tmp_path / "run"
    data = jsonl(
        tmp_path / "a.jsonl", [{"text": f"mail {at}", "label": "Spam" if at % 3 else "Ham"} for at in range(9)]
    )
    assert train(call, model, data, run) == 1
    assert not run.exists()
    assert train(call, model, data, run, "--label-map", "Spam=spam", "Ham=ham") == 0
    assert saved_names(run) == ["spam", "ham"]
    capsys.readouterr()
    assert call("eval", "--model", model, "--adapter", run, "--data", data, "--json") == 0
    assert json.loads(capsys.readouterr().out)["results"][1]["tokens"] == 9
    again = tmp_path / "again"
    assert call("train", "--from-adapter", run, "--data", data, "--output-dir", again, "--max-steps", 1) == 0
    assert saved_names(again) == ["spam", "ham"]


def test_adapters_that_rename_a_label_differently(
    finished: Callable[..., Path], call: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    model, found = finished(["spam", "ham"]), list[Path]()
    rows = [{"text": f"mail {at}", "label": ["0", "spam", "ham"][at % 3]} for at in range(12)]
    data = jsonl(tmp_path / "a.jsonl", rows)
    for name in ("spam", "ham"):
        found.append(tmp_path / name)
        assert train(call, model, data, found[-1], "--label-map", f"0={name}") == 0
        assert call("eval", "--model", model, "--data", data, "--adapter", found[-1]) == 0
    capsys.readouterr()
    assert call("eval", "--model", model, "--data", data, "--adapter", *found) == 2
    assert "reads the label '0' as 'ham'" in capsys.readouterr().err


def test_a_resumed_run_keeps_the_saved_order(finished: Callable[..., Path], tmp_path: Path) -> None:
    from lorakit.train.files.run_folder import unlock
    from lorakit.train.progress import Progress
    from lorakit.train.settings.settings import TrainSettings
    from lorakit.train.setup.run_spec import build_spec

    rows = [{"text": f"mail {at}", "label": ["1", "01"][at % 2]} for at in range(8)]
    settings = TrainSettings(
        model=str(finished(["x", "y"])),
        data=str(jsonl(tmp_path / "a.jsonl", rows)),
        output_dir=str(tmp_path / "run"),
        device="cpu",
    )
    spec = build_spec(settings, Progress())
    unlock(spec.lock)
    assert spec.task.target.names == ("01", "1")
    before = {
        "task": "classification",
        "split": "stratified",
        "labels": {"kind": "class", "names": ["1", "01"]},
    }  # of an earlier version
    record = {
        "format": 1,
        "status": "interrupted",
        "settings": settings.as_dict(),
        "resolved": before,
        "data_sha256": dict(spec.hashes),
    }
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    resumed = build_spec(settings.model_copy(update={"resume": True}), Progress())
    unlock(resumed.lock)
    assert resumed.task.target.names == ("1", "01")


def test_predictions_that_are_not_finite_are_an_error(
    finished: Callable[..., Path], call: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    from safetensors.torch import load_file, save_file

    for kind, row in [("SequenceClassification", {"text": "a"}), ("TokenClassification", {"tokens": ["a"]})]:
        model = finished(["x", "y"], kind)
        tensors = load_file(model / "model.safetensors")
        tensors["classifier.bias"][1] = float("nan")
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        assert call("predict", jsonl(tmp_path / "a.jsonl", [row]), "--model", model) == 1
        assert "non-finite" in capsys.readouterr().err


@pytest.mark.parametrize("label", [-1, "unlabeled", {"a": 1}, ["x", "y"], None, 0.5])
def test_rows_to_predict_may_have_any_label(
    label: Any, finished: Callable[..., Path], call: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    model = finished(["spam", "ham"])
    plain = jsonl(tmp_path / "plain.jsonl", [{"text": "one mail"}, {"text": "another mail"}])
    given = jsonl(
        tmp_path / "given.jsonl", [{"text": "one mail", "label": label}, {"text": "another mail", "label": 7}]
    )
    found = []
    for path, more in [(plain, ()), (given, ()), (given, ("--columns", "label=label"))]:
        assert call("predict", path, "--model", model, "--json", *more) == 0
        said = capsys.readouterr()
        assert "unused" not in said.out + said.err
        rows = json.loads(said.out)["predictions"]
        found.append([(row["line"], row["label"], row["scores"]) for row in rows])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("tags", [None, "X", ["X"], [-1] * 40])
def test_truncated_words_have_no_tag(
    side: str, tags: Any, finished: Callable[..., Path], call: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    import transformers

    model = finished(["O", "B-X", "I-X"], "TokenClassification")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "truncation_side": side}))
    backend = json.loads((model / "tokenizer.json").read_text())  # with tokens at both ends, like BERT's
    ends = [{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}]
    number = {"<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]}}
    single = [*ends, {"Sequence": {"id": "A", "type_id": 0}}, *ends]
    post = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": number}
    (model / "tokenizer.json").write_text(json.dumps({**backend, "post_processor": post}))
    words = [f"word{at}" if at % 3 else "é" for at in range(40)]
    begins = [sum(len(word) + 1 for word in words[:at]) for at in range(len(words))]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    length = tokenizer(" ".join(words)).char_to_token(begins[9]) + 1  # the first token left out is the first of a word
    data = jsonl(tmp_path / "t.jsonl", [{"tokens": words, "tags": tags}, {"tokens": words[:2], "tags": tags}])
    assert call("predict", data, "--model", model, "--max-length", length, "--json") == 0
    row, short = json.loads(capsys.readouterr().out)["predictions"]
    tokens = tokenizer(" ".join(words), truncation=True, max_length=length, return_tensors="pt")
    with torch.no_grad():
        loaded = transformers.AutoModelForTokenClassification.from_pretrained(model)
        guesses = loaded(**tokens).logits[0].argmax(-1).tolist()
    places = [tokens.char_to_token(begin) for begin in begins]
    kept = [at for at, place in enumerate(places) if place is not None]
    assert 0 < len(kept) < len(words) and (kept[0] == 0) == (side == "right")
    expected = [None if place is None else ("O", "B-X", "I-X")[guesses[place]] for place in places]
    assert row["tags"] == expected
    assert None not in short["tags"] and len(short["tags"]) == 2


def test_numbers_as_tags_have_no_spans(
    finished: Callable[..., Path], call: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    model, run = finished(["x", "y"], "TokenClassification"), tmp_path / "run"
    rows = [{"tokens": ["Ann", "met", "Bob", str(at)], "tags": [1, 0, 1, 0]} for at in range(12)]
    data = jsonl(tmp_path / "t.jsonl", rows)
    assert train(call, model, data, run) == 0
    said = capsys.readouterr().out
    assert "numbers without names" in said
    assert set(json.loads((run / "run.json").read_text())["result"]["adapter_metrics"]) == {"accuracy", "majority"}
    named = tmp_path / "named"
    assert train(call, model, data, named, "--label-map", "0=O", "1=B-PER") == 0
    labels = json.loads((named / "run.json").read_text())["resolved"]["labels"]
    assert (labels["names"], labels["scheme"]) == (["B-PER", "O"], "BIO")
    assert "f1" in json.loads((named / "run.json").read_text())["result"]["adapter_metrics"]


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("task", "held_out"), [("embedding", [0.5]), ("embedding", [0.5] * 3), ("classification", [0.5])]
)
def test_undefined_correlations_are_null_with_a_reason(
    task: str,
    held_out: list[float],
    finished: Callable[..., Path],
    call: Callable[..., int],
    tmp_path: Path,
    capsys: Any,
) -> None:
    if task == "embedding":
        pytest.importorskip("sentence_transformers")
    model, run = finished(["x", "y"]), tmp_path / "run"

    def rows(scores: list[float]) -> list[dict[str, Any]]:
        return [{"sentence1": f"a {at}", "sentence2": f"b {at}", "score": one} for at, one in enumerate(scores)]

    data, other = jsonl(tmp_path / "a.jsonl", rows([0.1, 0.5, 0.9, 0.3])), jsonl(tmp_path / "b.jsonl", rows(held_out))
    assert train(call, model, data, run, "--task", task, "--eval-data", other) == 0
    assert "spearman undefined (" in capsys.readouterr().out
    lines = [strict(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in lines if "eval_loss" in row]
    assert len(measured) > 1
    assert all(row["eval_spearman"] is None and row["eval_undefined"]["spearman"] for row in measured)
    record = strict((run / "run.json").read_text())
    assert record["result"]["adapter_metrics"]["spearman"] is None
    assert any("spearman is undefined" in note for note in record["result"]["notes"])
    assert call("eval", "--model", model, "--adapter", run, "--data", other, "--json") == 0
    result = strict(capsys.readouterr().out)["results"][-1]
    assert result["spearman"] is None and result["undefined"]["spearman"]


@pytest.mark.parametrize("streaming", ["off", "on"])
def test_names_of_a_feature_are_read_in_any_order(
    streaming: str,
    finished: Callable[..., Path],
    call: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = finished(["x"], "TokenClassification")
    words, texts = [["Ann", "met", str(at)] for at in range(12)], [f"mail {at}" for at in range(12)]
    names = ["O", "B-PER", "I-PER"]
    found = dict[str, list[bytes]]()
    for number, order in enumerate([names, names[::-1]]):
        kind = datasets.ClassLabel(names=order)
        tags = [[kind.str2int(name) for name in ("B-PER", "O", "O")] for _ in words]
        classes = [kind.str2int(names[at % 3]) for at in range(12)]
        whole = {
            "tags": datasets.Dataset.from_dict(
                {"tokens": words, "ner_tags": tags},
                features=datasets.Features(
                    {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(kind)}
                ),
            ),
            "classes": datasets.Dataset.from_dict(
                {"text": texts, "label": classes},
                features=datasets.Features({"text": datasets.Value("string"), "label": kind}),
            ),
        }
        for name, data in whole.items():
            (tmp_path / f"{name}{number}").mkdir()
            data.to_parquet(str(tmp_path / f"{name}{number}" / "data.parquet"))
            run = tmp_path / f"run-{name}{number}"
            given = tmp_path / f"{name}{number}" / "data.parquet"
            assert train(call, model, given, run, "--streaming", streaming, "--eval-fraction", 0) == 0
            assert saved_names(run) == (["B-PER", "O"] if name == "tags" else ["B-PER", "I-PER", "O"])
            found.setdefault(name, []).append(weights(run))
    assert all(one == other for one, other in found.values())


def test_rows_of_a_feature_without_a_label(
    finished: Callable[..., Path], call: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    datasets = pytest.importorskip("datasets")
    kind = datasets.ClassLabel(names=["ham", "spam"])
    features = datasets.Features({"text": datasets.Value("string"), "label": kind})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, -1]}, features=features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    model = finished(["spam", "ham"])
    assert train(call, model, tmp_path / "a.parquet", tmp_path / "run") == 1
    assert "a.parquet:3" in capsys.readouterr().err
    assert call("eval", "--model", model, "--data", tmp_path / "a.parquet") == 1
    assert "has no label" in capsys.readouterr().err
    assert call("predict", tmp_path / "a.parquet", "--model", model) == 0


@pytest.mark.slow
def test_the_same_bytes_for_any_seed_of_hashes_any_order_of_rows_and_any_number_of_processes(
    finished: Callable[..., Path], tmp_path: Path
) -> None:
    from tests.train.processes.processes import begin, end

    model = finished(["x", "y"])
    labels = ["1", "01", "b", "001", "a", "10", "9"]
    rows = [{"text": f"mail {at}", "label": labels[at % len(labels)]} for at in range(28)]
    data = jsonl(tmp_path / "a.jsonl", rows)
    names, found = set[str](), set[bytes]()

    def flags(run: Path) -> list[str]:
        words = ["-m", "lorakit", "train", "--model", model, "--data", data, "--output-dir", run, "--max-steps", 2]
        more = ["--batch-size", 4, "--gradient-accumulation-steps", 2, "--r", 2, "--eval-fraction", 0]
        return [*map(str, [*words, *more]), "--device", "cpu", "--dtype", "float32"]

    for seed in range(10):
        run = tmp_path / f"run{seed}"
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        subprocess.run([sys.executable, *flags(run)], env=environment, check=True, capture_output=True)
        names.add(str(saved_names(run)))
        found.add(weights(run))
    assert names == {str(["001", "01", "1", "9", "10", "a", "b"])} and len(found) == 1
    seeds = [{"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "7"}]
    for code, _, messages in end(begin(flags(tmp_path / "two"), 2, own=seeds)):
        assert code == 0, messages
    assert saved_names(tmp_path / "two") == saved_names(tmp_path / "run0")
    random.Random(1).shuffle(rows)
    jsonl(data, rows)
    subprocess.run([sys.executable, *flags(tmp_path / "permuted")], check=True, capture_output=True)
    assert saved_names(tmp_path / "permuted") == saved_names(tmp_path / "run0")


@pytest.mark.parametrize("streamed", [(), ("--streaming", "on")], ids=["whole", "streamed"])
def test_rows_without_a_label_are_skipped_by_every_command(
    streamed: tuple[str, ...], finished: Callable[..., Path], call: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    """The result is that of the same file without them."""
    datasets = pytest.importorskip("datasets")
    kind = datasets.ClassLabel(names=["spam", "ham"])
    features = datasets.Features({"text": datasets.Value("string"), "label": kind})
    labels = [0, 1, -1, 0, 1, 0, None, 1, 1, 0]
    rows = {"text": [f"mail {at}" for at in range(10)], "label": labels}
    path, model = tmp_path / "a.parquet", finished(["spam", "ham"])
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    known = [at for at, label in enumerate(labels) if label is not None and label >= 0]
    plain = jsonl(tmp_path / "b.jsonl", [{"text": f"mail {at}", "label": kind.names[labels[at]]} for at in known])  # type: ignore[index]
    commands: dict[str, list[object]] = {
        "train": ["--output-dir", tmp_path / "run", "--max-steps", 2, "--r", 2, "--eval-fraction", 0, *streamed],
        "eval": ["--json"],
    }
    for command, more in commands.items():
        words = ["--model", model, "--max-length", 32, *more]
        assert call(command, "--data", path, *words) == 1
        assert f"{path}:3: the field 'label' is null" in capsys.readouterr().err
        assert call(command, "--data", path, *words, "--on-bad-row", "skip") == 0
        captured = capsys.readouterr()
        assert f"{path}:3: row skipped" in captured.out or "2 rows skipped; the first is row 3" in (
            captured.out + captured.err
        )
        if command == "train":
            found = weights(tmp_path / "run")
            assert call(command, "--data", plain, *words, "--overwrite") == 0
            assert weights(tmp_path / "run") == found
        else:
            assert call(command, "--data", plain, *words) == 0
            assert json.loads(capsys.readouterr().out)["results"] == json.loads(captured.out)["results"]
    asked = ["data", str(path), "--model", str(model), "--max-length", "32"]
    assert cli.main(asked) == 1
    assert f"{path}:3: the field 'label' is null" in capsys.readouterr().err
    assert cli.main([*asked, "--on-bad-row", "skip"]) == 0
    assert "2 rows skipped; the first is row 3" in "".join(capsys.readouterr())


@pytest.mark.parametrize("count", [1, 8, 20])
def test_few_rows_are_described_as_in_training(
    count: int, finished: Callable[..., Path], call: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    """Oracle: the interval of scipy for a share of n rows; from 20 rows on, there is no message."""
    stats = pytest.importorskip("scipy.stats")
    model, run = finished(["x", "y"]), tmp_path / "run"
    names = [{"text": f"a {at}", "label": "xy"[at % 2]} for at in range(max(count, 4))]
    data, part = jsonl(tmp_path / "a.jsonl", names), jsonl(tmp_path / "b.jsonl", names[:count])
    assert train(call, model, data, run, "--eval-data", part) == 0
    trained = capsys.readouterr()
    assert call("eval", "--model", model, "--adapter", run, "--data", part, "--json") == 0
    said = capsys.readouterr().err
    half = min(0.5, stats.norm.interval(0.95, 0.5, math.sqrt(0.25 / count))[1] - 0.5)
    words = f"little: an accuracy near 50% is known to ±{100 * half:.0f}% (95% interval)."
    assert (words in said) == (words in trained.out) == (count < 20)
    assert ("95% interval" in said) == (count < 20)
