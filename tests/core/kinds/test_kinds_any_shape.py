"""Properties of every kind for generated shapes, ranks, scales, dtypes and names: new, merged, unmerged, routed, saved."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core import (
    attach,
    detach,
    load_adapter,
    merge,
    merged_state_dict,
    route,
    save_adapter,
    sites,
    unmerge,
    use,
)
from lorakit.core.kinds import KINDS, kind_named
from lorakit.core.kinds.kind import takes_values
from lorakit.core.variants import variant_named
from lorakit.core.variants.dora import row_norms
from lorakit.errors import MergeError, RouteError

from ...laws.snapshots import BaseBits, same_bits
from ...laws.tolerances import assert_close
from ...laws.zoo import randomise, run
from ..attachment.test_attachment_properties import DTYPES, QUICK, SIZES

NAMES = st.sampled_from(["default", "weight", "lora_A", "one", "0", "a-b_1"])
Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass(frozen=True)
class Drawn:
    """A module of one kind, named "one", and how it is used.

    Attributes:
        make: Makes it.
        x: Its input, floats in fp32 or ids; the first axis is the rows.
        parameters: Names for `target_parameters`; if empty, the module is the target.
        groups: Groups of a convolution.
        call: What the model makes of it and its input.
    """

    make: Callable[[], nn.Module]
    x: Tensor
    parameters: tuple[str, ...] = ()
    groups: int = 1
    call: Callable[[nn.Module, Tensor], Tensor] = field(default=lambda one, x: one(x))


class Model(nn.Module):
    """Whatever was drawn, called as it wants to be."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.one, self.call = drawn.make(), drawn.call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.one, x)


class Matrices(nn.Module):
    """Experts in one tensor, and a matrix."""

    def __init__(self, experts: int, size: int, out: int) -> None:
        super().__init__()
        self.stack, self.matrix = nn.Parameter(torch.randn(experts, size, out)), nn.Parameter(torch.randn(size, out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,eio->no", x, self.stack) / len(self.stack) + x @ self.matrix


def _linear(draw: Draw, rows: int) -> Drawn:
    size, out, bias = draw(SIZES), draw(SIZES), draw(st.booleans())
    return Drawn(lambda: nn.Linear(size, out, bias=bias), torch.randn(rows, size))


def _conv1d_of_transformers(draw: Draw, rows: int) -> Drawn:
    from transformers.pytorch_utils import Conv1D

    size, out = draw(SIZES), draw(SIZES)
    return Drawn(lambda: Conv1D(out, size), torch.randn(rows, size))


def _embedding(draw: Draw, rows: int) -> Drawn:
    size, out = draw(SIZES), draw(SIZES)
    return Drawn(lambda: nn.Embedding(size, out), torch.randint(0, size, (rows, 3)))


def _convolution(dims: int) -> Callable[[Draw, int], Drawn]:
    module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]

    def draw_one(draw: Draw, rows: int) -> Drawn:
        groups = draw(st.integers(1, 2))
        size, out = (groups * draw(st.integers(1, 3)) for _ in range(2))
        words = {
            "kernel_size": draw(st.integers(1, 3)),
            "stride": draw(st.integers(1, 2)),
            "dilation": draw(st.integers(1, 2)),
            "padding": draw(st.integers(0, 2)),
            "padding_mode": draw(st.sampled_from(["zeros", "circular", "replicate"])),
            "bias": draw(st.booleans()),
        }
        return Drawn(
            lambda: module(size, out, groups=groups, **words), torch.randn(rows, size, *[5] * dims), (), groups
        )

    return draw_one


def _attention(draw: Draw, rows: int) -> Drawn:
    heads, width, bias = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.booleans())
    wide = heads * width
    widths = draw(st.sampled_from([{}, {"kdim": wide + 1, "vdim": wide + 2}]))

    def call(one: nn.Module, x: Tensor) -> Tensor:
        keys, values = (x[..., :size] for size in (widths.get("kdim", wide), widths.get("vdim", wide)))
        out: Tensor = one(x[..., :wide], keys, values)[0]
        return out

    def make() -> nn.Module:
        return nn.MultiheadAttention(wide, heads, bias=bias, batch_first=True, **widths)

    return Drawn(make, torch.randn(rows, 4, wide + 2), call=call)


def _parameters(draw: Draw, rows: int) -> Drawn:
    experts, size, out = draw(st.integers(1, 3)), draw(SIZES), draw(SIZES)
    chosen = draw(st.sampled_from([("one.stack",), ("one.matrix",), ("one.stack", "one.matrix")]))
    return Drawn(lambda: Matrices(experts, size, out), torch.randn(rows, size), chosen)


DRAWN: Mapping[str, Callable[[Draw, int], Drawn]] = {
    "Linear": _linear,
    "Conv1D": _conv1d_of_transformers,
    "Embedding": _embedding,
    "Conv1d": _convolution(1),
    "Conv2d": _convolution(2),
    "Conv3d": _convolution(3),
    "MultiheadAttention": _attention,
    "Parameter": _parameters,
}


def test_every_kind_is_drawn() -> None:
    assert {kind.name for kind in KINDS} == {*DRAWN, "InnerLinear"}  # which comes with MultiheadAttention


def _model(drawn: Drawn, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    return Model(drawn).to(dtype).eval().requires_grad_(False)


def _config(draw: Draw, kind: str, drawn: Drawn) -> LoraConfig:
    gentle = kind == "MultiheadAttention"  # a softmax of large numbers magnifies every rounding
    ways = [
        "plain",
        *["dora"] * variant_named("dora").fits(kind_named(kind)),
        *["bias"] * takes_values(kind_named(kind)),
    ]
    way = draw(st.sampled_from(ways))
    return LoraConfig(
        r=draw(st.integers(1, 6)) * drawn.groups,
        lora_alpha=draw(st.floats(0.1, 2 if gentle else 8)),
        use_rslora=draw(st.booleans()),
        use_dora=way == "dora",
        lora_bias=way == "bias",
        target_modules=[] if drawn.parameters else ["one"],
        target_parameters=list(drawn.parameters) or None,
    )


def _is_conditioned(layer: Any, name: str) -> bool:
    """Return whether no row of W + s·B·A is small compared to W: DoRA divides by its norm, which amplifies rounding."""
    kind, factor = kind_named(layer.kind_name), layer.factor(name)
    W = kind.flat_weight(layer.spec, layer.read())
    rows = row_norms(W, *kind.flat(layer.spec, factor.A, factor.B), factor.scale)
    return bool((W.norm(dim=1) <= 4 * rows).all())


@pytest.mark.costly(cases=4)
@pytest.mark.parametrize("kind", DRAWN)
@QUICK
@given(data=st.data(), dtype=DTYPES, name=NAMES, rows=st.integers(1, 4))
def test_a_site_of_any_shape(kind: str, data: st.DataObject, dtype: torch.dtype, name: str, rows: int) -> None:
    torch.manual_seed(0)
    drawn = DRAWN[kind](data.draw, rows)
    config = _config(data.draw, kind, drawn)
    model = _model(drawn, dtype)
    x = drawn.x.to(dtype) if drawn.x.is_floating_point() else drawn.x
    plain = run(model, x)
    attach(model, config, name, allow=["odd_scale"])
    if not config.use_dora:  # the update is 0.0, and adding it turns an output of -0.0 (some convolutions) into 0.0
        assert same_bits(run(model, x) + 0.0, plain + 0.0)
    randomise(model, name, 1, size=0.2)
    assume(not config.use_dora or all(_is_conditioned(site.layer, name) for site in sites(model)))
    adapted = run(model, x)
    _routes(model, kind, name, x, (adapted, plain), dtype)
    _merges(model, drawn, config, x, adapted, dtype)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder, name)
        before = BaseBits(model).before
        detach(model, name)
        assert same_bits(run(model, x), plain)
        load_adapter(model, folder, name, allow=["odd_scale"])
        assert BaseBits(model).before == before
    with use(model, name):
        assert same_bits(run(model, x), adapted)


def _routes(
    model: nn.Module, kind: str, name: str, x: Tensor, outputs: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    """Each row gets its own answer, or a mixed batch is refused where one weight acts on all rows."""
    chosen = [name if index % 2 == 0 else None for index in range(len(x))]
    with route(model, chosen):
        if len(x) > 1 and kind_named(kind).acts_on == "weight":
            with pytest.raises(RouteError):
                run(model, x)
            return
        mixed = run(model, x)
    for index, row in enumerate(chosen):
        assert_close(mixed[index], outputs[0 if row else 1][index], dtype)


def _merges(model: nn.Module, drawn: Drawn, config: LoraConfig, x: Tensor, adapted: Tensor, dtype: torch.dtype) -> None:
    """Merged is unmerged, in place and as weights for a plain model, and unmerging restores bits; or it is refused."""
    if drawn.groups > 1 or (config.lora_bias and getattr(drawn.make(), "bias", None) is None):
        with pytest.raises(MergeError):
            merge(model)
        assert same_bits(run(model, x), adapted)
        return
    fresh = _model(drawn, dtype)
    fresh.load_state_dict(merged_state_dict(model))
    assert_close(run(fresh, x), adapted, dtype)
    before = BaseBits(model).before
    merge(model)
    assert_close(run(model, x), adapted, dtype)
    unmerge(model)
    assert BaseBits(model).before == before
    assert same_bits(run(model, x), adapted)
