"""What a request names: the base or a version of an adapter, with its own tokenizer, prompt format and end tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.core import AdapterFiles, moving_variant
from lorakit.data.tokens import beginning, token_ids
from lorakit.errors import NotYetSupported
from lorakit.serve.templates import LimitedTokenizer, TemplateProcesses
from lorakit.session import Session
from lorakit.session.prompts import conversation, encode_prompts, end_ids
from lorakit.session.tokenizers import SavedTokenizer


@dataclass(frozen=True, eq=False)
class Served:
    """The base or a version of an adapter.

    Attributes:
        id: `NAME@HASH12`, or the base's name.
        name: Name of the adapter, or the base's name.
        adapter: Name of the adapter in the session, or None for the base.
        tokenizer: The tokenizer with which the adapter was trained.
        created: When it was loaded, in seconds since 1970.
        facts: Contents of `lorakit.json`, and the adapter's rank (`r`).
        text_ends: Tokens that end a text.
        chat_ends: Tokens that end an answer in a chat.
        templates: Processes that render the tokenizer's chat template.
    """

    id: str
    name: str
    adapter: str | None
    tokenizer: SavedTokenizer
    created: int
    facts: Mapping[str, Any]
    text_ends: frozenset[int]
    chat_ends: frozenset[int]
    templates: TemplateProcesses

    @classmethod
    def of(
        cls,
        session: Session,
        templates: TemplateProcesses,
        id: str,
        tokenizer: SavedTokenizer,
        adapter: str | None = None,
        files: AdapterFiles | None = None,
    ) -> Served:
        """Collect what requests need: of an adapter with a name in the session and its files, or of the base."""
        limited = LimitedTokenizer(tokenizer, templates)
        text, chat = (frozenset(end_ids(session.model, limited, form)) for form in ("text", "chat"))
        facts = {} if files is None else {"r": files.config.r, **files.sidecar.facts}
        name = id if adapter is None else id.partition("@")[0]
        return cls(id, name, adapter, tokenizer, int(time.time()), facts, text, chat, templates)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be formatted."""
        return bool(self.tokenizer.chat_template)

    def end_ids(self, *, chat: bool) -> frozenset[int]:
        """Return the ids of the tokens that end an answer."""
        return self.chat_ends if chat else self.text_ends

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text, as at the beginning of a training row."""
        return beginning(self.tokenizer) + token_ids(self.tokenizer, text)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Return the token ids of a conversation to continue, in the adapter's chat template.

        Raises:
            DataError: The messages are invalid.
            UsageError: The chat template rejects them.
        """
        chat = conversation({"messages": [*messages], "tools": [*tools]}, "messages")
        return encode_prompts([chat], LimitedTokenizer(self.tokenizer, self.templates), "chat", None)[0]


def check_servable(session: Session, files: AdapterFiles) -> None:
    """Check that an adapter can be added to a running base, and removed.

    Raises:
        UsageError: The adapter was trained for another task.
        NotYetSupported: The adapter would change the base, which other requests use.
    """
    session.spec.check_adapter(files)
    moved = moving_variant(files.config)
    if moved is not None:
        text = (
            f"{files.folder}: {moved.name} changes the base, which other requests use; merge it and serve the result."
        )
        raise NotYetSupported(text, what=moved.name, where=files.folder)
    rows = session.base_rows
    if files.vocabulary > rows:
        text = (
            f"{files.folder}: has new tokens, for which the base would have to grow ({rows:,} to {files.vocabulary:,} "
            "rows); merge it and serve the result."
        )
        raise NotYetSupported(text, what="vocabulary", where=files.folder)
