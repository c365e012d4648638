"""The number of times DoRA reads its base weight, its norms for every weight format, and that no norm is outdated.

‖W + s·B·A‖ needs W·Aᵀ, and A changes with each step, so caching ‖W‖² would not save a read: in a forward W is dequantized
once for the base's matmul, and once for the norms of all DoRA adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.core import activate, attach, disable, merge, route, sites, trainable_parameters, unmerge, use
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.variants.dora import row_norms
from lorakit.plan.quantized import STORAGES, Storage

from ...laws.quantized import EVALUATED, specimen, storages
from ...laws.tolerances import assert_close
from ...laws.zoo import LINEARS, Specimen, attach_fresh, randomise, run, with_adapters

EVERY = pytest.mark.parametrize("storage", storages())
FP32 = torch.float32
MAGNITUDE = "lora_magnitude_vector"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """Counts how often layers read their weight while something is done."""
    count, read = [0], LoraLayer.read

    def counted(layer: LoraLayer, name: str | None = None) -> Tensor:
        count[0] += 1
        return read(layer, name)

    monkeypatch.setattr(LoraLayer, "read", counted)

    def during(work: Callable[[], Any]) -> int:
        count[0] = 0
        work()
        return count[0]

    return during


@EVERY
def test_a_site_is_read_once_in_a_forward_however_many_adapters_ask(
    storage: Storage, reads: Callable[[Callable[[], Any]], int]
) -> None:
    kind = specimen(storage)
    model, given = with_adapters(kind, "a", "b", "c", use_dora=True), kind.given()
    attach(model, kind.config(), "plain")
    for names, expected in ((["plain"], 0), (["a"], 2), (["a", "b", "c"], 2), (["a", "plain", "b"], 2)):
        activate(model, *names)  # two sites
        assert reads(lambda: run(model, given)) == expected
    with route(model, ["a", "b", "c", "plain"]):
        assert reads(lambda: run(model, given)) == 2
    with disable(model):
        assert reads(lambda: run(model, given)) == 0
    activate(model, "a", "b")
    model.train()
    assert reads(lambda: model(given).sum().backward()) == 2


def test_one_that_moved_the_base_has_a_weight_of_its_own(reads: Callable[[Callable[[], Any]], int]) -> None:
    model = LINEARS.model()
    for name, init in (("moved", "pissa"), ("a", True), ("b", True)):
        attach_fresh(model, LINEARS, name, init_lora_weights=init, use_dora=True)
    activate(model, "a", "moved", "b")
    assert reads(lambda: run(model, LINEARS.given())) == 4


class Counted(TorchDispatchMode):
    """Count the operations of bitsandbytes that dequantize a 4-bit weight: inside a matmul, or separately."""

    def __init__(self) -> None:
        super().__init__()
        self.within = self.alone = 0

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.within += str(func) == "bitsandbytes.gemm_4bit.default"
        self.alone += str(func) == "bitsandbytes.dequantize_4bit.default"
        return func(*args, **(kwargs or {}))


def test_what_bitsandbytes_multiplies_out_in_a_step() -> None:
    pytest.importorskip("bitsandbytes")
    kind = specimen(next(storage for storage in STORAGES if storage.name == "nf4"))

    def step(*adapters: str, **fields: Any) -> tuple[int, int]:
        """In the forward and in the backward of two sites."""
        model = with_adapters(kind, *adapters, **fields).train()
        activate(model, *adapters)
        with Counted() as forward:
            out = model(kind.given().requires_grad_())
        with Counted() as backward:
            out.sum().backward()
        return forward.within + forward.alone, backward.within + backward.alone

    assert step("a") == (2, 2)
    for adapters in (("a",), ("a", "b", "c")):
        assert step(*adapters, use_dora=True) == (4, 2)


@EVERY
def test_values_and_gradients_are_those_of_the_formula(storage: Storage) -> None:
    kind = specimen(storage)
    model, given = with_adapters(kind, "a", "b", use_dora=True), kind.given()
    activate(model, "a", "b")
    model.train()
    found = model(given)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    parameters = dict(trainable_parameters(model))
    gradients = torch.autograd.grad((found * weights).sum(), list(parameters.values()))

    def adapted(layer: Any, x: Tensor) -> Tensor:
        W, bias = layer.read().double(), layer.original_bias()
        y = y0 = x @ W.T
        for name in ("a", "b"):
            factor = layer.factor(name)
            A, B = factor.A.double(), factor.B.double()
            norms = torch.linalg.vector_norm(W + factor.scale * B @ A, dim=1).detach()
            y = y + factor.own[MAGNITUDE].double() / norms * (y0 + factor.scale * x @ A.T @ B.T) - y0
        return y if bias is None else y + bias.double()

    x = torch.tanh(adapted(model.up, given.double()))
    out = torch.tanh(adapted(model.square, x)) @ model.out.weight.double().T + model.out.bias.double()
    expected = torch.autograd.grad((out * weights).sum(), list(parameters.values()))
    tolerance = 5 * EVALUATED.get(storage.name, 1e-4)
    assert (found - out).norm() <= tolerance * out.norm()
    for name, one, other in zip(parameters, gradients, expected, strict=True):
        assert (one - other).norm() <= 3 * tolerance * other.norm(), name


def written(model: nn.Module, how: str) -> None:
    weight = model.up.owner.weight
    numbers = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9)).to(weight.dtype)
    if how == "in place":
        weight.data.copy_(numbers)  # leaves no trace in the tensor's version
    elif how == "another tensor":
        weight.data = numbers
    else:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state["up.base_layer.weight"] = numbers
        model.load_state_dict(state)


@pytest.mark.parametrize("how", ["in place", "another tensor", "a state dict"])
def test_a_base_that_is_written_to_is_seen_at_once(how: str) -> None:
    model, given = with_adapters(LINEARS, "a", use_dora=True), LINEARS.given()
    for training in (True, False):
        model.train(training)
        run(model, given)
        written(model, how)
        check_up(model, given)


def check_up(model: nn.Module, given: Tensor, dtype: torch.dtype = FP32) -> None:
    layer: Any = model.up
    W, factor = layer.read(), layer.factor("a")
    gain = factor.own[MAGNITUDE] / row_norms(W, factor.A, factor.B, factor.scale)
    bias = layer.original_bias()
    expected = given.float() @ (gain[:, None] * (W + factor.scale * factor.B @ factor.A)).T + bias.float()
    with torch.no_grad():
        assert_close(layer(given), expected.detach(), dtype)


@pytest.mark.parametrize("kind", [LINEARS], ids=str)
def test_merges_casts_and_changed_factors_are_seen_at_once(kind: Specimen) -> None:
    model, given = with_adapters(kind, "a", "b", use_dora=True), kind.given()
    expected = run(model, given)
    check_up(model, given)
    merge(model, "b")
    with use(model, "a"):
        assert_close(run(model, given), expected, FP32)
        check_up(model, given)
    unmerge(model)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model, "a"):
            parameter.data.mul_(1.1)
    check_up(model, given)
    randomise(model, "a", 31)
    check_up(model, given)
    model.to(torch.bfloat16)
    check_up(model, given.bfloat16(), torch.bfloat16)
    assert sites(model)


@pytest.mark.costly(cases=0)
@torch.no_grad()
def test_compiled_where_the_graph_may_break() -> None:
    model, given = with_adapters(LINEARS, "a", "b", use_dora=True), LINEARS.given()
    activate(model, "a", "b")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(given), model(given))
        randomise(model, "a", 5)
        written(model, "in place")
    torch._dynamo.reset()
