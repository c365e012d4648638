"""Linear layers that multiply few rows independently: the same bits in decoding, and otherwise the layer's own forward."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit import LoraConfig, core
from lorakit.core import Int8Linear, quantize_base
from lorakit.generate import Continuation, Engine, NewToken, rows_are_independent
from lorakit.identity.identities import original_class
from lorakit.ops.linear import few_rows
from lorakit.speed import accelerate, multiply_few_rows, undo_few_rows
from lorakit.speed.few_rows import Linear

DTYPES = [torch.float32, torch.bfloat16]
HAS = {dtype: few_rows(torch.ones(1, 2, dtype=dtype), torch.ones(1, 2, dtype=dtype)) is not None for dtype in DTYPES}
dtypes = pytest.mark.parametrize(
    "dtype",
    [pytest.param(d, marks=pytest.mark.skipif(not HAS[d], reason=f"no kernel for {d}")) for d in DTYPES],
    ids=["fp32", "bf16"],
)
ADAPTERS = ("one", "two")


def llama(dtype: torch.dtype = torch.float32, *names: str) -> Any:
    """Return a frozen model with 15 linear layers, and adapters on 14 of them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).to(dtype).eval().requires_grad_(False)
    for name in names:
        core.attach(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), name)
    return model


def linears(model: nn.Module) -> set[type[nn.Module]]:
    return {
        type(module)
        for module in model.modules()
        if isinstance(module, nn.Linear) and original_class(module) is nn.Linear
    }


def ids(rows: int, tokens: int = 1) -> Tensor:
    return torch.randint(0, 300, (rows, tokens), generator=torch.Generator().manual_seed(1))


@dtypes
def test_a_layer_gives_a_row_the_same_bits_among_any_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    holder = nn.ModuleList([nn.Linear(577, 33)]).to(dtype)
    expected = holder[0](x := torch.randn(20, 1, 577).to(dtype))
    assert multiply_few_rows(holder) == 1 and multiply_few_rows(holder) == 0
    with torch.no_grad():
        y = holder[0](x)
        assert all(torch.equal(holder[0](x[i : i + n]), y[i : i + n]) for n in (1, 2, 7) for i in range(20 - n))
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=20 * torch.finfo(torch.float32).eps)


@dtypes
@pytest.mark.parametrize("names", [(), ADAPTERS], ids=["base", "adapters"])
def test_a_decoding_step_gives_a_row_the_same_bits_among_any_rows(names: tuple[str, ...], dtype: torch.dtype) -> None:
    """The rows attend to nothing but themselves, because attention is not what is tested."""
    model, tokens = llama(dtype, *names), ids(18)
    route = [(*names, None)[row % 3] for row in range(18)] if names else []

    def logits(some: slice) -> Tensor:
        with torch.no_grad(), core.route(model, route[some], keep=True) if names else torch.no_grad():
            return model(tokens[some]).logits

    before = logits(slice(0, 18))
    multiply_few_rows(model)
    together = logits(slice(0, 18))
    torch.testing.assert_close(together, before, rtol=0, atol=0.05 if dtype == torch.bfloat16 else 1e-5)
    for some in (slice(0, 1), slice(5, 6), slice(3, 5), slice(2, 18)):
        assert torch.equal(logits(some), together[some])


@dtypes
@pytest.mark.parametrize("per_step", [9, 1], ids=["together", "one after another"])
def test_answers_beside_others_have_the_bits_of_answers_alone(per_step: int, dtype: torch.dtype) -> None:
    """Rows join and leave at different steps, with two adapters and the base."""
    model, names = llama(dtype, *ADAPTERS), (*ADAPTERS, None)
    given = [
        Continuation(tuple(ids(1, 2 + 7 * n)[0].tolist()), 3 + n % 4, adapter=names[n % 3], logprobs=3)
        for n in range(9)
    ]
    multiply_few_rows(model)

    def answers(some: list[Continuation]) -> list[list[Any]]:
        engine, left, found = Engine(model), list(some), [list[Any]() for _ in some]
        while left or not engine.is_idle:
            for _ in range(min(per_step, len(left))):
                engine.submit(left.pop(0))
            for event in engine.step():
                assert isinstance(event, NewToken)
                found[event.row].append((event.token, event.logprobs))
        return found

    assert answers(given) == [answers([each])[0] for each in given]
    assert rows_are_independent(model, ADAPTERS)


@dtypes
def test_calls_that_a_kernel_does_not_support_run_the_original_forward(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(70, 20).to(dtype)
    few, many, strided = torch.randn(2, 70).to(dtype), torch.randn(500, 70).to(dtype), torch.randn(2, 70).double()
    expected = [layer(few), layer(many)]
    multiply_few_rows(layer)
    y = layer(few.requires_grad_())
    assert y.grad_fn is not None and torch.equal(y, expected[0])
    with torch.no_grad():
        assert torch.equal(layer(many), expected[1])
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(few.float()).dtype == torch.bfloat16
        assert layer(input=few).shape == (2, 20)
        with pytest.raises(RuntimeError):
            layer(strided)
        with pytest.raises(RuntimeError):
            layer(few[:, :5])


def test_hooks_names_copies_and_pickles_are_those_of_the_original_class() -> None:
    model, seen = llama(torch.float32, "one"), list[int]()
    described, state, classes = repr(model), list(model.state_dict()), linears(model)
    assert classes == {nn.Linear}
    assert multiply_few_rows(model) == 15 and linears(model) == {Linear}
    assert repr(model) == described and list(model.state_dict()) == state
    assert isinstance(model.lm_head, nn.Linear) and original_class(model.lm_head) is nn.Linear
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(ids(2))
    assert seen == [1]
    assert linears(copy.deepcopy(model)) == {nn.Linear}
    assert type(pickle.loads(pickle.dumps(model.model.layers[0].mlp.up_proj.base_layer))) is nn.Linear
    undo_few_rows(model)
    assert linears(model) == {nn.Linear}


def test_subclasses_and_the_adapters_of_peft_keep_their_class() -> None:
    class Own(nn.Linear):
        pass

    layer = nn.ModuleDict({"lora_A": nn.Linear(4, 2), "base_layer": nn.Linear(4, 4), "own": Own(4, 4)})
    assert multiply_few_rows(nn.ModuleList([layer])) == 1
    assert [type(module) for module in layer.values()] == [nn.Linear, Linear, Own]


def test_adapters_are_attached_merged_and_removed_as_before() -> None:
    plain, model = llama(), llama()
    multiply_few_rows(model)
    for each in (plain, model):
        torch.manual_seed(3)
        core.attach(each, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), "one")
    x = ids(3, 40)
    assert torch.equal(model(x).logits, plain(x).logits)  # with gradients
    for change in (core.merge, core.unmerge, core.detach):
        for each in (plain, model):
            change(each, *(["one"] if change is not core.unmerge else []))
        assert torch.equal(model(x).logits, plain(x).logits)
    assert linears(model) == {Linear}


@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
def test_acceleration_works_before_and_after(is_first: bool) -> None:
    plain, model, x = llama(torch.float32, "one"), llama(torch.float32, "one"), ids(3, 40)
    expected = accelerate(plain)
    if is_first:
        multiply_few_rows(model)
    accelerated = accelerate(model)
    if not is_first:
        multiply_few_rows(model)
    assert str(accelerated) == str(expected)
    assert torch.equal(model(x).logits, plain(x).logits)
    assert linears(copy.deepcopy(model)) == {nn.Linear}
    accelerated.undo()
    assert linears(model) == ({Linear} if is_first else {Linear, nn.Linear})  # the head was replaced
    undo_few_rows(model)
    expected.undo()
    assert torch.equal(model(x).logits, plain(x).logits)


def test_a_base_is_quantized_to_int8_as_before() -> None:
    model = llama()
    multiply_few_rows(model)
    quantize_base(model, [{"input_ids": ids(4, 32)}])
    kinds = [type(module) for module in model.modules() if type(module) in (Linear, Int8Linear)]
    assert kinds.count(Int8Linear) == 14 and kinds.count(Linear) == 1
