"""What identifies a base: its architecture, its parameters' names and shapes, and a few numbers of it.

Made in milliseconds, also for large models: fixed positions of a few fixed tensors are read and rounded to
bf16, so that the same base at another precision is still the same. Adapters, merges and trained biases do not
change it.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.underlying import base_tensors

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
    """

    architecture: str
    parameters: int
    names_sha256: str
    vocabulary: int
    dtype: str
    samples: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `lorakit.json` holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Fingerprint | None:
        """What `as_dict` gave; None where the values are not of that form."""
        try:
            made = cls(**values)
        except TypeError:
            return None
        words, numbers = (made.architecture, made.names_sha256, made.dtype), (made.parameters, made.vocabulary)
        sound = all(isinstance(w, str) for w in words) and all(isinstance(n, int) for n in numbers)
        sound = sound and isinstance(made.samples, dict)
        sound = sound and all(
            isinstance(text, str) and not set(text) - set("0123456789abcdef") for text in made.samples.values()
        )
        return made if sound else None


def fingerprint(model: nn.Module) -> Fingerprint:
    """Take the fingerprint of a model's base.

    Args:
        model: A model with or without adapters; only read.

    Returns:
        The fingerprint of what is under the adapters.
    """
    tensors = {
        name: t
        for name, t, module in base_tensors(model, stacked=False)
        if name.rpartition(".")[2] in module._parameters
    }
    listing = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(tensors.items()))
    large = sorted(name for name, tensor in tensors.items() if tensor.ndim >= 2)
    step = max(1, len(large) // TENSORS)
    chosen = large[::step][:TENSORS]
    readable = all(tensors[name].is_floating_point() and not tensors[name].is_meta for name in large)
    dtypes = [str(tensors[name].dtype).removeprefix("torch.") for name in chosen]
    return Fingerprint(
        architecture=type(_innermost(model)).__name__,
        parameters=sum({id(tensor): tensor.numel() for tensor in tensors.values()}.values()),
        names_sha256=hashlib.sha256(listing.encode()).hexdigest(),
        vocabulary=_vocabulary(model),
        dtype=max(set(dtypes), key=dtypes.count) if dtypes else "",
        samples={name: _sample(tensors[name]) for name in chosen} if readable else {},
    )


def compare(known: Fingerprint | None, present: Fingerprint) -> tuple[str, str]:
    """Whether an adapter's base is the one at hand.

    Args:
        known: The fingerprint kept with the adapter, or None.
        present: That of the model at hand.

    Returns:
        The verdict (`SAME`, `OTHER_PRECISION`, `UNVERIFIABLE`, `DIFFERENT`) and its reason in words.
    """
    if known is None:
        return UNVERIFIABLE, "the adapter carries no fingerprint of its base"
    if known.architecture != present.architecture:
        return DIFFERENT, f"the adapter's base is a {known.architecture}, this model is a {present.architecture}"
    if known.vocabulary != present.vocabulary:
        return DIFFERENT, f"the adapter's base has {known.vocabulary:,} tokens, this model has {present.vocabulary:,}"
    if known.names_sha256 != present.names_sha256:
        counts = f"{known.parameters:,} against {present.parameters:,} parameters"
        return DIFFERENT, f"names or shapes of the base's parameters differ ({counts})"
    if not known.samples or not present.samples:
        return UNVERIFIABLE, "the numbers of one of the bases cannot be read (quantised, or without data)"
    for name, numbers in known.samples.items():
        if name not in present.samples or not _close(numbers, present.samples[name]):
            return DIFFERENT, f"the numbers of {name} differ: same shapes, other weights"
    if known.dtype != present.dtype:
        return OTHER_PRECISION, f"the adapter's base was {known.dtype}, this model is {present.dtype}"
    return SAME, "architecture, shapes and sampled numbers agree"


def _sample(tensor: Tensor) -> str:
    count = min(NUMBERS, tensor.numel())
    flat = torch.linspace(0, tensor.numel() - 1, count, dtype=torch.float64).long().to(tensor.device)
    numbers = tensor.detach()[torch.unravel_index(flat, tensor.shape)]
    patterns = numbers.to(torch.bfloat16).cpu().view(torch.int16).tolist()
    return "".join(f"{pattern & 0xFFFF:04x}" for pattern in patterns)


def _close(one: str, other: str) -> bool:
    """Whether two samples agree within one step of bf16, which is what rounding twice can cost."""
    if len(one) != len(other) or len(one) % 4:
        return False
    pairs = ((_order(one[i : i + 4]), _order(other[i : i + 4])) for i in range(0, len(one), 4))
    return all(abs(a - b) <= 1 for a, b in pairs)


def _order(pattern: str) -> int:
    """A bf16 pattern as a whole number that grows with its value, one per representable number."""
    bits = int(pattern, 16)
    return -(bits & 0x7FFF) if bits & 0x8000 else bits


def _vocabulary(model: nn.Module) -> int:
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
