"""Call decoder_layer.h, which computes a whole decoder layer, under the terms of `lorakit.ops.kernels`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.ops.kernels.gateway import Gateway

MOST_LOW_RANKS = 4
"""Largest number of stacks of factors at one linear layer, as in decoder_layer.h."""

LOW_RANK_FIELDS = 4

NormOperands = tuple[Tensor, float, float]
"""Weight (d,), eps and offset of an RMS norm, as for `rms_forward`."""


@dataclass(frozen=True)
class RowLinear:
    """A linear layer with one adapter per row: W (out, in), rows at a distance, bias (out,), and stacks of factors.

    Attributes:
        stacks: A (K, r, in) with the scales, Bt (K, r, out), and the adapter of each row, int64 (B,), −1 for none.
    """

    W: Tensor
    bias: Tensor | None
    stacks: Sequence[tuple[Tensor, Tensor, Tensor]] = ()


@dataclass(frozen=True)
class LayerOperands:
    """The operands of a decoder layer for B rows with T new tokens each.

    Attributes:
        linears: Those of q, k, v, the output of attention, gate, up (None without a gate: the first one is activated)
            and down.
        norms: Before and after attention, before and after the feed-forward block, of q and of k; None if absent.
        act: Index of the activation.
        rotary: Tables cos and sin, (1 or B, T, rot), or None.
        keys, values: Those of all slots, (slots, K, D), which are written.
        write, table, lengths: Slot of each new token, int64 (B·T,), of each position, int64 (B, longest), and the
            number of tokens of each row, including the new ones, int64 (B,).
    """

    linears: Sequence[RowLinear | None]
    norms: Sequence[NormOperands | None]
    act: int
    scale: float
    rotary: tuple[Tensor, Tensor] | None
    keys: Tensor
    values: Tensor
    write: Tensor
    table: Tensor
    lengths: Tensor


class CompiledDecoderLayer:
    """The function of decoder_layer.h, whose bits are those of the separate kernels."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway, self.most_rows = gateway, gateway.linear_rows

    def decoder_layer(self, x: Tensor, given: LayerOperands) -> Tensor:
        """Return the output (B, T, d) of a layer for x (B, T, d), and store the new keys and values.

        Raises:
            ValueError: A tensor is invalid.
        """
        dtype, (rows, tokens, d), pointer = x.dtype, x.shape, self._gateway.pointer
        slots, kv, width = given.keys.shape
        q, k, v, o, first, up, down = given.linears
        assert q is not None and first is not None
        of_q, of_k, inner, longest = q.W.shape[0], kv * width, first.W.shape[0], given.table.shape[-1]
        if not of_k or of_q % of_k:
            raise ValueError(f"q {tuple(q.W.shape)}: the number of heads is not a multiple of that of keys, {kv}")
        sizes = ((d, of_q), (d, of_k), (d, of_k), (of_q, d), (d, inner), (d, inner), (inner, d))
        fields: list[int | None] = []
        for one, (of_input, of_output) in zip((q, k, v, o, first, up, down), sizes, strict=True):
            fields += self._site(one, of_input, of_output, dtype, rows)
        numbers: list[float] = []
        for norm, size in zip(given.norms, (d, d, d, d, width, width), strict=True):
            weight, eps, offset = norm or (None, 0.0, 0.0)
            fields.append(self._gateway.optional("norm", weight, dtype, (size,)))
            numbers += (eps, offset)
        fields += (of_q // width, kv, width, given.act, *self._tables(given, x, width))
        fields += (
            pointer("keys", given.keys, dtype, (slots, kv, width)),
            pointer("values", given.values, dtype, (slots, kv, width)),
            pointer("write", given.write, torch.int64, (rows * tokens,), within=(0, slots - 1)),
            pointer("table", given.table, torch.int64, (rows, longest), within=(0, slots - 1)),
            pointer("lengths", given.lengths, torch.int64, (rows,), within=(tokens, longest)),
            longest,
        )
        y = torch.empty_like(x)
        layer = (ctypes.c_int64 * len(fields))(*[field or 0 for field in fields])
        floats = (ctypes.c_float * (len(numbers) + 1))(*numbers, given.scale)
        inputs = ctypes.addressof(layer), ctypes.addressof(floats), pointer("x", x, dtype, x.shape)
        self._gateway.call("decoder_layer", dtype, d * d, *inputs, rows, tokens, pointer("y", y, dtype, y.shape))
        return y

    def _site(
        self, one: RowLinear | None, of_input: int, of_output: int, dtype: torch.dtype, rows: int
    ) -> list[int | None]:
        """Return the fields of one linear layer."""
        pointer = self._gateway.pointer
        if one is None:
            return [0] * (6 + LOW_RANK_FIELDS * MOST_LOW_RANKS)
        apart = one.W.stride(0)
        if len(one.stacks) > MOST_LOW_RANKS or apart < of_input:
            raise ValueError(f"W: expected rows at a distance, with at most {MOST_LOW_RANKS} stacks of factors")
        weight = pointer("W", one.W, dtype, (of_output, of_input), (apart, 1))
        bias = self._gateway.optional("bias", one.bias, dtype, (of_output,))
        fields: list[int | None] = [weight, bias, apart, of_input, of_output, len(one.stacks)]
        for A, Bt, index in one.stacks:
            adapters, rank, _ = A.shape
            fields += (
                pointer("A", A, dtype, (adapters, rank, of_input)),
                pointer("Bt", Bt, dtype, (adapters, rank, of_output)),
                pointer("index", index, torch.int64, (rows,), within=(-1, adapters - 1)),
                rank,
            )
        return fields + [0] * (LOW_RANK_FIELDS * (MOST_LOW_RANKS - len(one.stacks)))

    def _tables(self, given: LayerOperands, x: Tensor, width: int) -> list[int | None]:
        """Return the fields of the rotary tables."""
        if given.rotary is None:
            return [0, 0, 0, 0]
        cos, sin = given.rotary
        rows, tokens, _ = x.shape
        batch, rot = cos.shape[0], cos.shape[-1]
        if rot % 2 or rot > width or batch not in (1, rows):
            raise ValueError(f"cos {tuple(cos.shape)}: expected (1 or B, T, rot) with rot even, at most {width}")
        shape = (batch, tokens, rot)
        tables = (self._gateway.pointer(name, table, x.dtype, shape) for name, table in (("cos", cos), ("sin", sin)))
        return [*tables, batch * tokens, rot]
