"""Catalog of published models: their names, sizes and sources, from `catalogue.json`.

Sizes come from each model's config.json. The first name of an entry is its display name, and the paper, which gives the
sizes, is cited along with the config.json of the first Hub id. gpt-oss is published in MXFP4, which is dequantized when
it is loaded. The tests build every entry with transformers on the meta device and compare the counts and sites.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import Any

from lorakit.architectures.expert_shapes import ExpertSizes, glm4_moe, gpt_oss, mixtral, olmoe, qwen3_moe
from lorakit.architectures.shapes import ModelShape, Sizes, bert, gpt2, llama, qwen2, qwen3

_FAMILIES: dict[str, Callable[[Any], ModelShape]] = {
    family.__name__: family
    for family in (gpt2, bert, llama, qwen2, qwen3, mixtral, qwen3_moe, olmoe, gpt_oss, glm4_moe)
}
"""Name of a family in `catalogue.json` -> function that builds the shape from the sizes."""


@cache
def _entries() -> list[dict[str, Any]]:
    return list(json.loads(resources.files(__package__).joinpath("catalogue.json").read_text(encoding="utf-8")))


def names() -> list[str]:
    """Return the first name of every entry, in catalog order."""
    return [entry["names"][0] for entry in _entries()]


def aliases() -> list[str]:
    """Return every name and Hub id that `published` accepts."""
    return [name for entry in _entries() for name in entry["names"]]


def published(name: str) -> ModelShape | None:
    """Return the shape of a published model by name or Hub id (not case-sensitive), or None if it is not listed."""
    wanted = name.casefold()
    matching = (at for at, entry in enumerate(_entries()) if wanted in map(str.casefold, entry["names"]))
    return next(map(_built, matching), None)


@cache
def _built(number: int) -> ModelShape:
    entry = _entries()[number]
    sizes = (ExpertSizes if "experts" in entry["sizes"] else Sizes)(**entry["sizes"])
    hub_id = next(name for name in entry["names"] if "/" in name)
    source = f"config.json of {hub_id}; {entry['paper']}"
    shape = _FAMILIES[entry["family"]](sizes)
    return replace(shape, name=entry["names"][0], source=source, dtype=entry["dtype"], published=True)
