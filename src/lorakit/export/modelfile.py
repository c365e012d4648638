"""The Modelfile with which Ollama creates a model from a merged GGUF file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lorakit import hub

if TYPE_CHECKING:
    from lorakit.export.gguf_base import GgufBase

Chat = Sequence[Mapping[str, str]]

CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
"""ChatML as a Go template, which is what Ollama reads."""

CHATML_STOP = "<|im_end|>"

_DEFAULT_SYSTEM = re.compile(r"<\|im_start\|>system\n((?:(?!<\|im_).)*)<\|im_end\|>\n", re.DOTALL)
_STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")

_USER, _SYSTEM = {"role": "user", "content": "  One\n\n{{ two }} "}, {"role": "system", "content": " Be brief.\n"}
_ANSWER = {"role": "assistant", "content": "Three."}
PROBES: Sequence[Chat] = (
    (_USER,),
    (_SYSTEM, _USER),
    (_USER, _ANSWER, _USER),
    (_SYSTEM, _USER, _ANSWER, _USER, _ANSWER, _USER),
)
"""Conversations that a template must render as ChatML does."""


def modelfile(file: str, base: GgufBase, template: str | None) -> str:
    """Return the Modelfile for a merged file, with the adapter's chat template, or else the base's."""
    chosen = template or base.field("tokenizer.chat_template")
    system = chatml_system(chosen) if chosen else None
    lines = [f"FROM ./{file}"]
    if system is None:
        lines.append("# no TEMPLATE: the chat template is not ChatML; Ollama uses the one in the file, if it knows it")
    else:
        lines += ["# ChatML, without functions (tools)", f'TEMPLATE """{CHATML}"""']
        lines += [f'SYSTEM """{system}"""'] if system else []
    stops = dict.fromkeys([*([] if system is None else [CHATML_STOP]), *_ends(base)])
    lines += [f'PARAMETER stop "{text}"' for text in stops if '"' not in text and "\n" not in text]
    lines += [
        "# Ollama before 0.34.1 also applied an adapter, the file of `lorakit export gguf`, to a base in GGUF:",
        "# FROM ./BASE.gguf",
        "# ADAPTER ./ADAPTER.gguf",
    ]
    return "\n".join(lines) + "\n"


def chatml_system(template: str) -> str | None:
    """Return the default system message of a chat template that renders conversations as ChatML does.

    Returns:
        "" if it has none; None if the template is another one.
    """
    first = hub.render_chat(template, PROBES[0])
    if first is None or not first.endswith(_chatml(PROBES[0])):
        return None
    found = _DEFAULT_SYSTEM.fullmatch(start := first.removesuffix(_chatml(PROBES[0])))
    if start and (found is None or '"""' in found[1]):
        return None
    for probe in PROBES[1:]:
        expected = ("" if probe[0]["role"] == "system" else start) + _chatml(probe)
        if hub.render_chat(template, probe) != expected:
            return None
    return found[1] if found else ""


def _chatml(chat: Chat) -> str:
    turns = (f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in chat)
    return "".join(turns) + "<|im_start|>assistant\n"


def _ends(base: GgufBase) -> Iterator[str]:
    """Yield the texts of the tokens that end an answer, by the file's metadata."""
    tokens = base.reader.fields.get("tokenizer.ggml.tokens")
    for name in _STOPS:
        number = base.field(f"tokenizer.ggml.{name}")
        if tokens is not None and isinstance(number, int) and 0 <= number < len(tokens.data):
            yield str(tokens.contents(number))
