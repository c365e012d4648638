"""The Triton kernels compared with the `reference` of each operation: values, gradients, allowed aliasing."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.ops import activation
from lorakit.ops import reference as references
from lorakit.ops.cross_entropy import Head
from lorakit.ops.kernels import triton
from lorakit.ops.norm import Norm
from lorakit.ops.rotary import Rotary

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
"""Relative norm of the difference: roundings of fp32 sums, and about two roundings to bf16."""
EPS = 1e-5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Given:
    """Return random tensors on the device, in the tested dtype."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(self.device, self.dtype)

    def close(self, found: Tensor, truth: Tensor) -> None:
        truth = truth.detach()
        error = float((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))
        assert error < BOUNDS[self.dtype], f"{error:.2e} of the truth"


@pytest.fixture
def given(dtype: torch.dtype, device: str) -> Given:
    return Given(dtype, device)


def gradients(y: Tensor, dy: Tensor, *inputs: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(y, inputs, dy.to(y.dtype))


def leaves(*tensors: Tensor) -> list[Tensor]:
    """Return double-precision copies that require gradients."""
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


# ---- norms


@pytest.mark.parametrize("shape", [(5, 7), (33, 64), (3, 3000), (0, 16)], ids=str)
@pytest.mark.parametrize("kind", ["weight", "weight from zero"])
def test_rms_norm(triton_kernels: Any, given: Given, kind: str, shape: tuple[int, int]) -> None:
    x, dn, add = given(*shape), given(*shape), given(*shape)
    w = given(shape[1])
    offset = 1.0 if kind == "weight from zero" else 0.0
    n, again, rstd = torch.empty_like(x), torch.empty_like(x), x.new_empty(len(x), 1, dtype=torch.float32)
    triton_kernels.rms_forward(x, w, EPS, offset, n, rstd)
    triton_kernels.rms_recompute(x, w, offset, rstd, again)
    assert torch.equal(n, again)
    (leaf,) = leaves(x)
    truth = references.norm(leaf, Norm("rms", w.double(), None, EPS, offset))
    given.close(n, truth)
    given.close(rstd, (leaf.square().mean(1, keepdim=True) + EPS).rsqrt())
    (dx,) = gradients(truth, dn, leaf)
    found = torch.empty_like(x)
    triton_kernels.rms_backward(dn, x, w, offset, rstd, None, found)
    given.close(found, dx)
    triton_kernels.rms_backward(dn, x, w, offset, rstd, add, dn)  # overwriting the input
    given.close(dn, dx + add)


def test_rms_norm_rounds_before_the_weight(triton_kernels: Any, given: Given) -> None:
    """As in transformers: invisible in fp32; in bf16 each element equals the reference's."""
    x, w = given(16, 64), given(64)
    n, rstd = torch.empty_like(x), x.new_empty(16, 1, dtype=torch.float32)
    triton_kernels.rms_forward(x, w, EPS, 0.0, n, rstd)
    truth = references.norm(x, Norm("rms", w, None, EPS))
    assert (n != truth).float().mean() < 0.01 if given.dtype == torch.bfloat16 else torch.allclose(n, truth, rtol=1e-6)


# ---- activations


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_activation(triton_kernels: Any, given: Given, act: str, gated: bool) -> None:
    first, da = given(3, 700, scale=3.0), given(3, 700)
    up = given(3, 700) if gated else None
    out = torch.empty_like(first)
    triton_kernels.gate(act, first, up, out)
    inputs = leaves(first) if up is None else leaves(first, up)
    truth = references.ACTIVATIONS[act](inputs[0])
    truth = truth if up is None else truth * inputs[1]
    given.close(out, truth)
    wanted = gradients(truth, da, *inputs)
    dup = None if up is None else torch.empty_like(up)
    triton_kernels.gate_backward(act, da, first, up, da, dup)  # overwriting the input
    given.close(da, wanted[0])
    if dup is not None:
        given.close(dup, wanted[1])


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the interpreter's exp
@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_activation_of_numbers_that_are_large(triton_kernels: Any, given: Given, act: str) -> None:
    x = torch.tensor([[-1e15, -30.0, 0.0, 30.0, 1e15]], dtype=given.dtype, device=given.device)
    out, dx = torch.empty_like(x), torch.ones_like(x)
    triton_kernels.gate(act, x, None, out)
    triton_kernels.gate_backward(act, dx, x, None, dx, None)
    assert torch.allclose(out, x.clamp_min(0), atol=1e-6)
    assert torch.allclose(dx[0, [0, 1, 3, 4]], torch.tensor([0.0, 0, 1, 1]).to(dx), atol=1e-6)


# ---- rotary positions


@pytest.mark.parametrize(("width", "rot", "rows"), [(8, 8, 1), (10, 6, 3), (64, 64, 3)])
def test_turn(triton_kernels: Any, given: Given, width: int, rot: int, rows: int) -> None:
    x, cos, sin = given(3, 5, 9, width), given(rows, 5, rot), given(rows, 5, rot)
    turn = Rotary(cos.double(), sin.double())
    (leaf,) = leaves(x)
    truth = references.rotary(leaf.transpose(1, 2), turn).transpose(1, 2)
    (back,) = gradients(truth, x, leaf)
    out = torch.full_like(x, torch.nan)
    triton_kernels.rotate(x, cos, sin, False, out)
    given.close(out, truth)
    out.fill_(torch.nan)
    triton_kernels.rotate(x, cos, sin, True, out)
    given.close(out, back)
    triton_kernels.rotate(x, cos, sin, False, x)
    given.close(x, truth)


def test_turn_of_tokens_that_lie_apart(triton_kernels: Any, given: Given) -> None:
    """Return q within a fused projection of q, k and v."""
    every, cos, sin = given(2, 5, 12, 8), given(1, 5, 8), given(1, 5, 8)
    x = every[:, :, 4:8]
    out, untouched = torch.empty_like(every)[:, :, 2:6], every.clone()
    triton_kernels.rotate(x, cos, sin, False, out)
    truth = references.rotary(x.double().transpose(1, 2), Rotary(cos.double(), sin.double())).transpose(1, 2)
    given.close(out, truth)
    triton_kernels.rotate(x, cos, sin, False, x)
    assert torch.equal(x, out)
    assert torch.equal(every[:, :, :4], untouched[:, :, :4]) and torch.equal(every[:, :, 8:], untouched[:, :, 8:])


# ---- attention weights


@pytest.mark.parametrize("bounds", ["none", "low", "high", "both"])
@pytest.mark.parametrize("m", [5, 64, 300])
def test_softmax(triton_kernels: Any, given: Given, bounds: str, m: int) -> None:
    """Rows repeat with a period of k, like the heads that share a key head."""
    low = torch.tensor([0, 1, 2], dtype=torch.int32) if bounds in ("low", "both") else None
    high = torch.tensor([3, 4, m], dtype=torch.int32) if bounds in ("high", "both") else None
    scores, ds, targets = given(2, 6, m, scale=3.0), given(2, 6, m), torch.arange(m)
    seen = torch.ones(3, m, dtype=torch.bool)
    seen &= targets >= (0 if low is None else low[:, None])
    seen &= targets < (m if high is None else high[:, None])
    (leaf,) = leaves(scores)
    truth = leaf.masked_fill(~seen.repeat(2, 1).to(given.device), -torch.inf).softmax(-1)
    (wanted,) = gradients(truth, ds, leaf)
    low, high = (None if bound is None else bound.to(given.device) for bound in (low, high))
    triton_kernels.softmax(scores, low, high)
    given.close(scores, truth)
    triton_kernels.softmax_backward(scores, ds)
    given.close(ds, wanted)


# ---- dropout


def seed_of(number: int, device: str) -> Tensor:
    return torch.tensor([number], dtype=torch.uint64, device=device)


def test_drop_is_a_function_of_seed_and_place(triton_kernels: Any, given: Given) -> None:
    x = given(37, 101) + 10
    one, other, third = (torch.empty_like(x) for _ in range(3))
    for number, out in ((2**63 + 5, one), (2**63 + 5, other), (2**63 + 6, third)):
        triton_kernels.drop(x, 0.3, seed_of(number, given.device), 2.0, out)
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
    given.close(one, x * (one != 0) * 2)
    triton_kernels.drop(x, 0.3, seed_of(2**63 + 5, given.device), 2.0, x)
    assert torch.equal(one, x)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(70, 300, 16), (33, 128, 4), (5, 8, 40)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_thin_products_with_dropout(
    triton_kernels: Any, given: Given, p: float, rows: int, columns: int, rank: int
) -> None:
    """Matmuls of dropout(x) with the same seed, for any tiles."""
    x, a, h, y = given(rows, columns), given(rank, columns), given(rows, rank), given(rows, columns)
    seed, kept = seed_of(2**63 + 9, given.device), torch.ones(rows, columns, device=given.device)
    triton_kernels.drop(kept, p, seed, 1.0, kept)
    left = kept * x.double()
    given.close(triton_kernels.shrink(x, a, p, seed), left @ a.double().t())
    dA = triton_kernels.outer(h, x, p, seed)
    given.close(dA, h.double().t() @ left)
    assert dA.dtype == torch.float32
    truth = y.double() + kept * (h.double() @ a.double())
    triton_kernels.add_low_rank(h, a, p, seed, y)
    given.close(y, truth)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_drop_takes_its_share_and_no_neighbour_knows(triton_kernels: Any, device: str, p: float) -> None:
    """The distribution of (70): mean and variance of the count over blocks, and pairs at distances of the kernel's
    layout.
    """
    n = 102_400
    out = torch.ones(n, device=device)
    triton_kernels.drop(out, p, seed_of(11, device), 1.0, out)
    dropped = (out == 0).double()
    error = math.sqrt(p * (1 - p) / n)
    assert abs(float(dropped.mean()) - p) <= 5 * error
    counts = dropped.view(100, -1).sum(1)
    spread = 1024 * p * (1 - p)
    assert abs(float(counts.var()) - spread) <= 5 * spread * math.sqrt(2 / 99) + 1e-12
    for distance in (1, 2, 4, 256, 512, 1024):
        both = float((dropped[distance:] * dropped[:-distance]).mean())
        assert abs(both - p * p) <= 6 * p / math.sqrt(n) * (1 - p)


def test_drops_of_other_seeds_are_independent(triton_kernels: Any, device: str) -> None:
    p, n, made = 0.2, 30_720, []
    for number in (0, 1, 2**32):
        out = torch.ones(n, device=device)
        triton_kernels.drop(out, p, seed_of(number, device), 1.0, out)
        made.append((out == 0).double())
    for i, one in enumerate(made):
        for other in made[:i]:
            assert abs(float((one * other).mean()) - p * p) < 6 * p / math.sqrt(n)


# ---- losses


@pytest.mark.parametrize("vocabulary", [11, 1000, 9000])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.7, 2.0)])
def test_losses(triton_kernels: Any, given: Given, scale: float, softcap: float | None, vocabulary: int) -> None:
    """With the identity as head, h is the logits, and its gradient is theirs over the scale."""
    z, labels = given(6, vocabulary, scale=4.0), torch.randint(0, vocabulary, (6,)).to(given.device)
    (leaf,) = leaves(z)
    t = leaf * scale
    t = t if softcap is None else softcap * torch.tanh(t / softcap)
    each = torch.nn.functional.cross_entropy(t, labels, reduction="none")
    if vocabulary == 11:
        head = Head(torch.eye(vocabulary, dtype=torch.float64, device=given.device), None, scale, softcap)
        torch.testing.assert_close(each.sum(), references.cross_entropy(leaf, head, labels, total=1))
    (wanted,) = torch.autograd.grad(each.sum(), leaf)
    found, losses = z.clone(), torch.empty(6, dtype=torch.float32, device=given.device)
    triton_kernels.cross_entropy(found, labels, scale, False, losses, softcap)
    assert torch.equal(found, z)
    triton_kernels.cross_entropy(found, labels, scale, True, losses, softcap)
    given.close(losses, each)
    given.close(found, wanted / scale)


def test_losses_of_labels_that_are_all_but_impossible(triton_kernels: Any, device: str) -> None:
    z = torch.tensor([[500.0, -500.0, 0.0], [0.0, 800.0, 0.0]], device=device)
    losses = torch.empty(2, device=device)
    triton_kernels.cross_entropy(z, torch.tensor([1, 1], device=device), 1.0, True, losses)
    assert losses.tolist() == [1000.0, 0.0]
    assert z.tolist() == [[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]


# ---- without kernels


def test_a_device_without_triton_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAKIT_KERNELS", raising=False)
    here = "lorakit.ops.kernels.triton"
    for name in [name for name in sys.modules if name == "triton" or name.startswith((f"{here}.", "triton."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(triton, "launching", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert triton.failure_on.__wrapped__(torch.device("cpu")) == "the triton package is not installed"
    assert triton.lacks_package()
    monkeypatch.setenv("LORAKIT_KERNELS", "off")
    assert not triton.lacks_package()  # kernels are disabled


def test_the_switch_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_KERNELS", "OFF")
    assert triton.failure_on.__wrapped__(torch.device("cpu")) == "LORAKIT_KERNELS=off"


def test_a_device_where_nothing_compiles_has_none(triton_kernels: Any, device: str, monkeypatch: Any) -> None:
    from lorakit.ops.kernels.triton import launching

    def failing(*args: Any) -> None:
        raise RuntimeError("Failed to find C compiler.")

    assert launching.failure(torch.device(device)) == ""
    monkeypatch.setattr(launching.TritonKernels, "drop", failing)
    message = "Triton cannot compile and run kernels: RuntimeError: Failed to find C compiler."
    assert launching.failure(torch.device(device)) == message
    monkeypatch.setattr(launching.TritonKernels, "drop", lambda *args: None)
    assert launching.failure(torch.device(device)) == "a Triton kernel returned a wrong result"


# ---- not covered by the interpreter


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(triton_kernels: Any) -> None:
    """Compile to machine code, which needs no device, in a separate process without interpretation."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).parent / "programs" / "compiled_for_hopper.py"
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = done.stdout.split()
    assert set(made) == {
        "rms",
        "rms_backward",
        "gate",
        "gate_backward",
        "rotate",
        "drop",
        "shrink",
        "add_low_rank",
        "outer",
        "cross_entropy",
        "softmax",
        "softmax_backward",
    }
