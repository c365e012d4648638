#!/usr/bin/env python3
"""Write the tables of docs/int8.md from the rows of benchmarks/bench_int8_parity.py.

    python scripts/int8_parity_tables.py [--check]

Each cell is from the newest row with the most evaluated tokens. A cell without a row is "not measured".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from generated_table import begin, write

ROOT = Path(__file__).resolve().parent.parent
ROWS, PAGE, BEGIN = ROOT / "benchmarks/results/int8_parity.jsonl", ROOT / "docs/int8.md", begin(__file__)
BEFORE, AFTER, MERGED = "before training", "after training", "merged in fp32"
NONE = "not measured"

Row = dict[str, Any]


def main() -> int:
    """Write the tables or check them; return the exit status."""
    return write(PAGE, BEGIN, lambda: tables(read_rows()))


def read_rows() -> list[Row]:
    """Return the rows of the benchmark, oldest first."""
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []


def tables(rows: Sequence[Row]) -> str:
    """Return all tables, as Markdown."""
    return "\n".join((*before(rows), "", *after(rows), "", *worst(rows)))


def newest(rows: Iterable[Row], what: str, *keys: str) -> dict[tuple[Any, ...], Row]:
    """Return the newest row with the most tokens for each combination of values."""
    found = dict[tuple[Any, ...], Row]()
    for row in rows:
        if row["what"] == what:
            key = tuple(row[name] for name in keys)
            found[key] = row if row["tokens"] >= found.get(key, row)["tokens"] else found[key]
    return found


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def delta(part: Row) -> str:
    """Return a difference with its standard error and 95% interval."""
    low, high = part["interval"]
    return f"{part['difference']:+.4f} ± {part['standard_error']:.4f} ({low:+.4f} to {high:+.4f})"


def before(rows: Sequence[Row]) -> list[str]:
    """Return the table of all schemes before training."""
    lines = [
        (
            task,
            scheme,
            f"{row['tokens']:,}",
            "0" if scheme == "bf16" else delta(row),
            f"{row['cosine_sites']['median']:.4f}" if "cosine_sites" in row else NONE,
            *(f"{row['cosine'][name]:.4f}" for name in ("median", "p05")),
            f"{min(row['cosine']['worst'].values()):.3f}",
            by_batch(row["cosine"].get("batches", ())),
        )
        for (task, scheme), row in newest(rows, BEFORE, "task", "scheme").items()
    ]
    cosines = "cosine, median module", "median tensor", "5% quantile", "worst", "median tensor by batch"
    head = ("task", "scheme", "tokens", "ΔNLL ± SE (95% interval)", *cosines)
    return ["**Before training**", "", *table(head, lines)]


def by_batch(medians: Sequence[float]) -> str:
    """Return the range of the batches' median cosines; the first measurements have a single batch."""
    return f"{min(medians):.4f} to {max(medians):.4f} ({len(medians)})" if medians else "(1)"


def after(rows: Sequence[Row]) -> list[str]:
    """Return the table of runs after training, and the mean over the seeds of a task and scheme."""
    merged = newest(rows, MERGED, "task", "scheme", "seed", "steps")
    lines, groups = list[Sequence[str]](), dict[tuple[str, str, int], list[Row]]()
    runs = newest(rows, AFTER, "task", "scheme", "seed", "steps")
    for key in sorted(runs):
        task, scheme, seed, steps = key
        row = runs[key] | ({"fp32": merged[key]} if key in merged else {})
        groups.setdefault((task, scheme, steps), []).append(row)
        cells = (delta(row[part]) if part in row else NONE for part in PARTS)
        lines.append((task, scheme, str(seed), f"{row['after']['loss_bf16']:.4f}", *cells))
    for (task, scheme, _), members in groups.items():
        if len(members) == 1:
            continue
        lines.append((task, scheme, f"mean of {len(members)}", "", *(mean(members, part) for part in PARTS)))
    head = (
        "task",
        "scheme",
        "seed",
        "bf16 loss",
        "ΔNLL before training",
        "after training",
        "on the bf16 base",
        "merged, bf16",
        "merged, fp32",
    )
    return ["**After training**", "", *table(head, lines)]


PARTS = ("before", "after", "on_bf16", "merged", "fp32")


def mean(members: Sequence[Row], part: str) -> str:
    """Return the mean difference of several seeds, and its range."""
    found = [row[part]["difference"] for row in members if part in row]
    if not found:
        return NONE
    return f"{sum(found) / len(found):+.4f} ({min(found):+.4f} to {max(found):+.4f})"


def worst(rows: Sequence[Row]) -> list[str]:
    """Return the tensors with the smallest cosines in bf16 and in the default scheme, and the largest outliers."""
    lines, sites = list[Sequence[str]](), list[str]()
    for (task, scheme), row in newest(rows, BEFORE, "task", "scheme").items():
        if scheme in ("bf16", "smooth+split"):
            cells = (f"{short(path)} {value:.3f}" for path, value in row["cosine"]["worst"].items())
            lines.append((task, scheme, ", ".join(cells)))
            sites = [f"{path.removeprefix('model.')} {value:,.0f}" for path, value in row["outliers"].items()]
    text = f"Largest outliers (largest input / that of the median channel): {', '.join(sites) or NONE}."
    return ["**Smallest cosines**", "", *table(("task", "scheme", "tensor and cosine"), lines), "", text]


def short(path: str) -> str:
    """Return the path of a tensor without the parts that all have."""
    return path.removeprefix("model.").removesuffix(".default.weight")


if __name__ == "__main__":
    sys.exit(main())
