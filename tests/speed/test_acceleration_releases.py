"""A release of transformers with other source code: other whitespace and comments are accelerated as usual, and another
operator runs the module's own forward.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lorakit.speed import accelerate

from .mutant_checks import WAYS, released, source_of, unseen
from .mutant_models import FAMILIES, TOLERANCE, difference, results, usual
from .mutants import Mutant, functions, mutants

Edit = Callable[[str], str]


def fused(model: Any) -> list[tuple[str, str]]:
    """Accelerate a model and return the name of each fused forward with the class that it replaces."""
    return sorted((name, type(swap.original).__name__) for name, swap in accelerate(model).swaps)


def wider(source: str) -> str:
    """Add blank lines, spaces after brackets and commas, and spaces at the ends of lines."""
    lines = source.split("\n")
    for token in reversed(list(tokenize.generate_tokens(io.StringIO(source).readline))):
        row, column = token.end
        if token.type == tokenize.NL:
            lines.insert(token.start[0], "")
        elif token.type == tokenize.OP and token.string in ("(", ",", "["):
            lines[row - 1] = f"{lines[row - 1][:column]}  {lines[row - 1][column:]}"
    return "\n".join(lines)


def commented(source: str) -> str:
    """Add a comment before each statement of a function and at the end of each statement."""
    lines = source.split("\n")
    for _, function in reversed(list(functions(ast.parse(source)))):
        for node in reversed(function.body):
            indent = " " * node.col_offset
            if not isinstance(node, ast.Expr) and node.lineno == node.end_lineno:
                lines[node.lineno - 1] += "  # changed"
            lines.insert(node.lineno - 1, f"{indent}# x = -x")
    return "\n".join(lines)


def build_release(family: str, edit: Edit, folder: Path, check: Callable[[Any, ModuleType], None]) -> None:
    module = FAMILIES[family].module
    source = source_of(module)[1]
    changed = edit(source)
    assert changed != source
    with released(module, changed, folder) as made:
        check(FAMILIES[family].build(made), made)


SAMPLE = ("llama", "gemma2", "bert", "t5")
"""Models of `make test`."""


@pytest.mark.costly(cases=3)
@pytest.mark.parametrize("edit", [wider, commented])
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.slow) for name in FAMILIES]
)
def test_whitespace_and_comments_change_nothing(family: str, edit: Edit, tmp_path: Path) -> None:
    def check(model: Any, made: ModuleType) -> None:
        assert type(model).__module__ == made.__name__ and type(model) is getattr(made, type(model).__name__)
        assert fused(model) == wanted
        assert difference(results(model), usual(family)) <= TOLERANCE

    source = source_of(FAMILIES[family].module)[1]
    assert ast.dump(ast.parse(edit(source))) == ast.dump(ast.parse(source))
    wanted = fused(FAMILIES[family].build())
    build_release(family, edit, tmp_path, check)


OPERATORS = [
    ("llama", "LlamaRMSNorm.forward", "LlamaRMSNorm"),
    ("llama", "LlamaMLP.forward", "LlamaMLP"),
    ("llama", "rotate_half", "LlamaAttention"),
    ("llama", "apply_rotary_pos_emb", "LlamaAttention"),
    ("llama", "LlamaDecoderLayer.forward", "LlamaDecoderLayer"),
    ("gemma3", "Gemma3RMSNorm._norm", "Gemma3RMSNorm"),
    ("gemma2", "eager_attention_forward", "Gemma2Attention"),
    ("phi3", "Phi3MLP.forward", "Phi3MLP"),
    ("gpt2", "GPT2Block.forward", "GPT2Block"),
    ("opt", "OPTAttention.forward", "OPTAttention"),
    ("bert", "BertOutput.forward", "BertLayer"),
    ("t5", "T5LayerNorm.forward", "T5LayerNorm"),
    ("t5", "T5LayerFF.forward", "T5LayerFF"),
]


def operators(family: str, function: str) -> list[Mutant]:
    """Return the mutants of one function that change an operator."""
    module = FAMILIES[family].module
    source = source_of(module)[1]
    found = mutants(module, source, range(source.count("\n")))
    return [one for one in found if one.function == function and one.operator in ("operator", "sign", "dropped term")]


@pytest.mark.costly(cases=6)
@pytest.mark.parametrize("is_hidden", [False, True])
@pytest.mark.parametrize(("family", "function", "kind"), OPERATORS)
def test_an_operator_runs_the_own_forward(
    family: str, function: str, kind: str, is_hidden: bool, tmp_path: Path
) -> None:
    """A hidden operator acts only while gradients are recorded, so a probe does not find it."""

    def check(model: Any) -> None:
        found = {name for _, name in fused(model)}
        assert found and kind not in found

    for target, mutant in enumerate(operators(family, function)):
        place = tmp_path / str(target)
        place.mkdir()
        one = mutant.hidden() if is_hidden else mutant
        verdict = unseen(family, WAYS[0], one, place)
        if verdict is None:
            continue  # the plain model fails, or gives the usual results
        assert not verdict, f"{one}: {verdict}"
        build_release(family, one.apply, place, lambda model, _: check(model))
        return
    raise AssertionError("no operator counts")
