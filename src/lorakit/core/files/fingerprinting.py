"""What identifies a base: its architecture, its parameters' names and shapes, and a few numbers of it.

Made in milliseconds, also for large models: fixed positions of a few fixed tensors are read and rounded to
bf16, so that the same base at another precision is still the same. Adapters, merges and trained biases do not
change it.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.layering.underlying import QuantisedWeight, base_tensors, quantised_weights

TENSORS, NUMBERS = 16, 16  # sampled tensors, and numbers of each

SAME, OTHER_PRECISION, UNVERIFIABLE, DIFFERENT = "same", "same at other precision", "unverifiable", "different"


@dataclass(frozen=True)
class Fingerprint:
    """A base's identity.

    Attributes:
        architecture: Class name of the model.
        parameters: Numbers in it; a tensor that is shared under several names counts once.
        names_sha256: Of the sorted names and shapes.
        vocabulary: Rows of the input embedding, 0 where there is none.
        dtype: dtype of most of the sampled tensors.
        samples: Tensor name -> sampled numbers as bf16 patterns in hexadecimal; empty where they cannot be read.
        bounds: Name of a quantised tensor -> how far each sampled number may be from what was quantised, likewise.
    """

    architecture: str
    parameters: int
    names_sha256: str
    vocabulary: int
    dtype: str
    samples: dict[str, str]
    bounds: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `lorakit.json` holds them; `bounds` only where something is quantised."""
        values = asdict(self)
        return values if self.bounds else {name: value for name, value in values.items() if name != "bounds"}

    @classmethod
    def from_dict(cls, values: Any) -> Fingerprint | None:
        """What `as_dict` gave; None where the values are not of that form."""
        try:
            made = cls(**values)
        except TypeError:
            return None
        words, numbers = (made.architecture, made.names_sha256, made.dtype), (made.parameters, made.vocabulary)
        sound = all(isinstance(w, str) for w in words) and all(isinstance(n, int) for n in numbers)
        tables = (made.samples, made.bounds)
        sound = sound and all(isinstance(table, dict) for table in tables)
        sound = sound and all(
            isinstance(text, str) and not set(text) - set("0123456789abcdef")
            for table in tables
            for text in table.values()
        )
        return made if sound else None


def fingerprint(
    model: nn.Module, read: Callable[[str], Tensor] | None = None, cut: Mapping[int, int] = MappingProxyType({})
) -> Fingerprint:
    """Take the fingerprint of a model's base.

    Args:
        model: A model with or without adapters; only read.
        read: Name -> tensor (…), for a model on the meta device whose numbers lie elsewhere.
        cut: Id of a tensor of the base -> how many of its rows are meant, where it has more.

    Returns:
        The fingerprint of what is under the adapters.
    """
    parts = _parts(model, cut)
    listing = "\n".join(f"{name} {part.shape}" for name, part in sorted(parts.items()))
    large = sorted(name for name, part in parts.items() if len(part.shape) >= 2)
    step = max(1, len(large) // TENSORS)
    chosen = large[::step][:TENSORS]
    readable = all(parts[name].is_readable(read is not None) for name in large)
    sampled = {name: parts[name] if read is None else _of_tensor(read(name)) for name in chosen}
    dtypes = [part.dtype for part in sampled.values()]
    numbers = {name: part.sample() for name, part in sampled.items()} if readable else {}
    return Fingerprint(
        architecture=type(_innermost(model)).__name__,
        parameters=sum({part.key: math.prod(part.shape) for part in parts.values()}.values()),
        names_sha256=hashlib.sha256(listing.encode()).hexdigest(),
        vocabulary=min(vocabulary_of(model), *cut.values()) if cut else vocabulary_of(model),
        dtype=max(set(dtypes), key=dtypes.count) if dtypes else "",
        samples={name: _patterns(values) for name, (values, _) in numbers.items()},
        bounds={name: _patterns(bound) for name, (_, bound) in numbers.items() if bound is not None},
    )


@dataclass(frozen=True)
class _Part:
    """A parameter as the plain base has it: its shape, what it is stored as, and how to read numbers of it."""

    shape: tuple[int, ...]
    dtype: str
    key: int  # the same for a tensor that is shared
    tensor: Tensor | None
    weight: QuantisedWeight | None = None

    def is_readable(self, elsewhere: bool) -> bool:
        """Whether it holds numbers: here, or, of a plain tensor on the meta device, elsewhere."""
        if self.weight is not None:
            return not any(tensor.is_meta for tensor in self.weight.base.tensors(self.weight.stored))
        return self.tensor is not None and self.tensor.is_floating_point() and (elsewhere or not self.tensor.is_meta)

    def sample(self) -> tuple[Tensor, Tensor | None]:
        """Numbers at fixed places of the tensor as the plain base has it, (n,); if quantised, also how far off."""
        size = math.prod(self.shape)
        places = torch.linspace(0, size - 1, min(NUMBERS, size), dtype=torch.float64).long()
        if self.weight is not None:
            rows, columns = _canonical(self.weight)
            if self.shape != (rows, columns):  # the plain base has it as (in, out)
                places = places % rows * columns + places // rows
            return self.weight.base.values(self.weight.stored, places)
        tensor: Tensor = self.tensor  # type: ignore[assignment]
        return tensor.detach()[torch.unravel_index(places.to(tensor.device), tensor.shape)], None


def _of_tensor(tensor: Tensor, cut: Mapping[int, int] = MappingProxyType({})) -> _Part:
    meant = tensor[: cut[id(tensor)]] if id(tensor) in cut else tensor
    return _Part(tuple(meant.shape), str(tensor.dtype).removeprefix("torch."), id(tensor), meant)


def _parts(model: nn.Module, cut: Mapping[int, int]) -> dict[str, _Part]:
    """The base's parameters under the names and with the shapes of the plain base."""
    quantised = {weight.packed: weight for weight in quantised_weights(model, stacked=False)}
    parts = {}
    for name, tensor, module in base_tensors(model, stacked=False):
        weight = quantised.get(name)
        if weight is not None:
            rows, columns = _canonical(weight)
            before = getattr(weight.module, "source_cls", nn.Linear).__name__
            laid = (columns, rows) if before == "Conv1D" else (rows, columns)
            parts[weight.name] = _Part(laid, weight.base.name, id(weight.module), None, weight)
            if weight.loose_bias is not None:
                parts[weight.name.removesuffix("weight") + "bias"] = _of_tensor(weight.loose_bias)
        elif name.rpartition(".")[2] in module._parameters:
            parts[name] = _of_tensor(tensor, cut)
    return parts


def _canonical(weight: QuantisedWeight) -> tuple[int, int]:
    module: Any = weight.module
    return int(module.out_features), int(module.in_features)


def compare(known: Fingerprint | None, present: Fingerprint, whose: str = "the adapter's") -> tuple[str, str]:
    """Whether an adapter's base is the one at hand.

    Args:
        known: The fingerprint kept with the adapter, or None.
        present: That of the model at hand.
        whose: Of what it is the base, for the reason.

    Returns:
        The verdict (`SAME`, `OTHER_PRECISION`, `UNVERIFIABLE`, `DIFFERENT`) and its reason in words.
    """
    if known is None:
        return UNVERIFIABLE, "the adapter carries no fingerprint of its base"
    if known.architecture != present.architecture:
        return DIFFERENT, f"{whose} base is a {known.architecture}, this model is a {present.architecture}"
    if known.vocabulary != present.vocabulary:
        return DIFFERENT, f"{whose} base has {known.vocabulary:,} tokens, this model has {present.vocabulary:,}"
    if known.names_sha256 != present.names_sha256:
        counts = f"{known.parameters:,} against {present.parameters:,} parameters"
        return DIFFERENT, f"names or shapes of the base's parameters differ ({counts})"
    if not known.samples or not present.samples:
        return UNVERIFIABLE, "the numbers of one of the bases cannot be read (quantised, or without data)"
    exact = True
    for name, numbers in known.samples.items():
        bounds = [taken.bounds.get(name, "") for taken in (known, present)]
        if name not in present.samples or not _close(numbers, present.samples[name], bounds):
            return DIFFERENT, f"the numbers of {name} differ: same shapes, other weights"
        exact = exact and _close(numbers, present.samples[name], ())
    if known.dtype != present.dtype:
        return OTHER_PRECISION, f"{whose} base was {known.dtype}, this model is {present.dtype}"
    if not exact:
        return OTHER_PRECISION, "the numbers agree within what quantising cost, in one way and in another"
    return SAME, "architecture, shapes and sampled numbers agree"


def _patterns(numbers: Tensor) -> str:
    """Numbers (n,) as bf16 patterns in hexadecimal."""
    patterns = numbers.to(torch.bfloat16).cpu().view(torch.int16).tolist()
    return "".join(f"{pattern & 0xFFFF:04x}" for pattern in patterns)


def _close(one: str, other: str, bounds: Sequence[str]) -> bool:
    """Whether two samples agree within one step of bf16, which is what rounding twice can cost, or within bounds."""
    if len(one) != len(other) or len(one) % 4 or any(len(bound) not in (0, len(one)) for bound in bounds):
        return False
    for i in range(0, len(one), 4):
        first, second = one[i : i + 4], other[i : i + 4]
        slack = sum(_number(bound[i : i + 4]) for bound in bounds if bound)
        near = abs(_number(first) - _number(second)) <= slack * (1 + 2**-6)  # the bounds are rounded, too
        if abs(_order(first) - _order(second)) > 1 and not near:
            return False
    return True


def _number(pattern: str) -> float:
    """The number that a bf16 pattern stands for."""
    return float(struct.unpack(">f", bytes.fromhex(pattern + "0000"))[0])


def _order(pattern: str) -> int:
    """A bf16 pattern as a whole number that grows with its value, one per representable number."""
    bits = int(pattern, 16)
    return -(bits & 0x7FFF) if bits & 0x8000 else bits


def vocabulary_of(model: nn.Module) -> int:
    """Rows of a model's input embedding, 0 where it has none."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embedding = getter() if getter is not None else None
    except (AttributeError, NotImplementedError):  # models without one differ in how they say so
        return 0
    weight = getattr(embedding, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.ndim else 0


def _innermost(model: nn.Module) -> nn.Module:
    """The model itself, or what a compiler's wrapper holds."""
    original = model._modules.get("_orig_mod")
    return original if original is not None else model
