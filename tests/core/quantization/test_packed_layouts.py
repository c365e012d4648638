"""GPTQ and AWQ weights, unpacked and compared with the definition of each format, element by element."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.model.base_view import dequantize, quantized_weights
from lorakit.core.quantization import weight_format_of
from lorakit.core.quantization.packed import PackedLinear, packed_linear
from lorakit.core.quantization.packed_layouts import AwqLinear, GptqLinear
from lorakit.errors import ConfigError, MergeError, ModelError

from ... import packed_models

ROWS, COLUMNS = 64, 96
LAYOUTS = {
    **{f"gptq-{bits}": {"method": "gptq", "bits": bits, "group": 32} for bits in (2, 3, 4, 8)},
    "gptq-whole": {"method": "gptq", "bits": 4, "group": -1},
    "gptq-act-order": {"method": "gptq", "bits": 4, "group": 32, "shuffled": True},
    "gptq-v2": {"method": "gptq", "bits": 4, "group": 32, "version": 2},
    "gptq-no-index": {"method": "gptq", "bits": 4, "group": 32, "indexed": False},
    "awq": {"method": "awq", "bits": 4, "group": 32},
}
EVERY = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def packed(linear: nn.Linear, method: str, **words: Any) -> tuple[PackedLinear, Tensor]:
    """Return a packed layer with random codes, and the weight that its format defines."""
    if method == "gptq":
        parts, weight = packed_models.gptq_tensors(linear.out_features, linear.in_features, **words)
        settings = {"bits": words["bits"], "offset": 2 - words.get("version", 1)}
        return packed_linear(GptqLinear, linear, parts, settings), weight
    parts, weight = packed_models.awq_tensors(linear.out_features, linear.in_features, words["group"])
    return packed_linear(AwqLinear, linear, parts, {}), weight


def pair(layout: dict[str, Any]) -> tuple[nn.Sequential, nn.Sequential]:
    """Return a model with packed layers, and the dense model with the weights that the format defines."""
    torch.manual_seed(0)
    layers = [nn.Linear(COLUMNS, ROWS), nn.Linear(ROWS, ROWS, bias=False)]
    found = [packed(layer, **layout) for layer in layers]
    for layer, (_, weight) in zip(layers, found, strict=True):
        layer.weight.data = weight
    model = nn.Sequential(found[0][0], nn.Tanh(), found[1][0])
    return model, nn.Sequential(layers[0], nn.Tanh(), layers[1])


def adapted(model: nn.Module, **words: Any) -> list[Any]:
    config = LoraConfig(**{"r": 3, "target_modules": ["0", "2"], "init_lora_weights": False, **words})
    core.attach(model, config, seed=1)
    return [parameter for _, parameter in core.trainable_parameters(model)]


@EVERY
def test_the_weight_is_read_as_the_format_defines_it(layout: dict[str, Any]) -> None:
    module, weight = packed(nn.Linear(COLUMNS, ROWS), **layout)
    base = weight_format_of(module)
    stored = base.stored(module, "weight")
    assert base.quantized and torch.equal(base.read(module, stored), weight)
    some = torch.tensor([0, COLUMNS - 1, COLUMNS, ROWS * COLUMNS - 1])
    values, bounds = base.values(stored, some)
    assert torch.equal(values, weight.reshape(-1)[some]) and bounds.isinf().all()


@EVERY
def test_outputs_and_gradients_are_those_of_the_dense_model(layout: dict[str, Any]) -> None:
    results = []
    for one in pair(layout):
        parameters = adapted(one)
        x = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = one.train()(x)
        y.square().mean().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in parameters)])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


@EVERY
def test_no_dequantized_weight_is_kept_for_the_backward_pass(layout: dict[str, Any]) -> None:
    model, _ = pair(layout)
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.randn(2, COLUMNS, requires_grad=True))
    assert not {(ROWS, COLUMNS), (COLUMNS, ROWS), (ROWS, ROWS)}.intersection(kept)


@pytest.mark.parametrize("name", ["gptq-act-order", "awq"])
def test_an_adapter_is_trained_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, dense = pair(LAYOUTS[name])
    x = torch.randn(4, COLUMNS)
    found = packed_models.losses(model, adapted(model), x)
    assert found[-1] < found[0]
    core.save_adapter(model, tmp_path / "adapter")
    wanted = model(x)
    again, _ = pair(LAYOUTS[name])
    for other in (again, dense):  # the fingerprint is that of the dense base
        core.load_adapter(other, tmp_path / "adapter")
        torch.testing.assert_close(other(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gptq-act-order", "awq"])
def test_merging_is_rejected_in_place_and_exact_in_a_dense_copy(name: str) -> None:
    model, _ = pair(LAYOUTS[name])
    adapted(model)
    x = torch.randn(2, COLUMNS)
    wanted = model(x)
    before = [part.clone() for weight in quantized_weights(model) for part in weight.base.tensors(weight.stored)]
    with pytest.raises(MergeError, match="dense=True") as caught:
        core.merge(model)
    assert caught.value.field == "dense" and torch.equal(model(x), wanted)
    assert set(core.merged_state_dict(model)) == {"0.weight", "0.bias", "2.weight"}
    core.merge(model, dense=True)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    core.unmerge(model)
    after = [part for weight in quantized_weights(model) for part in weight.base.tensors(weight.stored)]
    assert all(map(torch.equal, before, after)) and torch.equal(model(x), wanted)


@pytest.mark.parametrize("name", ["gptq-3", "awq"])
def test_a_dense_copy_computes_the_same(name: str) -> None:
    model, dense = pair(LAYOUTS[name])
    assert dequantize(model) == 2 and type(model[0]) is nn.Linear
    x = torch.randn(2, COLUMNS)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("words", [{"use_dora": True}, {"bias": "lora_only"}], ids=["dora", "bias"])
def test_other_settings_work(words: dict[str, Any]) -> None:
    outputs = []
    for one in pair(LAYOUTS["awq"]):
        adapted(one, **words)
        outputs.append(one(torch.ones(2, COLUMNS)))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-4)


def test_inits_that_change_the_base_are_rejected() -> None:
    model, _ = pair(LAYOUTS["awq"])
    for init in ("pissa", "olora"):
        with pytest.raises((ConfigError, MergeError)):
            adapted(model, init_lora_weights=init)
        assert type(model[0]) is AwqLinear


@pytest.mark.parametrize(
    ("name", "field", "change"),
    [
        ("gptq-4", "scales", lambda t: t.index_fill(0, torch.tensor([0]), float("nan"))),
        ("awq", "scales", lambda t: t.index_fill(0, torch.tensor([0]), float("inf"))),
        ("awq", "scales", lambda t: None),
        ("gptq-4", "qzeros", lambda t: None),
        ("gptq-4", "qweight", lambda t: t[:-1]),
        ("awq", "qzeros", lambda t: t[:, :-1]),
        ("gptq-4", "g_idx", lambda t: t + 1),
    ],
)
def test_damaged_tensors_are_rejected(name: str, field: str, change: Any) -> None:
    model, _ = pair(LAYOUTS[name])
    value = change(getattr(model[2], field).data)
    model[2]._parameters[field] = None if value is None else nn.Parameter(value, requires_grad=False)
    with pytest.raises(ModelError) as caught:
        adapted(model)
    assert caught.value.where == "2" and caught.value.field == field and isinstance(model[0], PackedLinear)
