"""`--new-tokens`: a tokenizer that knows them, and what their rows ask of base and adapter.

The tokens are added by `lorakit.hub`, the rows grown and trained by `lorakit.core`; here the two are brought together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorakit import hub
from lorakit.config import LoraConfig
from lorakit.core.files.fingerprinting import vocabulary_of
from lorakit.core.parts.growing import begin_rows, check_growth, grow_vocabulary, with_trained_rows
from lorakit.data import Loader


@dataclass(frozen=True)
class NewTokens:
    """Tokens that a run adds.

    Attributes:
        added: Their ids, and what their texts were until then.
        vocabulary: Rows that the base's embedding must have.
        rows: The rows that are trained: theirs, and any that the base lacked for older tokens.
    """

    added: hub.AddedTokens
    vocabulary: int
    rows: tuple[int, ...]

    def sentence(self) -> str:
        """What is done, for a person."""
        words = ", ".join(f"{token} ({number})" for token, number in self.added.ids.items())
        return f"New tokens: {words}; of the embedding and the head, their rows alone are trained."

    def config(self, config: LoraConfig, model: nn.Module) -> LoraConfig:
        """A config that trains the rows as well.

        Args:
            config: The adapter's.
            model: The base; its numbers are not needed.
        """
        return with_trained_rows(config, model, self.rows)

    def grow(self, model: nn.Module) -> None:
        """Give a base the rows that it lacks.

        Args:
            model: The base.
        """
        grow_vocabulary(model, self.vocabulary)

    def begin(self, model: nn.Module, name: str) -> None:
        """Let the rows of a fresh adapter begin where the tokens' pieces are.

        Args:
            model: The adapted model.
            name: The adapter.
        """
        begin_rows(model, name, self.added.pieces)

    def unseen(self, loader: Loader) -> list[str]:
        """A sentence about tokens that the training data does not have, whose rows stay as they begin.

        Args:
            loader: The run's.
        """
        seen = Counter(number for sequence in loader.sequences for number in sequence.input_ids)
        never = [token for token, number in self.added.ids.items() if not seen[number]]
        if not never:
            return []
        return [f"Not in the training data, so their rows are not trained: {', '.join(never)}."]


def add_new_tokens(tokenizer: Any, tokens: list[str], base: nn.Module) -> NewTokens:
    """Add tokens to a run's tokenizer.

    Args:
        tokenizer: The base's; changed in place.
        tokens: The setting.
        base: The base's modules; their numbers are not needed.

    Returns:
        What that asks of the base.

    Raises:
        ConfigError: A token is in the vocabulary already.
        ModelError: Tokenizer or base cannot take new ones.
    """
    added = hub.add_tokens(tokenizer, tokens)
    present = vocabulary_of(base)
    check_growth(base, added.vocabulary)
    return NewTokens(
        added,
        max(present, added.vocabulary),
        tuple(sorted({*added.ids.values(), *range(present, added.vocabulary)})),
    )
