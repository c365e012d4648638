"""Chat templates by name: those of lorakit, and Jinja files."""

from __future__ import annotations

import re
from pathlib import Path

from lorakit.data.tokens import Tokenizer, token_ids
from lorakit.durable import read_bytes
from lorakit.errors import AdapterFileError, ConfigError, did_you_mean

MAX_BYTES = 1 << 20
"""Maximum size of a chat template."""

_FOLDER = Path(__file__).parent / "chat_templates"
_MARKER = re.compile(r"<\|\w+\|>|<\w+_of_turn>")


def template_names() -> list[str]:
    """Return the names of lorakit's chat templates."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def use_template(tokenizer: Tokenizer, choice: str, new_tokens: list[str]) -> None:
    """Set a tokenizer's chat template by name, or from a Jinja file, whose path must not be a bare name.

    Raises:
        ConfigError: The file cannot be read, or the tokenizer lacks a token of the named template.
    """
    names = template_names()
    path = _FOLDER / f"{choice}.jinja" if choice in names else Path(choice)
    try:
        text = read_bytes(path, MAX_BYTES).decode("utf-8")
    except (AdapterFileError, UnicodeDecodeError) as cause:
        known = f"pass a Jinja file or one of {', '.join(names)}.{did_you_mean(choice, names)}"
        raise ConfigError(
            f"chat_template: {path} cannot be read ({cause}); {known}", what=str(path), field="chat_template"
        ) from None
    if choice in names:
        _check_tokens(tokenizer, choice, text, new_tokens)
    tokenizer.chat_template = text


def _check_tokens(tokenizer: Tokenizer, name: str, text: str, new_tokens: list[str]) -> None:
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
