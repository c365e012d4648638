"""Attention: both methods compared with plain PyTorch in values and gradients, saved tensors, and errors."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorakit.ops import attention_products
from lorakit.ops.attention import FLASH_FROM, chosen
from lorakit.ops.attention_pattern import Pattern
from lorakit.ops.dropout import draw_record, positions
from lorakit.ops.reference import attention as reference

from .differentiable import attention


def visible(pattern: Pattern, tokens: int) -> Tensor:
    """Return a boolean mask (T, T) whose entry (i, j) is true if token i of a row sees token j."""
    lengths = pattern.lengths(tokens)
    which = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)])
    targets = torch.arange(len(which))
    distance = targets.unsqueeze(1) - targets
    seen = which.unsqueeze(1) == which
    if pattern.causal:
        seen &= distance >= 0
    if pattern.window is not None:
        seen &= distance < pattern.window if pattern.causal else distance.abs() <= pattern.window
    return seen


Operands = tuple[Tensor, Tensor, Tensor]
SHORTER = torch.zeros(2, 1, 1, 13).double().index_fill_(3, torch.tensor([9, 10, 11, 12]), -torch.inf)
SHORTER[1] = 0  # the second row has no padding
PATTERNS = {
    "causal": Pattern(),
    "full": Pattern(causal=False),
    "scale": Pattern(scale=0.3),
    "window": Pattern(window=3),
    "window of one": Pattern(window=1),
    "window on both sides": Pattern(causal=False, window=2),
    "window over all": Pattern(window=64),
    "softcap": Pattern(softcap=1.5, scale=0.7),
    "window and softcap": Pattern(window=4, softcap=2.0),
    "packed": Pattern(segments=(5, 1, 7)),
    "packed, full": Pattern(segments=(1, 10, 2), causal=False),
    "packed, window": Pattern(segments=(9, 4), window=2),
    "packed, window on both sides": Pattern(segments=(9, 4), window=2, causal=False),
    "packed, softcap": Pattern(segments=(6, 7), softcap=3.0),
    "padded": Pattern(causal=False, bias=SHORTER),
    "padded, causal": Pattern(bias=SHORTER, scale=0.7),
    "padded, window": Pattern(bias=SHORTER[:1] / torch.ones(2, 1, 13, 1).double(), window=8),
    "bias and softcap": Pattern(bias=torch.arange(169.0).view(1, 1, 13, 13).sin().double(), softcap=1.5),
    "packed, bias": Pattern(bias=torch.arange(169.0).view(1, 1, 13, 13).sin().double(), segments=(5, 1, 7)),
}
HEADS = [(4, 4), (6, 2), (3, 1)]
FLASH = [
    "causal",
    "full",
    "scale",
    "window over all",
    "packed",
    "packed, full",
    "padded",
    "padded, causal",
    "packed, bias",
]


def with_sinks(pattern: Pattern, heads: int) -> Pattern:
    """Return the pattern with a different sink for each of the heads, from negligible to dominant."""
    return replace(pattern, sinks=torch.linspace(-2, 3, heads, dtype=torch.float64))


def operands(heads: int, kv: int, dtype: torch.dtype = torch.float64, batch: int = 2, tokens: int = 13) -> Operands:
    """Return q, k, v with the strides of a projection, one of them in a wider buffer."""
    torch.manual_seed(heads * 10 + kv)
    made = []
    for count, spare in ((heads, 0), (kv, 2), (kv, 0)):
        rows = torch.randn(batch, tokens, count + spare, 5).to(dtype)[:, :, :count]
        made.append(rows.transpose(1, 2).requires_grad_())
    return made[0], made[1], made[2]


def gradients(out: Tensor, given: Operands) -> Operands:
    torch.manual_seed(7)
    return torch.autograd.grad(out, given, torch.randn(out.shape).to(out.dtype))  # type: ignore[return-value]


@pytest.fixture(params=[64, 4, 3], ids=lambda rows: f"blocks of {rows}")
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Use short blocks, so that few tokens make several; then each batch row is computed alone."""
    monkeypatch.setattr(attention_products, "BLOCK", request.param)
    if request.param == 3:
        monkeypatch.setattr(attention_products, "TOGETHER", 1)
    return request.param


def with_way(pattern: Pattern, method: str) -> Pattern:
    return Pattern(**{**vars(pattern), "method": method})


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("heads", "kv"), HEADS)
def test_products(name: str, heads: int, kv: int, block: int) -> None:
    given, pattern = operands(heads, kv), with_way(PATTERNS[name], "matmul")
    out, expected = attention(*given, pattern), reference(*given, pattern)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(out, given), gradients(expected, given), rtol=1e-12, atol=1e-12)


def test_products_in_fp32_do_not_narrow_float64() -> None:
    given = operands(4, 2)
    found, expected = (attention(*given, Pattern(method=method)) for method in ("matmul_fp32", "matmul"))  # type: ignore[arg-type]
    assert torch.equal(found, expected)
    assert all(map(torch.equal, gradients(found, given), gradients(expected, given)))


def test_an_unknown_method_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"method is 'products'.*auto, flash, matmul, matmul_fp32"):
        attention(*operands(2, 1), Pattern(method="products"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize(("heads", "kv"), HEADS)
def test_flash(name: str, heads: int, kv: int) -> None:
    given, pattern = operands(heads, kv), with_way(PATTERNS[name], "flash")
    out, expected = attention(*given, pattern), reference(*given, pattern)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(out, given), gradients(expected, given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "matmul") for name in PATTERNS), *((name, "flash") for name in FLASH)]
)
@pytest.mark.parametrize(("heads", "kv"), HEADS)
def test_sinks(name: str, method: str, heads: int, kv: int, block: int) -> None:
    given, pattern = operands(heads, kv), with_sinks(with_way(PATTERNS[name], method), heads)
    out, expected = attention(*given, pattern), reference(*given, pattern)
    assert not torch.allclose(expected, reference(*given, replace(pattern, sinks=None)), rtol=0.1)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(out, given), gradients(expected, given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["flash", "matmul", "matmul_fp32"])
def test_sinks_of_any_size(method: str, dtype: torch.dtype) -> None:
    """A sink far below the scores changes nothing, and a sink far above them leaves nothing; nothing overflows."""
    given = tuple(t.detach().to(dtype).requires_grad_() for t in operands(4, 2))
    pattern = with_way(Pattern(sinks=torch.tensor([-torch.inf, -1e4, 0.0, 1e4])), method)
    out, without = attention(*given, pattern), attention(*given, replace(pattern, sinks=None))
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out[:, :2], without[:, :2], rtol=bound, atol=bound)
    assert not out[:, 3].any()
    assert all(bool(t.isfinite().all()) for t in (out, *gradients(out, given)))  # type: ignore[arg-type]


def test_with_a_sink_a_token_that_sees_nothing_gets_zero() -> None:
    given = operands(4, 2)
    hidden = torch.zeros(1, 1, 13, 13, dtype=torch.float64)
    hidden[:, :, 5] = -torch.inf
    out = attention(*given, with_sinks(Pattern(causal=False, bias=hidden, method="matmul"), 4))
    assert not out[:, :, 5].any()
    assert all(bool(t.isfinite().all()) for t in (out, *gradients(out, given)))


def test_what_is_no_sink() -> None:
    given = operands(6, 2)
    for wrong in (torch.zeros(2), torch.zeros(1, 6), torch.zeros(())):
        with pytest.raises(ValueError, match=r"sinks .*shape \(6,\).*got \(.*\)"):
            attention(*given, Pattern(sinks=wrong))
    for wrong, said in (
        (torch.zeros(6, requires_grad=True), "requires_grad=True"),
        (torch.zeros(6, dtype=torch.int64), r"torch\.int64"),
    ):
        with pytest.raises(ValueError, match=f"sinks must be floating-point and frozen; got .*{said}"):
            attention(*given, Pattern(sinks=wrong))


def test_flash_hides_padding_that_is_longer_than_its_blocks() -> None:
    tokens = 1100
    given = operands(2, 1, tokens=tokens)
    bias = torch.zeros(2, 1, 1, tokens, dtype=torch.float64)
    bias[0, ..., :600] = bias[1, ..., 300:] = -torch.inf
    pattern = Pattern(causal=False, bias=bias, method="flash")
    out, expected = attention(*given, pattern), reference(*given, pattern)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(out, given), gradients(expected, given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_positions_get_exactly_no_weight_and_no_gradient(dtype: torch.dtype) -> None:
    """Tiny weights would be denormal numbers, with which a matmul takes a hundred times as long."""
    q, k, v = (part.detach().to(dtype).requires_grad_() for part in operands(4, 4))
    hidden = torch.zeros(2, 1, 1, 13)
    hidden[:, ..., 8:] = torch.finfo(torch.float32).min
    out = attention(q, k, v, with_way(Pattern(causal=False, bias=hidden), "matmul"))
    out[:, :, :8].square().sum().backward()  # the outputs of hidden positions are not used either
    for gradient in (k.grad, v.grad):
        assert gradient is not None
        assert not gradient[:, :, 8:].any()
    assert q.grad is not None
    tiny = torch.finfo(torch.float32).tiny
    assert not ((q.grad != 0) & (q.grad.abs() < tiny)).any()


def test_a_bias_of_each_head_and_what_is_no_bias(block: int) -> None:
    given = operands(6, 2)
    bias = torch.arange(6 * 169.0).view(1, 6, 13, 13).cos().double()
    for method in ("matmul", "flash"):
        pattern = Pattern(causal=False, bias=bias, method=method)  # type: ignore[arg-type]
        out, expected = attention(*given, pattern), reference(*given, pattern)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(out, given), gradients(expected, given), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"shape \(2, 6, 13, 13\), with 1 .*; got \(1, 5, 13, 13\)"):
        attention(*given, Pattern(bias=bias[:, :5]))
    with pytest.raises(ValueError, match=r"got torch\.float64 with requires_grad=True"):
        attention(*given, Pattern(bias=bias.clone().requires_grad_()))


def dropping(name: str, p: float = 0.3) -> Pattern:
    return Pattern(**{**vars(PATTERNS[name]), "dropout": p})


def kept_by(given: Operands, pattern: Pattern, seed: int) -> Tensor:
    """Return the weights (B, H, T, T) that dropout keeps with this seed: if v is the identity, the output is the
    weights.
    """
    q, k, v = (t.detach() for t in given)
    batch, kv, tokens, _ = v.shape
    torch.manual_seed(seed)
    return attention(q, k, torch.eye(tokens, dtype=v.dtype).expand(batch, kv, -1, -1), pattern) != 0


@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("heads", "kv"), HEADS)
def test_dropout_is_its_reference_with_the_mask_given(name: str, heads: int, kv: int, block: int, sinks: bool) -> None:
    given, pattern = operands(heads, kv), dropping(name)
    pattern = with_sinks(pattern, heads) if sinks else pattern
    kept = kept_by(given, pattern, 11)
    torch.manual_seed(11)
    out, expected = attention(*given, pattern), reference(*given, pattern, kept)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(out, given), gradients(expected, given), rtol=1e-12, atol=1e-12)


def test_dropout_takes_each_weight_with_its_probability(block: int) -> None:
    """The distribution of (70) on the weights: the fraction, uniform over positions and heads, independent heads and
    rows.
    """
    p, rounds = 0.3, 300
    given = operands(4, 2, tokens=6)
    pattern = Pattern(dropout=p, causal=False)
    dropped = torch.stack([~kept_by(given, pattern, seed) for seed in range(rounds)]).double()
    error = (p * (1 - p) / rounds) ** 0.5
    assert abs(dropped.mean() - p) < 5 * error / dropped[0].numel() ** 0.5
    assert (dropped.mean(0) - p).abs().max() < 5 * error
    for axis in (1, 2, 3, 4):
        both = (dropped * dropped.roll(1, axis)).mean()
        assert abs(both - p * p) < 6 * p * (1 - p) / dropped.numel() ** 0.5


def test_dropout_keeps_the_mean() -> None:
    given = operands(2, 1, batch=1, tokens=5)
    torch.manual_seed(0)
    mean = torch.stack([attention(*given, Pattern(dropout=0.2)).detach() for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, reference(*given, Pattern()).detach(), atol=0.08, rtol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_is_the_same_when_it_is_run_again(reentrant: bool) -> None:
    given, pattern = operands(4, 2), dropping("causal")
    torch.manual_seed(3)
    straight = attention(*given, pattern)
    torch.manual_seed(3)
    again = checkpoint(attention, *given, pattern, use_reentrant=reentrant)
    torch.manual_seed(99)  # draws in between do not matter
    found = []
    for out in (straight, again):
        for t in given:
            t.grad = None
        out.sum().backward()
        found.append([out.detach(), *(t.grad.clone() for t in given)])  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_dropout_by_a_mask_is_dropout_by_positions() -> None:
    """Off the CPU and under a compiler a boolean mask of all blocks replaces the positions."""
    given, pattern = operands(4, 2), Pattern(dropout=0.3)
    scores = attention_products._Scores(given[0], given[1], pattern)
    sizes = scores._sizes()
    assert len(sizes) > 1 or scores.rows >= given[0].shape[2]
    dropped = [positions(at, size, 0.3) for at, size in zip(scores.by_block(scores.draw()), sizes, strict=False)]
    assert all(0 < len(part) < size for part, size in zip(dropped, sizes, strict=True))
    mask = draw_record(sum(sizes), 0.3, torch.device("meta"))
    assert (mask.dtype, mask.shape) == (torch.bool, (sum(sizes),))
    mask = torch.rand(sum(sizes)) < 0.3
    assert [len(part) for part in scores.by_block(mask)] == sizes


@pytest.mark.parametrize("method", ["flash", "matmul"])
def test_gradcheck(method: str) -> None:
    pattern = Pattern(segments=(2, 4), method=method)  # type: ignore[arg-type]
    for made in (pattern, with_sinks(pattern, 4)):
        run = functools.partial(attention, pattern=made)
        assert torch.autograd.gradcheck(run, operands(4, 2, batch=1, tokens=6))


def test_gradcheck_of_window_and_softcap() -> None:
    pattern = Pattern(window=2, softcap=1.0)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, pattern), operands(2, 1, batch=1, tokens=5))


@pytest.mark.parametrize("method", ["flash", "matmul", "matmul_fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_in_lower_precision(method: str, dtype: torch.dtype, block: int) -> None:
    compare_in_lower_precision(with_sinks(Pattern(segments=(5, 1, 7), method=method), 6), dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["causal", "window and softcap", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_as_near_the_truth_as_plain_pytorch(name: str, dtype: torch.dtype, block: int) -> None:
    compare_in_lower_precision(PATTERNS[name], dtype)


def compare_in_lower_precision(pattern: Pattern, dtype: torch.dtype) -> None:
    """Check that the errors of `attention` are not much larger than those of its reference in the same dtype."""
    exact = tuple(t.detach().bfloat16().double().requires_grad_() for t in operands(6, 2))
    lower = tuple(t.detach().to(dtype).requires_grad_() for t in exact)
    truth_out = reference(*exact, pattern)  # type: ignore[arg-type]
    truth = [truth_out, *gradients(truth_out, exact)]  # type: ignore[arg-type]
    errors = []
    for function in (attention, reference):
        out = function(*lower, pattern)  # type: ignore[arg-type]
        assert out.dtype == dtype
        found = [out, *gradients(out, lower)]  # type: ignore[arg-type]
        errors.append([(a - b).norm() / b.norm() for a, b in zip(found, truth, strict=True)])
    for ours, plain in zip(*errors, strict=True):
        assert ours <= 1.5 * plain + (1e-6 if dtype == torch.float32 else 1e-3)


def test_value_of_another_width() -> None:
    q, k, _ = operands(4, 2)
    v = torch.randn(2, 2, 13, 3, dtype=torch.float64, requires_grad=True)
    out, expected = attention(q, k, v), reference(q, k, v, Pattern())
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(out, (q, k, v)), gradients(expected, (q, k, v)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["flash", "matmul"])
def test_one_token_and_none(method: str) -> None:
    for tokens in (1, 0):
        given = operands(4, 2, tokens=tokens)
        out = attention(*given, Pattern(method=method if tokens else "matmul"))  # type: ignore[arg-type]
        torch.testing.assert_close(out, given[2].repeat_interleave(2, 1))


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, cap: float, s: float, sink: float = -math.inf
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, weights and 1 − tanh² of one causal head, row by row."""
    out, weights, slopes = torch.zeros_like(v), *(torch.zeros(len(q), len(k), dtype=q.dtype) for _ in range(2))
    for i in range(len(q)):
        capped = torch.stack([torch.tanh(s * (q[i] @ k[j]) / cap) for j in range(i + 1)])
        weights[i, : i + 1] = (cap * capped).exp() / ((cap * capped).exp().sum() + math.exp(sink))
        slopes[i, : i + 1] = 1 - capped**2
        out[i] = sum(weights[i, j] * v[j] for j in range(i + 1))
    return out, weights, slopes


def test_it_is_the_formula(block: int) -> None:
    q, k, v = (t.detach() for t in operands(2, 1, batch=1))
    out = attention(q, k, v, Pattern(softcap=1.5, scale=0.4))
    for head in range(2):
        torch.testing.assert_close(out[0, head], by_hand(q[0, head], k[0, 0], v[0, 0], 1.5, 0.4)[0])


def test_its_gradients_are_the_formula(block: int) -> None:
    q, k, v = operands(1, 1, batch=1)
    G = torch.randn(13, 5, dtype=torch.float64)
    found = torch.autograd.grad(attention(q, k, v, Pattern(softcap=1.5, scale=0.4)), (q, k, v), G[None, None])
    q0, k0, v0 = (t.detach()[0, 0] for t in (q, k, v))
    _, P, slope = by_hand(q0, k0, v0, 1.5, 0.4)
    dP = G @ v0.t()
    Z = P * (dP - (P * dP).sum(1, keepdim=True)) * slope
    for grad, wanted in zip(found, (0.4 * Z @ k0, 0.4 * Z.t() @ q0, P.t() @ G), strict=True):
        torch.testing.assert_close(grad[0, 0], wanted)


def test_a_sink_is_the_formula(block: int) -> None:
    q, k, v = operands(2, 1, batch=1)
    sinks = torch.tensor([0.5, -0.7]).double()
    out = attention(q, k, v, Pattern(softcap=1.5, scale=0.4, sinks=sinks))
    G = torch.randn(1, 2, 13, 5, dtype=torch.float64)
    found = torch.autograd.grad(out, (q, k, v), G)
    wanted = [torch.zeros_like(t) for t in (q, k, v)]
    for head, sink in enumerate(sinks.tolist()):
        q0, k0, v0 = (t.detach()[0] for t in (q[:, head], k[:, 0], v[:, 0]))
        o, P, slope = by_hand(q0, k0, v0, 1.5, 0.4, sink)
        torch.testing.assert_close(out[0, head], o)
        dP = G[0, head] @ v0.t()
        Z = P * (dP - (P * dP).sum(1, keepdim=True)) * slope
        wanted[0][0, head] = 0.4 * Z @ k0
        wanted[1][0, 0] += 0.4 * Z.t() @ q0
        wanted[2][0, 0] += P.t() @ G[0, head]
    torch.testing.assert_close(found, tuple(wanted))


@pytest.mark.parametrize("method", ["flash", "matmul"])
def test_packed_is_one_by_one_and_nothing_leaks(method: str) -> None:
    pattern = Pattern(segments=(5, 1, 7), method=method)  # type: ignore[arg-type]
    given = operands(4, 2, torch.float32, batch=1)
    whole = attention(*given, pattern)
    for start, stop in itertools.pairwise((0, 5, 6, 13)):
        alone = attention(*(t[:, :, start:stop] for t in given), Pattern(method=method))  # type: ignore[arg-type]
        torch.testing.assert_close(whole[:, :, start:stop], alone)
    changed = [t.detach().clone() for t in given]
    for t in changed:
        t[:, :, 5:6] = 1e4
    again = attention(*changed, pattern)  # type: ignore[arg-type]
    assert torch.equal(again[:, :, 6:], whole[:, :, 6:])
    assert torch.equal(again[:, :, :5], whole[:, :, :5])


def test_output_is_stored_by_token_and_the_gradient_that_came_in_stays() -> None:
    for method in ("flash", "matmul"):
        given = operands(6, 2)
        out = attention(*given, Pattern(method=method))  # type: ignore[arg-type]
        assert out.transpose(1, 2).is_contiguous()
        incoming = torch.randn_like(out)
        before = incoming.clone()
        out.backward(incoming)
        assert torch.equal(incoming, before)


def test_choice_of_the_way() -> None:
    short, long = (torch.empty(1, 1, tokens, 4) for tokens in (FLASH_FROM - 1, FLASH_FROM))
    assert chosen(short, short, Pattern()) == "matmul"
    assert chosen(long, long, Pattern()) == "flash"
    assert chosen(long, long, Pattern(softcap=1.0)) == "matmul"
    assert chosen(long, long, Pattern(window=8)) == "matmul"
    assert chosen(long, long, Pattern(dropout=0.1)) == "matmul"
    assert chosen(long, long, Pattern(sinks=torch.zeros(1))) == "flash"
    assert chosen(long, long, Pattern(window=FLASH_FROM)) == "flash"
    assert chosen(long, long, Pattern(segments=(FLASH_FROM // 2,) * 2)) == "matmul"
    assert chosen(long, long, Pattern(method="matmul")) == "matmul"
    assert chosen(long, torch.empty(1, 1, FLASH_FROM, 2), Pattern()) == "matmul"


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (Pattern(segments=(5, 5)), "sum to 13 tokens; got 2 lengths with 10 tokens"),
        (Pattern(segments=(0, 13)), "segments must be positive"),
        (Pattern(window=0), "window must be at least 1"),
        (Pattern(softcap=0.0), "softcap must be above 0"),
        (Pattern(method="flash", softcap=1.0), "method='flash' does not support"),
        (Pattern(method="flash", window=2), "method='flash' does not support"),
        (Pattern(method="flash", dropout=0.1), "does not support"),
        (Pattern(dropout=1.0), "dropout must be in .*; got 1.0"),
    ],
)
def test_patterns_that_are_refused(pattern: Pattern, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        attention(*operands(4, 2), pattern)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("segments", [None, (9,), (4, 1, 4), (1, 8)], ids=str)
def test_allowed_positions_are_those_of_the_reference(
    segments: tuple[int, ...] | None, window: int | None, causal: bool
) -> None:
    pattern, targets = Pattern(causal, window=window, segments=segments), torch.arange(9)
    assert torch.equal(pattern.allowed(targets, targets), visible(pattern, 9))
    assert torch.equal(pattern.allowed(targets[5:], targets[2:]), visible(pattern, 9)[5:, 2:])


@pytest.mark.slow
def test_other_segments_under_compile() -> None:
    """The second call has symbolic lengths."""

    def packed(q: Tensor, segments: tuple[int, ...]) -> Tensor:
        return attention(q, q, q, Pattern(segments=segments))

    compiled, q = torch.compile(packed, backend="aot_eager", fullgraph=True), torch.randn(1, 2, 9, 8).double()
    for segments in ((4, 1, 4), (2, 7), (9,), (3, 3, 3)):
        torch.testing.assert_close(compiled(q, segments), packed(q, segments), rtol=1e-12, atol=1e-12)


def test_with_a_sink_the_gradient_keeps_its_digits_where_one_token_dominates() -> None:
    """As that of transformers' function for gpt-oss; a softmax alone loses them, because dP − D cancels."""
    generator = torch.Generator().manual_seed(0)
    q, k = (3 * torch.randn(2, 4, 12, 8, generator=generator) for _ in range(2))
    v = torch.randn(2, 4, 1, 8, generator=generator) + 1e-4 * torch.randn(2, 4, 12, 8, generator=generator)
    sinks, dout = torch.full((4,), -8.0), torch.randn(2, 4, 12, 8, generator=generator)

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        y = function(*leaves, Pattern(sinks=sinks.to(dtype), method="matmul"))
        return [grad.double() for grad in torch.autograd.grad((y * dout.to(dtype)).sum(), leaves)]

    exact, plain = gradients(reference, torch.float64), gradients(reference, torch.float32)
    for number, ours in enumerate(gradients(attention, torch.float32)[:2]):
        error, usual = (float((one - exact[number]).norm()) for one in (ours, plain[number]))
        assert error < 0.5 * usual
