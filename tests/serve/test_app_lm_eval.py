"""lorakit.serve.app: EleutherAI's harness, as a client of a process of `lorakit serve`, gives the scores of `lorakit eval`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakit import cli, open_session

from .conftest import serving_process

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]
pytest.importorskip("lm_eval")

END = "<|endoftext|>"
LONGEST = 60
"""Tokens of a window. The last text has two full ones; the context of one that is not full would be longer in lm-eval."""

TEXTS = ["The quick fox.", "Two plus two?\nFour: naïve, 🦊.", "def add(a, b):\n    return a + b\n" * 9]
QUESTIONS = [
    {"prompt": "What is two plus two?", "choices": [" It is four.", " A lazy dog", " world"], "label": 2},
    {"prompt": "The quick brown", "choices": [" system", " fox jumps"], "label": 1},
    {"prompt": "for i in", "choices": [" range(10):", " matrices", " the dog", " A"], "label": 3},
]
STOPS = ["o", "\n"]
TASKS: dict[str, dict[str, Any]] = {
    "texts": {  # lm-eval scores a text after an end token, lorakit with the end token after it: the rows have both
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": f"{{{{text | replace('{END}', '', 1)}}}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    },
    "answers": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{completion}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    },
    "questions": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "continued": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "",
        "generation_kwargs": {"until": STOPS, "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A directory with the tasks, and the rows of each: a row of `answers` is a choice of `questions`."""
    questions = [{**one, "choices": [text + END for text in one["choices"]]} for one in QUESTIONS]
    answers = [{"prompt": one["prompt"], "completion": text} for one in questions for text in one["choices"]]
    rows = {
        "texts": [{"text": END + text + END} for text in TEXTS],
        "answers": answers,
        "questions": questions,
        "continued": questions,
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, given in TASKS.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
        spec = {"task": name, **source, "target_delimiter": "", **given, "metadata": {"version": 1}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    return folder


def harness(url: str, model: str, tokenizer: Path, tasks: Path, output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the results of each task, and its answers to each document: log-likelihoods, or a text."""
    length = LONGEST + 1  # lm-eval keeps one token for an answer
    given = f"model={model},base_url={url}/v1/completions,tokenizer={tokenizer},max_length={length}"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--include_path", str(tasks)]
    command += ["--model_args", f"{given},tokenized_requests=True"]
    command += ["--tasks", ",".join(TASKS), "--batch_size", "4", "--log_samples", "--output_path", str(output)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(output / "cache"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = output.glob("*/results_*.json")
    answers = {}
    for name in TASKS:
        (file,) = output.glob(f"*/samples_{name}_*.jsonl")
        lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        answers[name] = [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
    results = json.loads(report.read_text(encoding="utf-8"))["results"]
    return {name: {key.removesuffix(",none"): value for key, value in results[name].items()} for name in TASKS}, answers


def test_scores_are_those_of_eval(
    tiny_model_directory: Path,
    save_adapter: Callable[..., Path],
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = save_adapter("adapters/one", spread=2.0)
    found = {}
    with serving_process(tiny_model_directory, tmp_path / "adapters") as (_, url):
        for name, model in {"base": tiny_model_directory.name, "one": "one"}.items():
            found[name] = harness(url, model, tiny_model_directory, tasks, tmp_path / name)
    common = ["--model", str(tiny_model_directory), "--adapter", str(adapter), "--max-length", str(LONGEST), "--json"]

    def evaluated(file: Path) -> dict[str, float]:
        """Return the summed loss over a file by model."""
        assert cli.main(["eval", "--data", str(file), *common]) == 0
        return {
            Path(one["name"]).name: one["loss"] * one["tokens"]
            for one in json.loads(capsys.readouterr().out)["results"]
        }

    texts, answers = evaluated(tasks / "texts.jsonl"), evaluated(tasks / "answers.jsonl")
    rows = (tasks / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    single = [evaluated(_written(tasks / f"answer-{number}.jsonl", row)) for number, row in enumerate(rows)]
    with open_session(str(tiny_model_directory), {"one": str(adapter)}) as session:
        continued = {
            name: [
                session.generate(one["prompt"], adapter=used, chat=False, max_new_tokens=8, stop=STOPS).text
                for one in QUESTIONS
            ]
            for name, used in {"base": None, "one": "one"}.items()
        }
    size = sum(len(f"{text}{END}".encode()) for text in TEXTS)
    assert set(found) == set(texts) and abs(texts["base"] - texts["one"]) > 1 and any(continued["one"])
    for name, (results, responses) in found.items():
        assert results["texts"]["bits_per_byte"] == pytest.approx(texts[name] / size / math.log(2), rel=1e-6)
        assert math.log(results["answers"]["perplexity"]) == pytest.approx(answers[name] / len(rows), rel=1e-6)
        losses = [one[name] for one in single]
        assert [-float(one[0][0]) for one in responses["answers"]] == pytest.approx(losses, rel=1e-6)
        rest = iter(losses)
        of_choices = [list(islice(rest, len(one["choices"]))) for one in QUESTIONS]
        right = sum(found.index(min(found)) == one["label"] for one, found in zip(QUESTIONS, of_choices, strict=True))
        assert right and results["questions"]["acc"] == pytest.approx(right / len(QUESTIONS))
        assert [one for (one,) in responses["continued"]] == continued[name]


def _written(file: Path, row: str) -> Path:
    file.write_text(f"{row}\n", encoding="utf-8")
    return file
