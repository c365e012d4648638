"""Hashes and settings that identify a tokenizer and its chat template; and what the template marks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.durable import sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of all in a tokenizer that affects how text maps to ids, except for its chat template.

    Saving and reloading the tokenizer, or truncating and padding texts, does not change it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("padding", None)  # padding and truncation settings are left over from the last call
        rules.pop("truncation", None)
    else:
        rules = {"vocab": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    unusual = {name: value for name, usual in _USUAL.items() if (value := getattr(tokenizer, name, usual)) != usual}
    if "src_lang" in unusual:  # the language of target texts, too, unless there is another
        unusual = {"tgt_lang": unusual["src_lang"], **unusual}
    return _digest(json.dumps([rules, special, *([unusual] if unusual else [])], sort_keys=True))


_USUAL = {"truncation_side": "right", "split_special_tokens": False, "src_lang": None, "tgt_lang": None}
"""Attributes of tokenizers that affect how text is mapped to ids -> their usual values."""

_WITHOUT_EFFECT = frozenset(
    {"chat_template", "deprecation_warnings", "files_loaded", "init_inputs", "name_or_path", "verbose"}
    | {"_in_target_context_manager", "_should_update_post_processor"}
)
"""Attributes of tokenizers that do not affect how text is mapped to ids, or that have their own hash."""


def tokenizer_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return what may affect how a tokenizer maps text to ids and is not part of `tokenizer_hash`.

    These are all attributes with plain values, such as `truncation_side` and `split_special_tokens`, and the files that
    a tokenizer without a backend saves. Saving and reloading the tokenizer does not change them.
    """
    settings = {"class": type(tokenizer).__qualname__}
    for name, value in vars(tokenizer).items():
        if name == "init_kwargs":
            value = {key: one for key, one in value.items() if key not in _WITHOUT_EFFECT and not key.endswith("_file")}
        if name not in _WITHOUT_EFFECT:
            with contextlib.suppress(TypeError):
                settings[name] = json.dumps(value, sort_keys=True, default=_added_token)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(NotImplementedError):
            tokenizer.save_vocabulary(folder)
            settings |= {path.name: sha256_file(path) for path in sorted(Path(folder).iterdir())}
    return settings


def _added_token(value: Any) -> str:
    from tokenizers import AddedToken

    if isinstance(value, AddedToken):
        return repr(value)
    raise TypeError(type(value).__name__)


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the SHA-256 of a tokenizer's chat template, or None if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    return _digest(template if isinstance(template, str) else json.dumps(template, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def render_chat(template: str, messages: Sequence[Mapping[str, str]]) -> str | None:
    """Return a conversation as a chat template renders it, without special tokens; None if it raises an error."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(
            conversations=[[dict(message) for message in messages]], chat_template=template, add_generation_prompt=True
        )
    except Exception:  # noqa: BLE001 - a template is untrusted code and may raise anything
        return None
    return str(texts[0])


def marked_text(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation, and return its text with the (start, end) offsets of each mark; a mark may be empty.

    `apply_chat_template` returns marked tokens: without empty marks, and without spaces that some offsets omit.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [{key: value for key, value in message.items() if value is not None} for message in messages]
    texts, spans = render_jinja_template(
        conversations=[turns],
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **options},
    )
    return str(texts[0]), list(spans[0])
