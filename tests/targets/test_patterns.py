"""Patterns from a file are plain names: a regular expression is rejected by name and never run."""

from __future__ import annotations

import time

import pytest

from lorakit.errors import PatternError
from lorakit.targets.patterns import exact_key, key_fits, literal_value, names


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "q_proj", True),
        ("0.q_proj", "model.layers.0.q_proj", True),
        (r"0\.q_proj", "model.layers.0.q_proj", True),
        ("^model.layers.0.q_proj", "model.layers.0.q_proj", True),
        (r"^model\.layers\.0\.q_proj", "model.layers.0.q_proj", True),
        ("^q_proj", "model.layers.0.q_proj", False),
        ("proj", "model.q_proj", False),
        ("model", "model.q_proj", False),
        ("10.q_proj", "model.0.q_proj", False),
        ("0.q_proj", "model.10.q_proj", False),
    ],
)
def test_plain_names(pattern: str, path: str, fits: bool) -> None:
    assert names(pattern, path) is fits


@pytest.mark.parametrize("pattern", ["(a+)+$", "q_proj|v_proj", ".*q_proj", "layers.[01].q", "q?", "(", "a{99999}"])
def test_regular_expressions_are_refused_at_once(pattern: str) -> None:
    started = time.perf_counter()
    with pytest.raises(PatternError, match="regular expression"):
        names(pattern, "a" * 200 + "!")
    assert time.perf_counter() - started < 0.1


def test_the_first_that_fits_decides_and_later_ones_are_not_tried() -> None:
    assert literal_value({"v": 1, "q": 2, "x.q": 3}, "x.q", 9) == 2
    assert literal_value({"v": 1}, "x.q", 9) == 9
    assert literal_value({}, "x.q", 9) == 9
    with pytest.raises(PatternError):
        literal_value({".*": 1}, "x.q", 9)


@pytest.mark.parametrize(
    "paths",
    [
        ("layers.0.q", "layers.1.q"),
        ("q", "layers.0.q", "layers.q"),
        ("layers.1.q", "layers.1xq", "deep.layers.1.q"),
        ("my-layers.0.q_proj", "other.my-layers.0.q_proj"),
    ],
)
def test_an_exact_key_names_one_path(paths: tuple[str, ...]) -> None:
    for path in paths:
        key = exact_key(path, paths)
        assert [other for other in paths if key_fits(key, other)] == [path]
        assert [other for other in paths if names(key, other)] == [path]  # also when the key is read from a file


def test_an_exact_key_is_the_path_if_that_is_enough() -> None:
    assert exact_key("layers.0.q-proj", ["layers.0.q-proj", "layers.0.k-proj"]) == "layers.0.q-proj"


def test_an_exact_key_escapes_special_characters() -> None:
    path = "blocks.a+b.q"
    assert key_fits(exact_key(path, [path]), path)


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        (r".*\.gate_up_proj", "layers.0.experts.gate_up_proj", True),
        (r".*\.experts.gate_up_proj", "layers.0.experts.gate_up_proj", True),
        (r".*\.gate_up_proj", "layers.0.my_gate_up_proj", False),
        (r".*\.gate_up_proj", "gate_up_proj", False),
        (r".*\.gate_up_proj", "layers.0.gate_up_proj.weight", False),
    ],
)
def test_a_name_under_any_parent_is_read_as_text(pattern: str, path: str, fits: bool) -> None:
    assert names(pattern, path) is fits
    assert key_fits(pattern, path) is fits  # as peft matches it


@pytest.mark.parametrize("pattern", [r".*\..*\.q", r".*\.(a+)+", r".*.q", r"x.*\.q", r"^.*\.q", r".*\."])
def test_other_patterns_with_any_parent_are_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        names(pattern, "layers.0.q")
