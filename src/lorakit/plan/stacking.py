"""Shape of a model with replicated layers (`layer_replication`): more sites, no additional weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lorakit.architectures.shapes import ModelShape, block_of
from lorakit.config import LoraConfig
from lorakit.errors import ConfigError

LISTS = ("layers", "layer", "h")


def stacked(shape: ModelShape, config: LoraConfig) -> ModelShape:
    """Return a shape with the layers that an adapter's config replicates; the shape itself without replication.

    Args:
        shape: The model.
        config: The adapter's config.

    Returns:
        The shape with the resulting layers; repeated layers share their weights.

    Raises:
        ConfigError: The shape has no list of layers, or a range is out of bounds.
    """
    if not config.layer_replication:
        return shape
    name, order = _list_and_order(shape, config.layer_replication)
    made, plain = [], []
    for index, source in enumerate(order):
        again = source in order[:index]
        for site in shape.sites:
            if _layer(site.path, name) == source:
                first = _moved(site.path, name, order.index(source))
                tied_to = first if again else site.tied_to
                made.append(replace(site, path=_moved(site.path, name, index), tied_to=tied_to))
        for other in shape.others:
            if _layer(other.path, name) == source:
                moved = replace(other, path=_moved(other.path, name, index))
                plain.append(replace(moved, parameters=0, biases=0) if again else moved)
    outside = [site for site in shape.sites if _layer(site.path, name) is None]
    before = next(i for i, site in enumerate(shape.sites) if _layer(site.path, name) is not None)
    return replace(
        shape,
        layers=len(order),
        sites=(*outside[:before], *made, *outside[before:]),
        others=(*plain, *(other for other in shape.others if _layer(other.path, name) is None)),
    )


def _list_and_order(shape: ModelShape, ranges: Sequence[tuple[int, int]]) -> tuple[str, list[int]]:
    """Return the path of the list of layers, and the original index of each resulting layer."""
    lists: dict[str, set[int]] = {}
    for block in shape.blocks:
        path, _, number = block.rpartition(".")
        lists.setdefault(path, set()).add(int(number))
    name = next((path for path in lists if path.rpartition(".")[2] in LISTS), None)
    if name is None:
        raise ConfigError(f"layer_replication: {shape.name} has no list of layers as in Llama, Bert or Falcon.")
    count = len(lists[name])
    order: list[int] = []
    for start, end in ranges:
        if not 0 <= start < end <= count:
            raise ConfigError(
                f"layer_replication: range ({start}, {end}) is out of bounds; {shape.name} has layers 0 to {count - 1}."
            )
        order += range(start, end)
    return name, order


def _layer(path: str, name: str) -> int | None:
    """Return the index of the layer that a module belongs to, or None."""
    block = block_of(path)
    return int(block.rpartition(".")[2]) if block is not None and block.rpartition(".")[0] == name else None


def _moved(path: str, name: str, index: int) -> str:
    rest = path.removeprefix(name + ".").partition(".")[2]
    return f"{name}.{index}.{rest}" if rest else f"{name}.{index}"
