"""The shape of a model whose layers are stacked anew (`layer_replication`): more sites, no more weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lorakit.architectures.shapes import ModelShape, block_of
from lorakit.config import LoraConfig
from lorakit.errors import ConfigError

LISTS = ("layers", "layer", "h")


def stacked(shape: ModelShape, config: LoraConfig) -> ModelShape:
    """A shape as an adapter's config stacks its layers; the shape itself where it does not.

    Args:
        shape: The model.
        config: The adapter's config.

    Returns:
        The shape with the layers that will stand there; a layer that stands there again shares its weights.

    Raises:
        ConfigError: The shape has no list of layers, or a range does not fit.
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
                made.append(
                    dataclasses.replace(
                        site, path=_moved(site.path, name, index), tied_to=first if again else site.tied_to
                    )
                )
        for other in shape.others:
            if _layer(other.path, name) == source:
                moved = dataclasses.replace(other, path=_moved(other.path, name, index))
                plain.append(dataclasses.replace(moved, parameters=0, biases=0) if again else moved)
    outside = [site for site in shape.sites if _layer(site.path, name) is None]
    before = next(i for i, site in enumerate(shape.sites) if _layer(site.path, name) is not None)
    return dataclasses.replace(
        shape,
        layers=len(order),
        sites=(*outside[:before], *made, *outside[before:]),
        others=(*plain, *(other for other in shape.others if _layer(other.path, name) is None)),
    )


def _list_and_order(shape: ModelShape, ranges: Sequence[tuple[int, int]]) -> tuple[str, list[int]]:
    """Path of the list of layers, and the original number of each layer that will stand there."""
    lists: dict[str, set[int]] = {}
    for block in shape.blocks:
        path, _, number = block.rpartition(".")
        lists.setdefault(path, set()).add(int(number))
    name = next((path for path in lists if path.rpartition(".")[2] in LISTS), None)
    if name is None:
        raise ConfigError(f"layer_replication: {shape.name} has no list of layers as Llama, Bert or Falcon have.")
    count = len(lists[name])
    order: list[int] = []
    for start, end in ranges:
        if not 0 <= start < end <= count:
            raise ConfigError(f"layer_replication holds ({start}, {end}); {shape.name} has layers 0 to {count - 1}.")
        order += range(start, end)
    return name, order


def _layer(path: str, name: str) -> int | None:
    """The number of the layer of a list that a module lies in, or None."""
    block = block_of(path)
    return int(block.rpartition(".")[2]) if block is not None and block.rpartition(".")[0] == name else None


def _moved(path: str, name: str, index: int) -> str:
    rest = path.removeprefix(name + ".").partition(".")[2]
    return f"{name}.{index}.{rest}" if rest else f"{name}.{index}"
