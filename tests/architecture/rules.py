"""Architecture rules: those that fail a build, and those that only warn."""

from __future__ import annotations

from .docs import dangling_references, misplaced_tests, shapeless, undocumented, unnamed_errors
from .imports import (
    core_door_breaches,
    door_breaches,
    dynamic_imports,
    floor_breaches,
    folder_cycles,
    import_cycles,
    inner_floor_breaches,
)
from .names import loosely_typed, misnamed, name_comparisons, row_names, variant_fields
from .practices import exception_texts, fieldless, foreign_memory, incomplete_components, process_state, walks, writers
from .reading import Rule
from .sizes import long_files, many_modules, oversized, small_modules

RULES: list[Rule] = [
    floor_breaches,
    door_breaches,
    inner_floor_breaches,
    folder_cycles,
    import_cycles,
    dynamic_imports,
    core_door_breaches,
    loosely_typed,
    row_names,
    variant_fields,
    name_comparisons,
    misnamed,
    exception_texts,
    fieldless,
    walks,
    process_state,
    incomplete_components,
    foreign_memory,
    writers,
    oversized,
    small_modules,
    undocumented,
    shapeless,
    unnamed_errors,
    dangling_references,
    misplaced_tests,
]
WARNINGS: list[Rule] = [long_files, many_modules]
