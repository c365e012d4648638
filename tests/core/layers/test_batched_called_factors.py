"""Hooks on the modules that hold A and B: when they run, what they see and change, and where they cannot run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.core import disable, merge, route, use

from ...laws.tolerances import assert_close, assert_differs
from ...laws.zoo import CONV1DS, EMBEDDING, LINEARS, Specimen, output, run, with_adapters

Seen = list[tuple[str, tuple[int, ...]]]


def watch(model: nn.Module, seen: Seen, *names: str) -> None:
    """Note the shapes of the inputs of A and B at the site `up`, with a hook on each."""
    for name in names or ("a",):
        for part in ("lora_A", "lora_B"):
            holder = getattr(model.up, part)[name]
            holder.register_forward_hook(lambda _, x, y, part=part: seen.append((part, tuple(x[0].shape))))


@pytest.mark.parametrize("fields", [{}, {"lora_bias": True}, {"use_dora": True}], ids=["lora", "bias of B", "dora"])
@pytest.mark.parametrize("specimen", [LINEARS, CONV1DS], ids=["Linear", "Conv1D"])
def test_hooks_run_once_and_leave_output_and_gradients_as_they_are(specimen: Specimen, fields: dict[str, Any]) -> None:
    model = with_adapters(specimen, "a", dtype=torch.float64, **fields)
    x = specimen.given(torch.float64, rows=3)
    plain = output(model, x)
    gradients = torch.autograd.grad(plain.square().sum(), list(model.up.lora_A["a"].parameters()))
    seen: Seen = []
    watch(model, seen)
    again = output(model, x)
    assert [part for part, _ in seen] == ["lora_A", "lora_B"]
    assert [shape[-1] for _, shape in seen] == [model.up.in_features, model.up.r["a"]]
    assert_close(again, plain, torch.float64)
    found = torch.autograd.grad(again.square().sum(), list(model.up.lora_A["a"].parameters()))
    assert_close(found[0], gradients[0], torch.float64)


def test_a_hook_may_change_the_product_and_only_while_the_adapter_is_active() -> None:
    model = with_adapters(LINEARS, "a")
    x = LINEARS.given(rows=3)
    plain = run(model, x)
    with disable(model):
        base = run(model, x)
    model.up.lora_B["a"].register_forward_hook(lambda _, args, output: 0 * output)
    assert_differs(run(model, x), plain, torch.float32)
    seen: Seen = []
    watch(model, seen)
    with disable(model):
        assert torch.equal(run(model, x), base)
    merge(model, "a")
    run(model, x)
    assert seen == []


def test_in_a_mixed_batch_hooks_see_the_rows_of_their_adapter() -> None:
    rows = ["b", "a", None, "c", "d", "b"]
    model = with_adapters(LINEARS, "a", "b", "c", "d")
    x = LINEARS.given(rows=len(rows))
    seen: Seen = []
    with torch.no_grad(), route(model, rows, keep=True):
        plain = run(model, x)
        watch(model, seen, "b")  # the stacks that the first pass kept do not hide it
        again = run(model, x)
    assert [shape[0] for _, shape in seen] == [2, 2]
    assert_close(again, plain, torch.float32)
    with torch.no_grad(), use(model, "b"):
        run(model, x)
    assert [shape[0] for _, shape in seen[2:]] == [len(rows)] * 2


@pytest.mark.parametrize("casts", [True, False])
def test_the_input_gets_the_dtype_of_a_unless_this_is_turned_off(casts: bool) -> None:
    model = with_adapters(LINEARS, "a")
    found: list[torch.dtype] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].dtype)

    model.up.lora_A["a"].double().register_forward_pre_hook(note)
    model.up.lora_B["a"].double()
    model.up.cast_input_dtype_enabled = casts
    if casts:
        assert run(model, LINEARS.given(rows=2)).dtype == torch.float32
    else:
        with pytest.raises(RuntimeError, match="dtype"):
            run(model, LINEARS.given(rows=2))
    assert found == [torch.float64 if casts else torch.float32]


def test_factors_that_cannot_be_called_are_only_read() -> None:
    seen: Seen = []
    model = with_adapters(LINEARS, "a", use_qalora=True, qalora_group_size=2)
    x = LINEARS.given(rows=2)
    plain = run(model, x)
    watch(model, seen)
    assert torch.equal(run(model, x), plain)
    table = with_adapters(EMBEDDING, "a")
    layer = next(module for module in table.modules() if hasattr(module, "kind_name"))
    layer.lora_embedding_A.register_forward_hook(lambda *_: seen.append(("A", ())))
    run(table, EMBEDDING.given(rows=2))
    assert seen == []
