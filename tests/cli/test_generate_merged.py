"""`lorakit generate`: when it merges automatically, that merging does not change the answers, and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import core, hub
from lorakit.cli import main
from lorakit.cli.generate import WORTHWHILE_TOKENS
from lorakit.generate import generate
from lorakit.session.prompts import encode_prompts

Save = Callable[..., Path]
TOKENS = 8


@pytest.fixture
def loud_model_directory(tiny_model_directory: Path) -> Path:
    """The tiny model with weights large enough that it does not repeat one token."""
    model = hub.load_model(tiny_model_directory)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ".layers." in name:
                parameter.mul_(12)
    model.save_pretrained(tiny_model_directory)
    return tiny_model_directory


def answer(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[str, bool, str]:
    """Return the first answer's text, whether the base was merged, and standard error."""
    assert main(["generate", "--max-new-tokens", str(TOKENS), "--prompt", "hello", *map(str, words), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    return found["results"][0]["answers"][-1]["text"], found["merged"], captured.err


def refusal(capsys: pytest.CaptureFixture[str], code: int, *words: Any) -> str:
    assert main(["generate", "--prompt", "hello", *map(str, words)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def unmerged(directory: Path, adapter: Path) -> str:
    """Return the unmerged adapter's answer, computed with the library alone."""
    tokenizer, model = hub.load_tokenizer(directory), hub.load_model(directory)
    core.load_adapter(model, adapter)
    ids = encode_prompts(["hello"], tokenizer, "chat", None)[0]
    made = list(generate(model, ids, max_new_tokens=TOKENS, eos_ids=(0,)))
    return str(tokenizer.decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["norm"]}],
    ids=["plain", "dora", "rslora", "copies"],
)
def test_the_greedy_answer_is_the_unmerged_one(
    loud_model_directory: Path, save_adapter: Save, capsys: pytest.CaptureFixture[str], fields: dict[str, Any]
) -> None:
    one = save_adapter("one", **fields)
    common = ["--model", loud_model_directory, "--adapter", one]
    text, merged, said = answer(capsys, *common, "--merged", "--verbose")
    assert merged
    assert f"{one}: merged into the base in memory, which is exact in float32" in said
    beside, merged, said = answer(capsys, *common, "--no-merged")
    assert not merged and "merged" not in said
    assert text == beside == unmerged(loud_model_directory, one)
    base, merged, _ = answer(capsys, "--model", loud_model_directory)
    assert base != text and not merged


@pytest.mark.costly(cases=0)
def test_by_itself_where_it_is_exact_and_enough_tokens_may_come(
    loud_model_directory: Path, save_adapter: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = save_adapter("one", 1), save_adapter("two", 2)
    common = ["--model", loud_model_directory, "--adapter", one]
    many = ["hello"] * (WORTHWHILE_TOKENS // TOKENS)
    text, merged, _ = answer(capsys, *common, "--prompt", *many[1:])
    assert merged
    beside, merged, _ = answer(capsys, *common, "--prompt", *many[2:])
    assert not merged and beside == text, "fewer tokens than a merge is worth"
    assert not answer(capsys, *common, two, "--prompt", *many)[1], "base and two adapters answer"
    assert not answer(capsys, *common, "--base", "--prompt", *many)[1], "the base answers too"
    for dtype in ("bfloat16", "float16"):
        _, merged, said = answer(capsys, *common, "--dtype", dtype, "--prompt", *many)
        assert not merged and "merged" not in said


def test_what_is_not_exact_is_refused_where_it_is_asked_for(
    loud_model_directory: Path, save_adapter: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = save_adapter("one", 1), save_adapter("two", 2)
    common = ["--model", loud_model_directory, "--merged"]
    said = refusal(capsys, 1, *common, "--adapter", one, "--dtype", "bfloat16")
    assert f"{one}: --merged requires an exact merge" in said
    assert "model.layers.0.self_attn.q_proj is bfloat16" in said
    waiting = save_adapter("waiting", 3, alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    said = refusal(capsys, 1, *common, "--adapter", waiting)
    assert "model.layers.0.self_attn.q_proj is aLoRA, which cannot be merged" in said
    alone = "--merged needs exactly one adapter and no other answer"
    assert f"{alone}, but there is no adapter" in refusal(capsys, 2, *common)
    assert f"{alone}, but there are several answers" in refusal(capsys, 2, *common, "--adapter", one, two)
    assert f"{alone}, but there are several answers" in refusal(capsys, 2, *common, "--adapter", one, "--base")


def test_an_adapter_that_waits_stays_beside_the_base(
    loud_model_directory: Path, save_adapter: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = save_adapter("waiting", 3, alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    many = ["hello"] * (WORTHWHILE_TOKENS // TOKENS)
    assert not answer(capsys, "--model", loud_model_directory, "--adapter", waiting, "--prompt", *many)[1]


@pytest.mark.filterwarnings("default")
def test_damaged_numbers_are_found_by_the_merge(
    loud_model_directory: Path, save_adapter: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save_adapter("one", spread=float("nan"))
    words = ["--model", loud_model_directory, "--adapter", one, "--allow-nonfinite"]
    assert "NaNs detected in the merged weights." in refusal(capsys, 1, *words, "--merged")
    assert main(["generate", "--prompt", "hello", *map(str, words)]) == 1  # up to 256 tokens, so a merge is tried
    said = capsys.readouterr().err
    assert "The logits for row 0 are NaN or infinite at new token 1" in said and "merged into" not in said
