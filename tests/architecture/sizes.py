"""Rules of sizes. Functions, arguments and tiny modules are errors; files and the number of modules are warnings."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from .reading import (
    Breach,
    Function,
    Sources,
    arguments_of,
    import_edges,
    lines_of,
    modules_of,
    nodes,
    parsed,
    part_of,
    within,
)

MAX_FUNCTION_LINES, MAX_ARGUMENTS = 60, 7
KERNELS = "ops/kernels/triton/"  # what a kernel takes are pointers, sizes and constants, and no object can hold them
SMALL_MODULE_LINES = 60
ROW_FOLDERS = ("core/kinds", "core/inits", "core/variants", "core/quantization")
MAX_FILE_LINES, MAX_WHOLE_SUBJECT_LINES, MAX_MODULES = 400, 600, 235
WHOLE_SUBJECTS = (  # files that one subject needs whole
    "architectures/families.py",
    "architectures/shapes.py",
    "config/lora.py",
    "core/attachment/residual_base.py",
    "core/layers/lora_layer.py",
    "core/layers/trainable_tokens.py",
    "peft/matching.py",
    "peft/model.py",
    "peft/tuner.py",
    "train/files/checkpoint.py",
    "train/trainer.py",
)


def oversized(sources: Sources) -> Iterator[Breach]:
    """Find functions and argument lists above their limits; Ruff counts branches and complexity."""
    for path, tree in parsed(sources):
        for node in nodes(tree):
            if not isinstance(node, Function):
                continue
            doc = node.body[0] if ast.get_docstring(node) is not None else None
            length = lines_of(node) - (lines_of(doc) if doc else 0)
            if length > MAX_FUNCTION_LINES:
                message = f"{node.name} has {length} lines, the cap is {MAX_FUNCTION_LINES}"
                yield Breach(path, f"{node.name}: lines", message, node.lineno)
            names = [argument.arg for argument in arguments_of(node)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            if count > MAX_ARGUMENTS and part_of(path) != "peft" and not path.startswith(KERNELS):
                message = f"{node.name} takes {count} arguments, the cap is {MAX_ARGUMENTS}"
                yield Breach(path, f"{node.name}: arguments", message, node.lineno)


def small_modules(sources: Sources) -> Iterator[Breach]:
    """Find modules of a few lines that one other module imports: they belong in it. Files of rows are left out."""
    edges = import_edges(sources)
    for module, path in modules_of(sources).items():
        lines = sources[path].count("\n")
        if path.endswith("__init__.py") or within(path, ROW_FOLDERS) or lines >= SMALL_MODULE_LINES:
            continue
        importers = [other for other, targets in edges.items() if module in targets]
        if len(importers) == 1:
            message = f"{lines} lines, imported by {importers[0]} only; move them there"
            yield Breach(path, "single importer", message)


def long_files(sources: Sources) -> Iterator[Breach]:
    """Find files with more lines than the aim."""
    for path, _ in parsed(sources):
        lines = sources[path].count("\n")
        cap = MAX_WHOLE_SUBJECT_LINES if path in WHOLE_SUBJECTS else MAX_FILE_LINES
        if lines > cap:
            yield Breach(path, "lines", f"{lines} lines, aim for {cap} at most")


def many_modules(sources: Sources) -> Iterator[Breach]:
    """Find whether the package has more modules than the restructuring aims for."""
    count = len(modules_of(sources))
    if count > MAX_MODULES:
        yield Breach("src/lorakit", "modules", f"{count} modules, aim for {MAX_MODULES} at most")
