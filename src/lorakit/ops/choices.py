"""Autotuned kernel choices: which method to use for an operation of a given shape.

A choice maps the name of a shape to a method that was faster than the default when `lorakit.speed.tuning` measured both
on this machine. A shape without an active choice uses the default method. All methods give the same results up to
rounding.

The default can be slow for two reasons. First, some libraries compute certain matmul shapes at half speed if given all
rows at once, but at full speed if given slices of rows. oneDNN does this with bf16 on processors with matrix units.
Second, processors with bf16 dot products but no matrix units run bf16 matmuls more slowly than fp32 matmuls. On these
processors, the fp32 method upcasts the operands block by block and rounds the sum only once, as a bf16 matmul does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType

import torch
from torch import Tensor

ROWS = (768, 1024, 1280, 1536, 2048, 3072, 4096)
"""Row counts for which matmuls are measured. Any other count uses the result for the next larger count in this list.
There are two exceptions: a matmul with at most `SLICES[0]` rows, or with more rows than the largest count, is computed
all at once.
"""

SLICES = (512, 256)
"""Slice sizes (in rows) that autotuning may choose; the default is to compute all rows at once."""

FEWEST_IN_FP32 = 128
"""Minimum number of rows for a matmul in fp32; with fewer rows, upcasting the weight costs more than it saves."""

NARROW = (torch.bfloat16, torch.float16)
"""Dtypes whose matmuls may be slower than fp32 matmuls."""

IN_FP32 = " through fp32"  # prose-check: ok
"""Suffix that marks choices of the fp32 method ("fp32 choices"). Their names are stored in checkpoints and in the
cache.
"""

BLOCK = 2048
"""Height and width of the blocks in which a weight is upcast. Only one block is upcast at a time, so that the output
head is never copied to fp32 in full.
"""

LENGTHS = (256, 512, 1024, 2048)
"""Sequence lengths, in tokens, for which attention is measured. A batch uses the result for the largest of these
lengths that does not exceed its longest sequence.
"""

# Choices are active per thread and context, not per process: the choices of one run must not affect the next run, or
# another thread that is in the middle of a step. On a CPU, a backward pass runs in the thread that calls it.
_ACTIVE: ContextVar[Mapping[str, int]] = ContextVar("lorakit_choices", default=MappingProxyType({}))


@contextlib.contextmanager
def activate(choices: Mapping[str, int]) -> Iterator[None]:
    """Return a context manager that activates choices in the current thread.

    Each training step must run either entirely inside or entirely outside the context.

    Args:
        choices: Dict from shape name to value. For a matmul, the value is the slice size in rows; for an fp32
            choice, it is 1; for attention, it is 1 for the flash kernel and 0 for matmuls.
    """
    token = _ACTIVE.set(MappingProxyType(dict(choices)))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _chosen() -> Mapping[str, int]:
    """Return the active choices.

    During compilation, return an empty dict, because the compiled code would treat the choices as constants.
    """
    return {} if torch.compiler.is_compiling() else _ACTIVE.get()


def to_strings(choices: Mapping[str, int]) -> list[str]:
    """Format choices as a sorted list of strings, for checkpoints and logs.

    Args:
        choices: Dict from shape name to value, as for `activate`.
    """
    return [f"{name}: {value}" for name, value in sorted(choices.items())]


def from_strings(stored: object) -> dict[str, int]:
    """Parse choices formatted by `to_strings`. Malformed entries are ignored.

    Args:
        stored: Value read from a checkpoint.
    """
    pairs = [word.rpartition(": ") for word in stored if isinstance(word, str)] if isinstance(stored, list) else []
    return {name: int(value) for name, _, value in pairs if name and value.isascii() and value.isdigit()}


def matmul(x: Tensor, right: Tensor, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """Compute `x·right` (N, out), or `plus + x·right`, with the active method and without autograd.

    Args:
        x: Input (N, in).
        right: Weight (in, out) with any strides. It has the dtype of x, or a narrower dtype if x is fp32.
        out: Output tensor (N, out); None allocates it.
        plus: Tensor to add, (out,) or (N, out); may be `out`.
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
    """Return fp32 if the active choices select it for all weights and `rows` is large enough; otherwise return `dtype`.

    Args:
        rows: Number of input rows.
        weights: Weights in either orientation. Both orientations are looked up, because the forward pass uses one
            orientation and the backward pass uses the other.
        dtype: Dtype of the input.
    """
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
    """Compute `matmul` (N, out) for x (N, in) and `right` (in, out) with upcast operands, rounding the sum only once.

    If x is fp32, `plus` and the result are fp32 too.
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
    """Yield slices of about equal size, with at most `size` rows each.

    Equal sizes avoid a short last slice, which would take just as long as a full slice. The size of every slice except
    the last is a multiple of 16.

    Args:
        rows: Total number of rows.
        size: Maximum number of rows in a slice, a multiple of 16.
    """
    count = max(-(-rows // size), 1)
    step = max(min(-(-rows // (16 * count)) * 16, size), 1)
    yield from (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def attention_method(q: Tensor, v: Tensor, causal: bool, longest: int, default: str) -> str:
    """Return the attention method to use for these tensors: any value of `Pattern.method` except "auto".

    Choices are measured without a window, softcap, bias, dropout or sinks, and apply with these too.

    Args:
        q: Queries (B, H, T, D).
        v: Values (B, KV, T, D).
        causal: Whether a token sees only itself and earlier tokens.
        longest: Length of the longest sequence in tokens.
        default: Method to return if there is no active choice.
    """
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
    """Return the shape name of an attention computation, or "" if sequences of this length are not tuned.

    `heads` contains the number of q heads, the number of k heads, and the head width.
    """
    counted = [length for length in LENGTHS if length <= longest < 2 * length]
    if not counted:
        return ""
    seen = "causal" if causal else "full"
    return f"attention {counted[0]} tokens {heads[0]}/{heads[1]}x{heads[2]} {str(dtype)[6:]} {seen}"
