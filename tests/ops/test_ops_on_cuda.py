"""Every operation on a device compared with its reference; without a device, Triton's kernels are interpreted on a CPU.

On a device in fp32 and bf16, by kernels, cuBLAS and flash. Interpreted in fp32 only, because bf16 is wrong there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lorakit.ops import attention, attention_block, cross_entropy, dropout, linear, mlp, norm, rotary, segments
from lorakit.ops import reference as references
from lorakit.ops.activation import ACTIVATIONS, activation
from lorakit.ops.adapted import Adapted, LowRank
from lorakit.ops.attention_block import SelfAttention
from lorakit.ops.attention_pattern import Pattern
from lorakit.ops.cross_entropy import Head
from lorakit.ops.kernels import compiled, kernels_for
from lorakit.ops.kernels.building import SWITCH
from lorakit.ops.norm import Norm
from lorakit.ops.rotary import Rotary

from .differentiable import attention as differentiable

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the interpreter's exp
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Relative norm of the difference from double precision: of sums in fp32; of some roundings to bf16."""
N, D, F = 24, 32, 48


class Place(NamedTuple):
    """Device and dtype of the tensors."""

    device: str
    dtype: torch.dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(self.device, self.dtype)

    def close(self, found: Tensor, truth: Tensor) -> None:
        truth = truth.detach().double()
        error = float((found.detach().double() - truth).norm() / truth.norm().clamp_min(1e-30))
        assert found.device.type == self.device and error < BOUNDS[self.dtype], f"{error:.2e} of the truth"


ON_DEVICE = [
    pytest.param(("cuda", dtype), marks=pytest.mark.gpu, id=f"cuda-{str(dtype)[6:]}")
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.fixture(params=[*ON_DEVICE, pytest.param(("cpu", torch.float32), id="interpreted")])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    pytest.importorskip("triton", reason="the triton package is not installed: pip install 'lorakit[triton]'")
    from lorakit.ops.kernels import triton

    if os.environ.get(SWITCH, "").lower() == "off":
        pytest.skip("the kernels are turned off")
    device, dtype = request.param
    if device == "cpu":
        if torch.cuda.is_available():
            pytest.skip("there is a device, so nothing is interpreted")
        monkeypatch.setattr(compiled, "kernels", lambda: triton.kernels(torch.device("cpu")))
    torch.manual_seed(0)
    made = Place(device, dtype)
    kernels = kernels_for(made(1))
    assert type(kernels).__name__ == "TritonKernels", triton.failure_on(made(1).device)
    yield made


def in_double(thing: Any) -> Any:
    """Convert a tensor, or an object that holds some, to double precision; leaves keep requiring gradients."""
    if isinstance(thing, Tensor):
        return thing.detach().double().requires_grad_(thing.requires_grad) if thing.is_floating_point() else thing
    if isinstance(thing, tuple) and not hasattr(thing, "_fields"):
        return tuple(in_double(one) for one in thing)
    if isinstance(thing, (Adapted, LowRank, Norm, Rotary, Head, SelfAttention, Pattern)):
        return type(thing)(**{name: in_double(value) for name, value in vars(thing).items()})
    return thing


def adapted(target: Place, out: int, width: int, p: float = 0.0, bias: bool = False) -> Adapted:
    A, B = (target(*shape).float().requires_grad_() for shape in ((4, width), (out, 4)))
    low = LowRank(A, B, 0.5, p)
    return Adapted(target(out, width, scale=width**-0.5), target(out) if bias else None, low)


def leaves_of(*modules: Adapted) -> list[Tensor]:
    return [t for t in linear.factors(modules) if t is not None]


def compare(target: Place, found: Sequence[Tensor], truths: Sequence[Tensor], ours: Any, theirs: Any) -> None:
    """Return values, and the gradients of every leaf for one random cotangent per output."""
    dys = [torch.randn_like(y) for y in found]
    for y, truth in zip(found, truths, strict=True):
        target.close(y, truth)
    made = torch.autograd.grad(found, ours, dys)
    wanted = torch.autograd.grad(truths, theirs, [dy.double() for dy in dys])
    for grad, truth in zip(made, wanted, strict=True):
        target.close(grad, truth)


def masks_of(x: Tensor, group: Sequence[Adapted], seed: int) -> list[Tensor | None]:
    """Return the dropout mask of each module for x with this seed."""
    torch.manual_seed(seed)
    masks: list[Tensor | None] = []
    for module in group:
        assert module.low is not None
        if module.low.p == 0:
            masks.append(None)
            continue
        record = dropout.draw(x, module.low.p)
        mask = torch.ones(x.numel(), device=x.device)
        mask[dropout.positions(record, x.numel(), module.low.p, x.device)] = 0
        masks.append(mask.view(x.shape))
    return masks


# ---- each operation


@pytest.mark.parametrize("kind", ["rms", "rms from zero", "layer"])
def test_norm(target: Place, kind: str) -> None:
    x, w = target(2, N, D).requires_grad_(), target(D)
    own = Norm("layer", w, target(D), 1e-5) if kind == "layer" else Norm("rms", w, None, 1e-5, float(kind != "rms"))
    double = in_double(x)
    compare(target, [norm.normalize(x, own)], [references.norm(double, in_double(own))], [x], [double])


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_mlp(target: Place, act: str, gated: bool) -> None:
    x, own = target(2, N, D).requires_grad_(), Norm("rms", target(D), None, 1e-5)
    inner = tuple(adapted(target, F, D) for _ in range(2 if gated else 1))
    down = adapted(target, D, F)
    y = mlp.mlp(x, mlp.Form(inner, down, activation(act), own, True))
    double, modules = in_double(x), in_double((*inner, down))
    form = mlp.Form(modules[:-1], modules[-1], activation(act), in_double(own), True)
    compare(target, [y], [references.mlp(double, form)], [x, *leaves_of(*inner, down)], [double, *leaves_of(*modules)])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_linears(target: Place, p: float) -> None:
    x = target(2, N, D).requires_grad_()
    group = (adapted(target, F, D, p, bias=True), adapted(target, D, D), adapted(target, D, D, p))
    masks = masks_of(x.detach(), group, 5)
    torch.manual_seed(5)
    ys = linear.linears(x, group)
    double, same = in_double(x), in_double(group)
    compare(target, ys, references.linear(double, same, masks), [x, *leaves_of(*group)], [double, *leaves_of(*same)])


def test_rotary(target: Place) -> None:
    x, turn = target(2, N, 4, 16), Rotary(target(N, 8), target(N, 8))
    double = in_double(x.requires_grad_())
    y, truth = rotary.rotated(x.detach(), turn), references.rotary(double.transpose(1, 2), in_double(turn))
    target.close(y.transpose(1, 2), truth)
    (wanted,) = torch.autograd.grad(truth, double, in_double(y.transpose(1, 2)))
    target.close(rotary.rotate_back_(y, turn), wanted)


PATTERNS = {
    "causal": Pattern(),
    "full": Pattern(causal=False, scale=0.2),
    "window": Pattern(window=5),
    "packed": Pattern(segments=(5, 1, N - 6)),
    "packed, window": Pattern(segments=(9, N - 9), window=4),
    "softcap": Pattern(softcap=2.0),
    "packed, softcap": Pattern(segments=(9, N - 9), softcap=2.0),
}


@pytest.mark.costly
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2)])
def test_attention(target: Place, name: str, heads: int, kv: int) -> None:
    given = [target(2, N, n, 16).transpose(1, 2).requires_grad_() for n in (heads, kv, kv)]
    doubles = [in_double(t) for t in given]
    out = differentiable(*given, PATTERNS[name])
    compare(target, [out], [references.attention(*doubles, PATTERNS[name])], given, doubles)


@pytest.mark.parametrize("name", PATTERNS)
def test_attention_with_sinks(target: Place, name: str) -> None:
    given = [target(2, N, n, 16).transpose(1, 2).requires_grad_() for n in (4, 2, 2)]
    doubles, pattern = [in_double(t) for t in given], replace(PATTERNS[name], sinks=target(4))
    out = differentiable(*given, pattern)
    compare(target, [out], [references.attention(*doubles, pattern)], given, doubles)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [PATTERNS["causal"], PATTERNS["window"], PATTERNS["packed"]])
def test_flash_is_taken_on_a_device(target: Place, pattern: Pattern) -> None:
    q = target(2, 4, N, 64)
    assert attention.chosen(q, q, pattern) == ("flash" if target.dtype == torch.bfloat16 else "matmul")


@pytest.mark.costly
@pytest.mark.parametrize("name", ["causal", "packed, window"])
@pytest.mark.parametrize("fused", [True, False], ids=["one projection", "three"])
def test_attention_block(target: Place, name: str, fused: bool) -> None:
    x, heads, kv, width = target(2, N, D).requires_grad_(), 4, 2, 16
    sizes = [heads * width, kv * width, kv * width]
    inputs = tuple(adapted(target, out, D) for out in ([sum(sizes)] if fused else sizes))
    own = None if fused else Norm("rms", target(width), None, 1e-5)
    block = SelfAttention(inputs, adapted(target, D, sizes[0]), width, kv, Norm("rms", target(D), None, 1e-5), own, own)
    turn = Rotary(target(N, width), target(N, width))
    y = attention_block.attention_block(x, block, PATTERNS[name], turn, residual=True)
    double, same = in_double(x), in_double(block)
    truth = references.attention_block(double, same, PATTERNS[name], in_double(turn), True)
    compare(target, [y], [truth], [x, *leaves_of(*block.projections)], [double, *leaves_of(*same.projections)])


@pytest.mark.parametrize("labels_on", ["cpu", "device"])
@pytest.mark.parametrize("words", [{}, {"scale": 0.3}, {"softcap": 1.5, "scale": 1.2}], ids=["plain", "scale", "cap"])
def test_loss(target: Place, words: dict[str, float], labels_on: str) -> None:
    h, head = target(N, D).requires_grad_(), Head(target(61, D), target(61), **words)
    labels = torch.randint(0, 61, (N,))
    labels[::3] = -100
    double = in_double(h)
    truth = references.cross_entropy(double, in_double(head), labels.to(target.device))
    loss = cross_entropy.linear_cross_entropy(
        h, head, labels.to(target.device if labels_on == "device" else "cpu"), chunk=5
    )
    target.close(loss, truth)
    target.close(*(torch.autograd.grad(y, x)[0] for y, x in ((loss, h), (truth, double))))


def test_dropout(target: Place) -> None:
    """The fraction, the scale, and the same elements in the backward; only the seed is saved."""
    x = torch.ones(200, 300, device=target.device, dtype=target.dtype).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        y = dropout.dropout(x, 0.2)
    assert kept == [1]
    assert set(y.unique().tolist()) == {0.0, 1.25}
    assert abs(float((y == 0).double().mean()) - 0.2) < 5 * (0.16 / 60_000) ** 0.5
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, y)


def test_weights_that_drop(target: Place) -> None:
    """Attention dropout, with the weights visible through a unit v."""
    q, k = target(1, 2, N, 16), target(1, 2, N, 16)
    unit = torch.eye(N).to(target.device, target.dtype).expand(1, 2, -1, -1)
    torch.manual_seed(3)
    kept = differentiable(q, k, unit, Pattern(dropout=0.3)) != 0
    given = [t.requires_grad_() for t in (q, k, target(1, 2, N, 16))]
    doubles = [in_double(t) for t in given]
    torch.manual_seed(3)
    out = differentiable(*given, Pattern(dropout=0.3))
    truth = references.attention(*doubles, Pattern(dropout=0.3), kept)
    compare(target, [out], [truth], given, doubles)


@pytest.mark.parametrize("method", ["masked", "rows", "sorted"])
def test_segmented(target: Place, method: Any) -> None:
    x = target(6, 3, D).requires_grad_()
    A, B = target(3, 4, D).requires_grad_(), target(3, F, 4).requires_grad_()
    scales, index = torch.tensor([0.5, 1.0, 2.0], device=target.device), torch.tensor([2, 0, 0, -1, 1, 2])
    y = segments.segmented(x, A, B, scales, index.to(target.device), method=method)
    doubles = [in_double(t) for t in (x, A, B)]
    truth = references.segments(*doubles, scales.double(), index)
    compare(target, [y], [truth], [x, A, B], doubles)


# ---- whole models


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_of_a_whole_model(target: Place, tiny_llama: Any, packed: bool) -> None:
    """`lorakit train`'s loss and gradients, accelerated and plain."""
    from lorakit import LoraConfig, core
    from lorakit.data import Batch
    from lorakit.speed import accelerate
    from lorakit.train.loop.step import loss_sum

    model = tiny_llama.to(target.device, target.dtype).train()
    core.attach(model, LoraConfig(r=4, target_modules="all-linear"))
    for _, parameter in core.trainable_parameters(model):
        parameter.data.normal_(std=0.1)
    ids, mask = torch.randint(0, 500, (3, 21)), torch.ones(3, 21, dtype=torch.long)
    if packed:
        mask[1, 13:] = mask[2, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    batch = Batch(ids, mask, labels, 0.0, int(mask.sum()), int((labels[:, 1:] != -100).sum()))
    found = []
    for fast in (None, accelerate(model)):
        model.zero_grad()
        loss = loss_sum(model, batch, target.device, fast)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for _, p in core.trainable_parameters(model))])
    assert fast is not None and fast.packs
    for mine, theirs in zip(found[1], found[0], strict=True):
        error = float((mine - theirs).norm() / theirs.norm())
        assert error < 3 * BOUNDS[target.dtype], f"{error:.2e}"
