"""The compiled attention kernel compared with double precision, and the calls for which it is not used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lorakit.ops.attention import kernel_backward, kernel_for, kernel_forward
from lorakit.ops.attention_pattern import Operands, Pattern
from lorakit.ops.kernels import compiled
from lorakit.ops.kernels.compiled_matmuls import CompiledAttention
from lorakit.ops.reference import attention as reference

from .differentiable import attention

KERNELS = compiled.kernels()
KERNEL = None if KERNELS is None else KERNELS.attention
pytestmark = pytest.mark.skipif(KERNEL is None, reason="no compiled attention for this processor")
CASES = {
    "several blocks": ((2, 6, 2, 77, 64), Pattern()),
    "one head of k": ((1, 5, 1, 40, 128), Pattern(scale=0.3)),
    "packed": ((2, 4, 2, 61, 32), Pattern(segments=(30, 1, 30))),
    "packed, full": ((1, 3, 3, 50, 16), Pattern(causal=False, segments=(17, 33))),
    "full": ((2, 2, 2, 100, 48), Pattern(causal=False)),
    "two tokens": ((2, 2, 1, 2, 16), Pattern(scale=-0.5)),
    "window over all": ((1, 2, 2, 33, 32), Pattern(window=33)),
}
"""Name -> B, H, KV, T and D, and the pattern."""


def kernel() -> CompiledAttention:
    assert KERNEL is not None
    return KERNEL


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """With more threads than sequences and heads of k, the kernel is not used."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def operands(batch: int, heads: int, kv: int, tokens: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Operands:
    """Return q, k and v with the strides of a projection, in one wider buffer."""
    rows = torch.randn(batch, tokens, heads + 2 * kv, width).to(dtype).transpose(1, 2)
    q, k, v = rows.split((heads, kv, kv), 1)
    return q, k, v


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(name: str) -> None:
    sizes, pattern = CASES[name]
    given = operands(*sizes)
    exact = [t.double().requires_grad_() for t in given]
    truth = reference(*exact, pattern)
    dout = torch.randn(truth.shape).bfloat16()
    truth.backward(dout.double())
    used = kernel_for(*given, pattern)
    assert type(used) is type(KERNEL)  # other tests build the kernels again
    out = kernel_forward(used, given, pattern)
    grads = tuple(torch.empty_like(t) for t in given)
    kernel_backward(used, dout, given, grads, pattern)  # type: ignore[arg-type]
    assert relative(out, truth.detach()) < 2**-8
    for grad, leaf in zip(grads, exact, strict=True):
        assert relative(grad, leaf.grad) < 2**-7


def test_another_sequence_does_not_leak() -> None:
    given = operands(1, 2, 1, 40, 32)
    before = attention(*given, Pattern(segments=(20, 20)))
    for t in given:
        t[:, :, 20:] = torch.nan
    after = attention(*given, Pattern(segments=(20, 20)))
    assert torch.equal(after[:, :, :20], before[:, :, :20]) and after[:, :, 20:].isnan().all()


def test_the_gradient_of_q_may_replace_the_incoming_gradient() -> None:
    given, pattern = operands(2, 4, 2, 70, 32), Pattern()
    dout = torch.randn_like(given[0].contiguous())
    apart = tuple(torch.empty_like(t) for t in given)
    kernel_backward(kernel(), dout, given, apart, pattern)  # type: ignore[arg-type]
    again = (dout, torch.empty_like(apart[1]), torch.empty_like(apart[2]))
    kernel_backward(kernel(), dout, given, again, pattern)
    assert all(torch.equal(a, b) for a, b in zip(apart, again, strict=True))


@pytest.mark.parametrize("tokens", [1, 64])
def test_a_second_call_gives_the_same_bits(tokens: int) -> None:
    given = operands(3, 3, 1, tokens, 64)
    assert torch.equal(attention(*given), attention(*given))


@pytest.mark.parametrize(
    "pattern",
    [
        Pattern(window=3),
        Pattern(softcap=1.0),
        Pattern(dropout=0.1),
        Pattern(bias=torch.zeros(1, 1, 20, 20)),
        Pattern(sinks=torch.zeros(4)),
    ],
    ids=["window", "softcap", "dropout", "bias", "sinks"],
)
def test_other_patterns_do_not_use_it(pattern: Pattern) -> None:
    assert kernel_for(*operands(2, 4, 2, 20, 32), pattern) is None


def test_other_tensors_do_not_use_it() -> None:
    q, k, v = operands(2, 4, 2, 20, 32)
    for other in (
        (q.float(), k.float(), v.float()),
        (q[..., :20], k[..., :20], v[..., :20]),
        (q, k, v[..., :16]),
        (q[..., ::2], k[..., ::2], v[..., ::2]),
        (q[:, :, :0], k[:, :, :0], v[:, :, :0]),
    ):
        assert kernel_for(*other, Pattern()) is None
    assert type(kernel_for(q, k, v, Pattern())) is type(KERNEL)


WRONG: dict[str, Callable[[Operands, Tensor], tuple[Operands, Tensor]]] = {
    "q": lambda ops, ends: ((ops[0][:, :3], *ops[1:]), ends),
    "k": lambda ops, ends: ((ops[0], ops[1][:, :, :-1], ops[2]), ends),
    "v": lambda ops, ends: ((ops[0], ops[1], ops[2].float()), ends),
    "ends": lambda ops, ends: (ops, ends + 1),
    "ends: expected": lambda ops, ends: (ops, torch.tensor([12, 12, 20])),
    "increase": lambda ops, ends: (ops, torch.tensor([-1, 20])),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_tensors_are_an_error_before_anything_is_written(name: str) -> None:
    given, ends = WRONG[name](operands(2, 4, 2, 20, 32), torch.tensor([8, 20]))
    out = torch.full((2, 4, 20, 32), 7.0, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=name):
        kernel().attend(given, ends, 1.0, True, out)
    into = tuple(torch.full_like(out[:, :n], 7.0) for n in (4, 2, 2))
    with pytest.raises(ValueError, match=name):
        kernel().attend_backward(given, out, ends, 1.0, True, into)  # type: ignore[arg-type]
    assert all((t == 7).all() for t in (out, *into))


def test_an_output_of_another_shape_is_an_error() -> None:
    given, ends = operands(2, 4, 2, 20, 32), torch.tensor([20])
    with pytest.raises(ValueError, match="out"):
        kernel().attend(given, ends, 1.0, True, torch.empty(2, 4, 19, 32, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="dk"):
        grads = (given[0].clone(), given[0].clone(), given[2].clone())
        kernel().attend_backward(given, given[0], ends, 1.0, True, grads)


def test_an_expanded_output_is_an_error() -> None:
    given, ends = operands(2, 4, 2, 20, 32), torch.tensor([20])
    out = torch.empty(1, 1, 1, 32, dtype=torch.bfloat16).expand(2, 4, 20, 32)
    with pytest.raises(ValueError, match="out"):
        kernel().attend(given, ends, 1.0, True, out)
