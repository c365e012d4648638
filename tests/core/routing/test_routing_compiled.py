"""Routes under torch.compile: one graph per default, compiled once; a block is never ignored."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lorakit import activate, attach, disable, route, use
from lorakit.config import LoraConfig


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def model() -> Iterator[nn.Module]:
    torch.manual_seed(0)
    adapted = Two().eval()
    for name in ("one", "two"):
        attach(adapted, LoraConfig(r=2, target_modules=["first", "second"]), name)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(torch.randn_like(parameter))
    torch._dynamo.reset()
    yield adapted
    torch._dynamo.reset()


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def test_a_whole_graph_for_each_default_and_none_twice(model: nn.Module) -> None:
    made = CompileCounter()
    compiled = torch.compile(model, backend=made, fullgraph=True)
    for name, graphs in (("one", 1), ("two", 2), ("one", 2), ("two", 2)):
        activate(model, name)
        torch.testing.assert_close(compiled(X), model(X))
        assert made.frame_count == graphs


def test_gradients_are_those_of_the_uncompiled_model(model: nn.Module) -> None:
    activate(model, "one")
    trained = [value for value in model.parameters() if value.requires_grad]
    expected = torch.autograd.grad(model(X).square().sum(), trained, allow_unused=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(X).square().sum(), trained, allow_unused=True)
    torch.testing.assert_close(found, expected)


@torch.no_grad()  # dynamo asks a tensor in the middle of a graph for its gradient, which warns
def test_a_block_is_in_force_in_a_compiled_model(model: nn.Module) -> None:
    activate(model, "one")
    compiled = torch.compile(model, backend="eager")
    default = compiled(X)
    torch.testing.assert_close(default, model(X))
    for block in (disable(model), use(model, "two"), route(model, ["one", "two", None, "two"])):
        with block:
            expected = model(X)
            torch.testing.assert_close(compiled(X), expected)
        assert not torch.allclose(expected, default)
        torch.testing.assert_close(compiled(X), default)


def test_a_whole_graph_and_a_block_cannot_go_together_and_it_is_said(model: nn.Module) -> None:
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(X)
    with disable(model), pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(X)
    torch.testing.assert_close(compiled(X), model(X))
