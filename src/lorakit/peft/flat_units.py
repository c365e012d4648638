"""Adapters in models that FSDP 1 has wrapped: tensors are read and written while one unit after another is gathered.

A unit (`FullyShardedDataParallel`) keeps its parameters in one flat buffer, and each process has a part of it. Every
process must call these functions. Only units that hold tensors of the adapter are gathered, one at a time. Before the
first forward pass, the model must be the outermost unit, because FSDP takes the first unit that is gathered for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from lorakit.core.shards import is_flat

Own = Callable[[], Iterable[tuple[str, str, Tensor]]]
"""Function that yields an adapter's tensors (…) now, each after its names on disk and in memory."""

MATRICES = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
"""Ends of the names on disk of tensors with at least two dimensions."""


def parts(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the path and the module of each part of a module, with those that only hold factors, which can be units."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from parts(child, f"{path}.{name}" if path else name)


def flat_names(own: Own) -> set[str]:
    """Return the names on disk of tensors that this process holds only in part; empty within `summon_full_params`."""
    flat = {name: tensor for name, _, tensor in own() if is_flat(tensor)}
    # a vector looks the same when it is whole
    is_gathered = not any(name.endswith(MATRICES) or hasattr(tensor, "_is_flat_param") for name, tensor in flat.items())
    return set() if is_gathered else set(flat)


def read(model: nn.Module, own: Own) -> dict[str, Tensor]:
    """Return copies of the whole tensors (…) in the units of a model, keyed by name on disk."""
    found: dict[str, Tensor] = {}

    def note(name: str, tensor: Tensor) -> None:
        found[name] = tensor.detach().clone()

    _visit(model, own, note, writes=False)
    return found


def write(model: nn.Module, own: Own, values: Mapping[str, Tensor]) -> None:
    """Copy whole tensors (…), keyed by name on disk and the same in every process, into the units of a model."""

    def copy(name: str, tensor: Tensor) -> None:
        if name in values:
            tensor.copy_(values[name])

    _visit(model, own, copy, writes=True)


def _visit(model: nn.Module, own: Own, use: Callable[[str, Tensor], None], *, writes: bool) -> None:
    """Call a function with the name on disk and the whole value (…) of each flat tensor, one unit after another."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    paths = {path: module for path, module in parts(model) if isinstance(module, FullyShardedDataParallel)}
    flat, held = flat_names(own), dict[str, set[str]]()
    for name, in_memory, _ in own():
        around = [path for path in paths if not path or in_memory.startswith(f"{path}.")]
        if name in flat and around:
            held.setdefault(max(around, key=len), set()).add(name)
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, recurse=False, writeback=False):
            pass  # makes FSDP initialize the outermost unit first, as its other units need
    for path, names in held.items():
        whole = FullyShardedDataParallel.summon_full_params(paths[path], recurse=False, writeback=writes)
        with whole, torch.no_grad():
            for name, _, tensor in own():
                if name in names:
                    use(name, tensor)
