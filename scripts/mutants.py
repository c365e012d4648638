#!/usr/bin/env python3
"""Measure what the sample of `make test` detects of the faults that all its cases detect, on seeded mutants.

pip install cosmic-ray pytest-cov                # after `make setup`
python scripts/mutants.py list                   # draw mutants into benchmarks/mutants.jsonl (--number, --seed)
python scripts/mutants.py cover --work DIR       # run the sample and one case of each other function; keep their lines
python scripts/mutants.py run --work DIR         # test each mutant that has no result yet
python scripts/mutants.py table                  # a Markdown table, and the mutants that only the whole suite detects

Each mutant is tested with the sampled cases that execute its line, and if none fails, with all other cases of the
functions that do. A mutant that no case executes gets the cases of the test file that mirrors its module. One that
does not end is detected.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "benchmarks" / "mutants.jsonl"
PACKAGES = ("core", "ops", "speed", "train/loop", "data", "peft")
QUICK = "not gpu and not net and not clients and not slow"
SAMPLE_SEED = 20261202
STARTING_SECONDS = 120
SECONDS = 1.0  # of a case that `cover` did not run
INTERNAL_ERROR, NO_CASES = 3, 5  # exit codes of pytest
VARIABLES = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRITON_INTERPRET": "1"}
CONTEXT = multiprocessing.get_context("forkserver")
"""Processes in which what the tests import is already imported, but lorakit is not."""
IMPORTED = [
    "torch",
    "torch.distributed",
    "transformers.modeling_utils",
    "transformers.trainer",
    "peft",
    "hypothesis",
    "pytest",
]


def mutated(text: str, operator: str, occurrence: int) -> str | None:
    """Return a file's text with one operator applied once."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    return mutate_code(text, get_operator(operator)(), occurrence)


def _behaviour(text: str) -> str | None:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
    return ast.dump(tree)


def draw(number: int, seed: int) -> list[dict[str, Any]]:
    """Return mutants that change what their file does: those of annotations and docstrings do not.

    Places are drawn first and tried in that order, since making every mutant of the tree takes an hour.
    """
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    operators = {name: get_operator(name)() for name in sorted(operator_names()) if not get_operator(name).arguments()}
    places = []
    for package in PACKAGES:
        for path in sorted((ROOT / "src/lorakit" / package).rglob("*.py")):
            nodes = list(ast_nodes(get_ast(path.read_text("utf-8"))))
            for name, operator in operators.items():
                lines = [start[0] for node in nodes for start, _ in operator.mutation_positions(node)]
                places += [(path, name, occurrence, line) for occurrence, line in enumerate(lines)]
    rows: list[dict[str, Any]] = []
    for path, name, occurrence, line in random.Random(seed).sample(places, len(places)):
        text = path.read_text("utf-8")
        mutant = mutated(text, name, occurrence)
        if mutant is None or _behaviour(mutant) in {None, _behaviour(text)}:
            continue
        change = list(difflib.unified_diff(text.splitlines(), mutant.splitlines(), n=0, lineterm=""))[3:]
        place = {"file": path.relative_to(ROOT).as_posix(), "line": line, "operator": name, "occurrence": occurrence}
        rows.append({"seed": seed, **place, "change": change})
        if len(rows) == number:
            break
    return rows


def pytest_runtest_logreport(report: Any) -> None:
    """Keep the seconds and the outcome of each phase of each case, where this file is a plugin of pytest."""
    if reports := os.environ.get("MUTANTS_REPORTS"):
        with Path(reports).open("a") as file:
            file.write(json.dumps([report.nodeid, report.duration, report.outcome]) + "\n")


def read_lines(file: Path) -> list[Any]:
    """Return the values of a file that has one JSON value in each line."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def pytest(*arguments: str, **environment: str) -> list[str]:
    """Return a command that runs pytest with this file as a plugin, with variables of its environment in front."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("src", "", "scripts"))
    variables = {**VARIABLES, "PYTHONPATH": paths, **environment}
    settings = [f"{name}={value}" for name, value in variables.items()]
    return ["env", *settings, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def function_of(case: str) -> str:
    """Return the id of the test function of a case."""
    return case.partition("[")[0]


def covering() -> list[str]:
    """Return the sampled cases and the first case of each function that has none in the sample."""
    sample = collected("--cases", "sample", "--cases-seed", str(SAMPLE_SEED))
    functions = {function_of(case) for case in sample}
    others = {function_of(case): case for case in reversed(collected())}
    return sample + [case for function, case in others.items() if function not in functions]


def cover(work: Path) -> None:
    """Run the cases of `covering`, and keep which lines each executes and how long it takes."""
    seconds = work / "seconds.jsonl"
    seconds.unlink(missing_ok=True)
    settings = work / "coveragerc"
    settings.write_text(f"[run]\ndata_file = {work / 'coverage'}\nsource = lorakit\n")
    options = ["--cov=lorakit", f"--cov-config={settings}", "--cov-context=test", "--cov-report="]
    (work / "cases").write_text("\n".join(covering()))
    run = ["-p", "mutants", "-n", "2", "--dist", "worksteal", *options, f"@{work / 'cases'}"]
    subprocess.run(pytest(*run, MUTANTS_REPORTS=str(seconds)), cwd=ROOT, check=False)


def executing(work: Path, file: str) -> dict[int, set[str]]:
    """Return the cases that execute each line of a file."""
    from coverage import CoverageData

    data = CoverageData(str(work / "coverage"))
    data.read()
    contexts = data.contexts_by_lineno(str(ROOT / file))
    return {line: {name.rpartition("|")[0] for name in names if "|" in name} for line, names in contexts.items()}


def collected(*arguments: str) -> list[str]:
    """Return the ids of the cases that pytest selects."""
    command = pytest("--collect-only", "-m", QUICK, *arguments)
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [line for line in text.splitlines() if "::" in line]


def write_mutant(row: Mapping[str, Any], folder: Path) -> None:
    """Copy the source tree to a directory, and mutate one of its files."""
    shutil.rmtree(folder / "src", ignore_errors=True)
    shutil.copytree(ROOT / "src", folder / "src")
    target = folder / row["file"]
    target.write_text(mutated(target.read_text("utf-8"), row["operator"], row["occurrence"]) or "", "utf-8")


def run_cases(cases: Sequence[str], folder: Path) -> None:
    """Run cases on the source tree in a directory, until one fails, and keep their outcomes in a file there."""
    import pytest

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.chdir(ROOT)
    paths = f"{folder / 'src'}{os.pathsep}{ROOT}"
    os.environ |= {"PYTHONPATH": paths, "HOME": str(folder), "MUTANTS_REPORTS": str(folder / "reports.jsonl")}
    sys.path[:0] = [str(folder / "src"), str(ROOT)]
    with (folder / "output").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    (folder / "cases").write_text("\n".join(cases))
    arguments = [
        "-q",
        "-x",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "--tb=no",
        "-W",
        "ignore:Module already",
        f"@{folder / 'cases'}",
    ]
    os._exit(pytest.main(arguments, plugins=[sys.modules[__name__]]))


def detecting(cases: Sequence[str], folder: Path, limit: float) -> str | None:
    """Return the case that fails first on the source tree in a directory, "does not end" or None.

    Raises:
        RuntimeError: If pytest itself failed or ran nothing, which says nothing of the mutant.
    """
    if not cases:
        return None
    (folder / "reports.jsonl").write_text("")
    process = CONTEXT.Process(target=run_cases, args=(cases, folder))
    process.start()
    process.join(limit)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    if process.exitcode is None:
        return "does not end"
    if process.exitcode == 0:
        return None
    failed = [name for name, _, outcome in read_lines(folder / "reports.jsonl") if outcome == "failed"]
    if not failed and process.exitcode in {INTERNAL_ERROR, NO_CASES}:
        raise RuntimeError(f"pytest ended with {process.exitcode}: read {folder / 'output'}")
    return failed[0] if failed else f"pytest ended with {process.exitcode}"


def passing(work: Path) -> dict[str, float]:
    """Return the seconds of each case that `cover` ran without a failure."""
    seconds, broken = defaultdict[str, float](float), set[str]()
    for name, duration, outcome in read_lines(work / "seconds.jsonl"):
        seconds[name] += duration
        if outcome == "failed":
            broken.add(name)
    return {name: value for name, value in seconds.items() if name not in broken}


def test(work: Path, workers: int) -> None:
    """Test each mutant of the list that has no result, and add the results to the list."""
    rows, seconds = read_lines(LIST), passing(work)
    cases_of = defaultdict[str, list[str]](list)
    for case in collected():
        cases_of[function_of(case)].append(case)
    os.environ |= VARIABLES
    CONTEXT.set_forkserver_preload(IMPORTED)
    sample = set(collected("--cases", "sample", "--cases-seed", str(SAMPLE_SEED)))
    folders = SimpleQueue[Path]()
    for number in range(workers):
        (work / f"worker{number}").mkdir(exist_ok=True)
        folders.put(work / f"worker{number}")

    def finish(row: dict[str, Any]) -> None:
        cases = executing(work, row["file"]).get(row["line"], set()) & seconds.keys()
        cases = cases or mirrored(row["file"], seconds)
        order = sorted(cases, key=lambda name: (mirror(row["file"]) not in name, seconds[name], name))
        folder = folders.get()
        try:
            write_mutant(row, folder)
            others = [name for function in dict.fromkeys(map(function_of, order)) for name in cases_of[function]]
            for key, chosen in {
                "sample": [name for name in order if name in sample],
                "all": [name for name in others if name not in sample],
            }.items():
                limit = STARTING_SECONDS + 5 * sum(seconds.get(name, SECONDS) for name in chosen)
                row[key] = detecting(chosen, folder, limit)
                row[f"{key} cases"] = len(chosen)
                if row[key] is not None:
                    row.setdefault("all", row[key])
                    break
        finally:
            folders.put(folder)
        LIST.write_text("".join(json.dumps(each) + "\n" for each in rows))

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(finish, [row for row in rows if "all" not in row]))


def mirror(file: str) -> str:
    """Return the test file that mirrors a module, without its folders."""
    return f"test_{Path(file).stem}.py"


def mirrored(file: str, cases: Mapping[str, float]) -> set[str]:
    """Return the cases in the test file that mirrors a module, or else in its folder."""
    folder = f"tests/{Path(file).parent.relative_to('src/lorakit').as_posix()}/"
    return {name for name in cases if mirror(file) in name} or {name for name in cases if name.startswith(folder)}


def table() -> str:
    """Return what was detected of the mutants that were tested, by package, and the list of what the sample loses."""
    rows = [row for row in read_lines(LIST) if "all" in row]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        package = next(name for name in PACKAGES if row["file"].startswith(f"src/lorakit/{name}/"))
        for name in (package, "**all**"):
            counts[name].update({"mutants": 1, "all": row["all"] is not None, "sample": row.get("sample") is not None})
    lines = ["| package | mutants | detected by all cases | by the sample | share |", "|---|---|---|---|---|"]
    for name, count in counts.items():
        share = count["sample"] / count["all"] if count["all"] else 1.0
        lines.append(f"| {name} | {count['mutants']} | {count['all']} | {count['sample']} | {share:.1%} |")
    lost = [row for row in rows if row["all"] and not row.get("sample")]
    return "\n".join(lines + [f"- {row['file']}:{row['line']} {row['change']}: {row['all']}" for row in lost])


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["list", "cover", "run", "table"])
    parser.add_argument("--number", type=int, default=400)
    parser.add_argument("--seed", type=int, default=36)
    parser.add_argument("--work", type=Path, help="directory for the lines and seconds of the cases, and for sources")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.part == "list":
        rows = draw(arguments.number, arguments.seed)
        LIST.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif arguments.part == "table":
        print(table())
    elif arguments.work is None:
        parser.error("cover and run need --work DIR")
    elif arguments.part == "cover":
        arguments.work.mkdir(parents=True, exist_ok=True)
        cover(arguments.work)
    else:
        test(arguments.work, arguments.workers)


if __name__ == "__main__":
    main()
