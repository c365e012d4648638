"""Judgement of comparisons, and their form as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from lorakit.verify import Comparison, GreedyDifference, VerifyReport

GOOD = Comparison(
    runtime="gguf",
    title="notes in llama.cpp",
    versions={"xllamacpp": "1"},
    dtype="float32",
    bound=1e-3,
    prompts=20,
    tokens=600,
    other_tokens=(),
    difference=2e-4,
    distances={"base": 3.0},
    base_difference=1e-4,
    greedy_same=20,
)
DIFFERS = GreedyDifference(3, 2, 5, 7, 1e-3)


@pytest.mark.parametrize(
    ("fields", "problems", "in_other_dtypes"),
    [
        ({}, 0, 0),
        ({"other_tokens": None, "greedy_same": None, "base_difference": None}, 0, 0),
        ({"other_tokens": (4,)}, 1, 1),
        ({"difference": 1.1e-3}, 1, 0),
        ({"difference": math.nan}, 2, 1),
        ({"base_difference": 1.1e-3}, 1, 0),
        ({"base_difference": math.nan}, 1, 0),
        ({"greedy_first": DIFFERS, "greedy_same": 19}, 0, 0),  # the tokens are equally likely, within twice the bound
        ({"greedy_first": replace(DIFFERS, gap=2.1e-3), "greedy_same": 19}, 1, 0),
        ({"greedy_first": replace(DIFFERS, theirs=None, gap=math.inf), "greedy_same": 19}, 1, 0),
        ({"distances": {"base": 3.9e-4}}, 1, 1),
        ({"distances": {"base": 3.9e-4}, "difference": 0.0}, 1, 1),
        ({"distances": {"base": 0.039}, "difference": 0.02}, 2, 1),
        ({"distances": {"base": 3.0, "other": 0.0}}, 1, 1),
    ],
)
def test_what_is_judged(fields: dict[str, Any], problems: int, in_other_dtypes: int) -> None:
    one = replace(GOOD, **fields)
    assert len(one.problems) == problems
    assert len(replace(one, dtype="F16").problems) == in_other_dtypes
    report = VerifyReport("notes", "0" * 64, "base", "float32", "packaged", 2.0, {}, [GOOD, one])
    assert report.is_good == (problems == 0)
    plain = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert plain["good"] == report.is_good and plain["comparisons"][1]["problems"] == one.problems
    assert plain["comparisons"][0]["difference"] == 2e-4


def test_nothing_compared_is_not_good() -> None:
    assert not VerifyReport("notes", "0" * 64, "base", "float32", "packaged", 2.0, {}, []).is_good
