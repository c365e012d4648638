"""Every path and name of `peft` that installed libraries built on PEFT import resolves under `lorakit.peft`."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit.peft.installing import BIND_AT_IMPORT

PROGRAMS = ("transformers", "trl", "accelerate", "diffusers", "sentence_transformers")
Body = list[ast.stmt]


def sources(program: str) -> Iterator[tuple[Path, ast.Module]]:
    """Each file of an installed program that speaks of peft, parsed."""
    spec = importlib.util.find_spec(program)
    if spec is None or spec.origin is None:
        pytest.skip(f"{program} is not installed")
    root = Path(spec.origin).parent
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if "peft" in text:
            yield path.relative_to(root.parent), ast.parse(text)


def imported(tree: ast.AST) -> set[tuple[str, str]]:
    """Return (module, name) of every import from peft, at any level; also ("peft", "x") if `peft.x` is read."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").partition(".")[0] == "peft":
            found |= {(node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name.partition(".")[0] == "peft"}
    if ("peft", "") in found:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "peft":
                found.add(("peft", node.attr))
    return found


@pytest.mark.costly
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_import_resolves(program: str) -> None:
    wanted = sorted(set().union(*(imported(tree) for _, tree in sources(program))))
    missing = []
    for module, name in wanted:
        try:
            home = importlib.import_module("lorakit." + module)
        except ModuleNotFoundError:
            missing.append(module)
            continue
        if name and not hasattr(home, name):
            missing.append(f"{module}.{name}")
    assert wanted, f"{program} imports nothing from peft: this test reads it wrongly"
    assert not missing


def looks_at_import(body: Body) -> bool:
    """Return whether a module checks for peft while it is imported."""
    for node in body:
        if (
            isinstance(node, ast.If)
            and "peft" in ast.unparse(node.test)
            and "TYPE_CHECKING" not in ast.unparse(node.test)
        ):
            return True
        if isinstance(node, (ast.ImportFrom, ast.Import)) and any(
            module.startswith("peft") for module, _ in imported(node)
        ):
            return True
        if any(
            looks_at_import(getattr(node, part, []))
            for part in ("body", "orelse")
            if isinstance(node, (ast.If, ast.Try))
        ):
            return True
    return False


@pytest.mark.parametrize("program", PROGRAMS)
def test_install_as_peft_knows_who_looks_for_peft_at_import(program: str) -> None:
    asking = [path for path, tree in sources(program) if looks_at_import(tree.body)]
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in asking]
    unknown = [
        name for name in modules if not any(name == known or name.startswith(known + ".") for known in BIND_AT_IMPORT)
    ]
    assert not unknown
