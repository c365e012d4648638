"""The tree of errors: every class has its own stable code, and is what the builtins promise."""

from __future__ import annotations

import inspect

import pytest

from lorakit import errors
from lorakit.errors import LorakitError, nearest

CODES = {
    "LorakitError": ("LORA-E000", 1, Exception),
    "ConfigError": ("LORA-E010", 2, ValueError),
    "UsageError": ("LORA-E011", 2, ValueError),
    "ConfigTypeError": ("LORA-E012", 2, TypeError),
    "TargetError": ("LORA-E020", 1, ValueError),
    "AdapterError": ("LORA-E030", 1, ValueError),
    "RouteError": ("LORA-E040", 1, RuntimeError),
    "MergeError": ("LORA-E050", 1, RuntimeError),
    "AdapterFileError": ("LORA-E060", 1, ValueError),
    "BaseMismatchError": ("LORA-E061", 1, ValueError),
    "PatternError": ("LORA-E062", 1, ValueError),
    "ModelError": ("LORA-E070", 1, ValueError),
    "DataError": ("LORA-E080", 1, ValueError),
    "RunError": ("LORA-E090", 1, RuntimeError),
    "NonFiniteError": ("LORA-E091", 1, RuntimeError),
    "DiskError": ("LORA-E100", 1, OSError),
    "MissingExtra": ("LORA-E110", 1, ImportError),
    "NotYetSupported": ("LORA-E120", 1, NotImplementedError),
}


def classes() -> dict[str, type[LorakitError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, LorakitError)
    }


def test_every_code_is_stable_and_there_is_no_other() -> None:
    """A code is for logs and programs: it may be added to, and never changes its meaning."""
    assert {name: (kind.code, kind.exit_code) for name, kind in classes().items()} == {
        name: (code, exit_code) for name, (code, exit_code, _) in CODES.items()
    }


@pytest.mark.parametrize("name", CODES)
def test_each_is_caught_as_the_builtin_it_stands_for(name: str) -> None:
    kind, (_, _, builtin) = classes()[name], CODES[name]
    with pytest.raises(builtin, match="what happened"):
        raise kind("what happened")
    with pytest.raises(LorakitError):
        raise kind("what happened")


def test_the_docstring_draws_the_whole_tree() -> None:
    for name, kind in classes().items():
        line = next(line for line in (errors.__doc__ or "").splitlines() if f" {name} " in f" {line.strip('│├└─ ')} ")
        assert kind.code in line


def test_nearest() -> None:
    words = ["q_proj", "k_proj", "v_proj", "gate_proj", "lm_head"]
    assert nearest("q_porj", words)[0] == "q_proj"
    assert nearest("qproj", words, 1) == ["q_proj"]
    assert nearest("zzzz", words) == []
    assert nearest("", words) == [] and nearest("x", []) == []
