"""Autotuned kernel choices: which method to use for an operation of a given shape.

A choice maps the name of a shape to a method that was faster than the default when `lorakit.speed.tuning` measured both
on this machine; other shapes use the default. All methods give the same results up to rounding.

The default can be slow for two reasons. Some libraries, such as oneDNN in bf16 on processors with matrix units, compute
certain shapes at half speed unless given slices of rows. And without matrix units, bf16 matmuls are slower than fp32
ones: the fp32 method upcasts the operands block by block and rounds the sum only once, as a bf16 matmul does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType

import torch
from torch import Tensor

ROWS = (768, 1024, 1280, 1536, 2048, 3072, 4096)
"""Row counts for which matmuls are measured; others use the next larger count. With at most `SLICES[0]` rows, or more
than the largest count, a matmul is computed all at once.
"""

SLICES = (512, 256)
"""Slice sizes (in rows) that autotuning may choose; the default is to compute all rows at once."""

FEWEST_IN_FP32 = 128
"""Minimum number of rows for a matmul in fp32; with fewer rows, upcasting the weight costs more than it saves."""

NARROW = (torch.bfloat16, torch.float16)
"""Dtypes whose matmuls may be slower than fp32 matmuls."""

IN_FP32 = " through fp32"  # prose-check: ok
"""Suffix of the names of fp32 choices, as stored in checkpoints and in the cache."""

BLOCK = 2048
"""Height and width of the blocks in which a weight is upcast, so that no head is copied to fp32 in full."""

LENGTHS = (256, 512, 1024, 2048)
"""Sequence lengths, in tokens, for which attention is measured; a batch uses the largest that it reaches."""

# Choices are active per thread and context, not per process: the choices of one run must not affect the next run, or
# another thread that is in the middle of a step. On a CPU, a backward pass runs in the thread that calls it.
_ACTIVE: ContextVar[Mapping[str, int]] = ContextVar("lorakit_choices", default=MappingProxyType({}))


@contextlib.contextmanager
def activate(choices: Mapping[str, int]) -> Iterator[None]:
    """Activate choices in the current thread within a context; a training step must run entirely inside or outside. A
    choice is the slice size of a matmul in rows, 1 for the fp32 method; for attention, 1 is flash and 0 matmuls.
    """
    token = _ACTIVE.set(MappingProxyType(dict(choices)))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _chosen() -> Mapping[str, int]:
    """Return the active choices, or none during compilation, because compiled code would treat them as constants."""
    return {} if torch.compiler.is_compiling() else _ACTIVE.get()


def to_strings(choices: Mapping[str, int]) -> list[str]:
    """Format choices as a sorted list of strings, for checkpoints and logs."""
    return [f"{name}: {value}" for name, value in sorted(choices.items())]


def from_strings(stored: object) -> dict[str, int]:
    """Parse choices from a checkpoint, as formatted by `to_strings`, without malformed entries."""
    pairs = [word.rpartition(": ") for word in stored if isinstance(word, str)] if isinstance(stored, list) else []
    return {name: int(value) for name, _, value in pairs if name and value.isascii() and value.isdigit()}


def matmul(x: Tensor, right: Tensor, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """Compute `x·right` (N, out), or `plus + x·right`, with the active method and without autograd.

    Here, x is (N, in), `right` (in, out) with any strides, in x's dtype or narrower if that is fp32, and `plus`, which
    may be `out`, (out,) or (N, out).
    """
    if x.dtype == torch.float32 and right.dtype in NARROW:
        return matmul_in_fp32(x, right, out, plus)
    chosen = _chosen()
    if not chosen or right.device.type != "cpu":
        return _at_once(x, right, out, plus)
    if len(x) >= FEWEST_IN_FP32 and chosen.get(fp32_name(right)):
        return matmul_in_fp32(x, right, out, plus)
    size = chosen.get(matmul_name(len(x), right), 0)
    if 0 < size < len(x):
        return matmul_in_slices(x, right, size, out, plus)
    return _at_once(x, right, out, plus)


def matmul_dtype(rows: int, weights: Sequence[Tensor], dtype: torch.dtype) -> torch.dtype:
    """Return fp32 if the active choices select it for all weights, in both orientations, and `rows` is large enough."""
    chosen = _chosen()
    if not chosen or rows < FEWEST_IN_FP32 or any(W.dtype != dtype or W.device.type != "cpu" for W in weights):
        return dtype
    through = all(chosen.get(fp32_name(W)) and chosen.get(fp32_name(W.t())) for W in weights)
    return torch.float32 if through else dtype


def matmul_in_slices(
    x: Tensor, right: Tensor, size: int, out: Tensor | None = None, plus: Tensor | None = None
) -> Tensor:
    """Compute `matmul` (N, out) for x (N, in) and `right` (in, out), in slices of at most `size` rows."""
    if out is None:
        out = x.new_empty(len(x), right.shape[1])
    for part in slices(len(x), size):
        room = out[part]
        added = room if plus is out else plus if plus is None or plus.dim() == 1 else plus[part]
        _at_once(x[part], right, room, added)
    return out


def matmul_in_fp32(x: Tensor, right: Tensor, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """Compute `matmul` (N, out) with upcast operands, rounding the sum once, or not at all if x (N, in) is fp32."""
    if out is None:
        out = x.new_empty(len(x), right.shape[1])
    columns, inner = (_blocks(size) for size in right.shape[::-1])
    widened = [x[:, k].float() for k in inner] if len(columns) > 1 else None
    for at in columns:
        total = None if plus is None else plus[..., at].float()
        room = out[:, at] if out.dtype == torch.float32 and plus is not out else total
        for number, k in enumerate(inner):
            rows, factor = x[:, k].float() if widened is None else widened[number], right[k, at].float()
            total = room = _at_once(rows, factor, room if room is None or room.dim() == 2 else None, total)
        if out.dtype != torch.float32:
            out[:, at].copy_(total)  # type: ignore[arg-type]  # no weight is empty
    return out


def _blocks(size: int) -> list[slice]:
    return [slice(begin, begin + BLOCK) for begin in range(0, size, BLOCK)]


def _at_once(x: Tensor, right: Tensor, out: Tensor | None, plus: Tensor | None) -> Tensor:
    if plus is None:
        return torch.mm(x, right, out=out)
    return plus.addmm_(x, right) if plus is out else torch.addmm(plus, x, right, out=out)


def slices(rows: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` rows, of about equal size, because a short last one would take as long as a full
    one. The size of every slice except the last is a multiple of 16, as `size` must be.
    """
    count = max(-(-rows // size), 1)
    step = max(min(-(-rows // (16 * count)) * 16, size), 1)
    yield from (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def attention_method(q: Tensor, v: Tensor, causal: bool, longest: int, default: str) -> str:
    """Return the `Pattern.method` chosen for q (B, H, T, D), v (B, KV, T, D) and `longest`, or the default."""
    chosen = _chosen()
    if not chosen:
        return default
    name = attention_name((q.shape[1], v.shape[1], q.shape[3]), q.dtype, causal, longest)
    if chosen.get(fp32_choice(name)):
        return "matmul_fp32"
    return ("matmul", "flash")[chosen[name]] if name in chosen else default


def matmul_name(rows: int, right: Tensor) -> str:
    """Return the shape name for multiplying `rows` rows by `right` (in, out), or "" if this shape is not tuned."""
    if not SLICES[0] < rows <= ROWS[-1]:
        return ""
    counted = next(count for count in ROWS if rows <= count)
    return f"product {counted}x{right.shape[0]}x{right.shape[1]} {_stored(right)}"


def fp32_name(right: Tensor) -> str:
    """Return the name of the fp32 choice for matmuls with `right` (in, out) and any number of rows."""
    inner, outer = (min(size, BLOCK) for size in right.shape)
    return fp32_choice(f"product {inner}x{outer} {_stored(right)}")


def fp32_choice(name: str) -> str:
    """Return the name of the fp32 choice for the shape with the given name."""
    return name + IN_FP32


def _stored(right: Tensor) -> str:
    return f"{str(right.dtype)[6:]} by {'rows' if right.stride(1) == 1 else 'columns'}"


def attention_name(heads: tuple[int, int, int], dtype: torch.dtype, causal: bool, longest: int) -> str:
    """Return the shape name of attention with (q heads, k heads, head width), or "" if the length is not tuned."""
    counted = [length for length in LENGTHS if length <= longest < 2 * length]
    if not counted:
        return ""
    seen = "causal" if causal else "full"
    return f"attention {counted[0]} tokens {heads[0]}/{heads[1]}x{heads[2]} {str(dtype)[6:]} {seen}"
