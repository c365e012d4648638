"""Metrics of answers: generated texts and likelihoods equal those that transformers and peft compute one row at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import cli
from lorakit.errors import ConfigError
from lorakit.session import AnswerMetrics

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads it

PROMPTS = [f"{'The dog and ' * (n % 4)}{n} plus {n % 7} is" for n in range(24)]
NEW_TOKENS = 5


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def models(
    tiny_model_directory: Path, tiny_llama: Any, save_adapter: Callable[..., Path]
) -> tuple[Path, dict[str, torch.nn.Module]]:
    """The directory of an adapter, and the base and the adapter as transformers and peft load them."""
    from transformers import LlamaForCausalLM

    adapter = save_adapter("adapter")
    adapted = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model_directory), str(adapter))
    return adapter, {"base": tiny_llama, str(adapter): adapted.eval()}


@pytest.fixture
def measured(
    tmp_path: Path, tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], dict[str, list[Any]]]]:
    def measure(adapter: Path, data: Path, *more: str) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        words = ["eval", "--model", tiny_model_directory, "--adapter", adapter, "--data", data, "--output-file", file]
        words += ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", NEW_TOKENS, *more, "--json"]
        assert cli.main([*map(str, words)]) == 0
        results = {row["name"]: row for row in json.loads(capsys.readouterr().out)["results"]}
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return results, {name: [row for row in rows if row["name"] == name] for name in results}

    return measure


def _generated(model: Any, tokenizer: Any, ids: list[int], ends: list[int]) -> str:
    with torch.no_grad():
        found = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
        )[0, len(ids) :].tolist()
    return str(tokenizer.decode(found, skip_special_tokens=True))


def _likelihood(model: Any, ids: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].double()
    return float(logits.log_softmax(-1)[range(len(answer)), answer].sum())


def test_generated_answers_are_those_of_transformers(
    tmp_path: Path, tiny_tokenizer: Any, models: Any, measured: Callable[..., Any]
) -> None:
    adapter, plain = models
    texts = {
        name: [_generated(model, tiny_tokenizer, tiny_tokenizer(prompt)["input_ids"], [0]) for prompt in PROMPTS]
        for name, model in plain.items()
    }
    rows = [
        {
            "prompt": prompt,
            "completion": [texts["base"][n], f" {texts[str(adapter)][n]}\n", "x9"][n % 3].strip() or "x9",
        }
        for n, prompt in enumerate(PROMPTS)
    ]
    results, lines = measured(adapter, _jsonl(tmp_path / "a.jsonl", rows), "--exact-match", "--regex", r"([a-z]\w?)")
    for name, expected in texts.items():
        assert [line["answer"] for line in lines[name]] == expected
        assert [line["line"] for line in lines[name]] == [*range(1, 25)]
        exact = [text.strip() == row["completion"] for text, row in zip(expected, rows, strict=True)]
        found = [
            [re.search(r"[a-z]\w?", text) for text in (one, row["completion"])]
            for one, row in zip(expected, rows, strict=True)
        ]
        same = [bool(one and other and one[0] == other[0]) for one, other in found]
        assert ([line["exact_match"] for line in lines[name]], [line["regex_match"] for line in lines[name]]) == (
            exact,
            same,
        )
        assert results[name]["exact_match"] == sum(exact) / 24 and 5 <= sum(exact) < 24
        assert results[name]["regex_match"] == sum(same) / 24
        total, tokens = sum(line["loss_sum"] for line in lines[name]), sum(line["tokens"] for line in lines[name])
        assert (total / tokens, tokens) == (pytest.approx(results[name]["loss"], rel=1e-6), results[name]["tokens"])
    found = results[str(adapter)]["differences"]
    assert [*found] == ["loss", "exact_match", "regex_match"]
    change = results[str(adapter)]["exact_match"] - results["base"]["exact_match"]
    assert found["exact_match"]["difference"] == pytest.approx(change) and found["exact_match"]["documents"] == 24


@pytest.mark.parametrize("is_normalized", [False, True])
def test_likelihoods_of_choices_are_those_of_transformers(
    tmp_path: Path, tiny_tokenizer: Any, models: Any, measured: Callable[..., Any], is_normalized: bool
) -> None:
    """A choice takes the whitespace of the row's answer, and its likelihood includes the end of the text."""
    adapter, plain = models
    choices = ["fox", "four dogs", "two"]
    rows = [{"prompt": prompt, "completion": f" {choices[n % 3]}"} for n, prompt in enumerate(PROMPTS)]
    more = ["--normalize-choices"] if is_normalized else []
    results, lines = measured(adapter, _jsonl(tmp_path / "a.jsonl", rows), "--choices", *choices, *more)
    for name, model in plain.items():
        for n, (prompt, line) in enumerate(zip(PROMPTS, lines[name], strict=True)):
            ids = tiny_tokenizer(prompt)["input_ids"]
            expected = {
                choice: _likelihood(model, ids, [*tiny_tokenizer(f" {choice}")["input_ids"], 0]) for choice in choices
            }
            assert line["log_likelihoods"] == pytest.approx(expected, abs=1e-5)
            scores = {key: value / (len(key) if is_normalized else 1) for key, value in expected.items()}
            assert line["choice"] == max(scores, key=scores.__getitem__)
            assert line["choice_accuracy"] is (line["choice"] == choices[n % 3])
            assert line["loss_sum"] == pytest.approx(-expected[choices[n % 3]], abs=1e-5)
        assert results[name]["choice_accuracy"] == sum(line["choice_accuracy"] for line in lines[name]) / 24


def test_conversations_are_answered_after_the_generation_prompt(
    tmp_path: Path, tiny_tokenizer: Any, models: Any, measured: Callable[..., Any]
) -> None:
    """The turns before the last one are the prompt; the likelihood is that of the last turn alone."""
    adapter, plain = models
    first = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello world"}]
    answers = ["yes", "no", "yes"]
    talks = [
        [*(first if n else ()), {"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": answer}]
        for n, answer in enumerate(answers)
    ]
    data = _jsonl(tmp_path / "talks.jsonl", [{"messages": talk} for talk in talks])
    _, lines = measured(adapter, data, "--exact-match", "--choices", "yes", "no")
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    for name, model in plain.items():
        for talk, line in zip(talks, lines[name], strict=True):
            ids = tiny_tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            assert line["answer"] == _generated(model, tiny_tokenizer, ids, [0, end])
            whole = tiny_tokenizer.apply_chat_template(
                [*talk[:-1], {"role": "assistant", "content": "no"}], return_dict=True
            )
            likelihoods = [
                _likelihood(model, ids, whole["input_ids"][len(ids) : at])
                for at in range(len(ids) + 1, len(whole["input_ids"]) + 1)
            ]
            assert any(math.isclose(line["log_likelihoods"]["no"], one, abs_tol=1e-5) for one in likelihoods[-2:])


def test_rows_that_have_no_answer_or_another_one(
    tmp_path: Path, tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--model", str(tiny_model_directory), "--dtype", "float32", "--device", "cpu", "--data"]
    text, rows = tmp_path / "a.txt", _jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "yes"}])
    text.write_text("The quick fox", encoding="utf-8")

    def said(*more: object) -> str:
        assert cli.main([*words, *map(str, more)]) in (1, 2)
        return capsys.readouterr().err

    assert "a.txt: the row has no answer to compare with" in said(text, "--exact-match")
    assert "a.jsonl:1: the answer 'yes' is not one of the choices (no, maybe)" in said(rows, "--choices", "no", "maybe")
    assert "occurs in none of the answers" in said(rows, "--regex", "[0-9]")
    assert "not a valid regular expression" in said(rows, "--regex", "(")
    assert "choices is" in said(rows, "--choices", "yes")
    assert "longer than the 128 tokens that the model supports" in said(rows, "--choices", "yes", "no " * 300)
    rows.write_text('{"prompt": "", "completion": "yes"}\n', encoding="utf-8")
    assert "a.jsonl:1: the prompt is empty" in said(rows, "--exact-match")
    assert "max_new_tokens is 0" in said(rows, "--exact-match", "--max-new-tokens", 0)
    rows.write_text('{"prompt": "a", "completion": "yes"}\n', encoding="utf-8")
    assert cli.main([*words, str(rows), "--choices", "yes", "no", "--output-file", str(text)]) == 2  # the file exists
    assert "will not be overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("choices", [("yes", "yes "), ("yes", ""), ("yes",)])
def test_choices_are_different_answers(choices: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="choices is"):
        AnswerMetrics(choices=choices)
