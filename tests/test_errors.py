"""The tree of errors: every class has its own stable code, and is what the builtins promise."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit import errors
from lorakit.errors import LorakitError, MissingExtra, nearest

CODES = {
    "LorakitError": ("LORA-E000", 1, Exception),
    "ConfigError": ("LORA-E010", 2, ValueError),
    "UsageError": ("LORA-E011", 2, ValueError),
    "ConfigTypeError": ("LORA-E012", 2, TypeError),
    "TargetError": ("LORA-E020", 1, ValueError),
    "NoTargetError": ("LORA-E021", 1, ValueError),
    "AdapterError": ("LORA-E030", 1, ValueError),
    "UnknownModelError": ("LORA-E032", 1, ValueError),
    "RouteError": ("LORA-E040", 1, RuntimeError),
    "RowCountError": ("LORA-E041", 1, RuntimeError),
    "MixedRowsError": ("LORA-E042", 1, RuntimeError),
    "MergeError": ("LORA-E050", 1, RuntimeError),
    "AdapterFileError": ("LORA-E060", 1, ValueError),
    "BaseMismatchError": ("LORA-E061", 1, ValueError),
    "PatternError": ("LORA-E062", 1, ValueError),
    "ShapeMismatchError": ("LORA-E063", 1, ValueError),
    "ModelError": ("LORA-E070", 1, ValueError),
    "DataError": ("LORA-E080", 1, ValueError),
    "RunError": ("LORA-E090", 1, RuntimeError),
    "NonFiniteError": ("LORA-E091", 1, RuntimeError),
    "BusyError": ("LORA-E092", 1, RuntimeError),
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


@pytest.mark.parametrize("name", CODES)
def test_a_message_alone_is_enough(name: str) -> None:
    error = classes()[name]("what happened")
    assert str(error) == error.message == "what happened" and error.args == ("what happened",)
    assert error.fields == {"what": None, "where": None, "field": None, "allowed": (), "override": None}
    assert str(classes()[name]()) == ""


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_fields_survive_pickling_and_copying(name: str, copied: Callable[[LorakitError], LorakitError]) -> None:
    fields = {"what": "q", "where": "a/b", "field": "r", "allowed": ("1", "2"), "override": "odd_scale"}
    error = classes()[name]("r is 0.", advice="Check it, or {override}.", **fields)
    error.add_note("a note")
    twin = copied(error)
    assert type(twin) is type(error) and twin.code == error.code
    assert twin.fields == error.fields == fields
    assert str(twin) == str(error) == "r is 0. Check it, or allow 'odd_scale'."
    assert twin.text("give --x") == "r is 0. Check it, or give --x."
    assert (twin.message, twin.advice, twin.__notes__) == (error.message, error.advice, ["a note"])


def test_fields_go_into_an_error_that_wraps_another() -> None:
    inner = errors.ConfigError("r is 0.", where=Path("a") / "b", field="r", allowed=iter(["1"]))
    outer = errors.AdapterFileError(f"x: {inner}", **inner.fields)
    assert str(outer) == "x: r is 0." and (outer.where, outer.field, outer.allowed) == ("a/b", "r", ("1",))


def test_a_value_that_is_no_text_is_held_as_its_repr() -> None:
    assert errors.ConfigError("x", what=object).what == repr(object)
    assert errors.ConfigError("x", what=0.5).what == "0.5" and errors.ConfigError("x", what="0.5").what == "0.5"


def test_a_missing_package_is_still_an_import_error() -> None:
    error = MissingExtra("pip install x", what="x")
    assert error.msg == "pip install x" and error.name is None


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
