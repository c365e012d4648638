"""aLoRA under torch.compile: correct for every batch with fullgraph=False; fullgraph=True raises a clear error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.core import activate, attach, disable, use

from ...laws.zoo import INVOCATION, LLAMA, WAITING_LINEARS, randomise

IDS = WAITING_LINEARS.given(rows=3)


@pytest.fixture
def model() -> Iterator[nn.Module]:
    adapted = WAITING_LINEARS.model()
    attach(adapted, waits(WAITING_LINEARS), "waits")
    attach(adapted, WAITING_LINEARS.config(), "plain")
    for seed, name in enumerate(("waits", "plain")):
        randomise(adapted, name, 60 + seed)
    activate(adapted, "waits")
    torch._dynamo.reset()
    yield adapted
    torch._dynamo.reset()


def waits(specimen: Any) -> Any:
    return specimen.config(alora_invocation_tokens=list(INVOCATION), task_type="CAUSAL_LM")


def moved(ids: Tensor, by: int) -> Tensor:
    """The same tokens with the invocation elsewhere."""
    return ids.roll(by, dims=1)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_each_batch_has_its_own_start(model: nn.Module, backend: str) -> None:
    compiled = torch.compile(model, backend=backend)
    for by in (0, 1, 2, 0, 4):
        ids = moved(IDS, by)
        expected = model(ids)
        torch.testing.assert_close(compiled(ids), expected)
        with disable(model):
            base = model(ids)
            torch.testing.assert_close(compiled(ids), base)
        assert not torch.allclose(expected, base)
    none = torch.full_like(IDS, 9)
    with disable(model):
        base = model(none)
    torch.testing.assert_close(compiled(none), base)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks for it
def test_gradients_are_those_of_the_uncompiled_model(model: nn.Module) -> None:
    trained = [value for value in model.parameters() if value.requires_grad]
    expected = torch.autograd.grad(model(IDS).square().sum(), trained, allow_unused=True)
    compiled = torch.compile(model, backend="aot_eager")
    found = torch.autograd.grad(compiled(IDS).square().sum(), trained, allow_unused=True)
    torch.testing.assert_close(found, expected)
    assert any(gradient is not None and bool(gradient.any()) for gradient in found)


@torch.no_grad()
def test_a_whole_graph_is_refused_with_a_sentence_and_plain_adapters_still_have_one(model: nn.Module) -> None:
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"outside of a compiled graph\. Compile with fullgraph=False"
    ):
        compiled(IDS)
    activate(model, "plain")
    torch.testing.assert_close(compiled(IDS), model(IDS))


@pytest.mark.costly(cases=0)
@torch.no_grad()
def test_a_block_for_it_in_a_model_that_was_compiled_for_another(model: nn.Module) -> None:
    activate(model, "plain")
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(IDS), model(IDS))
    with use(model, "waits"):
        torch.testing.assert_close(compiled(IDS), model(IDS))
    torch.testing.assert_close(compiled(IDS), model(IDS))
    for name in ("waits", "plain", "waits"):
        activate(model, name)
        for by in (0, 2):
            torch.testing.assert_close(compiled(moved(IDS, by)), model(moved(IDS, by)))


@pytest.mark.costly(cases=0)
@torch.no_grad()
def test_threads_do_not_meet_in_a_compiled_model(model: nn.Module) -> None:
    compiled = torch.compile(model, backend="eager")
    compiled(IDS)
    batches = [moved(IDS, by) for by in (0, 1, 2, 4)]
    expected, wrong = [model(ids) for ids in batches], []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(25):
                if not torch.allclose(compiled(batches[number]), expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.costly(cases=0)
@torch.no_grad()
def test_a_transformers_model_and_its_steps_with_a_cache() -> None:
    model = LLAMA.model()
    attach(model, waits(LLAMA))
    randomise(model, "default", 5)
    ids = WAITING_LINEARS.given(rows=2)
    expected = model(ids).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids).logits, expected)
    first = compiled(ids[:, :4], use_cache=True)
    rest = compiled(ids[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), expected, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()
