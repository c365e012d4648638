"""Autotuned kernel choices: which method computes an operation, by shape.

The default method is used unless choices are active: values by shape name, as `lorakit.speed.tuning` measured them on
this machine. Active choices list only shapes for which another method is faster. Methods agree up to rounding.

Some libraries run some matmul shapes at half speed on all rows at once, and at full speed on slices of rows (oneDNN,
bf16, on processors with matrix units). Some processors run bf16 matmuls more slowly than fp32 ones (those with bf16 dot
products but no matrix units): there operands are upcast block by block and the sum is rounded once, as in a bf16
matmul.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType

import torch
from torch import Tensor

ROWS = (768, 1024, 1280, 1536, 2048, 3072, 4096)
"""Row counts of a matmul that are measured; other counts use the next larger one. Below the second largest slice and
above the largest count all rows are computed at once.
"""

SLICES = (512, 256)
"""Slice sizes in rows that may be chosen instead of all rows."""

FEWEST_IN_FP32 = 128
"""Minimum rows for a matmul in fp32: below, upcasting the weight costs more than it saves."""

NARROW = (torch.bfloat16, torch.float16)
"""Dtypes whose matmuls may be slower than fp32's."""

IN_FP32 = " through fp32"  # prose-check: ok
"""Suffix of the names of fp32 choices, which checkpoints and the cache contain."""

BLOCK = 2048
"""Rows and columns of a weight that are upcast at a time, so that no full fp32 copy of the head exists."""

LENGTHS = (256, 512, 1024, 2048)
"""Lengths in tokens of the longest sequence that are measured for attention; others use the next smaller one."""

# Per thread and context, not per process: the choices of one run must not affect the next run, or another thread in the
# middle of a step. A CPU backward runs in the thread that calls it.
_ACTIVE: ContextVar[Mapping[str, int]] = ContextVar("lorakit_choices", default=MappingProxyType({}))


@contextlib.contextmanager
def activate(choices: Mapping[str, int]) -> Iterator[None]:
    """Activate choices for this thread within a context; keep it open over whole steps.

    Args:
        choices: Shape name -> slice size in rows of a matmul; 1 for a matmul or attention in fp32; 1 or 0 for attention
            by flash or by matmuls.
    """
    token = _ACTIVE.set(MappingProxyType(dict(choices)))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _chosen() -> Mapping[str, int]:
    """Return the active choices; none while compiling, since a compiler would treat them as constants."""
    return {} if torch.compiler.is_compiling() else _ACTIVE.get()


def to_strings(choices: Mapping[str, int]) -> list[str]:
    """Format choices as a sorted list of strings, for checkpoints and logs.

    Args:
        choices: As for `activate`.
    """
    return [f"{name}: {value}" for name, value in sorted(choices.items())]


def from_strings(stored: object) -> dict[str, int]:
    """Parse the choices that `to_strings` wrote; other entries are ignored.

    Args:
        stored: The value read from a checkpoint.
    """
    pairs = [word.rpartition(": ") for word in stored if isinstance(word, str)] if isinstance(stored, list) else []
    return {name: int(value) for name, _, value in pairs if name and value.isascii() and value.isdigit()}


def matmul(x: Tensor, right: Tensor, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """Compute x·right, or plus + x·right, (N, out), with the active method; without autograd.

    Args:
        x: (N, in).
        right: (in, out), any strides; in the dtype of x, or narrower if x is fp32.
        out: Output tensor (N, out); None allocates it.
        plus: (out,) or (N, out); may be `out`.
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
    """Return fp32 if matmuls of `rows` rows with all these weights run in fp32, else `dtype`.

    Args:
        rows: Rows of the input.
        weights: Weights in either orientation; forward and backward use both, so both are looked up.
        dtype: Dtype of the rows.
    """
    chosen = _chosen()
    if not chosen or rows < FEWEST_IN_FP32 or any(W.dtype != dtype or W.device.type != "cpu" for W in weights):
        return dtype
    through = all(chosen.get(fp32_name(W)) and chosen.get(fp32_name(W.t())) for W in weights)
    return torch.float32 if through else dtype


def matmul_in_slices(
    x: Tensor, right: Tensor, size: int, out: Tensor | None = None, plus: Tensor | None = None
) -> Tensor:
    """Compute `matmul` of x (N, in) and right (in, out) -> (N, out), about `size` rows at a time."""
    if out is None:
        out = x.new_empty(len(x), right.shape[1])
    for part in slices(len(x), size):
        room = out[part]
        added = room if plus is out else plus if plus is None or plus.dim() == 1 else plus[part]
        _at_once(x[part], right, room, added)
    return out


def matmul_in_fp32(x: Tensor, right: Tensor, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """Compute `matmul` of x (N, in) and right (in, out) -> (N, out) with upcast operands, rounding the sum once.

    If x is fp32, so are `plus` and the result.
    """
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
    """Yield slices of about equal size, at most `size` and multiples of 16: a short last slice would cost as much as a
    full one.

    Args:
        rows: Total rows.
        size: A multiple of 16.
    """
    count = max(-(-rows // size), 1)
    step = max(min(-(-rows // (16 * count)) * 16, size), 1)
    yield from (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def attention_method(q: Tensor, v: Tensor, causal: bool, longest: int, default: str) -> str:
    """Return the attention method for these tensors: a `Pattern.method` except "auto".

    Args:
        q: (B, H, T, D).
        v: (B, KV, T, D).
        causal: Whether a token sees only itself and earlier tokens.
        longest: Tokens of the longest sequence.
        default: The method without an active choice.
    """
    chosen = _chosen()
    if not chosen:
        return default
    name = attention_name((q.shape[1], v.shape[1], q.shape[3]), q.dtype, causal, longest)
    if chosen.get(fp32_choice(name)):
        return "matmul_fp32"
    return ("matmul", "flash")[chosen[name]] if name in chosen else default


def matmul_name(rows: int, right: Tensor) -> str:
    """Return the name of a matmul of `rows` rows with right (in, out), or "" if it is not tuned."""
    if not SLICES[0] < rows <= ROWS[-1]:
        return ""
    counted = next(count for count in ROWS if rows <= count)
    return f"product {counted}x{right.shape[0]}x{right.shape[1]} {_stored(right)}"


def fp32_name(right: Tensor) -> str:
    """Return the name under which matmuls with right (in, out), of any number of rows, are tuned for fp32."""
    inner, outer = (min(size, BLOCK) for size in right.shape)
    return fp32_choice(f"product {inner}x{outer} {_stored(right)}")


def fp32_choice(name: str) -> str:
    """Return the name of a shape's fp32 choice."""
    return name + IN_FP32


def _stored(right: Tensor) -> str:
    return f"{str(right.dtype)[6:]} by {'rows' if right.stride(1) == 1 else 'columns'}"


def attention_name(heads: tuple[int, int, int], dtype: torch.dtype, causal: bool, longest: int) -> str:
    """Return the name of attention over (heads of q, heads of k, width), or "" if it is not tuned."""
    counted = [length for length in LENGTHS if length <= longest < 2 * length]
    if not counted:
        return ""
    seen = "causal" if causal else "full"
    return f"attention {counted[0]} tokens {heads[0]}/{heads[1]}x{heads[2]} {str(dtype)[6:]} {seen}"
