"""The hash of a function's source covers what a call computes, and nothing else; source that is not live is rejected."""

from __future__ import annotations

import functools
import inspect
import linecache
import types
from typing import Any

import pytest
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, repeat_kv

from lorakit.identity import source
from lorakit.identity.source import source_of

PLAIN = """
def f(x, *, scale=2.0):
    '''Scale.'''
    y = x * scale
    return y - 1
"""


def made(text: str, name: str = "f", **variables: Any) -> Any:
    """Return a function that was compiled from a text, which is then its file."""
    file = f"<{hash(text)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    scope: dict[str, Any] = {"__name__": "made", **variables}
    exec(compile(text, file, "exec", dont_inherit=True), scope)
    return scope[name]


def hash_of(text: str, **variables: Any) -> str:
    source = source_of(made(text, **variables))
    assert source is not None
    return source.hash


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    '''Scale.'''\n", ""),
        ("Scale", "Multiply"),
        ("x * scale\n", "(x  *  scale)  # a comment\n\n"),
        ("def f(x, *, scale=2.0):", "def f(x: int, *, scale: float = 2.0) -> float:"),
        ("y = x", "y: float = x"),
        ("def f", "@unchanged\ndef f"),
    ],
)
def test_text_that_computes_nothing_does_not_count(old: str, new: str) -> None:
    assert old in PLAIN
    changed = PLAIN.replace(old, new)
    assert hash_of(PLAIN) == hash_of(changed, unchanged=lambda function: function)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x * scale", "x + scale"),
        ("y - 1", "y - 1.0"),
        ("y - 1", "y - True"),
        ("scale=2.0", "scale=3.0"),
        ("*, scale", "scale"),
        ("return y", "return x"),
        ("y = x * scale\n", "y = x * scale\n    y = y\n"),
    ],
)
def test_text_that_computes_counts(old: str, new: str) -> None:
    assert old in PLAIN
    assert hash_of(PLAIN) != hash_of(PLAIN.replace(old, new))


def test_names_do_not_count_but_variables_do() -> None:
    renamed = made(PLAIN.replace("def f", "def g"), "g")
    source, plain = source_of(renamed), source_of(made(PLAIN))
    assert source is not None and plain is not None and source.hash == plain.hash
    assert hash_of(PLAIN) != hash_of(PLAIN.replace("y", "z"))


@pytest.mark.parametrize("function", [LlamaAttention.forward, LlamaRMSNorm.forward, repeat_kv])
def test_functions_of_transformers_are_read(function: Any) -> None:
    while function is not None:
        assert source_of(function) is not None
        function = getattr(function, "__wrapped__", None)


@pytest.mark.parametrize(("old", "new"), [("x * scale", "x + scale"), ("y - 1", "y - 2")])
def test_code_that_was_changed_in_memory_is_rejected(old: str, new: str) -> None:
    function = made(PLAIN)
    assert source_of(function) is not None
    changed = compile(PLAIN.replace(old, new), function.__code__.co_filename, "exec", dont_inherit=True)
    function.__code__ = next(one for one in changed.co_consts if isinstance(one, types.CodeType))
    assert source_of(function) is None  # the file and the line are the same


def test_constants_that_compare_equal_are_told_apart() -> None:
    function = made(PLAIN)
    code = function.__code__
    function.__code__ = code.replace(co_consts=tuple(True if one == 1 else one for one in code.co_consts))
    assert source_of(function) is None


def test_a_function_whose_lines_another_has_now_is_rejected() -> None:
    """A file that was edited after its import: the function is still in it, but not where the live one was."""
    other = "class Other:\n    def f(self, x):\n        return x\n\n"
    text = "class One:\n    def f(self, x):\n        return x + 1\n\n"
    function = made(text, "One").f
    assert source_of(function) is not None
    file = function.__code__.co_filename
    linecache.cache[file] = (1, None, (other + text).splitlines(keepends=True), file)
    source._source.cache_clear()
    assert source_of(function) is None


def test_functions_without_a_file_are_rejected() -> None:
    scope: dict[str, Any] = {}
    exec("def f(x):\n    return x", scope)
    assert source_of(scope["f"]) is None
    assert source_of(lambda x: x) is None  # type: ignore[arg-type]


def test_wrappers_and_closures_are_read() -> None:
    function = made(PLAIN)

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return [function(one) for one in args]

    source = source_of(wrapper)  # type: ignore[arg-type]
    assert source is not None and "function" in source.variables


def test_what_is_read() -> None:
    source = source_of(inspect.unwrap(LlamaAttention.forward))
    assert source is not None
    assert ("self", "head_dim") in source.attributes and "apply_rotary_pos_emb" in source.variables
    assert {"scaling", "_attn_implementation"} <= source.words
