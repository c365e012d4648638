"""Fingerprints of the first form: 16 values of at most 16 matrices, rounded to bf16.

Files written before form 2 hold them. They are still compared, with the weaker guarantee that they had: other tensors,
norms and biases may differ unseen, and so may everything within one step of bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lorakit.core.model.base_samples import Part, Sample, part_of

TENSORS, NUMBERS = 16, 16
"""Sampled tensors, and values of each."""


def first_positions(shape: tuple[int, ...]) -> Tensor:
    """Return which values of a flattened tensor were sampled, (n,).

    Args:
        shape: Its shape.
    """
    size = math.prod(shape)
    return torch.linspace(0, size - 1, min(NUMBERS, size), dtype=torch.float64).long()


def take_first_samples(parts: Mapping[str, Part], read: Callable[[str], Tensor] | None) -> dict[str, Sample]:
    """Sample matrices as the first form did.

    Args:
        parts: Name -> part, readable.
        read: Name -> tensor (…), for parts on the meta device whose values are elsewhere.
    """
    large = sorted(name for name, part in parts.items() if len(part.shape) >= 2 and not part.is_buffer)
    found = {}
    for name in large[:: max(1, len(large) // TENSORS)][:TENSORS]:
        part = parts[name] if read is None else part_of(read(name), {})
        bits, bound = part.bits(first_positions(part.shape).to(part.device))
        values = bits.view(part.stored_dtype)
        found[name] = Sample("bfloat16", _brain(values), b"" if bound is None else _brain(bound))
    return found


def first_agreement(one: Sample, other: Sample, slack: bool = True) -> bool:
    """Return whether two samples agree within one step of bf16, or within their bounds.

    Args:
        one: A sample of the first form.
        other: Another.
        slack: Whether bounds count.
    """
    first, second = one.values(), other.values()
    if first.shape != second.shape or not (one.is_sound() and other.is_sound()):
        return False
    near = (_order(one) - _order(other)).abs() <= 1
    if slack:
        near |= (first - second).abs() <= (one.slack() + other.slack()) * (1 + 2**-6)  # the bounds are rounded, too
    return bool(near.all())


def as_hex(bits: bytes) -> str:
    """Return bf16 patterns in hexadecimal, four digits each."""
    return _swapped(bits).hex()


def from_hex(text: str) -> bytes:
    """Return what `as_hex` was given.

    Raises:
        ValueError: The text is not patterns in hexadecimal.
    """
    if len(text) % 4:
        raise ValueError("not whole patterns")
    return _swapped(bytes.fromhex(text))


def _swapped(bits: bytes) -> bytes:
    swapped = bytearray(bits)
    swapped[::2], swapped[1::2] = bits[1::2], bits[::2]
    return bytes(swapped)


def _brain(values: Tensor) -> bytes:
    patterns = values.to(torch.bfloat16).cpu().view(torch.int16).tolist()
    return b"".join((pattern & 0xFFFF).to_bytes(2, "little") for pattern in patterns)


def _order(sample: Sample) -> Tensor:
    """Return bf16 patterns as whole numbers that grow with their values, one per representable number, (n,)."""
    if not sample.bits:
        return torch.zeros(0, dtype=torch.int64)
    patterns = torch.frombuffer(bytearray(sample.bits), dtype=torch.int16).long()
    return torch.where(patterns < 0, -(patterns & 0x7FFF), patterns)
