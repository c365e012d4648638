"""Compile a JSON schema and follow it for some tokens, as a process that the system ends if it takes too long.

llguidance limits the work of most steps, but not of all: a schema of 40 characters can take minutes and all memory. So
`grammar.py` runs this file as a script, with the schema as its input, before it compiles the schema itself. The file
imports nothing of lorakit, so that it starts within a tenth of a second. Here, a token is one byte.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

CPU_SECONDS = 1
MEMORY_BYTES = 2**30
WALKS, WALK_TOKENS, WALK_SECONDS = 4, 100, 0.3
PLACE_SECONDS = 0.3
"""Time in which the part of a schema that cannot be compiled is searched."""

WHITESPACE = r"[\x20\x0A\x0D\x09]{0,32}"
"""Whitespace between JSON tokens; without a maximum, a model could write spaces until its last token."""

OPTIONS = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_pattern": WHITESPACE,
    "json_allow_general_unicode_escapes": True,  # but no lone surrogates
}
LIMITS = {"max_grammar_size": 20_000, "max_lexer_states": 50_000, "verbose_errors": False}
"""Limits of llguidance: 2,000 optional properties have fewer symbols; each state takes 1 to 2 kB."""

_SINGLE = ("items", "additionalProperties", "additionalItems")
_SEVERAL = ("properties", "patternProperties", "allOf", "anyOf", "oneOf", "prefixItems")


def compiled(library: Any, tokens: Any, text: str) -> Any:
    """Return llguidance's matcher for a schema, which may be in an error state.

    Raises:
        ValueError: The text is not JSON, or is nested too deeply.
    """
    grammar = library.LLMatcher.grammar_from_json_schema(text, overrides=OPTIONS)
    return library.LLMatcher(tokens, grammar, log_level=0, limits=library.LLParserLimits(**LIMITS))


def reason(matcher: Any) -> str:
    """Return the error of a matcher on one line, or an empty text."""
    return " ".join(str(matcher.get_error()).replace("<non-verbose/>", "").split())


class _Bytes:
    """A tokenizer, as llguidance takes it, with one token per byte."""

    tokens = (*(bytes([value]) for value in range(256)), b"<end>")
    bos_token_id, eos_token_id, special_token_ids = None, 256, (256,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def main() -> None:
    """Read a schema and print what is wrong with it, as JSON: `{"reason": …, "place": …}`; no reason if nothing is."""
    import llguidance

    _limit_resources()
    tokens = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))
    text = sys.stdin.read()

    def fault(part: str) -> str:
        return reason(compiled(llguidance, tokens, part))

    place = "#"
    try:
        found = fault(text)
        if found:
            place, found = _smallest(json.loads(text), found, fault)
        else:
            found = _walk(compiled(llguidance, tokens, text))
    except ValueError as error:
        found = str(error)
    sys.stdout.write(json.dumps({"reason": found, "place": place}))


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:  # Windows; the caller's time limit remains
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))


def _walk(start: Any) -> str:
    """Follow a schema with random bytes, several times, and return the error that this finds."""
    dice, end = random.Random(0), time.monotonic() + WALK_SECONDS
    for _ in range(WALKS):
        matcher = start.deep_copy()
        for _ in range(WALK_TOKENS):
            if matcher.is_stopped() or time.monotonic() > end:
                break
            allowed = [token for token, is_allowed in enumerate(matcher.compute_logit_bias()) if is_allowed]
            if not matcher.is_error():
                matcher.consume_token(dice.choice(allowed))
        if matcher.is_error():
            return reason(matcher)
    return ""


def _smallest(schema: Any, found: str, fault: Callable[[str], str]) -> tuple[str, str]:
    """Return the JSON pointer of the smallest part of a schema that cannot be compiled, and why, as far as time allows.

    `found` is why the whole schema cannot be compiled, and `fault` returns why a text cannot. Each part is compiled
    alone, as a reference into the whole schema, so that the references in it stay valid.
    """
    whole, end = json.dumps(_moved(schema)), time.monotonic() + PLACE_SECONDS
    path, part, seen = "", schema, set[str]()
    while True:
        for name, child in _parts(schema, path, part):
            if name in seen or time.monotonic() > end:
                continue
            seen.add(name)
            reference = json.dumps("#/$defs/whole" + quote(name))
            inner = fault(f'{{"$ref": {reference}, "$defs": {{"whole": {whole}}}}}')
            if inner:
                path, part, found = name, child, inner
                break
        else:
            return f"#{path}", found


def _parts(schema: Any, path: str, part: Any) -> Iterator[tuple[str, Any]]:
    """Yield the pointers and values of the schemas inside a schema, and of the one that it refers to."""
    if not isinstance(part, dict):
        return
    for key in _SINGLE:
        if key in part:
            yield f"{path}/{key}", part[key]
    for key in _SEVERAL:
        inner = part.get(key)
        items = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
        for name, child in items:
            yield f"{path}/{key}/{str(name).replace('~', '~0').replace('/', '~1')}", child
    pointer = str(part.get("$ref", ""))[1:]
    target: Any = schema
    for name in pointer.split("/")[1:]:
        target = target.get(name) if isinstance(target, dict) else None
    if pointer.startswith("/") and target is not None:
        yield pointer, target


def _moved(value: Any) -> Any:
    """Return a JSON value whose local references point below `$defs/whole`."""
    if isinstance(value, dict):
        return {
            key: f"#/$defs/whole{item[1:]}" if key == "$ref" and str(item).startswith("#") else _moved(item)
            for key, item in value.items()
        }
    return [_moved(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
