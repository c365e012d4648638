"""scripts/test_ids.py maps the ids of tests, and reports each loss that has no reason."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from .loading import load

OLD = ["tests/a/test_x.py::test_one", "tests/a/test_x.py::test_two[1-a message]", "tests/a/test_x.py::test_two[2-b]"]


@pytest.fixture(scope="module")
def ids() -> ModuleType:
    return load("scripts/test_ids.py")


@pytest.fixture
def lists(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Files for old ids, new ids and reasons."""
    (tmp_path / "old.txt").write_text("\n".join([*OLD, "", "3 tests collected in 0.1s"]))
    return tmp_path / "old.txt", tmp_path / "new.txt", tmp_path / "reasons.tsv"


def matched(
    ids: ModuleType, old: list[str], new: list[str], renames: dict[str, str], reasons: str = ""
) -> dict[str, str]:
    result = ids.compare(ids.cases(old), ids.cases(new), renames, ids.read_reasons(reasons))
    assert len(result.kept) + len(result.lost) == len(old)
    assert len(result.kept) + len(result.added) == len(new)
    return {str(before): str(after) for before, after in result.kept.items()}


def test_lines_of_pytest_become_cases(ids: ModuleType) -> None:
    lines = ["tests/a.py::test_b[c::d[0]-e f]", "tests/a.py::A::test_b", "", "2 tests collected", "a.py: warning::x"]
    assert [(case.function, case.parameters) for case in ids.cases(lines)] == [
        ("test_b", "c::d[0]-e f"),
        ("A::test_b", ""),
    ]
    assert [str(case) for case in ids.cases(lines)] == lines[:2]


def test_a_renamed_file_keeps_its_cases(ids: ModuleType) -> None:
    new = [case.replace("a/test_x", "b/test_y") for case in OLD]
    others = [case.replace("a/test_x", "a/test_a") for case in OLD]  # equal names elsewhere, and earlier
    assert matched(ids, OLD, others + new, {"tests/a/test_x.py": "tests/b/test_y.py"}) == dict(
        zip(OLD, new, strict=True)
    )


def test_a_case_that_moved_to_another_file_is_found_by_its_name(ids: ModuleType) -> None:
    assert matched(ids, OLD[:1], ["tests/b/test_z.py::test_one"], {}) == {OLD[0]: "tests/b/test_z.py::test_one"}
    assert matched(ids, OLD[1:2], ["tests/b/test_z.py::test_two[1-other]"], {}) == {}  # another case of that name


def test_parameters_may_change_in_the_same_file_and_follow_renamed_files(ids: ModuleType) -> None:
    new = [OLD[0], "tests/a/test_x.py::test_two[2-b]", "tests/a/test_x.py::test_two[1-another message]"]
    assert matched(ids, OLD, new, {}) == {OLD[0]: new[0], OLD[1]: new[2], OLD[2]: new[1]}
    named = ["tests/docs/test_d.py::test_exists[a/test_x.py-1]", "tests/docs/test_d.py::test_exists[a/test_v.py-2]"]
    moved = ["tests/docs/test_d.py::test_exists[a/test_v.py-2]", "tests/docs/test_d.py::test_exists[b/test_y.py-1]"]
    found = matched(ids, named, moved, {"tests/a/test_x.py": "tests/b/test_y.py"})
    assert found == {named[0]: moved[1], named[1]: moved[0]}


def test_reasons_name_a_new_function_or_case(ids: ModuleType) -> None:
    new = ["tests/b.py::test_of_pairs[values7-b]", "tests/b.py::test_of_pairs[values6-a]", "tests/b.py::test_three"]
    old = ["tests/a.py::test_two[values0-a]", "tests/a.py::test_two[values1-b]", "tests/a.py::test_one[c]"]
    reasons = "# old\tnew\twhy\ntests/a.py::test_two\ttests/b.py::test_of_pairs\tx\ntests/a.py::test_one[c]\ttests/b.py::test_three\ty"
    assert matched(ids, old, new, {}, reasons) == {old[0]: new[1], old[1]: new[0], old[2]: new[2]}
    with pytest.raises(ValueError, match="row 1"):
        ids.read_reasons("tests/a.py::test_one\t-")


def test_renames_are_followed_step_by_step(ids: ModuleType) -> None:
    assert ids.chained([("a", "b"), ("c", "a"), ("b", "d")]) == {"a": "d", "c": "a"}


@pytest.mark.parametrize(
    ("reasons", "code"),
    [
        ("", 1),
        ("tests/a/test_x.py::test_one\ttests/a/test_x.py::test_none\twhy", 1),
        ("tests/a/test_x.py::test_one\t-\twhy", 0),
    ],
)
def test_a_loss_needs_a_reason(
    ids: ModuleType, lists: tuple[Path, Path, Path], reasons: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, table = lists
    new.write_text("\n".join([*OLD[1:], "tests/c.py::test_new"]))
    table.write_text(reasons)
    assert ids.main([str(old), str(new), "--reasons", str(table), "--cases"]) == code
    out, err = capsys.readouterr()
    assert (f"lost: {OLD[0]}\n" in err) == bool(code)
    assert "before: 3, after: 3, kept: 2, changed: 0, added: 1, lost: 1" in err
    assert "added: tests/c.py::test_new\n" in out
    rows = [line.split("\t") for line in out.splitlines() if "\t" in line]
    why = "why" if reasons else ""
    assert rows[1:] == [
        ["-", "tests/c.py", "0", "1", "0", "0", "new"],
        ["tests/a/test_x.py", "-", "1", "0", "0", "1", why],
        ["tests/a/test_x.py", "tests/a/test_x.py", "2", "2", "0", "0", ""],
    ]


def test_a_reason_covers_all_cases_of_its_function(
    ids: ModuleType, lists: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, table = lists
    new.write_text(OLD[0])
    table.write_text("tests/a/test_x.py::test_two[1-a message]\t-\twhy")
    assert ids.main([str(old), str(new), "--reasons", str(table)]) == 1
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("lost: tests")] == [
        f"lost: {OLD[2]}"
    ]
    table.write_text("tests/a/test_x.py::test_two\t-\twhy")
    assert ids.main([str(old), str(new), "--reasons", str(table)]) == 0


def test_an_unknown_commit_is_an_error(ids: ModuleType, lists: tuple[Path, Path, Path]) -> None:
    lists[1].write_text("")
    with pytest.raises(subprocess.CalledProcessError):
        ids.main([str(lists[0]), str(lists[1]), "--since", "no-such-commit"])
