"""Prompts of the package and of data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit import core
from lorakit.errors import DataError
from lorakit.session import session_spec
from lorakit.verify.prompts import PROMPTS, read_prompts


@pytest.fixture
def spec(save_adapter: Callable[..., Path], tiny_model_directory: Path) -> Any:
    return session_spec(str(tiny_model_directory), {"adapter": core.read_adapter(save_adapter("notes"))})


def test_packaged_prompts(spec: Any, tiny_tokenizer: Any) -> None:
    assert len(set(PROMPTS)) == 20
    prompts = read_prompts(spec, (), 20)
    for text, prompt in zip(PROMPTS, prompts, strict=True):
        assert prompt.messages == [{"role": "user", "content": text}]  # the tokenizer has a chat template
        rendered = tiny_tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False)
        assert tiny_tokenizer.decode(prompt.ids) == rendered
    assert [prompt.ids for prompt in read_prompts(spec, (), 3)] == [prompt.ids for prompt in prompts[:3]]


CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"text": "a text"}, [{"role": "user", "content": "a text"}]),
        ({"prompt": "Who?", "completion": "Ada."}, CHAT[:1]),
        ({"messages": CHAT}, CHAT[:1]),
        ({"messages": [*CHAT, {"role": "user", "content": "When?"}]}, [*CHAT, {"role": "user", "content": "When?"}]),
    ],
)
def test_rows_without_their_answers(spec: Any, tmp_path: Path, row: Any, messages: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    (prompt,) = read_prompts(spec, [str(file)], 20)
    assert prompt.messages == messages


@pytest.mark.parametrize("row", [{"messages": CHAT[1:]}, {"prompt": "", "completion": "Ada."}, {"text": " \n"}])
def test_data_without_prompts(spec: Any, tmp_path: Path, row: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(DataError) as caught:
        read_prompts(spec, [str(file)], 20)
    assert caught.value.where == str(file)


def test_rows_without_a_prompt_are_left_out(spec: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "\n".join(json.dumps({"prompt": text, "completion": "Ada."}) for text in (" ", "Who?", "", "When?"))
    )
    assert [one.messages[0]["content"] for one in read_prompts(spec, [str(file)], 2)] == ["Who?", "When?"]
