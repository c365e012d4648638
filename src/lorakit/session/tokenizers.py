"""The tokenizers of a session: of the base, of adapters, of training data; chat templates by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from lorakit import data, hub
from lorakit.core import AdapterFiles
from lorakit.data.tokens import token_ids
from lorakit.durable import read_bytes
from lorakit.errors import AdapterFileError, ConfigError, did_you_mean

MAX_TEMPLATE_BYTES = 1 << 20
"""Maximum size of a chat template."""

_FOLDER = Path(__file__).parent / "chat_templates"
_MARKER = re.compile(r"<\|\w+\|>|<\w+_of_turn>")


class SavedTokenizer(data.Tokenizer, Protocol):
    """The part of the transformers tokenizer interface that training runs and commands use."""

    def get_vocab(self) -> dict[str, int]:
        """Return a dict from token to id."""

    def save_pretrained(self, save_directory: Path) -> tuple[str, ...]:
        """Write the tokenizer's files to a directory and return their names."""


def tokenizer_for(source: hub.ModelSource, adapters: Sequence[AdapterFiles]) -> tuple[SavedTokenizer, str]:
    """Return the tokenizer to use, preferably the one that the adapters were trained and saved with.

    Returns:
        The saved tokenizer that contains all tokens of the other saved tokenizers, if there is one and all have the
            same chat template; otherwise, the model's tokenizer, with a warning if adapters have others, or "".

    Raises:
        ModelError: Neither the model nor the adapters have a tokenizer, or the tokenizer cannot be read.
    """
    saved = [own for files in adapters if (own := hub.adapter_tokenizer(files.folder)) is not None]
    distinct = {_hashes(own): own for own in saved}
    largest = _largest(list(distinct.values()))
    if largest is not None:
        return largest, ""
    warning = "the adapters have different tokenizers or chat templates; using the model's tokenizer." if saved else ""
    return hub.load_tokenizer(source), warning


def _largest(tokenizers: Sequence[SavedTokenizer]) -> SavedTokenizer | None:
    """Return the tokenizer that contains the others' tokens and ids; None if there is none or chat templates differ."""
    tokens = [set(tokenizer.get_vocab().items()) for tokenizer in tokenizers]
    for tokenizer, own in zip(tokenizers, tokens, strict=True):
        if all(own >= other for other in tokens) and all(
            t.chat_template == tokenizer.chat_template for t in tokenizers
        ):
            return tokenizer
    return None


def own_tokenizer(folder: Path, tokenizer: data.Tokenizer) -> SavedTokenizer | None:
    """Return the tokenizer in an adapter's directory if it differs from the base's, else None.

    Raises:
        ModelError: The tokenizer cannot be read.
    """
    saved = hub.adapter_tokenizer(folder)
    return None if saved is None or _hashes(saved) == _hashes(tokenizer) else saved


def _hashes(tokenizer: Any) -> tuple[str, str | None]:
    return hub.tokenizer_hash(tokenizer), hub.chat_template_hash(tokenizer)


def common_tokenizer(source: hub.ModelSource, folders: Iterable[Path]) -> SavedTokenizer:
    """Return the base's tokenizer, with the adapters' chat template if that alone differs and all have the same."""
    tokenizer = hub.load_tokenizer(source)
    saved = [own_tokenizer(folder, tokenizer) for folder in folders]
    owned = [own for own in saved if own is not None and hub.tokenizer_hash(own) == hub.tokenizer_hash(tokenizer)]
    templates = {hub.chat_template_hash(own) for own in owned}
    return owned[0] if len(owned) == len(saved) and len(templates) == 1 else tokenizer


def training_tokenizer(
    source: hub.ModelSource,
    chat_template: str | None = None,
    new_tokens: Sequence[str] = (),
    *,
    adapter: Path | None = None,
    resumed: SavedTokenizer | None = None,
) -> tuple[SavedTokenizer, bool]:
    """Return the tokenizer for training data, with its chat template, and whether it or its template is not the base's.

    Args:
        source: The base.
        chat_template: Name of a chat template, or a Jinja file; None keeps that of the tokenizer.
        new_tokens: Tokens that the run adds later, so that the template may contain them.
        adapter: Directory of the adapter that the run starts from, whose own tokenizer is used.
        resumed: Tokenizer in the checkpoint of the run that is resumed, whose template is used, because files with
            templates may be changed or removed after a start.

    Raises:
        ModelError: The tokenizer cannot be read.
        ConfigError: The template cannot be read, or the tokenizer lacks one of its tokens.
    """
    base = hub.load_tokenizer(source)
    own, template = None if adapter is None else own_tokenizer(adapter, base), hub.chat_template_hash(base)
    chosen = base if own is None else own
    if resumed is not None:
        chosen.chat_template = resumed.chat_template
    elif chat_template is not None:
        use_template(chosen, chat_template, [*new_tokens])
    return chosen, own is not None or hub.chat_template_hash(chosen) != template


def template_names() -> list[str]:
    """Return the names of lorakit's chat templates."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def use_template(tokenizer: data.Tokenizer, choice: str, new_tokens: list[str]) -> None:
    """Set a tokenizer's chat template by name, or from a Jinja file, whose path must not be a bare name.

    Raises:
        ConfigError: The file cannot be read, or the tokenizer lacks a token of the named template.
    """
    names = template_names()
    path = _FOLDER / f"{choice}.jinja" if choice in names else Path(choice)
    try:
        text = read_bytes(path, MAX_TEMPLATE_BYTES).decode("utf-8")
    except (AdapterFileError, UnicodeDecodeError) as cause:
        known = f"pass a Jinja file or one of {', '.join(names)}.{did_you_mean(choice, names)}"
        raise ConfigError(
            f"chat_template: {path} cannot be read ({cause}); {known}", what=str(path), field="chat_template"
        ) from None
    if choice in names:
        _check_tokens(tokenizer, choice, text, new_tokens)
    tokenizer.chat_template = text


def _check_tokens(tokenizer: data.Tokenizer, name: str, text: str, new_tokens: list[str]) -> None:
    """Check that the markers of a template are tokens, so that they are not spelled from pieces of text."""
    missing = [
        marker
        for marker in dict.fromkeys(_MARKER.findall(text))
        if marker not in new_tokens and len(token_ids(tokenizer, marker)) != 1
    ]
    if missing:
        listed = " ".join(f"'{marker}'" for marker in missing)
        advice = f"add them with --new-tokens {listed}, or use --chat-template plain"
        problem = f"the tokenizer has no tokens {listed}; {advice}."
        raise ConfigError(f"chat_template {name}: {problem}", what=name, field="chat_template")
    if "eos_token" in text and tokenizer.eos_token_id is None:
        problem = "the tokenizer has no end-of-text token, which ends answers; use another template."
        raise ConfigError(f"chat_template {name}: {problem}", what=name, field="chat_template")
