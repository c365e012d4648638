"""Two folders that hold the same adapter, one written by each library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from . import differences
from .closeness import assert_same_bits
from .rows import Row

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def compare_folders(
    row: Row, theirs: Path, ours: Path, more: Mapping[str, differences.Difference] = MappingProxyType({})
) -> set[str]:
    """The same files, config, metadata, names, shapes, dtypes and bits, but for the accepted differences.

    Args:
        row: What was written.
        theirs: peft's folder.
        ours: lorakit's.
        more: Differences of the config that are accepted besides, by field.

    Returns:
        The accepted differences that were met, by their keys in `differences`.
    """
    names, our_names = ({path.name for path in folder.iterdir()} for folder in (theirs, ours))
    assert names - our_names == set(differences.FILES_OF_PEFT_ALONE)
    expected = {name for name, more in differences.FILES_OF_OURS_ALONE.items() if more.holds(row, None, None)}
    assert our_names - names == expected
    used = _compare_configs(
        row, {**differences.CONFIG, **more}, *(json.loads((f / CONFIG).read_text()) for f in (theirs, ours))
    )
    metadata, our_metadata = (_metadata(f / WEIGHTS) for f in (theirs, ours))
    assert {k: v for k, v in our_metadata.items() if k not in differences.METADATA} == metadata
    tensors, our_tensors = (load_file(f / WEIGHTS) for f in (theirs, ours))
    used |= {_accepted(row, name) for name in set(tensors) - set(our_tensors)}
    assert_same_bits(our_tensors, _without(tensors, set(tensors) - set(our_tensors)))
    return used


def _compare_configs(
    row: Row, known: Mapping[str, differences.Difference], theirs: dict[str, Any], ours: dict[str, Any]
) -> set[str]:
    used = set()
    for field in sorted(set(theirs) | set(ours)):
        first, second = (_unordered(config.get(field, differences.ABSENT)) for config in (theirs, ours))
        if first != second:
            accepted = known.get(field)
            assert accepted is not None and accepted.holds(row, first, second), (
                f"{field}: peft {first}, lorakit {second}"
            )
            used.add(field)
    return used


def _accepted(row: Row, name: str) -> str:
    for ending, accepted in differences.TENSORS_OF_PEFT_ALONE.items():
        if name.endswith(ending) and accepted.holds(row, name, None):
            return ending
    raise AssertionError(f"peft alone wrote {name}")


def _without(tensors: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _unordered(value: Any) -> Any:
    """Lists of names are sets in peft, and it writes them in the order of their hashes."""
    return sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())
