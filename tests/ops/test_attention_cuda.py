"""The CUDA flash kernel: its arguments and the use of its results, with a fake kernel; its shapes, by PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lorakit.ops import attention as ops
from lorakit.ops import attention_flash
from lorakit.ops.attention import chosen
from lorakit.ops.attention_pattern import Pattern
from lorakit.ops.reference import attention as reference

PATTERNS = {
    "causal": Pattern(),
    "full": Pattern(causal=False),
    "scale": Pattern(scale=0.3),
    "window": Pattern(window=3),
    "window on both sides": Pattern(causal=False, window=2),
    "window over all": Pattern(window=64),
    "packed": Pattern(segments=(5, 1, 7)),
    "packed, full": Pattern(segments=(1, 10, 2), causal=False),
    "packed, window": Pattern(segments=(9, 4), window=2),
}
HEADS = [(4, 4), (6, 2)]


def kernel(q: Tensor, k: Tensor, v: Tensor, bounds: Any, longest: int, causal: bool, words: dict[str, Any]) -> Tensor:
    """Check the layout PyTorch documents: (B, T, H, D), or (tokens, H, D) with offsets; a window before and after."""
    if bounds is not None:
        ends = bounds.tolist()
        assert longest == max(after - before for before, after in itertools.pairwise(ends))
        parts = [[t[a:b][None] for t in (q, k, v)] for a, b in itertools.pairwise(ends)]
        return torch.cat([kernel(*part, None, 0, causal, words)[0] for part in parts])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    target = torch.arange(q.shape[2])
    distance = target[:, None] - target
    before, after = words.get("window_size_left"), words.get("window_size_right")
    seen = (distance <= (10**6 if before is None else before)) & (-distance <= (10**6 if after is None else after))
    seen &= (distance >= 0) | torch.tensor(not causal)
    scores = (q @ k.transpose(2, 3) * words["scale"]).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Any, same: Any, longest: int, _: int, *rest: Any, **words: Any
) -> Any:
    p, causal, debug = rest
    assert (p, debug, bounds is same) == (0.0, False, True)
    out = kernel(q, k, v, bounds, longest, causal, words)
    return out, torch.zeros(1), None, None, None


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Any, *rest: Any, **words: Any
) -> Any:
    _, longest, _, p, causal, state, unused = rest
    assert p == 0.0 and state.dtype == unused.dtype == torch.uint64
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        made = kernel(*leaves, bounds, longest, causal, words)
    torch.testing.assert_close(out, made.detach())
    return torch.autograd.grad(made, leaves, dy)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attention_flash, "aten", SimpleNamespace(_flash_attention_forward=forward, _flash_attention_backward=backward)
    )


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("heads", "kv"), HEADS)
def test_it_is_the_reference(name: str, heads: int, kv: int) -> None:
    torch.manual_seed(heads)
    pattern = PATTERNS[name]
    given = [torch.randn(2, 13, n, 8).double().transpose(1, 2).requires_grad_() for n in (heads, kv, kv)]
    truth = reference(*given, pattern)
    dout = torch.randn_like(truth)
    with torch.no_grad():
        out, lse = attention_flash.forward_on_cuda(*given, pattern)
        into = tuple(torch.full_like(t, torch.nan) for t in given)
        attention_flash.backward_on_cuda(dout, tuple(given), (out, lse), into, pattern)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(into, torch.autograd.grad(truth, given, dout))


def copied(written: Tensor, given: Tensor) -> Tensor:
    assert written.shape == given.shape
    return written


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Create tensors of a device that need not exist, for PyTorch's shape functions of the kernels."""
    monkeypatch.setattr(attention_flash, "_has_kernel", lambda device: True)
    monkeypatch.setattr(Tensor, "copy_", copied)  # this one queries the device
    with FakeTensorMode():
        yield


def heads_of(dtype: torch.dtype = torch.bfloat16, width: int = 64) -> list[Tensor]:
    return [torch.empty(2, 13, n, width, dtype=dtype, device="cuda").transpose(1, 2) for n in (6, 2, 2)]


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("name", PATTERNS)
def test_the_kernels_take_what_they_are_given(name: str) -> None:
    q, k, v = heads_of()
    assert chosen(q, v, PATTERNS[name]) == "flash"
    saved = ops.forward(q, k, v, PATTERNS[name])  # autograd would query the device for a stream
    assert (saved[0].shape, saved[0].dtype, saved[0].device.type) == (q.shape, q.dtype, "cuda")
    grads = ops.backward(saved[0], (q, k, v), saved, PATTERNS[name])
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.usefixtures("fake_cuda")
def test_what_the_kernel_does_not_know_goes_by_products() -> None:
    q, _, v = heads_of()
    bias, sinks = torch.zeros(1, 1, 1, 13, device="cuda"), torch.zeros(6, device="cuda")
    for pattern in (Pattern(softcap=3.0), Pattern(dropout=0.1), Pattern(bias=bias), Pattern(sinks=sinks)):
        assert chosen(q, v, pattern) == "matmul"
    assert chosen(q, v, Pattern(method="matmul")) == "matmul"
    for dtype, width in ((torch.float32, 64), (torch.bfloat16, 20), (torch.bfloat16, 264)):
        q, _, v = heads_of(dtype, width)
        assert chosen(q, v, Pattern()) == "matmul"
    with pytest.raises(ValueError, match="on CUDA, they do not support a bias or sinks, and they require fp16 or bf16"):
        chosen(q, v, Pattern(method="flash"))
