"""The fused MLP: equal to its reference in value and every gradient, and with no more saved than documented."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorakit.ops import linear
from lorakit.ops import reference as references
from lorakit.ops.activation import activation
from lorakit.ops.adapted import Adapted, LowRank
from lorakit.ops.dropout import draw, zero_
from lorakit.ops.mlp import Form, mlp
from lorakit.ops.norm import Norm
from lorakit.ops.reference import mlp as reference

D = torch.float64
WIDTH, INNER = 7, 10
FORMS: dict[str, dict[str, Any]] = {
    "llama": {"act": "silu"},
    "gemma": {"act": "gelu_tanh", "offset": 1.0},
    "gpt2": {"inner": 1, "act": "gelu_tanh", "kind": "layer", "bias": True, "transposed": True},
    "bert": {"inner": 1, "act": "gelu", "kind": None, "bias": True, "residual": False},
    "clip": {"inner": 1, "act": "quick_gelu", "r": (1, 3)},
    "t5": {"inner": 1, "act": "relu"},
    "only gate": {"act": "silu", "r": (2, 0, 0)},
    "only down": {"act": "silu", "r": (0, 0, 3)},
    "only down of one": {"inner": 1, "act": "silu", "r": (0, 3)},
    "without adapters": {"act": "silu", "r": (0, 0, 0)},
    "without norm": {"act": "silu", "kind": None},
    "phi3": {"inner": 1, "act": "silu", "fused": True},
    "fused, only down": {"inner": 1, "act": "silu", "fused": True, "r": (0, 3)},
    "fused, without norm": {"inner": 1, "act": "gelu", "fused": True, "kind": None, "bias": True},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(
    name: str,
    dtype: torch.dtype = D,
    master: torch.dtype = D,
    p: float = 0.0,
    sizes: tuple[int, int] = (WIDTH, INNER),
) -> Form:
    outer, between = sizes
    spec = {
        "inner": 2,
        "kind": "rms",
        "bias": False,
        "transposed": False,
        "residual": True,
        "offset": 0.0,
        "fused": False,
        **FORMS[name],
    }
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=D).to(to)

    def module(width: int, out: int, r: int) -> Adapted:
        W = normal(width, out) if spec["transposed"] else normal(out, width)
        low = None
        if r:
            A, B = normal(r, width, to=master) / 2, normal(out, r, to=master) / 2
            low = LowRank(A.requires_grad_(), B.requires_grad_(), 0.7, p)
        return Adapted(W / width**0.5, normal(out) if spec["bias"] else None, low, spec["transposed"])

    ranks = spec.get("r", (3, 2, 4)[-spec["inner"] - 1 :])
    norm = None
    if spec["kind"] is not None:
        layered = spec["kind"] == "layer"
        norm = Norm(spec["kind"], normal(outer), normal(outer) if layered else None, 1e-3, spec["offset"])
    inner = tuple(module(outer, between * (2 if spec["fused"] else 1), r) for r in ranks[:-1])
    down = module(between, outer, ranks[-1])
    return Form(inner, down, activation(spec["act"]), norm, spec["residual"], fused=spec["fused"])


def trained(form: Form, x: Tensor | None = None) -> list[Tensor]:
    return [t for t in (x, *linear.factors((*form.inner, form.down))) if t is not None and t.requires_grad]


def gradients(y: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    weights = torch.sin(torch.arange(y.numel(), dtype=D)).view(y.shape).to(y.dtype)
    return [y.detach(), *(torch.autograd.grad((y * weights).sum(), inputs) if inputs else ())]


def same(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("shape", [(2, 3, WIDTH), (1, WIDTH), (WIDTH,)])
@pytest.mark.parametrize("name", FORMS)
def test_it_is_the_reference(name: str, shape: tuple[int, ...]) -> None:
    form, x = made(name), torch.randn(shape, dtype=D, requires_grad=True)
    inputs = trained(form, x)
    same(gradients(mlp(x, form), inputs), gradients(reference(x, form), inputs))


def test_it_is_the_formula() -> None:
    """Compute formula (79) directly for a gated MLP with all three adapters."""
    form, x = made("llama"), torch.randn(5, WIDTH, dtype=D)
    assert form.norm is not None
    n = x * (x.square().mean(1, keepdim=True) + form.norm.eps) ** -0.5 * form.norm.weight
    weights = [m.W + m.low.scale * m.low.B @ m.low.A for m in (*form.inner, form.down)]  # type: ignore[union-attr]
    g, u = n @ weights[0].T, n @ weights[1].T
    written = x + (g * torch.sigmoid(g) * u) @ weights[2].T
    inputs = trained(form)
    same(gradients(mlp(x, form), inputs), gradients(written, inputs))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradcheck(name: str) -> None:
    form, x = made(name), torch.randn(2, WIDTH, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: mlp(x, form), tuple(trained(form, x)))


@pytest.mark.parametrize("frozen", ["x", "A", "B", "x, A and B of the inner ones", "A of down", "all but B of down"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_asks_for_no_gradient_gets_none(name: str, frozen: str) -> None:
    form, x = made(name), torch.randn(4, WIDTH, dtype=D, requires_grad="x" not in frozen and "all" not in frozen)
    for module in (*form.inner, form.down):
        low, is_down = module.low, module is form.down
        assert low is not None
        low.A.requires_grad_(not ("A" in frozen and is_down == ("down" in frozen)) and "all" not in frozen)
        low.B.requires_grad_(not (frozen in ("B", "x, A and B of the inner ones") and not is_down))
        if "all" in frozen:
            low.B.requires_grad_(is_down)
    inputs = trained(form, x)
    y = mlp(x, form)
    same(gradients(y, inputs), gradients(reference(x, form), inputs))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("name", FORMS)
def test_narrow_dtypes(name: str, dtype: torch.dtype, bound: float) -> None:
    """Value and every gradient: the error from float64 is at most 1.5 times the reference's; fp32 factors get fp32."""
    torch.manual_seed(0)
    sizes = 48, 80
    form, x = made(name, dtype, torch.float32, sizes=sizes), torch.randn(64, 48).to(dtype).requires_grad_()
    exact = made(name, dtype, torch.float32, sizes=sizes)
    exact = exact._replace(
        inner=tuple(_doubled(m) for m in exact.inner),
        down=_doubled(exact.down),
        norm=None if exact.norm is None else _doubled(exact.norm),
    )
    wide = x.detach().double().requires_grad_()
    inputs = trained(form, x)
    truth = gradients(reference(wide, exact), trained(exact, wide))
    found, expected = gradients(mlp(x, form), inputs), gradients(reference(x, form), inputs)
    assert [t.dtype for t in found] == [dtype, dtype, *[torch.float32] * (len(inputs) - 1)]
    for one, other, true in zip(found, expected, truth, strict=True):
        # if rounding moves an input of ReLU across 0, the gradient jumps
        assert error(one, true) <= 1.5 * error(other, true) + (4 * bound if name == "t5" else bound)


def _doubled(part: Any) -> Any:
    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().double()

    if isinstance(part, Norm):
        return replace(part, weight=wide(part.weight), bias=wide(part.bias))
    low = part.low
    if low is not None:
        low = replace(low, A=wide(low.A).requires_grad_(), B=wide(low.B).requires_grad_())  # type: ignore[union-attr]
    return replace(part, W=wide(part.W), bias=wide(part.bias), low=low)


@pytest.mark.parametrize("name", ["llama", "gpt2", "only down"])
def test_dropout(name: str) -> None:
    """Forward and backward drop the same elements; each module draws separately, in order."""
    form, x = made(name, p=0.4), torch.randn(6, WIDTH, dtype=D, requires_grad=True)
    inputs = trained(form, x)
    torch.manual_seed(5)
    found = gradients(mlp(x, form), inputs)
    torch.manual_seed(5)
    keeps: list[Tensor | None] = []
    for module in (*form.inner, form.down):
        mask = torch.ones(6, INNER if module is form.down else WIDTH, dtype=D)
        keeps.append(None if module.low is None else zero_(mask, draw(mask, 0.4), 0.4))
    assert form.norm is not None
    hidden = references.linear(references.norm(x, form.norm), form.inner, keeps[:-1])
    a = references.ACTIVATIONS[form.act.name](hidden[0]) * (hidden[1] if len(hidden) == 2 else 1)
    same(found, gradients(x + references.linear(a, [form.down], keeps[-1:])[0], inputs))


def test_the_value_is_that_of_transformers_or_nearer_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operations reproduce transformers' bits; a kernel rounds once where those round three times."""
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    theirs = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=96)).bfloat16().requires_grad_(False)
    norm = LlamaRMSNorm(64).bfloat16().requires_grad_(False)
    x = torch.randn(50, 64).bfloat16()
    gate, up, down = (Adapted(m.weight) for m in (theirs.gate_proj, theirs.up_proj, theirs.down_proj))
    usual, truth = x + theirs(norm(x)), x.double() + deepcopy(theirs).double()(deepcopy(norm).double()(x.double()))
    form = Form((gate, up), down, activation("silu"), Norm("rms", norm.weight), True)
    ours = mlp(x, form)
    assert (ours.double() - truth).norm() <= 1.05 * (usual.double() - truth).norm()
    for name in ("activation", "norm"):
        monkeypatch.setattr(f"lorakit.ops.{name}.kernels_for", lambda *_: None)
    assert torch.equal(mlp(x, form), usual)


@pytest.mark.parametrize(("name", "numbers"), [("llama", 1), ("gpt2", 2), ("without norm", 0), ("phi3", 1)])
def test_what_is_saved(name: str, numbers: int) -> None:
    """Saved: x itself, its norm's statistics, outputs of gate and up, and (tokens, r) per adapter; weights unchanged."""
    form = made(name, torch.bfloat16, torch.float32)
    x = torch.randn(5, 6, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    modules = (*form.inner, form.down)
    given = {t.data_ptr() for t in (x, *(m.W for m in modules), *linear.factors(modules)) if t is not None}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        mlp(x, form)
        new = [t for t in saved if t.data_ptr() not in given]
        ranks = sum(len(m.low.A) for m in modules)  # type: ignore[union-attr]
        bytes_a_token = 4 * numbers + 2 * INNER * (2 if form.fused else len(form.inner)) + 2 * ranks
        assert sum(t.nbytes for t in new) == 30 * bytes_a_token
        saved.clear()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                mlp(x, form)
        assert not saved


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("name", FORMS)
def test_what_is_not_kept_is_made_again_to_the_bit(name: str, p: float) -> None:
    form = made(name, torch.float32, torch.float32, p)._replace(dropout=p, within=p)
    for frozen in ("", "x", "A", "B"):
        x = torch.randn(2, 3, WIDTH, requires_grad=frozen != "x")
        for module in (*form.inner, form.down):
            if module.low is not None:
                module.low.A.requires_grad_(frozen != "A")
                module.low.B.requires_grad_(frozen != "B")
        inputs, found = trained(form, x), []
        if not inputs:
            continue
        for keep in (True, False):
            torch.manual_seed(4)
            y = mlp(x, form._replace(keep=keep))
            found.append([y.detach(), *torch.autograd.grad(y.sin().sum(), inputs)])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True)), frozen


@pytest.mark.parametrize("name", ["llama", "gpt2", "without norm", "only down", "only gate"])
def test_gradcheck_of_what_is_not_kept(name: str) -> None:
    form, x = made(name, p=0.3)._replace(keep=False), torch.randn(4, WIDTH, dtype=D, requires_grad=True)

    def run(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(4)
        return mlp(x, form)

    assert torch.autograd.gradcheck(run, tuple(trained(form, x)), fast_mode=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "only down", "without norm"])
def test_what_gate_and_up_gave_is_not_saved(name: str) -> None:
    form, x = made(name), torch.randn(5, 6, WIDTH, dtype=D, requires_grad=True)

    def saved(keep: bool) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):  # type: ignore[func-returns-value]
            mlp(x, form._replace(keep=keep))
        return sum(sizes)

    assert saved(True) - saved(False) == 8 * 30 * INNER * len(form.inner)


def test_a_strided_input_and_a_second_backward() -> None:
    form, wide = made("llama"), torch.randn(2, WIDTH, 5, dtype=D, requires_grad=True)
    inputs = trained(form, wide)
    y = mlp(wide.mT, form)
    same(gradients(y.mT, inputs), gradients(reference(wide.mT, form).mT, inputs))
    y = mlp(wide.mT, form)
    y.mul_(2)  # the output may be changed in place
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    same(torch.autograd.grad(y.sum(), inputs), first)


def test_nothing_that_was_given_is_written_to() -> None:
    form, x, dy = (
        made("llama", p=0.3),
        torch.randn(4, WIDTH, dtype=D, requires_grad=True),
        torch.randn(4, WIDTH, dtype=D),
    )
    given = [x, dy, *(m.W for m in (*form.inner, form.down)), *trained(form)]
    before = [t.detach().clone() for t in given]
    torch.autograd.grad(mlp(x, form), trained(form, x), dy)
    assert all(torch.equal(t, b) for t, b in zip(given, before, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing_the_same_is_dropped_again(reentrant: bool) -> None:
    form, x = made("llama", p=0.3), torch.randn(4, WIDTH, dtype=D, requires_grad=True)
    results = []
    for run in (mlp, lambda *inputs: checkpoint(mlp, *inputs, use_reentrant=reentrant)):
        torch.manual_seed(7)
        y = run(x, form)
        y.sum().backward()
        results.append([y.detach(), *(t.grad for t in trained(form, x))])
        for t in trained(form, x):
            t.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_autocast() -> None:
    """Norm and residual in fp32, matmuls in bf16: as close to fp32 as the reference under autocast."""
    form = made("llama", torch.float32, torch.float32, sizes=(48, 80))
    x = torch.randn(64, 48, requires_grad=True)
    truth = gradients(reference(x, form), trained(form, x))
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = mlp(x, form), reference(x, form)
    assert y.dtype == torch.float32
    found, plain_autocast = gradients(y, trained(form, x)), gradients(expected, trained(form, x))
    assert [t.dtype for t in found] == [t.dtype for t in plain_autocast]
    for one, other, true in zip(found, plain_autocast, truth, strict=True):
        assert 0 < error(one, true.double()) < 1.5 * error(other, true.double()) + 2e-3


def test_autocast_to_the_dtype_that_all_is_in_changes_nothing() -> None:
    """Bit-identical, and nothing more is saved: norm and residual stay inside the function."""
    form = made("llama", torch.bfloat16, torch.float32, sizes=(48, 80))
    x = torch.randn(64, 48).bfloat16().requires_grad_()
    runs = []
    for on in (False, True):
        kept: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.append(t.numel()), t)[1], lambda t: t
        )
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=on):
            y = mlp(x, form)
        runs.append((kept, gradients(y, trained(form, x))))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(one, other) for one, other in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("part", ["W", "bias", "norm"])
def test_a_trained_base_is_refused(part: str) -> None:
    form, x = made("gpt2"), torch.randn(2, WIDTH, dtype=D)
    asked = form.norm.weight if part == "norm" else getattr(form.down, part)  # type: ignore[union-attr]
    asked.requires_grad_()
    with pytest.raises(ValueError, match="requires a gradient, which the fused operations do not compute"):
        mlp(x, form)
    with pytest.raises(ValueError, match="no fused form of activation 'mish'"):
        activation("mish")


@pytest.mark.parametrize("residual", [True, False])
def test_dropout_of_the_output_comes_before_the_residual(residual: bool) -> None:
    form, x = made("gpt2")._replace(residual=residual), torch.randn(4, WIDTH, dtype=D, requires_grad=True)
    inputs = trained(form, x)

    def ours(residual: bool) -> Tensor:
        torch.manual_seed(3)
        return mlp(x, form._replace(residual=residual, dropout=0.4))

    kept = ours(False).detach() != 0
    assert 0.1 < 1 - float(kept.double().mean()) < 0.7
    y = reference(x, form._replace(residual=False)) * kept / 0.6
    same(gradients(ours(residual), inputs), gradients(x + y if residual else y, inputs))
    with pytest.raises(ValueError, match="output dropout must be in"):
        mlp(x, form._replace(dropout=1.0))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "only down"])
def test_dropout_before_down(name: str) -> None:
    """The mask is visible if down is the identity; given it, every gradient equals the reference's."""
    form = made(name)._replace(within=0.4)
    x = torch.randn(40, WIDTH, dtype=D, requires_grad=True)
    bare = form._replace(down=Adapted(torch.eye(INNER, dtype=D)), residual=False)
    torch.manual_seed(3)
    kept = (mlp(x, bare).detach() != 0).double()
    assert 0.3 < 1 - float(kept.mean()) < 0.5
    a = reference(x, bare._replace(within=0.0)) * kept / 0.6
    inputs = trained(form, x)
    torch.manual_seed(3)
    same(gradients(mlp(x, form), inputs), gradients(x + references.linear(a, [form.down])[0], inputs))
    with pytest.raises(ValueError, match="inner activation dropout must be in"):
        mlp(x, form._replace(within=1.0))


def test_two_modules_are_not_fused() -> None:
    with pytest.raises(ValueError, match="one gate-and-up module; got 2"):
        mlp(torch.randn(2, WIDTH, dtype=D), made("llama")._replace(fused=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_of_the_output_is_the_same_when_it_is_run_again(reentrant: bool) -> None:
    form, x = made("gpt2", p=0.2), torch.randn(4, WIDTH, dtype=D, requires_grad=True)
    inputs = trained(form, x)

    def run(x: Tensor) -> Tensor:
        return mlp(x, form._replace(dropout=0.4))

    torch.manual_seed(3)
    straight = gradients(run(x), inputs)
    torch.manual_seed(3)
    y = checkpoint(run, x, use_reentrant=reentrant)
    for t in inputs:
        t.grad = None
    (y * torch.sin(torch.arange(y.numel(), dtype=D)).view(y.shape)).sum().backward()
    same([y.detach(), *(t.grad for t in inputs if t.grad is not None)], straight)
