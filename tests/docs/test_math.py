"""docs/math.md and the code agree: numbers of formulas, cited symbols, cited tests, and every table.

A table of the page follows `<!-- table: NAME -->`; TABLES computes it again from the code. Values in a table of TOLERANT
may differ by the rounding of another machine; those of other tables must be equal.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.plan import Job, ModelShape, Plan, catalogue, count, estimate, rank_table
from lorakit.tables import format_bytes, format_percent

from ..loading import load

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "math.md"
CITATION = re.compile(r"\[docs/math\.md ((?:\(\d+\)(?:-|, )?)+)\]")
SECTION = re.compile(r"^### \((\d+)\) .*?(?=^#{2,3} |\Z)", re.MULTILINE | re.DOTALL)
TAUGHT: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["c_attn", "c_proj"]}


# --- numbers


def cited_numbers(text: str) -> set[int]:
    """Numbers that a text cites; "(20)-(27)" are all of them."""
    found: set[int] = set()
    for match in CITATION.finditer(text):
        for part in match[1].split(", "):
            ends = [int(number) for number in re.findall(r"\d+", part)]
            found.update(range(ends[0], ends[-1] + 1))
    return found


def sections() -> dict[int, str]:
    """Number -> text of a formula's section."""
    return {int(match[1]): match[0] for match in SECTION.finditer(PAGE.read_text(encoding="utf-8"))}


def test_code_and_page_have_the_same_numbers() -> None:
    in_code = {
        number
        for path in (ROOT / "src").rglob("*.py")
        for number in cited_numbers(" ".join(path.read_text(encoding="utf-8").split()))
    }
    numbers = re.findall(r"^### \((\d+)\)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(numbers) == len(set(numbers))
    assert set(sections()) == in_code


def test_each_formula_names_code_that_cites_it_and_a_test() -> None:
    for number, text in sections().items():
        symbols, tests = re.findall(r"`(lorakit\.[\w.]+)`", text), re.findall(r"`(tests/[\w/]+\.py::\w+)`", text)
        assert symbols, f"({number}) names no code"
        assert tests, f"({number}) names no test"
        citing = [symbol for symbol in symbols if number in cited_numbers(documentation(symbol))]
        assert citing, f"({number}): none of {symbols} cites it"


# --- symbols and tests that pages name


def pages() -> list[Path]:
    return [*sorted((ROOT / "docs").rglob("*.md")), *(p for p in sorted(ROOT.glob("*.md")) if p.name != "CHANGELOG.md")]


def find(symbol: str) -> tuple[ast.Module, ast.AST]:
    """The module's tree and the node that a dotted name stands for.

    Raises:
        LookupError: There is none.
    """
    words = symbol.split(".")
    for split in range(len(words), 0, -1):
        base = ROOT / "src" / Path(*words[:split])
        path = next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)
        if path is None:
            continue
        tree: Any = ast.parse(path.read_text(encoding="utf-8"))
        node = tree
        for word in words[split:]:
            node = next((child for child in node.body if word in names_of(child)), None)
            if node is None:
                break
        else:
            return tree, node
        if split + 1 == len(words) and hasattr(importlib.import_module(".".join(words[:split])), words[-1]):
            return tree, tree  # a name of the package's face
    raise LookupError(symbol)


def names_of(node: ast.AST) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def documentation(symbol: str) -> str:
    """Docstring of a function, class or module, on one line."""
    _, node = find(symbol)
    known = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    return " ".join((ast.get_docstring(node) or "").split()) if isinstance(node, known) else ""


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for symbol in sorted(set(re.findall(r"`(lorakit\.[a-z][\w.]*\w)(?:\([^`]*\))?`", text)) - {"lorakit.json"}):
        find(symbol)
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert any(name in names_of(node) for node in tree.body), f"{path}::{name}"
    for path in re.findall(r"`((?:src|tests|docs|examples|scripts|benchmarks)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


# --- tables


def shape_of(name: str) -> ModelShape:
    shape = catalogue.published(name)
    assert shape is not None
    return shape


def small() -> Plan:
    """SmolLM2-135M, r = 8 on all linear layers, 4 × 256 tokens in bf16."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    return estimate(shape_of("SmolLM2-135M"), config, Job(4, 256))


def by_rank() -> Iterator[list[str]]:
    ranks = (4, 8, 16, 32)
    found = rank_table(shape_of("gpt2"), LoraConfig(**TAUGHT), ranks)
    yield ["one site", "out × in", *(f"r = {rank}" for rank in ranks)]
    for row in found.rows:
        yield [", ".join(row.labels), f"{row.out_features} × {row.in_features}", *(f"{n:,}" for n in row.each)]
    yield ["all 36 sites", "", *(f"{total:,}" for total in found.totals)]
    yield ["of the base", "", *(format_percent(share) for share in found.shares)]


def by_site() -> Iterator[list[str]]:
    yield ["site", "r × (in + out)", "one", "in 12 blocks"]
    groups = count(shape_of("gpt2"), LoraConfig(**TAUGHT)).groups()
    for group in groups:
        formula = f"{group.rank} × ({group.in_features} + {group.out_features})"
        yield [f"`{group.label}`", formula, f"{group.each:,}", f"{group.trainable:,}"]
    yield ["all", "", f"{sum(g.each for g in groups):,}", f"{sum(g.trainable for g in groups):,}"]


def by_settings() -> Iterator[list[str]]:
    yield ["setting", "trained"]
    shape = shape_of("gpt2")
    changes: list[tuple[str, dict[str, Any]]] = [
        ("dropout 0.05, bias none (as taught)", {}),
        ("dropout 0", {"lora_dropout": 0.0}),
        ("dropout 0.5", {"lora_dropout": 0.5}),
        ("bias lora_only", {"bias": "lora_only"}),
        ("bias all", {"bias": "all"}),
        ("targets c_attn and attn.c_proj", {"target_modules": ["c_attn", "attn.c_proj"]}),
    ]
    for label, change in changes:
        yield [label, f"{count(shape, LoraConfig(**{**TAUGHT, **change})).trainable:,}"]


def on_disk() -> Iterator[list[str]]:
    yield ["file", "bytes", "MB (10⁶)", "MiB (2²⁰)"]
    for file in estimate(shape_of("gpt2"), LoraConfig(**TAUGHT)).files:
        size = file.size_bytes
        yield [file.what, f"{file.formula} = {size:,}", f"{size / 1e6:,.2f}", f"{size / 2**20:,.2f}"]


def memory_by_cause() -> Iterator[list[str]]:
    plan = small()
    yield ["cause", "formula for LoRA", "LoRA", "full fine-tuning"]
    for line in plan.lora.memory.lines:
        full = plan.full.memory.bytes_of(line.cause)
        yield [f"({line.equation}) {line.cause}", line.formula, format_bytes(line.size_bytes), format_bytes(full)]
    yield ["(27) peak", "", format_bytes(plan.lora.memory.peak_bytes), format_bytes(plan.full.memory.peak_bytes)]


def accelerated_memory() -> Iterator[list[str]]:
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    needs = estimate(shape_of("SmolLM2-135M"), config, Job(4, 256, accelerated=True)).lora.memory
    yield ["cause", "formula for LoRA, accelerated", "LoRA, accelerated"]
    for line in needs.lines:
        if line.equation in (29, 35):
            yield [f"({line.equation}) {line.cause}", line.formula, format_bytes(line.size_bytes)]
    yield ["(27) peak", "", format_bytes(needs.peak_bytes)]


def flops_by_pass() -> Iterator[list[str]]:
    plan = small()
    yield ["MFLOPs a token", "LoRA", "full fine-tuning", "ratio"]
    for label in ("forward", "backward", "total"):
        lora, full = getattr(plan.lora.flops, label), getattr(plan.full.flops, label)
        yield [label, f"{lora / 1e6:.1f}", f"{full / 1e6:.1f}", f"{lora / full:.2f}"]


def alpha_and_rate() -> Iterator[list[str]]:
    for line in load("examples/alpha_and_learning_rate.py").table().splitlines():
        if not line.startswith("|---"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def survival() -> Iterator[list[str]]:
    """Yield the fraction of a merged delta that each dtype retains, by the size of the delta relative to the weight."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    yield ["‖ΔW‖ / ‖W‖", *(str(dtype).removeprefix("torch.") for dtype in dtypes)]
    for relative in (1e-1, 1e-2, 1e-3, 1e-4):
        shares = [core.merge(model_with_delta(relative, dtype)).retained for dtype in dtypes]
        yield [f"{relative:g}", *(f"{share:.0%}" for share in shares)]


def model_with_delta(relative: float, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    with torch.no_grad():
        model[0].weight.normal_(0, 0.02)
    model.to(dtype)
    core.attach(model, LoraConfig(r=8, lora_alpha=8, target_modules=["0"], init_lora_weights=False), seed=0)
    factor, W = core.sites(model)[0].layer.factor("default"), core.sites(model)[0].layer.read()
    with torch.no_grad():
        factor.B.mul_(relative * W.norm() / (factor.B @ factor.A).norm())
    return model


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {
    "by rank": by_rank,
    "by site": by_site,
    "by settings": by_settings,
    "on disk": on_disk,
    "memory": memory_by_cause,
    "accelerated memory": accelerated_memory,
    "flops": flops_by_pass,
    "alpha": alpha_and_rate,
    "survival": survival,
}
TOLERANT = {"alpha", "survival"}


def written(rows: Iterator[list[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def on_the_page() -> dict[str, str]:
    found = re.findall(r"<!-- table: ([\w ]+) -->\n+((?:\|.*\n)+)", PAGE.read_text(encoding="utf-8"))
    return {name: table.strip() for name, table in found}


def test_every_table_is_one_of_these() -> None:
    assert set(on_the_page()) == set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_what_the_code_gives(name: str) -> None:
    made, page = written(TABLES[name]()), on_the_page()[name]
    if name in TOLERANT:
        number = re.compile(r"\d+(?:\.\d+)?(?=%|\b)")
        assert number.sub("#", made) == number.sub("#", page), made
        values = [[float(n) for n in number.findall(text)] for text in (made, page)]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1.0 if name == "survival" else 1e-5), made
    else:
        assert page == made, f"in docs/math.md the table {name!r} should be:\n{made}"


if __name__ == "__main__":
    for name, rows in TABLES.items():
        print(f"<!-- table: {name} -->\n{written(rows())}\n")
