"""Run benchmarks alternately against two source trees, and print how much longer each row takes in the second.

    python benchmarks/compare_trees.py --before PATH --after PATH [--rounds 5] [step 'bench_attach.py --sites 70']

A tree is a checkout, or its `src` directory. A benchmark is a name from `QUICK`, which has short settings, or a quoted
command without the interpreter; the default is all names. Each round runs a benchmark once with each tree, in a new
process, and the next round starts with the other tree. A process imports lorakit from its tree (this is checked) and
runs the tree's own scripts, because they may import names that the other tree does not have; a script that a tree lacks
comes from this checkout. The scripts are copied to a temporary directory, so no results file of a tree changes.

Rows of both trees are matched by their settings. For each value of a row, every round gives one ratio, p50 after / p50
before; printed are the median ratio, p20 and p80, and the median of each tree. Speeds ("per_second") are omitted,
because their seconds are in the same row. A "!" marks medians above --limit. The ratios are appended to
results/trees.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner import append_row, commit_of, summary

QUICK: dict[str, str] = {
    "layer_call": "bench_layer_call.py --rounds 7 --calls 50",
    "step": "bench_step.py --layers 6 --steps 4 --dropout 0.05 --allocators tuned --sides lorakit",
    "decode": "bench_decode.py --layers 6 --adapters 8 --rounds 2 "
    "--sides 'base alone' lorakit 'lorakit, nothing kept' 'lorakit, one adapter'",
    "attach": "bench_attach.py --repeats 5",
    "face": "bench_face.py --repeats 3",
    "startup": "bench_startup.py",
}
"""Name -> command with short settings, without the interpreter."""

HERE = Path(__file__).resolve().parent
CIRCUMSTANCES = frozenset({"time", "commit", "machine", "versions", "environment", "threads"})
MEASURED = ("times_", "of_peft", "memory_of_", "faster_than_", "last_loss", "survived", "exact")
"""Prefixes of facts that are measured, and so do not identify a row."""


@dataclass(frozen=True)
class Tree:
    """One source tree and a copy of its scripts.

    Attributes:
        source: The directory that contains the package `lorakit`.
        scripts: The copy, with a separate results directory.
    """

    source: Path
    scripts: Path

    @property
    def results(self) -> Path:
        """Return where the copied scripts write their rows."""
        return self.scripts / "results"

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that imports lorakit from this tree."""
        rest = os.environ.get("PYTHONPATH")
        return {**os.environ, "PYTHONPATH": os.pathsep.join([str(self.source), *([rest] if rest else [])])}


def tree_at(path: Path, scripts: Path) -> Tree:
    """Copy the scripts of a tree, and check that its lorakit is the one that a process imports.

    Args:
        path: A checkout, or its `src` directory.
        scripts: The directory to make for the copy.
    """
    path = path.resolve()
    source = path if (path / "lorakit").is_dir() else path / "src"
    if not (source / "lorakit" / "__init__.py").is_file():
        raise SystemExit(f"{path}: no lorakit found; give a checkout of lorakit or its src directory")
    scripts.mkdir(parents=True)
    own = source.parent / "benchmarks"
    for folder in (HERE, own):  # the tree's own scripts replace those of this checkout
        for file in sorted(folder.glob("*.py")):
            shutil.copy(file, scripts)
    tree = Tree(source, scripts)
    command = [sys.executable, "-c", "import lorakit; print(lorakit.__file__)"]
    found = subprocess.run(command, env=tree.environment(), cwd=scripts, capture_output=True, text=True, check=True)
    if Path(found.stdout.strip()).resolve().parent != (source / "lorakit").resolve():
        raise SystemExit(f"{source}: Python imports {found.stdout.strip()} instead; is PYTHONPATH ignored?")
    return tree


def rows_of(tree: Tree, command: str) -> list[dict[str, Any]]:
    """Run a benchmark in a process with this tree, and return the rows that it appends."""
    script, *words = shlex.split(command)
    shutil.rmtree(tree.results, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, str(tree.scripts / script), *words],
        cwd=tree.scripts, env=tree.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{command} failed with {tree.source}:\n{done.stdout[-1000:]}{done.stderr[-4000:]}")
    files = sorted(tree.results.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the p50 of every value of some rows by "settings: quantity"; the settings are those that differ.

    Args:
        rows: As `append_row` writes them.
    """
    settings = [
        {name: value for name, value in row.items() if not is_summary(value) and identifies(name)} for row in rows
    ]
    varying = [
        name for name in dict.fromkeys(n for one in settings for n in one)
        if name == "what" or len({json.dumps(one.get(name)) for one in settings}) > 1
    ]  # fmt: skip
    found: dict[str, float] = {}
    for row, one in zip(rows, settings, strict=True):
        label = ", ".join(str(one[name]) for name in varying if name in one)
        for quantity, value in row.items():
            if is_summary(value) and not quantity.endswith("per_second"):
                name = f"{label}: {quantity}" if label else quantity
                if name in found:
                    raise SystemExit(f"two rows have the same settings: {name}")
                found[name] = value["p50"]
    return found


def is_summary(value: object) -> bool:
    """Return whether a value of a row is what `summary` makes of samples."""
    return isinstance(value, Mapping) and "p50" in value


def identifies(name: str) -> bool:
    """Return whether a fact of a row is a setting."""
    return name not in CIRCUMSTANCES and not name.startswith(MEASURED)


def in_turn(before: Tree, after: Tree, command: str, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Run a benchmark alternately with two trees.

    Args:
        before: The first tree.
        after: The second tree.
        command: The benchmark.
        rounds: Runs with each tree.

    Returns:
        Row and quantity -> medians before and after, one per round; a row that a tree lacks is printed and omitted.
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    for number in range(rounds):
        order = (before, after) if number % 2 == 0 else (after, before)
        read = {tree: medians(rows_of(tree, command)) for tree in order}
        for name in dict.fromkeys((*read[before], *read[after])):
            if name in read[before] and name in read[after]:
                for samples, tree in zip(found.setdefault(name, ([], [])), (before, after), strict=True):
                    samples.append(read[tree][name])
            elif number == 0:
                print(f"{name}: measured only {'before' if name in read[before] else 'after'}")
    if not found:
        raise SystemExit(f"{command}: the trees have no row in common")
    return found


def report(
    command: str, found: dict[str, tuple[list[float], list[float]]], commits: dict[str, str], limit: float
) -> int:
    """Print a line for each row and quantity, append it to the results, and return how many exceed the limit."""
    print(f"\n{command}\n{'after / before':>14}  {'p20 to p80':14}  {'before':>10} {'after':>10}", flush=True)
    over = 0
    for name, (first, second) in found.items():
        ratios = [b / a for a, b in zip(first, second, strict=True) if a > 0]
        if not ratios:
            print(f"{'':14}  {'':14}  {name}: 0 before, no ratio")
            continue
        r, a, b = summary(ratios), summary(first)["p50"], summary(second)["p50"]
        exceeds = r["p50"] > limit
        over += exceeds
        spread = f"{r['p20']:.3f} to {r['p80']:.3f}"
        print(f"{'!' if exceeds else ' '} {r['p50']:12.3f}  {spread:14}  {a:10.4g} {b:10.4g}  {name}", flush=True)
        facts = {"what": name, "benchmark": command, **commits}
        append_row("trees", facts, {"ratio": ratios, "before": first, "after": second}, quiet=True)
    return over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="*", default=list(QUICK), help=f"{', '.join(QUICK)}, or commands")
    parser.add_argument("--before", type=Path, required=True, help="a checkout or its src directory")
    parser.add_argument("--after", type=Path, required=True, help="the tree to compare with it")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each benchmark with each tree (default: 5)")
    parser.add_argument("--limit", type=float, default=1.03, help="mark median ratios above it (default: 1.03)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    commands = [QUICK.get(one, one) for one in options.benchmarks]
    for command in commands:
        if not (HERE / shlex.split(command)[0]).is_file():
            parser.error(
                f"{command}: not in {HERE}; choose from {', '.join(QUICK)}, or give a script of that directory"
            )
    with tempfile.TemporaryDirectory() as folder:
        before = tree_at(options.before, Path(folder, "before", "benchmarks"))
        after = tree_at(options.after, Path(folder, "after", "benchmarks"))
        commits = {"before_commit": commit_of(before.source), "after_commit": commit_of(after.source)}
        over = 0
        for command in commands:
            over += report(command, in_turn(before, after, command, options.rounds), commits, options.limit)
    print(f"\n{over} medians above {options.limit:g}")


if __name__ == "__main__":
    main()
