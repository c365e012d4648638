"""docs/serving-elsewhere.md has the commands that `lorakit export` prints, and the rows that were measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.export.formats import FORMATS

from ..loading import load

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving-elsewhere.md").read_text(encoding="utf-8")
NAME, BASE, RANK = "legal@c663732cda0b", "owner/base", 16
GENERATED = load("scripts/generated_table.py")


@pytest.fixture(scope="module")
def script() -> Any:
    load("scripts/bootstrap.py")
    load("scripts/environments.py")
    load("scripts/vllm_server.py")
    return load("scripts/runtimes_table.py")


@pytest.mark.parametrize("format", FORMATS)
def test_the_commands_are_those_that_export_prints(format: str) -> None:
    for title, command in FORMATS[format].commands(NAME, BASE, RANK, "OUTPUT").items():
        assert f"\n{command}\n" in PAGE, title


def test_the_table_is_that_of_the_results(script: Any) -> None:
    assert GENERATED.with_table(PAGE, script.BEGIN, script.table()) == PAGE


def test_every_runtime_gives_the_answers_of_every_adapter(script: Any) -> None:
    rows = script.rows_of_results()
    pairs = {(family, runtime) for family in script.FAMILIES for runtime in script.RUNTIMES}
    assert set(rows) == {(family, runtime) for family, runtime in pairs if (runtime, family) not in script.WITHOUT_LORA}
    assert all(set(row["variants"]) == set(script.variants_of(family)) for (family, _), row in rows.items())
    assert all(map(script.is_good, rows.values()))


GOOD = {"lorakit": 1e-5, "peft": 1e-5, "greedy_same": 3, "nearest_other": 1.0}


@pytest.mark.parametrize("change", [{"lorakit": 2e-3}, {"peft": 2e-3}, {"greedy_same": 2}, {"nearest_other": 1e-4}])
def test_rows_that_fail(script: Any, change: dict[str, float]) -> None:
    assert script.is_good({"base": 1e-6, "variants": {"plain": GOOD}})
    assert not script.is_good({"base": 1e-6, "variants": {"plain": GOOD, "rsLoRA": GOOD | change}})


@pytest.mark.parametrize(
    ("theirs", "expected"), [([5, 6], True), ([5, 9], True), ([5], True), ([4, 6], False), ([5, 6, 7], False)]
)
def test_greedy_answers_may_differ_where_two_tokens_are_equally_likely(
    script: Any, theirs: list[int], expected: bool
) -> None:
    assert script.is_same(1e-3, [5, 6], theirs, [0.2, 5e-4, 0.3]) is expected


def test_the_words_of_a_printed_command() -> None:
    load("scripts/bootstrap.py")
    load("scripts/environments.py")
    server = load("scripts/vllm_server.py")
    command = FORMATS["vllm"].commands(NAME, "/models/my base", RANK, "OUTPUT")["vLLM, adapters on first use"]
    variables, (program, verb, model, *_) = server.split(command)
    assert (program, verb, model) == ("vllm", "serve", "/models/my base")
    assert variables["VLLM_LORA_RESOLVER_CACHE_DIR"] == "OUTPUT"
