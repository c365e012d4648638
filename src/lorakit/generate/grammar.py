"""JSON schemas that constrain one row's tokens, through llguidance, which is imported when it is used.

A schema is compiled once per tokenizer; a row's state is a copy of the compiled one. This module does not depend on the
model, and it knows a tokenizer only by the text of its `tokenizers` object.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lorakit.errors import ConfigError, MissingExtra, ModelError
from lorakit.generate import schema_check

JSON_OBJECT: Mapping[str, Any] = {"type": "object"}
"""The schema of any JSON object."""

MAX_SCHEMA_BYTES = 64 * 1024
CACHED_SCHEMAS = 64
CHECK_SECONDS = 10
"""Time after which the check of a schema fails on a busy machine; it may use less of the processor (`schema_check`)."""


class FastTokenizer(Protocol):
    """The part of a fast tokenizer of transformers that grammars use."""

    @property
    def backend_tokenizer(self) -> Any:
        """Return the `tokenizers.Tokenizer`."""


class Constraint:
    """The state of one row's answer, which follows a schema.

    Raises:
        ConfigError: From `mask` and `advance`: the schema is too complex at this point of the answer, or the answer
            does not follow it. The state cannot be used further.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def is_finished(self) -> bool:
        """Return whether the answer is complete: only a token that ends it may follow."""
        return bool(self._matcher.is_stopped())

    def mask(self, logits: Tensor) -> Tensor:
        """Return logits (vocabulary,) with -inf for the tokens that cannot come next."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        self._check()
        return logits.masked_fill((allowed[: logits.numel()] == 0).to(logits.device), -torch.inf)

    def advance(self, token: int) -> None:
        """Add a token to the answer."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _error(schema_check.reason(self._matcher), "the answer", "Simplify the schema.")


class GrammarCompiler:
    """A compiler of JSON schemas for one tokenizer; making it takes about half a second.

    Args:
        tokenizer: A fast tokenizer of transformers.
        vocabulary: Number of logits.
        end_ids: Tokens that end an answer, at least one.

    Raises:
        MissingExtra: llguidance is not installed.
        ModelError: llguidance does not support the tokenizer, or no token of the tokenizer ends answers.
    """

    def __init__(self, tokenizer: FastTokenizer, vocabulary: int, end_ids: Collection[int]) -> None:
        try:
            import llguidance
        except ImportError as cause:
            text = "JSON schemas need the package llguidance; run pip install 'lorakit[serve]'"
            raise MissingExtra(text, what="llguidance") from cause
        self._library = llguidance
        name, backend = type(tokenizer).__name__, getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(f"{name} is not a fast tokenizer, which JSON schemas need.", what=name)
        size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        ends = sorted(end for end in end_ids if end < size)
        try:
            self._tokens = llguidance.LLTokenizer(backend.to_str(), n_vocab=max(vocabulary, size), eos_token=ends)
        except ValueError as error:
            raise ModelError(f"{name}: JSON schemas do not support this tokenizer: {error}", what=name) from error
        self._compiled = functools.lru_cache(CACHED_SCHEMAS)(self._compile)

    def start(self, schema: Mapping[str, Any] = JSON_OBJECT) -> Constraint:
        """Return the constraint of a row whose answer must be JSON that is valid under a schema.

        A schema that was not among the last 64 is checked and compiled, which takes 0.1 s to some seconds; threads can
        run meanwhile. Keywords that cannot be enforced are errors.

        Raises:
            ConfigError: The schema is invalid, not supported or too complex; `where` is the place in the schema.
        """
        if not isinstance(schema, Mapping):
            raise ConfigError.of("json_schema", schema, "a JSON object")
        try:
            # "x-guidance" has options of llguidance, which a schema must not change
            text = json.dumps({key: value for key, value in schema.items() if key != "x-guidance"}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise _error(f"not JSON: {error}", "#", "Pass a JSON object.") from error
        if len(text) > MAX_SCHEMA_BYTES:
            raise _error(f"{len(text):,} bytes, more than {MAX_SCHEMA_BYTES:,}", "#", "Shorten it.")
        return Constraint(self._compiled(text).deep_copy())

    def _compile(self, text: str) -> Any:
        check = [sys.executable, str(Path(schema_check.__file__))]
        try:
            done = subprocess.run(check, input=text, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False)
            found = json.loads(done.stdout) if done.returncode == 0 else None
        except subprocess.TimeoutExpired:
            found = None
        if found is None:
            limits = f"{schema_check.CPU_SECONDS} s or {schema_check.MEMORY_BYTES / 2**30:.0f} GiB"
            reason = f"compiling takes more than {limits}"
            raise _error(reason, "#", "Use fewer and smaller lengths, counts, multiples and patterns.")
        if not found["reason"]:
            matcher = schema_check.compiled(self._library, self._tokens, text)
            found["reason"] = schema_check.reason(matcher)
        if found["reason"]:
            raise _error(found["reason"], found["place"], "Change or remove this part of the schema.")
        return matcher


def _error(reason: str, where: str, advice: str) -> ConfigError:
    text = f"json_schema: {where} cannot be enforced: {reason.rstrip('.')}. {advice}"
    return ConfigError(text, what=reason, where=where, field="json_schema")
