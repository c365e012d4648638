"""scripts/peft_suite.py: which cases count, and how they are grouped. The tests of PEFT themselves are not run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .loading import load

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a.TestA" name="test_one[x]"><properties><property name="other" value=""/></properties></testcase>
<testcase classname="tests.test_a.TestA" name="test_two"><failure message="ConfigError: no">trace</failure></testcase>
<testcase classname="tests.test_a" name="test_three"><skipped message="not here"/></testcase>
<testcase classname="tests.test_a" name="test_four"><properties><property name="other" value="VeraConfig"/></properties></testcase>
<testcase classname="tests.test_a" name="test_five"><error message="setup">trace</error></testcase>
</testsuite></testsuites>"""


@pytest.fixture(scope="module")
def script() -> Any:
    return load("scripts/peft_suite.py")


def test_the_import_is_renamed_and_nothing_else(script: Any) -> None:
    text = (
        'import peft\nfrom peft.utils import x\n    from peft import y\nwith patch("peft.a.b"):\n    peft.z("peft")\n'
    )
    assert script.renamed(text) == (
        "import lorakit.peft as peft\nfrom lorakit.peft.utils import x\n    from lorakit.peft import y\n"
        'with patch("lorakit.peft.a.b"):\n    peft.z("peft")\n'
    )


def test_results_are_read_from_a_report(script: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT, encoding="utf-8")
    results = script.read(report)
    outcomes = {name: case.outcome for name, case in results.items()}
    assert outcomes == {
        "test_a.TestA::test_one[x]": "passed",
        "test_a.TestA::test_two": "failed",
        "test_a::test_three": "skipped",
        "test_a::test_four": "passed",
        "test_a::test_five": "failed",
    }
    assert results["test_a::test_four"].other == "VeraConfig"
    assert "ConfigError" in results["test_a.TestA::test_two"].message


def test_a_case_counts_that_passes_with_peft_and_not_here(script: Any) -> None:
    case = script.Case
    theirs = {name: case("passed") for name in ("same", "failed", "skipped", "missing")}
    theirs |= {"other": case("passed", "", "VeraConfig"), "hub": case("failed"), "gpu": case("skipped")}
    ours = {"same": case("passed"), "failed": case("failed"), "skipped": case("skipped"), "hub": case("failed")}
    assert set(script.not_passed(theirs, ours)) == {"failed", "skipped", "missing"}
    assert "6 LoRA cases, passed by peft: 4, not passed here, passed by peft: 3" in script.summary(theirs, ours)


def test_a_case_is_found_if_its_parameters_have_another_number(script: Any) -> None:
    case = script.Case
    theirs = {"a::t[LoraConfig-kwargs13]": case("passed"), "a::u[LoraConfig-kwargs13]": case("passed")}
    ours = {"a::t[LoraConfig-kwargs0]": case("passed"), "a::u[LoraConfig-kwargs0]": case("failed")}
    assert set(script.not_passed(theirs, ours)) == {"a::u[LoraConfig-kwargs13]"}


def test_cases_are_grouped_by_reason(script: Any) -> None:
    case = script.Case
    cases = {
        "a": case("failed", "lorakit does not write pickle files"),
        "b": case("failed", "pickle weights are not loaded"),
        "c": case("failed", "something"),
    }
    groups = script.grouped(cases)
    assert list(groups.values()) == [["a", "b"], ["c"]]
    assert list(groups)[1] == script.OTHER
