"""The attention block compared with plain PyTorch and with transformers' modules: values, gradients, saved tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorakit.ops import attention_products
from lorakit.ops.adapted import Adapted, LowRank, factors
from lorakit.ops.attention_block import SelfAttention, attention_block
from lorakit.ops.attention_pattern import Pattern
from lorakit.ops.norm import Norm
from lorakit.ops.reference import attention_block as reference
from lorakit.ops.rotary import Rotary

WIDTH, HEAD, HEADS, KV, BATCH, TOKENS = 10, 4, 6, 2, 2, 9


def adapted(
    out: int, into: int, *, r: int = 3, bias: bool = False, transposed: bool = False, p: float = 0.0
) -> Adapted:
    """Return a frozen weight with factors; r = 0 is a module without an adapter."""
    W = torch.randn(out, into, dtype=torch.float64) / into**0.5
    low = None
    if r:
        A, B = (torch.randn(shape, dtype=torch.float64) / into**0.5 for shape in ((r, into), (out, r)))
        low = LowRank(A.requires_grad_(), B.requires_grad_(), 1.7, p)
    return Adapted(
        W.t().contiguous() if transposed else W, torch.randn(out).double() if bias else None, low, transposed
    )


def rms(width: int, offset: float = 0.0) -> Norm:
    generator = torch.Generator().manual_seed(width)
    return Norm("rms", torch.randn(width, dtype=torch.float64, generator=generator), eps=1e-5, offset=offset)


def layer(width: int) -> Norm:
    generator = torch.Generator().manual_seed(width)
    weight, bias = torch.randn(2, width, dtype=torch.float64, generator=generator)
    return Norm("layer", weight, bias, 1e-5)


def block_of(
    *, fused: bool = False, kv: int = KV, r: tuple[int, ...] = (3, 3, 3, 3), seed: int = 5, **made: Any
) -> SelfAttention:
    """Return projections of WIDTH into HEADS and kv heads, each with an adapter of another rank."""
    torch.manual_seed(seed)
    how = {name: made.pop(name) for name in ("bias", "transposed", "p") if name in made}
    q, shared = HEADS * HEAD, kv * HEAD
    widths = [q + 2 * shared] if fused else [q, shared, shared]
    inputs = tuple(adapted(width, WIDTH, r=rank, **how) for width, rank in zip(widths, r, strict=False))
    return SelfAttention(inputs, adapted(WIDTH, q, r=r[-1], **how), HEAD, kv, **made)


def tables(rot: int = HEAD, batch: int | None = None) -> Rotary:
    shape = (TOKENS, rot) if batch is None else (batch, TOKENS, rot)
    torch.manual_seed(6)
    return Rotary(torch.randn(shape).double(), torch.randn(shape).double())


SINKS = torch.linspace(-2, 3, HEADS, dtype=torch.float64)

# block, pattern, rotary, residual
CASES: dict[str, tuple[dict[str, Any], Pattern, Rotary | None, bool]] = {
    "Llama": ({"norm": rms(WIDTH)}, Pattern(), tables(), True),
    "Llama, no norm, no residual": ({}, Pattern(), tables(batch=2), False),
    "flash": ({"norm": rms(WIDTH)}, Pattern(method="flash"), tables(), True),
    "flash, packed": ({}, Pattern(method="flash", segments=(2, 3, 4)), tables(), True),
    "Qwen2": ({"norm": rms(WIDTH), "bias": True}, Pattern(), tables(), True),
    "Qwen3": ({"norm": rms(WIDTH), "q_norm": rms(HEAD), "k_norm": rms(HEAD)}, Pattern(), tables(), True),
    "OLMo2": ({"q_norm": rms(HEADS * HEAD), "k_norm": rms(KV * HEAD)}, Pattern(), tables(), False),
    "Gemma-2": ({"norm": rms(WIDTH, 1.0)}, Pattern(window=3, softcap=2.0, scale=0.3), tables(), False),
    "Gemma-3": (
        {"norm": rms(WIDTH, 1.0), "q_norm": rms(HEAD, 1.0), "k_norm": rms(HEAD, 1.0)},
        Pattern(window=4),
        tables(),
        False,
    ),
    "GPT-2": (
        {"fused": True, "kv": HEADS, "transposed": True, "bias": True, "norm": layer(WIDTH)},
        Pattern(),
        None,
        True,
    ),
    "Phi-3": ({"fused": True, "norm": rms(WIDTH)}, Pattern(window=5), tables(2), True),
    "fused, q and k normalized": (
        {"fused": True, "q_norm": rms(HEAD), "k_norm": layer(HEAD)},
        Pattern(),
        tables(),
        True,
    ),
    "fused, normalized, not turned": ({"fused": True, "q_norm": rms(HEAD)}, Pattern(), None, True),
    "GPT-NeoX": (
        {"fused": True, "interleaved": True, "kv": HEADS, "bias": True, "norm": layer(WIDTH)},
        Pattern(),
        tables(2),
        False,
    ),
    "interleaved, flash": ({"fused": True, "interleaved": True, "kv": HEADS}, Pattern(method="flash"), None, True),
    "interleaved, normalized": (
        {"fused": True, "interleaved": True, "kv": HEADS, "q_norm": rms(HEADS * HEAD), "k_norm": rms(HEAD)},
        Pattern(),
        tables(),
        True,
    ),
    "layer norm": ({"norm": layer(WIDTH), "kv": 3}, Pattern(), tables(), True),
    "BERT": ({"kv": HEADS, "bias": True}, Pattern(causal=False), None, True),
    "packed": ({"norm": rms(WIDTH)}, Pattern(segments=(4, 1, 4)), tables(), True),
    "gpt-oss": ({"norm": rms(WIDTH), "bias": True}, Pattern(window=4, sinks=SINKS), tables(), True),
    "gpt-oss, packed": ({"norm": rms(WIDTH)}, Pattern(window=2, segments=(4, 1, 4), sinks=SINKS), tables(), True),
    "gpt-oss, flash": ({"norm": rms(WIDTH)}, Pattern(segments=(4, 1, 4), sinks=SINKS, method="flash"), tables(), True),
    "q and v alone": ({"norm": rms(WIDTH), "r": (2, 0, 5, 0)}, Pattern(), tables(), True),
    "no adapter": ({"norm": rms(WIDTH), "r": (0, 0, 0, 0)}, Pattern(), tables(), True),
    "output alone": ({"norm": rms(WIDTH), "r": (0, 0, 0, 1)}, Pattern(), tables(), True),
}


def leaves(x: Tensor, block: SelfAttention) -> list[Tensor]:
    return [t for t in (x, *factors(block.projections)) if t is not None and t.requires_grad]


def found(function: Any, x: Tensor, block: SelfAttention, *rest: Any) -> list[Tensor]:
    """Return the output and every gradient."""
    out = function(x, block, *rest)
    torch.manual_seed(8)
    weight = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves(x, block), weight)]


def an_input(batch: int = BATCH, tokens: int = TOKENS, dtype: torch.dtype = torch.float64, seed: int = 9) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(batch, tokens, WIDTH, dtype=torch.float64).to(dtype).requires_grad_()


def in_dtype(block: SelfAttention, dtype: torch.dtype, factor: torch.dtype) -> SelfAttention:
    """Return the same values with the base in one dtype and the factors in another."""

    def weight(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(dtype)

    def one(a: Adapted) -> Adapted:
        low = a.low and replace(
            a.low, A=a.low.A.detach().to(factor).requires_grad_(), B=a.low.B.detach().to(factor).requires_grad_()
        )
        return replace(a, W=a.W.to(dtype), bias=weight(a.bias), low=low)

    norms = {
        name: own and replace(own, weight=weight(own.weight), bias=weight(own.bias))
        for name, own in (("norm", block.norm), ("q_norm", block.q_norm), ("k_norm", block.k_norm))
    }
    return replace(block, inputs=tuple(map(one, block.inputs)), output=one(block.output), **norms)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_products, "BLOCK", 4)
    made, *rest = CASES[name]
    block, x = block_of(**made), an_input()
    torch.testing.assert_close(
        found(attention_block, x, block, *rest), found(reference, x, block, *rest), rtol=1e-11, atol=1e-11
    )
    with torch.no_grad():
        torch.testing.assert_close(attention_block(x, block, *rest), reference(x, block, *rest), rtol=1e-11, atol=1e-11)


WANTED = torch.tensor([0, 3, 4, 11, 17])
"""Indices among the BATCH × TOKENS tokens."""


@pytest.mark.parametrize("name", CASES)
def test_the_wanted_rows_alone(name: str) -> None:
    made, *rest = CASES[name]
    block, x = block_of(**made), an_input()
    ours = found(attention_block, x, block, *rest, WANTED)
    assert ours[0].shape == (len(WANTED), WIDTH)
    torch.testing.assert_close(ours, found(reference, x, block, *rest, WANTED), rtol=1e-11, atol=1e-11)
    every = torch.arange(BATCH * TOKENS)
    torch.testing.assert_close(
        found(attention_block, x, block, *rest, every), found(reference, x, block, *rest, every), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "flash"])
def test_gradcheck_of_the_wanted_rows_with_every_dropout(name: str) -> None:
    made, pattern, *rest = CASES[name]
    block, x = block_of(**made, p=0.2, dropout=0.3), an_input()
    pattern = pattern if name == "flash" else replace(pattern, dropout=0.4)

    def run(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention_block(x, block, pattern, *rest, WANTED)

    assert torch.autograd.gradcheck(run, tuple(leaves(x, block)), fast_mode=True)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "flash", "gpt-oss"])
def test_the_wanted_rows_under_autocast(name: str) -> None:
    made, *rest = CASES[name]
    block, x = in_dtype(block_of(**made), torch.float32, torch.float32), an_input(dtype=torch.float32)

    def picked(*given: Any) -> Tensor:
        return attention_block(*given).flatten(0, 1)[WANTED]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, all_of_them = found(attention_block, x, block, *rest, WANTED), found(picked, x, block, *rest)
    for a, b in zip(ours, all_of_them, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).norm() <= 1e-2 * b.norm()


@pytest.mark.parametrize("name", ["Qwen3", "Gemma-2", "GPT-2"])
def test_gradcheck_with_dropout(name: str) -> None:
    made, *rest = CASES[name]
    block, x = block_of(**made, p=0.3), an_input(1)
    with torch.no_grad():
        x = x.clone().requires_grad_()

    def run(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention_block(x, block, *rest)

    assert torch.autograd.gradcheck(run, tuple(leaves(x, block)), fast_mode=True)


@pytest.mark.parametrize("residual", [True, False])
def test_dropout_of_the_output_comes_before_the_residual(residual: bool) -> None:
    made, pattern, turn, _ = CASES["GPT-2"]
    block, x = block_of(**made, dropout=0.4), an_input()
    torch.manual_seed(3)
    with torch.no_grad():
        kept = attention_block(x, block, pattern, turn, False) != 0

    def plain(x: Tensor, block: SelfAttention, *rest: Any) -> Tensor:
        y = reference(x, block, *rest, False) * kept / 0.6
        return x + y if residual else y

    def ours(x: Tensor, block: SelfAttention, *rest: Any) -> Tensor:
        torch.manual_seed(3)
        return attention_block(x, block, *rest, residual)

    assert 0.25 < 1 - float(kept.double().mean()) < 0.55
    torch.testing.assert_close(found(ours, x, block, pattern, turn), found(plain, x, block, pattern, turn))
    none = replace(block, dropout=0.0)
    torch.testing.assert_close(attention_block(x, none, pattern, turn), reference(x, none, pattern, turn, False))


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "fused, q and k normalized", "gpt-oss"])
def test_gradcheck_with_every_dropout(name: str) -> None:
    made, pattern, *rest = CASES[name]
    block, x = block_of(**made, p=0.2, dropout=0.3), an_input(1)

    def run(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention_block(x, block, replace(pattern, dropout=0.4), *rest)

    assert torch.autograd.gradcheck(run, tuple(leaves(x, block)), fast_mode=True)


def by_hand(x: Tensor, block: SelfAttention, turn: Rotary) -> Tensor:
    """Compute one sequence, head by head and row by row."""
    assert block.norm is not None
    n = x / (x.square().mean(-1, keepdim=True) + block.norm.eps).sqrt() * block.norm.weight
    q, k, v = (n @ (a.W + a.low.scale * a.low.B @ a.low.A).t() for a in block.inputs)  # type: ignore[union-attr]
    given = torch.zeros_like(q)
    half = HEAD // 2
    for head in range(HEADS):
        shared = head // (HEADS // KV)
        qh, kh, vh = q[:, head * HEAD :][:, :HEAD], *(t[:, shared * HEAD :][:, :HEAD] for t in (k, v))
        qh, kh = (t * turn.cos + torch.cat((-t[:, half:], t[:, :half]), 1) * turn.sin for t in (qh, kh))
        for i in range(len(x)):
            given[i, head * HEAD : (head + 1) * HEAD] = (qh[i] @ kh[: i + 1].t() / HEAD**0.5).softmax(0) @ vh[: i + 1]
    low = block.output.low
    return x + given @ (block.output.W + low.scale * low.B @ low.A).t()  # type: ignore[union-attr]


def test_it_is_the_formula() -> None:
    block, x, turn = block_of(norm=rms(WIDTH)), an_input(1).detach(), tables()
    torch.testing.assert_close(attention_block(x, block, Pattern(), turn, True)[0], by_hand(x[0], block, turn))


@pytest.mark.parametrize(
    "name", ["Llama", "Qwen3", "Gemma-2", "GPT-2", "Phi-3", "flash", "gpt-oss", "gpt-oss, packed", "gpt-oss, flash"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_as_near_the_truth_as_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    made, *rest = CASES[name]
    errors = []
    for seed in range(8):
        lower = in_dtype(block_of(**made, seed=seed), dtype, torch.float32)
        exact = in_dtype(lower, torch.float64, torch.float64)
        x = an_input(dtype=dtype, seed=seed)
        truth = found(reference, x.detach().double().requires_grad_(), exact, *rest)
        ours, plain = (found(function, x, lower, *rest) for function in (attention_block, reference))
        assert [t.dtype for t in ours] == [t.dtype for t in (x, *leaves(x, lower))]
        pairs = zip(ours, plain, truth, strict=True)
        errors.append([[(t.double() - true).norm() / true.norm() for t in (a, b)] for a, b, true in pairs])
    for own, usual in torch.tensor(errors).mean(0):  # a single draw may favor either
        assert own <= 2 * usual


def test_strides_one_token_and_inputs_untouched() -> None:
    block = block_of(norm=rms(WIDTH))
    x = torch.randn(TOKENS, BATCH, WIDTH + 1).double()[..., 1:].transpose(0, 1).requires_grad_()
    before = x.detach().clone()
    rest = (Pattern(), tables(), True)
    torch.testing.assert_close(found(attention_block, x, block, *rest), found(reference, x, block, *rest))
    assert torch.equal(x, before)
    incoming = torch.randn(BATCH, TOKENS, WIDTH).double()
    kept = incoming.clone()
    attention_block(x, block, *rest).backward(incoming)
    assert torch.equal(incoming, kept)
    one = an_input(1, 1)
    rest = (Pattern(), Rotary(torch.ones(1, HEAD).double(), torch.zeros(1, HEAD).double()), True)
    torch.testing.assert_close(found(attention_block, one, block, *rest), found(reference, one, block, *rest))


def test_an_output_may_be_changed_in_place() -> None:
    x, block = an_input(), block_of()
    out = attention_block(x, block)
    out.mul_(2.0)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), x), torch.autograd.grad(2 * reference(x, block, Pattern(), None, False).sum(), x)
    )


@pytest.mark.parametrize("frozen", ["x", "A", "B", "inputs", "x and inputs", "x and output"])
def test_only_asked_gradients(frozen: str) -> None:
    block, x = block_of(norm=rms(WIDTH)), an_input()
    for part in block.projections:
        assert part.low is not None
        whole = "output" in frozen if part is block.output else "inputs" in frozen
        part.low.A.requires_grad_(frozen != "A" and not whole)
        part.low.B.requires_grad_(frozen != "B" and not whole)
    x.requires_grad_("x" not in frozen)
    rest = (Pattern(), tables(), True)
    torch.testing.assert_close(found(attention_block, x, block, *rest), found(reference, x, block, *rest))


def kept_bytes(function: Any) -> int:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function()
    return sum(t.numel() * t.element_size() for t in kept)


@pytest.mark.parametrize(("name", "q_stats"), [("Llama", 0), ("Qwen3", HEADS + KV), ("Phi-3", 0)])
def test_what_is_kept_for_the_backward(name: str, q_stats: int) -> None:
    made, pattern, turn, residual = CASES[name]
    block, x = in_dtype(block_of(**made), torch.bfloat16, torch.float32), an_input(dtype=torch.bfloat16)
    tokens = BATCH * TOKENS
    given = sum(t.numel() * t.element_size() for t in (*factors(block.projections), *(a.W for a in block.projections)))
    made_here = 2 * tokens * (WIDTH + 2 * HEADS * HEAD + 2 * KV * HEAD + 3 * len(block.projections)) + 4 * tokens * (
        1 + q_stats
    )
    assert kept_bytes(lambda: attention_block(x, block, pattern, turn, residual)) == given + made_here


def test_what_is_kept_where_only_the_output_is_trained() -> None:
    made, *rest = CASES["output alone"]
    block, x = block_of(**made), an_input().detach()
    tokens, low = BATCH * TOKENS, block.output.low
    assert low is not None
    expected = block.output.W.numel() + low.A.numel() + low.B.numel() + tokens * (HEADS * HEAD + len(low.A))
    assert kept_bytes(lambda: attention_block(x, block, *rest)) == 8 * expected


@pytest.mark.parametrize(("name", "whole"), [("Llama", 0), ("flash", 1)])
def test_what_is_kept_of_the_wanted_rows(name: str, whole: int) -> None:
    """Only the wanted rows of the heads' output are saved, unless attention's own backward needs all."""
    made, *rest = CASES[name]
    block, x = block_of(**made), an_input()
    less = kept_bytes(lambda: attention_block(x, block, *rest)) - kept_bytes(
        lambda: attention_block(x, block, *rest, WANTED)
    )
    unwanted = BATCH * TOKENS - len(WANTED)
    assert less == 8 * unwanted * ((1 - whole) * HEADS * HEAD + 3)  # and of the output's low-rank activation


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients_with_dropout(reentrant: bool) -> None:
    block, rest = block_of(norm=rms(WIDTH), p=0.3, dropout=0.2), (Pattern(dropout=0.3), tables(), True)

    def straight(x: Tensor, *_: Any) -> Tensor:
        torch.manual_seed(4)
        return attention_block(x, block, *rest)

    def recompute(x: Tensor, *_: Any) -> Tensor:
        torch.manual_seed(4)
        return checkpoint(attention_block, x, block, *rest, use_reentrant=reentrant)  # type: ignore[no-any-return]

    outcomes = []
    for function in (straight, recompute):
        x = an_input()
        for leaf in leaves(x, block):
            leaf.grad = None
        out = function(x)
        out.sum().backward()
        outcomes.append([out.detach(), *(leaf.grad.clone() for leaf in leaves(x, block))])  # type: ignore[union-attr]
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen3", "Gemma-2", "packed", "flash", "gpt-oss", "gpt-oss, flash"])
def test_one_graph_under_compile(name: str) -> None:
    made, *rest = CASES[name]
    block, x = block_of(**made), an_input()
    compiled = torch.compile(lambda x: attention_block(x, block, *rest), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        found(lambda x, *_: compiled(x), x, block), found(attention_block, x, block, *rest), rtol=1e-11, atol=1e-11
    )


def test_autocast_keeps_norm_and_residual_wide() -> None:
    block = in_dtype(block_of(norm=rms(WIDTH)), torch.float32, torch.float32)
    x, rest = an_input(dtype=torch.float32), (Pattern(), tables(), True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, plain = found(attention_block, x, block, *rest), found(reference, x, block, *rest)
    truth = found(reference, x, block, *rest)
    for a, b, true in zip(ours, plain, truth, strict=True):
        assert a.dtype == torch.float32
        assert (a - true).norm() <= 1.5 * (b - true).norm() + 2e-3 * true.norm()


def test_autocast_leaves_float64_unchanged() -> None:
    block, x = block_of(norm=rms(WIDTH)), an_input()
    expected = found(attention_block, x, block, Pattern(), tables(), True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for ours, wanted in zip(found(attention_block, x, block, Pattern(), tables(), True), expected, strict=True):
            assert torch.equal(ours, wanted)


def test_parts_that_do_not_fit() -> None:
    block, x = block_of(), an_input()
    trained = replace(block.output, W=block.output.W.clone().requires_grad_())
    cases: list[tuple[Tensor, SelfAttention, str]] = [
        (x[0], block, r"expects x \(batch, tokens, width\); got \(9, 10\)"),
        (
            x,
            replace(block, inputs=block.inputs[:2]),
            r"widths \[24, 8\] do not match head_dim=4 and kv_heads=2",
        ),
        (x, replace(block, dropout=1.0), "output dropout must be in .*; got 1.0"),
        (x, replace(block, kv_heads=3), r"widths \[24, 8, 8\] do not match head_dim=4 and kv_heads=3"),
        (x, replace(block, interleaved=True), r"one fused projection and equal widths; got \[24, 8, 8\]"),
        (
            x,
            replace(block, q_norm=rms(5)),
            r"q_norm: weight must have shape \(4,\) for one head or \(24,\) for all heads; got \(5,\)",
        ),
        (x, replace(block, k_norm=Norm("layer", torch.ones(KV, HEAD))), r"k_norm: weight .* got \(2, 4\)"),  # Cohere's
        (x, replace(block, output=trained), "a weight of shape"),
        (
            x,
            replace(block, norm=Norm("rms", torch.ones(WIDTH, requires_grad=True))),
            "norm's weight .* requires a gradient",
        ),
    ]
    for given, made, said in cases:
        with pytest.raises(ValueError, match=said):
            attention_block(given, made)
    with pytest.raises(ValueError, match="rotary table cos must have shape"):
        attention_block(x[:, :3], block, Pattern(), tables())
