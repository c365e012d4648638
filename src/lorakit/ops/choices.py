"""Where one thing can be computed in several ways: which way is taken, by shape.

The usual way is taken unless choices are acting: numbers by the name of a shape, as `lorakit.speed.tuning` measured
them on this machine. What is acting names only shapes for which another way is faster, so where nothing is gained
there is nothing to look up. The ways agree within roundings.

Some libraries multiply some shapes at half speed with all rows at once (oneDNN, bf16, on processors with matrix units)
and at full speed some rows at a time. Some processors multiply bf16 more slowly than fp32 (those that know its dot
products and have no matrix units for it): there operands are widened block by block, and the sum is rounded once, as a
product in bf16 rounds it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType

import torch
from torch import Tensor

ROWS = (768, 1024, 1280, 1536, 2048, 3072, 4096)
"""Rows of a product that are measured; one of other size goes as the next larger. Fewer than the second largest slice
or more than the last go all at once."""

SLICES = (512, 256)
"""Rows at a time that may be chosen instead of all."""

FEWEST_IN_FP32 = 128
"""Rows from which a product may go through fp32: below, widening the weight costs more than is gained."""

NARROW = (torch.bfloat16, torch.float16)
"""Dtypes whose products may be slower than fp32's."""

BLOCK = 2048
"""Rows and columns of a weight that are widened at a time, so that the head's fp32 image is never there as a whole."""

LENGTHS = (256, 512, 1024, 2048)
"""Tokens of attention's longest sequence that are measured; another goes as the next smaller."""

# Acting in a block of one thread and not in a process: a run's choices must not reach the next run, nor another thread
# amid its step. A backward on CPU runs in the thread that asks for it.
_ACTING: ContextVar[Mapping[str, int]] = ContextVar("lorakit_choices", default=MappingProxyType({}))


@contextlib.contextmanager
def acting(choices: Mapping[str, int]) -> Iterator[None]:
    """A block in which these choices act on what this thread computes; hold it open over whole steps.

    Args:
        choices: Name of a shape -> rows at a time of a product; 1, a product or attention through fp32; 1 or 0,
            attention by flash or by products.
    """
    token = _ACTING.set(MappingProxyType(dict(choices)))
    try:
        yield
    finally:
        _ACTING.reset(token)


def in_force() -> dict[str, int]:
    """The choices that act here, for a checkpoint: with the same ones, the same kernels give the same bits."""
    return dict(_ACTING.get())


def _chosen() -> Mapping[str, int]:
    """The choices that act on what is computed here: none under a compiler, which would take them for constants."""
    return {} if torch.compiler.is_compiling() else _ACTING.get()


def words(choices: Mapping[str, int]) -> list[str]:
    """Choices as a sorted list of words, for a checkpoint and a person.

    Args:
        choices: As `acting` takes them.
    """
    return [f"{name}: {way}" for name, way in sorted(choices.items())]


def from_words(told: object) -> dict[str, int]:
    """The choices that `words` told; anything else in the list is passed over.

    Args:
        told: What stands in a checkpoint.
    """
    pairs = [word.rpartition(": ") for word in told if isinstance(word, str)] if isinstance(told, list) else []
    return {name: int(way) for name, _, way in pairs if name and way.isascii() and way.isdigit()}


def product(x: Tensor, right: Tensor, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """x·right, or plus + x·right, (N, out), the way that was chosen; no gradient is recorded.

    Args:
        x: (N, in).
        right: (in, out), in any strides; in the dtype of x, or narrower where x is fp32.
        out: Where the result is written, (N, out); None makes it.
        plus: (out,) or (N, out); it may be `out`.
    """
    if x.dtype == torch.float32 and right.dtype in NARROW:
        return in_fp32(x, right, out, plus)
    chosen = _chosen()
    if not chosen or right.device.type != "cpu":
        return _at_once(x, right, out, plus)
    if len(x) >= FEWEST_IN_FP32 and chosen.get(fp32_name(right)):
        return in_fp32(x, right, out, plus)
    size = chosen.get(product_name(len(x), right), 0)
    if 0 < size < len(x):
        return in_slices(x, right, size, out, plus)
    return _at_once(x, right, out, plus)


def dtype_of_products(rows: int, weights: Sequence[Tensor], dtype: torch.dtype) -> torch.dtype:
    """fp32 where all products of so many rows of a dtype with these weights go through it, else the dtype.

    Args:
        rows: Rows of the input.
        weights: Either way round, as products with both are asked about: one goes forward, the other back.
        dtype: Of the rows.
    """
    chosen = _chosen()
    if not chosen or rows < FEWEST_IN_FP32 or any(W.dtype != dtype or W.device.type != "cpu" for W in weights):
        return dtype
    through = all(chosen.get(fp32_name(W)) and chosen.get(fp32_name(W.t())) for W in weights)
    return torch.float32 if through else dtype


def in_slices(x: Tensor, right: Tensor, size: int, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """`product` of x (N, in) and right (in, out) -> (N, out), with about `size` rows at a time."""
    if out is None:
        out = x.new_empty(len(x), right.shape[1])
    for part in slices(len(x), size):
        room = out[part]
        added = room if plus is out else plus if plus is None or plus.dim() == 1 else plus[part]
        _at_once(x[part], right, room, added)
    return out


def in_fp32(x: Tensor, right: Tensor, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """`product` of x (N, in) and right (in, out) -> (N, out), of operands that are widened and a sum rounded once.

    Where x is fp32 already, so are `plus` and the result.
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
    """Slices of about equal size, at most `size` and multiples of 16: a last one of few rows would cost as a full one.

    Args:
        rows: Rows in all.
        size: A multiple of 16.
    """
    count = max(-(-rows // size), 1)
    step = min(-(-rows // (16 * count)) * 16, size)
    yield from (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def way_of_attention(q: Tensor, v: Tensor, causal: bool, longest: int, usual: str) -> str:
    """The way of attention over such tensors: a `Pattern.way`, and not "auto".

    Args:
        q: (B, H, T, D).
        v: (B, KV, T, D).
        causal: Whether a token sees only what is before it.
        longest: Tokens of the longest sequence.
        usual: The way where nothing was chosen.
    """
    chosen = _chosen()
    if not chosen:
        return usual
    name = attention_name((q.shape[1], v.shape[1], q.shape[3]), q.dtype, causal, longest)
    if chosen.get(through_fp32(name)):
        return "products in fp32"
    return ("products", "flash")[chosen[name]] if name in chosen else usual


def product_name(rows: int, right: Tensor) -> str:
    """The name of a product of so many rows with right (in, out); "" where there is no choice."""
    if not SLICES[0] < rows <= ROWS[-1]:
        return ""
    counted = next(count for count in ROWS if rows <= count)
    return f"product {counted}x{right.shape[0]}x{right.shape[1]} {_stored(right)}"


def fp32_name(right: Tensor) -> str:
    """The name of products of any number of rows with right (in, out), for whether they go through fp32."""
    inner, outer = (min(size, BLOCK) for size in right.shape)
    return through_fp32(f"product {inner}x{outer} {_stored(right)}")


def through_fp32(name: str) -> str:
    """The name of a shape for whether it goes through fp32."""
    return f"{name} through fp32"


def _stored(right: Tensor) -> str:
    return f"{str(right.dtype)[6:]} by {'rows' if right.stride(1) == 1 else 'columns'}"


def attention_name(heads: tuple[int, int, int], dtype: torch.dtype, causal: bool, longest: int) -> str:
    """The name of attention over heads of q, heads of k and their width; "" where there is no choice."""
    counted = [length for length in LENGTHS if length <= longest < 2 * length]
    if not counted:
        return ""
    seen = "causal" if causal else "full"
    return f"attention {counted[0]} tokens {heads[0]}/{heads[1]}x{heads[2]} {str(dtype)[6:]} {seen}"
