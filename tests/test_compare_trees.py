"""compare_trees.py runs each tree's own lorakit and scripts in turn, and gives the ratio of each row."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from .loading import ROOT, load

SCRIPT = """
import json, sys
from pathlib import Path
import lorakit

folder = Path(__file__).parent / "results"
folder.mkdir(exist_ok=True)
with open(Path(sys.argv[1]), "a") as log:
    log.write(lorakit.NAME + "\\n")
rows = [{"what": what, "off": 0.5, "times_base": lorakit.SECONDS, "seconds": {"p50": lorakit.SECONDS * factor},
         "tokens_per_second": {"p50": 1.0}, "commit": lorakit.NAME} for what, factor in lorakit.ROWS.items()]
(folder / "x.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""


@pytest.fixture(scope="module")
def trees() -> Any:
    load("benchmarks/runner.py")
    return load("benchmarks/compare_trees.py")


def make_tree(root: Path, seconds: float, rows: dict[str, int], script: str = SCRIPT) -> Path:
    """Return a checkout whose benchmark takes this long."""
    package = root / "src" / "lorakit"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"NAME, SECONDS, ROWS = {root.name!r}, {seconds}, {rows}\n")
    (root / "benchmarks").mkdir()
    (root / "benchmarks" / "bench_attach.py").write_text(script)
    return root


def run(trees: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> list[dict[str, Any]]:
    """Run the command, and return the rows that it wrote."""
    monkeypatch.setattr(sys.modules["runner"], "RESULTS", folder / "results")
    monkeypatch.setattr(sys, "argv", ["compare_trees.py", *words])
    trees.main()
    return [json.loads(line) for line in (folder / "results" / "trees.jsonl").read_text().splitlines()]


def test_trees_take_turns_and_each_row_has_its_ratio(
    trees: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = make_tree(tmp_path / "old", 2.0, {"load": 1, "gone": 1})
    new = make_tree(tmp_path / "new", 3.0, {"load": 1})
    log = tmp_path / "log"
    words = ("--before", str(old), "--after", str(new / "src"), "--rounds", "3", f"bench_attach.py {log}")
    (row,) = run(trees, monkeypatch, tmp_path, *words)
    assert log.read_text().split() == ["old", "new", "new", "old", "old", "new"]
    assert row["what"] == "load: seconds"
    assert row["ratio"] == {"n": 3, "best": 1.5, "p20": 1.5, "p50": 1.5, "p80": 1.5}
    assert (row["before"]["p50"], row["after"]["p50"]) == (2.0, 3.0)
    printed = capsys.readouterr().out
    assert "gone: seconds: measured only before" in printed
    assert "!        1.500  1.500 to 1.500" in printed
    assert "1 medians above 1.03" in printed
    assert not (old / "benchmarks" / "results").exists()


def test_a_benchmark_that_fails_says_which_tree_and_why(
    trees: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_tree(tmp_path / "old", 2.0, {"load": 1})
    new = make_tree(tmp_path / "new", 2.0, {"load": 1}, "import lorakit\nraise ValueError(lorakit.NAME)\n")
    words = ("--before", str(old), "--after", str(new), f"bench_attach.py {tmp_path / 'log'}")
    with pytest.raises(SystemExit, match=r"(?s)failed with .*new/src:.*ValueError: new"):
        run(trees, monkeypatch, tmp_path, *words)


def test_a_directory_without_lorakit_is_an_error(trees: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no lorakit found; give a checkout"):
        trees.tree_at(tmp_path, tmp_path / "copy")


def test_a_tree_gets_the_scripts_that_it_lacks(trees: Any, tmp_path: Path) -> None:
    tree = trees.tree_at(make_tree(tmp_path / "old", 2.0, {}), tmp_path / "copy")
    assert (tree.scripts / "bench_attach.py").read_text() == SCRIPT
    expected = (ROOT / "benchmarks" / "bench_layer_call.py").read_text()
    assert (tree.scripts / "bench_layer_call.py").read_text() == expected


def test_rows_are_told_apart_by_settings_and_not_by_what_was_measured(trees: Any) -> None:
    def rows(loss: float, *dropouts: float) -> list[dict[str, Any]]:
        facts = [{"what": "lorakit", "r": 16, "dropout": p, "last_loss": loss, "threads": loss} for p in dropouts]
        return [{**one, "seconds": {"p50": 1.0 + one["dropout"]}} for one in facts]

    assert trees.medians(rows(1.0, 0.0, 0.5)) == {"lorakit, 0.0: seconds": 1.0, "lorakit, 0.5: seconds": 1.5}
    assert trees.medians(rows(1.0, 0.5)) == trees.medians(rows(2.0, 0.5)) == {"lorakit: seconds": 1.5}
    with pytest.raises(SystemExit, match="two rows have the same settings: lorakit: seconds"):
        trees.medians(rows(1.0, 0.5, 0.5))


def test_the_short_commands_are_those_of_the_hot_paths_with_options_of_their_scripts(trees: Any) -> None:
    assert set(trees.QUICK) == {"layer_call", "step", "decode", "attach", "face", "startup"}
    for command in trees.QUICK.values():
        script, *words = shlex.split(command)
        text = (ROOT / "benchmarks" / script).read_text()
        assert all(f'"{word}"' in text for word in words if word.startswith("--")), command
