"""Write the table of architectures in docs/accelerate.md: what `lorakit.accelerate` replaces in each.

    python scripts/acceleration_table.py [--check]

The rows come from the small models of tests/speed/architectures.py, with the installed transformers release.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import generated_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "accelerate.md"
BEGIN = generated_table.begin(__file__)
LINEAR = "adapted linear"
SHOWN = ("decoder layer", "encoder layer", "sublayer", "attention", "feed-forward", "norm")
"""Fused forwards in the table, in their order there."""

SMALL = (LINEAR, "norm", "dropout", "loss without logits")
"""Other fused forwards. A model may have them although its layers keep their own forwards."""

HEAD = "| architecture | fused | linear only | own forward, with reason |\n| --- | --- | --- | --- |\n"


class Row(NamedTuple):
    """One row of the table, without the names of architectures.

    Attributes:
        fused: The fused forwards, with the classes of the modules that run them.
        linear: Classes that keep their own forward, but whose linear modules are fused.
        own: Classes that keep their own forward, with the reason.
    """

    fused: str
    linear: str
    own: str


def main() -> int:
    """Write the table, or compare it with the page; return the exit status."""
    return generated_table.write(PAGE, BEGIN, table)


def table() -> str:
    """Return the table, and the names of the architectures without a small model."""
    sys.path.insert(0, str(ROOT))
    import transformers
    from tests.speed.architectures import NotBuilt, architectures, small_settings
    from tests.speed.sweep import subject

    rows: dict[Row, list[str]] = {}
    missing = []
    for architecture in architectures():
        try:
            model = subject(architecture, small_settings(*architecture)).model
        except NotBuilt:
            missing.append(architecture.name)
            continue
        rows.setdefault(row_of(model, prefix_of(architecture.name)), []).append(architecture.name)
    lines = [f"| {grouped(names)} | {' | '.join(row)} |\n" for row, names in ordered(rows.items())]
    built = sum(map(len, rows.values()))
    return (
        f"transformers {transformers.__version__}: {built} classes. Class names are without the name of the model.\n\n"
        f"{HEAD}{''.join(lines)}\nNot covered, because no small model of it could be built: {', '.join(missing)}.\n"
    )


def ordered(rows: Iterable[tuple[Row, list[str]]]) -> list[tuple[Row, list[str]]]:
    """Return the rows with fused layers first, then in alphabetical order of their first architecture."""
    return sorted(rows, key=lambda one: (not one[0].fused.startswith(("decoder", "encoder", "sub")), one[1][0].lower()))


def grouped(names: Iterable[str]) -> str:
    """Return class names with the classes of one model together: "Llama (ForCausalLM, ForSequenceClassification)"."""
    of_model: dict[str, list[str]] = {}
    for name in names:
        prefix = prefix_of(name)
        of_model.setdefault(prefix, []).append(name.removeprefix(prefix))
    return ", ".join(f"{model} ({', '.join(rest)})" if rest != [""] else model for model, rest in of_model.items())


def prefix_of(name: str) -> str:
    """Return the name of the model in the name of its class: "Qwen2Moe" of "Qwen2MoeForCausalLM"."""
    return re.split(r"For(?=[A-Z])|LMHead|Model|WithLM", name)[0]


def row_of(model: Any, prefix: str) -> Row:
    """Return the row of a model.

    Args:
        model: A model with adapters. It is accelerated, and restored afterwards.
        prefix: Beginning of class names that is left out.
    """
    import lorakit

    acceleration = lorakit.accelerate(model)
    path_of = {id(module): path for path, module in model.named_modules()}
    swaps = [(name, path_of[id(swap.replacement)], type(swap.original).__name__) for name, swap in acceleration.swaps]
    acceleration.undo()
    layers = tuple(f"{path}." for name, path, _ in swaps if name not in SMALL)
    fused: dict[str, dict[str, None]] = {}
    linear: dict[str, None] = {}
    for name, path, kind in swaps:
        parent = path.rpartition(".")[0]
        if name != LINEAR:
            fused.setdefault(name, {})[short(kind, prefix)] = None
        elif parent and not path.startswith(layers):
            linear[short(type(model.get_submodule(parent)).__name__, prefix)] = None
    own = {f"{short(one.kind, prefix)}: {short(one.why, prefix)}": None for one in acceleration.skipped}
    listed = (f"{name} ({', '.join(fused[name])})" for name in SHOWN if name in fused)
    return Row("; ".join(listed), ", ".join(linear), "; ".join(own))


def short(text: str, prefix: str) -> str:
    """Return a text without the name of the model in class names, and without figures that depend on the processor."""
    text = re.sub(r" by \d\S* \(relative\)", "", text)
    return re.sub(rf"\b{re.escape(prefix)}(?=[A-Z])", "", text)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
