"""ARCHITECTURE.md lists the actual packages, layers, sole importers and core files."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import grimp

from ..architecture.contracts import importers, layers

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def test_every_package_is_in_its_layer() -> None:
    on_page = {
        part: int(floor.replace("−", "-"))
        for floor, cell in re.findall(r"^\| (−?\d+) \| ([^|]+) \|", PAGE, re.MULTILINE)
        for part in re.findall(r"`(\w+)(?:\.py|/)`", cell)
    }
    reserved = {part: int(n) for part, n in re.findall(r"`(\w+)(?:\.py|/)` \((\d+)\)", PAGE)}
    assert {**on_page, **reserved} == {p: n for p, n in layers().items() if not p.startswith("__")}
    package = ROOT / "src" / "lorakit"
    assert set(on_page) == {
        path.stem if path.suffix else path.name
        for path in package.iterdir()
        if not path.name.startswith("__") and (path.suffix == ".py" or any(path.glob("*.py")))
    }


def test_importers_of_packages_are_those_of_the_contracts() -> None:
    table = re.findall(r"^\| ([a-z][\w, ]+) \| (`[^|]+`) \|$", PAGE, re.MULTILINE)
    on_page = {
        package: [
            "lorakit." + path.removesuffix(".py").strip("/").replace("/", ".")
            for path in re.findall(r"`([\w./]+)`", cell)
        ]
        for packages, cell in table
        for package in packages.split(", ")
    }
    assert on_page == importers()


def test_arrows_of_the_packages_are_imports() -> None:
    diagram = re.sub(r"\[([^\]]*)\]", "", PAGE.split("```mermaid\n")[1].split("```")[0])
    basis = re.findall(r"(\w+)(?:\.py|/)", PAGE.split("basis[")[1].split("]")[0])
    arrows = re.findall(r"^ +(.+) --> (.+)$", diagram, re.MULTILINE)
    graph = grimp.build_graph("lorakit", cache_dir=None)
    assert len(arrows) > 8
    for importing, imported in arrows:
        for importer, other in itertools.product(re.findall(r"\w+", importing), re.findall(r"\w+", imported)):
            targets = {f"lorakit.{name}" for name in (basis if other == "basis" else [other])}
            sources = {f"lorakit.{importer}", *graph.find_descendants(f"lorakit.{importer}")}
            targets |= {inner for one in targets for inner in graph.find_descendants(one)}
            found = any(graph.find_modules_directly_imported_by(one) & targets for one in sources)
            assert found, f"{importer} does not import {other}"


def test_every_folder_of_the_core_is_named() -> None:
    core = ROOT / "src/lorakit/core"
    modules = {path.stem for path in core.glob("*.py") if path.name != "__init__.py"}
    folders = {path.name for path in core.iterdir() if path.is_dir() and path.name != "__pycache__"}
    section = PAGE.split("| folder of `core/`")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)/`", section)) - {"core"} == folders
    assert set(re.findall(r"`(\w+)\.py`", section)) == modules
    named = set(re.findall(r"`(\w+)`", section))
    assert named <= {path.stem for path in core.rglob("*.py")}


def test_rows_are_those_of_the_tables() -> None:
    from lorakit.core import inits, kinds, quantization, variants

    for table in (kinds.KINDS, quantization.WEIGHT_FORMATS, inits.INITS, variants.VARIANTS):
        for row in table:  # type: ignore[attr-defined]
            assert str(row.name) in PAGE


def test_page_is_short() -> None:
    assert PAGE.count("\n") <= 150
    assert (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").count("\n") <= 130  # one screen for each of six tasks
