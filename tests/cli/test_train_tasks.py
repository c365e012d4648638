"""`lorakit train`, `eval`, `predict` and `merge` for tasks other than language modeling, from the data to the result."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GOOD, BAD = ["fine", "good", "great", "lovely"], ["bad", "poor", "awful", "dull"]


def sentiment(path: Path, count: int = 24) -> Path:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for at in range(count):
            words = GOOD if at % 2 else BAD
            rows.writerow([f"{words[at % 4]} film number {at}", "positive" if at % 2 else "negative"])
    return path


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(call: Callable[..., int], model: Path, data: Path, run: Path, *more: object, steps: int = 6) -> int:
    flags = ["--model", model, "--data", data, "--output-dir", run, "--max-length", 64, "--r", 2]
    return call("train", *flags, "--max-steps", steps, "--batch-size", 4, "--lr", "1e-2", *more)


def record(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_classification(bert: Path, call: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    data, run = sentiment(tmp_path / "data.csv"), tmp_path / "run"
    held_out = sentiment(tmp_path / "eval.csv", 8)
    assert train(call, bert, data, run, "--eval-data", held_out, steps=30) == 0
    said = capsys.readouterr().out
    assert "task: classification" in said
    assert "labels: negative 12 (50%), positive 12 (50%)" in said
    assert "bert.pooler, classifier" in said  # neither is in the files of a masked language model
    assert "Evaluation: accuracy" in said
    found = record(run)
    assert found["resolved"]["labels"] == {"kind": "class", "names": ["negative", "positive"]}
    assert found["result"]["adapter_metrics"]["accuracy"] == 1.0
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert "bert.pooler" in config["modules_to_save"]
    card = (run / "adapter" / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    assert "num_labels=2" in card

    assert call("eval", "--model", bert, "--data", held_out, "--adapter", run, "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]  # the base has no head
    assert result["loss"] == pytest.approx(found["result"]["adapter_loss"], abs=1e-5)
    assert result["f1/positive"] == 1.0

    jsonl(tmp_path / "new.jsonl", [{"text": "awful film number 3"}, {"text": ""}, {"text": "lovely film number 1"}])
    flags = ["--model", bert, "--adapter", run, "--output-file", tmp_path / "out.jsonl"]
    assert call("predict", tmp_path / "new.jsonl", *flags) == 0
    first, second = lines(tmp_path / "out.jsonl")
    assert (first["label"], second["label"]) == ("negative", "positive")
    assert (first["line"], second["line"]) == (1, 3)
    assert sum(first["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert call("generate", *flags[:4], "--prompt", "hello", more=()) == 2
    assert "use `lorakit predict`" in capsys.readouterr().err
    assert call("predict", tmp_path / "new.jsonl", *flags) == 2  # an existing file is not replaced
    capsys.readouterr()
    assert call("predict", tmp_path / "new.jsonl", *flags[:4], "--json") == 0
    assert json.loads(capsys.readouterr().out)["predictions"] == [first, second]

    merged = tmp_path / "merged"
    assert call("merge", "--model", bert, "--adapter", run, "--output-dir", merged, more=()) == 0
    model_config = json.loads((merged / "config.json").read_text())
    assert model_config["id2label"] == {"0": "negative", "1": "positive"}
    capsys.readouterr()
    assert call("predict", tmp_path / "new.jsonl", "--model", merged) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["label"] for row in again] == ["negative", "positive"]
    assert again[0]["scores"]["negative"] == pytest.approx(first["scores"]["negative"], abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads the old name
def test_peft_computes_the_same_from_a_classification_adapter(
    bert: Path, call: Callable[..., int], tmp_path: Path
) -> None:
    import peft
    import transformers

    data, run = sentiment(tmp_path / "data.csv"), tmp_path / "run"
    assert train(call, bert, data, run, steps=8) == 0
    jsonl(tmp_path / "new.jsonl", [{"text": "awful film number 3"}])
    flags = ["--model", bert, "--adapter", run, "--output-file", tmp_path / "out.jsonl"]
    assert call("predict", tmp_path / "new.jsonl", *flags) == 0
    base = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    model = peft.PeftModel.from_pretrained(base, str(run / "adapter"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "adapter")
    with torch.no_grad():
        scores = model(**tokenizer("awful film number 3", return_tensors="pt")).logits.softmax(-1)[0]
    (row,) = lines(tmp_path / "out.jsonl")
    assert list(row["scores"].values()) == pytest.approx(scores.tolist(), abs=1e-5)


@pytest.mark.costly
@pytest.mark.parametrize("family", ["Roberta", "DistilBert", "ModernBert", "Electra", "Albert", "T5", "Llama"])
def test_classification_with_other_models(
    family: str, tiny_tokenizer: Any, tiny_llama: Any, call: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    """A reloaded adapter computes the loss that the run measured, so nothing random is left in the model."""
    import transformers
    from tokenizers.processors import TemplateProcessing

    torch.manual_seed(4)
    words = {"vocab_size": len(tiny_tokenizer), "pad_token_id": tiny_tokenizer.pad_token_id}
    if family == "Llama":
        model: Any = tiny_llama
    elif family == "T5":  # its classifier reads the end token, which T5's tokenizer adds to each text
        end = "<|endoftext|>"
        pairs = [(end, tiny_tokenizer.eos_token_id)]
        tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=pairs)
        tiny_tokenizer.pad_token = "<|im_end|>"
        words["pad_token_id"] = tiny_tokenizer.pad_token_id
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        ends = {"eos_token_id": tiny_tokenizer.eos_token_id, "decoder_start_token_id": tiny_tokenizer.pad_token_id}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **words, **ends))
    elif family == "DistilBert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
        model = transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**sizes, **words))
    else:
        more = {"ModernBert": {"eos_token_id": 0, "bos_token_id": 0, "cls_token_id": 0, "sep_token_id": 0}}.get(
            family, {}
        )
        config = getattr(transformers, f"{family}Config")(**SIZES, **words, **more)
        model = getattr(transformers, f"{family}ForMaskedLM")(config)
    folder = save(tmp_path / "model", model, tiny_tokenizer)
    data, held_out, run = sentiment(tmp_path / "data.csv"), sentiment(tmp_path / "eval.csv", 8), tmp_path / "run"
    assert train(call, folder, data, run, "--eval-data", held_out, steps=4) == 0
    found = record(run)["result"]
    assert found["adapter_loss"] < found["first_loss"]
    capsys.readouterr()
    assert call("eval", "--model", folder, "--data", held_out, "--adapter", run, "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["loss"] == pytest.approx(found["adapter_loss"], abs=1e-4)


def test_an_adapter_without_the_new_modules_is_rejected(
    bert: Path, call: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    assert train(call, bert, sentiment(tmp_path / "data.csv"), run, steps=2) == 0
    path = run / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["modules_to_save"].remove("bert.pooler")  # as peft saves it
    path.write_text(json.dumps(config))
    capsys.readouterr()
    assert call("eval", "--model", bert, "--data", tmp_path / "data.csv", "--adapter", run) == 1
    assert "no weights for bert.pooler" in capsys.readouterr().err


def test_several_labels_and_scores(bert: Path, call: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    rows = [{"text": f"film {at}", "labels": ["a", "b", "c"][: at % 4]} for at in range(12)]
    assert train(call, bert, jsonl(tmp_path / "m.jsonl", rows), tmp_path / "many", steps=2) == 0
    assert record(tmp_path / "many")["resolved"]["labels"] == {"kind": "classes", "names": ["a", "b", "c"]}
    rows = [{"sentence1": f"film {at}", "sentence2": "a film", "score": at / 8} for at in range(12)]
    data = jsonl(tmp_path / "s.jsonl", rows)
    assert train(call, bert, data, tmp_path / "score", steps=2) == 0
    assert "mse" in record(tmp_path / "score")["result"]["adapter_metrics"]
    capsys.readouterr()
    assert call("predict", data, "--model", bert, "--adapter", tmp_path / "score") == 0
    predicted = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(predicted) == 12
    assert isinstance(predicted[0]["score"], float)


def test_token_classification(bert: Path, call: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    rows = [{"tokens": ["Ann", "met", "Bob", str(at)], "ner_tags": ["B-PER", "O", "B-PER", "O"]} for at in range(12)]
    data, run = jsonl(tmp_path / "t.jsonl", rows), tmp_path / "run"
    assert train(call, bert, data, run, steps=30) == 0
    assert record(run)["result"]["adapter_metrics"]["f1"] == 1.0
    capsys.readouterr()
    new = jsonl(tmp_path / "new.jsonl", [{"tokens": ["Ann", "met", "Bob", "5"]}])
    assert call("predict", new, "--model", bert, "--adapter", run) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["tags"] == ["B-PER", "O", "B-PER", "O"]
    assert row["spans"][1] == {"type": "PER", "text": "Bob", "begin": 2, "end": 3}
    assert call("predict", "--text", "Ann met Bob 5", "--adapter", run) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tags"] == row["tags"]
    assert call("merge", "--model", bert, "--adapter", run, "--output-dir", tmp_path / "merged", more=()) == 0
    capsys.readouterr()
    assert call("predict", new, "--model", tmp_path / "merged") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tags"] == row["tags"]


def test_seq2seq(t5: Path, call: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    rows = [{"source": f"say {word}", "target": word} for word in ("yes", "no", "maybe") * 4]
    data, run = jsonl(tmp_path / "t.jsonl", rows), tmp_path / "run"
    assert train(call, t5, data, run, steps=4) == 0
    assert "task: seq2seq" in capsys.readouterr().out
    assert 0 <= record(run)["result"]["adapter_metrics"]["token_accuracy"] <= 1
    assert call("eval", "--model", t5, "--data", data, "--adapter", run) == 0
    assert "token_accuracy" in capsys.readouterr().out
    new = jsonl(tmp_path / "new.jsonl", [{"source": "say yes"}])
    assert call("predict", new, "--model", t5, "--adapter", run, "--max-new-tokens", 4) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert call("predict", "--text", "say yes", "--adapter", run, "--max-new-tokens", 4) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["text"] == row["text"]
    assert call("merge", "--model", t5, "--adapter", run, "--output-dir", tmp_path / "merged", more=()) == 0


def embedding_model(folder: Path) -> Path:
    """Save a model as sentence-transformers does: the first token, a dense layer and a prompt."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    (folder / "chat_template.jinja").unlink()  # texts would be rendered as messages
    torch.manual_seed(3)
    modules = [Transformer(str(folder)), Pooling(32, "cls"), Dense(32, 8), Normalize()]
    prompts = {"prompts": {"search": "search: "}, "default_prompt_name": "search"}
    SentenceTransformer(modules=modules, device="cpu", **prompts).save(str(folder.with_name("embeds")))
    shutil.rmtree(folder.with_name("embeds") / "3_Normalize")  # published models lack directories without settings
    return folder.with_name("embeds")


@pytest.mark.costly
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of sentence-transformers about its own files
@pytest.mark.parametrize("is_saved", [False, True], ids=["plain", "with modules"])
def test_embeddings(is_saved: bool, bert: Path, call: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    base = embedding_model(bert) if is_saved else bert
    (bert / "chat_template.jinja").unlink(missing_ok=True)
    rows = [{"anchor": f"question {at}", "positive": f"answer {at}"} for at in range(12)]
    data, run = jsonl(tmp_path / "p.jsonl", rows), tmp_path / "run"
    assert train(call, base, data, run, "--eval-fraction", "0.3", steps=4) == 0
    out = capsys.readouterr().out
    assert "task: embedding" in out
    assert ("not adapted, because the task does not use their output: pooler.dense" in out) == is_saved
    assert "ndcg@10" in record(run)["result"]["adapter_metrics"]
    files = json.loads((run / "adapter" / "lorakit.json").read_text())["training"]["labels"]["embedding"]
    kinds = [module["type"] for module in files["modules"]]
    assert kinds == (["Pooling", "Dense", "Normalize"] if is_saved else ["Pooling"])
    texts = ["question 1", "a longer text, with several words", "x"]
    new = jsonl(tmp_path / "new.jsonl", [{"text": text} for text in texts])
    capsys.readouterr()
    assert call("predict", new, "--model", base, "--adapter", run, "--batch-size", 2) == 0
    found = [json.loads(line)["embedding"] for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert call("predict", "--text", texts[0], "--adapter", run) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["embedding"] == pytest.approx(found[0], abs=1e-5)
    merged = tmp_path / "merged"
    assert call("merge", "--model", base, "--adapter", run, "--output-dir", merged, more=()) == 0
    expected = sentence_transformers.SentenceTransformer(str(merged), device="cpu").encode(texts)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-5)
    before = sentence_transformers.SentenceTransformer(str(base), device="cpu").encode(texts)
    assert abs(expected - before).max() > 1e-4
    capsys.readouterr()
    assert call("predict", new, "--model", merged) == 0
    again = [json.loads(line)["embedding"] for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    torch.testing.assert_close(torch.tensor(again), torch.tensor(expected), rtol=1e-3, atol=1e-5)
    pairs = jsonl(tmp_path / "pairs.jsonl", [{"sentence1": texts[0], "sentence2": texts[1]}])
    assert call("predict", pairs, "--model", merged) == 0
    score = json.loads(capsys.readouterr().out.splitlines()[-1])["score"]
    assert score == pytest.approx(float(torch.cosine_similarity(*torch.tensor(expected[:2]), dim=0)), abs=1e-4)
    assert call("eval", "--data", data, "--model", base, "--adapter", run) == 0


def test_an_adapter_is_trained_further(bert: Path, call: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    data, first, second = sentiment(tmp_path / "data.csv"), tmp_path / "first", tmp_path / "second"
    held_out = sentiment(tmp_path / "eval.csv", 8)
    assert train(call, bert, data, first, "--eval-data", held_out, steps=20) == 0
    flags = ["--data", data, "--output-dir", second, "--eval-data", held_out, "--max-steps", 2]
    assert call("train", "--from-adapter", first, *flags, "--batch-size", 4) == 0
    assert record(second)["result"]["first_loss"] == pytest.approx(record(first)["result"]["adapter_loss"], abs=1e-5)
    assert record(second)["resolved"]["labels"] == record(first)["resolved"]["labels"]
    capsys.readouterr()
    other = jsonl(tmp_path / "o.jsonl", [{"text": "a", "label": "neutral"}, {"text": "b", "label": "positive"}])
    flags = ["--data", other, "--output-dir", tmp_path / "third", "--max-steps", 2]
    assert call("train", "--from-adapter", first, *flags) == 1
    assert "o.jsonl:1: `neutral`: the model has negative, positive; use `--label-map" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["classification", "embedding"])
def test_an_interrupted_run_resumes_with_the_same_bits(
    task: str, bert: Path, call: Callable[..., int], tmp_path: Path
) -> None:
    if task == "classification":
        data = sentiment(tmp_path / "data.csv")
    else:
        (bert / "chat_template.jinja").unlink()
        data = jsonl(tmp_path / "p.jsonl", [{"anchor": f"q {at}", "positive": f"a {at}"} for at in range(24)])
    more = ("--save-steps", 3, "--save-total-limit", 9, "--eval-fraction", "0.2", "--lora-dropout", "0.1")
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train(call, bert, data, whole, *more, steps=6) == 0
    shutil.copytree(whole, part)
    for path in [part / "adapter", *part.glob("checkpoint-*")]:
        if path.name != "checkpoint-3":
            shutil.rmtree(path)
    assert call("train", "--output-dir", part, "--resume", more=()) == 0
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (part / "checkpoint-6" / name).read_bytes() == (whole / "checkpoint-6" / name).read_bytes()
    assert (part / "checkpoint-3" / name).read_bytes() != (whole / "checkpoint-6" / name).read_bytes()


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"text": "a", "label": "x"}] * 3, (), "same label, 'x'"),
        ([{"text": "a", "label": "x"}, {"text": "b"}], (), "the field 'label' is missing"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], (), "2: the field 'label' is null"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], ("--task", "seq2seq"), "source"),
        (
            [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
            ("--label-type", "score"),
            "must be a finite number",
        ),
        ([{"text": "a"}, {"text": "b"}], (), "does not continue text"),
        ([{"source": "a", "target": "b"}] * 2, ("--task", "seq2seq"), "needs an encoder-decoder model"),
        (
            [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
            ("--new-tokens", "<a>"),
            "new_tokens does not apply",
        ),
        ([{"anchor": "a", "positive": "b"}] * 4, ("--batch-size", "1"), "compares the rows of a batch"),
        (
            [{"anchor": "a", "positive": "b"}] * 4,
            ("--label-type", "class", "--task", "embedding"),
            "label_type does not apply",
        ),
    ],
)
def test_bad_input_is_rejected_before_the_weights(
    rows: list[dict[str, Any]],
    more: tuple[str, ...],
    message: str,
    bert: Path,
    call: Callable[..., int],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lorakit import hub

    def no_weights(*_: object, **__: object) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(hub, "load_for_task", no_weights)
    (bert / "chat_template.jinja").unlink()
    run = tmp_path / "run"
    flags = ["--model", bert, "--data", jsonl(tmp_path / "d.jsonl", rows), "--output-dir", run]
    assert call("train", *flags, *more) != 0
    assert message in capsys.readouterr().err
    assert not run.exists()


def test_evaluation_labels_that_training_lacks(
    bert: Path, call: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    data = sentiment(tmp_path / "data.csv")
    held_out = jsonl(tmp_path / "e.jsonl", [{"text": "a film", "label": "neutral"}])
    assert train(call, bert, data, tmp_path / "run", "--eval-data", held_out) == 1
    said = capsys.readouterr().err
    assert "e.jsonl:1" in said
    assert "'neutral', which the training data lacks" in said


def test_data_shows_labels(bert: Path, call: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    data = sentiment(tmp_path / "data.csv")
    page = tmp_path / "page.html"
    assert call("data", data, "--model", bert, "--html", page, more=()) == 0
    said = capsys.readouterr().out
    assert "labels: " in said
    assert "[negative]" in said
    assert "<span class=loss>negative</span>" in page.read_text()
    assert call("data", data, "--model", bert, "--json", more=()) == 0
    assert json.loads(capsys.readouterr().out)["report"]["labels"] == {"negative": 10, "positive": 10}
