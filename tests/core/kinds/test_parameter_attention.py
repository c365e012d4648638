"""nn.MultiheadAttention: both projections are adapted once, the base does not change, keys and values can differ in width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core import attach, detach, disable, load_adapter, merge, route, save_adapter, sites, unmerge, use
from lorakit.errors import RouteError, TargetError

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3))


class Model(nn.Module):
    def __init__(self, **options: int | bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True, **options)  # type: ignore[arg-type]
        self.widths = [int(options.get(name, 8)) for name in ("kdim", "vdim")]

    def forward(self, x: Tensor) -> Tensor:
        keys, values = (x[..., :width] for width in self.widths)
        out: Tensor = self.mha(x, keys, values)[0]
        return out


def adapted(dtype: torch.dtype = torch.float32, **options: int | bool) -> Model:
    model = Model(**options).to(dtype).eval()
    attach(model, LoraConfig(r=2, lora_alpha=4, target_modules=["mha"]))
    generator = torch.Generator().manual_seed(1)
    for site in sites(model):
        for parameter in site.layer.parameters_of("default"):
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def by_hand(model: Model, **options: int | bool) -> Tensor:
    """The answer of a plain module whose weights have each delta added once."""
    plain = Model(**options)
    plain.load_state_dict({k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if ".lora_" not in k})
    for site in sites(model):
        factor, spec = site.layer.factor("default"), site.layer.spec
        owner = plain.mha.out_proj if site.path.endswith("out_proj") else plain.mha
        getattr(owner, spec.parameter).data += factor.scale * factor.B @ factor.A
    return plain(X)


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 4}, {"bias": False}], ids=str)
def test_each_projection_is_adapted_once(options: dict[str, int | bool]) -> None:
    model = adapted(**options)
    expected = by_hand(model, **options)
    torch.testing.assert_close(model(X), expected)
    merge(model)
    torch.testing.assert_close(model(X), expected)
    unmerge(model)
    torch.testing.assert_close(model(X), expected)


def test_gradients_are_those_of_the_formula() -> None:
    model = adapted(torch.float64)
    x = X.double()
    model(x).square().sum().backward()
    for site in sites(model):
        A, B = site.layer.parameters_of("default")
        for parameter in (A, B):
            index, step = (0, 1), 1e-6
            keep = parameter.data[index].item()
            losses = []
            for sign in (1, -1):
                parameter.data[index] = keep + sign * step
                losses.append(model(x).square().sum().item())
            parameter.data[index] = keep
            assert parameter.grad is not None
            assert abs((losses[0] - losses[1]) / (2 * step) - parameter.grad[index].item()) < 1e-5


def test_a_bf16_base_does_not_drift_in_use() -> None:
    model = adapted(torch.bfloat16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = model(X.bfloat16())
    for _ in range(200):
        model(X.bfloat16())
    assert torch.equal(model(X.bfloat16()), first)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_names_in_memory_and_on_disk_are_pefts(tmp_path: Path) -> None:
    model = adapted()
    assert [site.path for site in sites(model)] == ["mha", "mha.base_layer.out_proj"]
    save_adapter(model, tmp_path)
    from safetensors.torch import load_file

    assert sorted(load_file(tmp_path / "adapter_model.safetensors")) == [
        "base_model.model.mha.base_layer.out_proj.lora_A.weight",
        "base_model.model.mha.base_layer.out_proj.lora_B.weight",
        "base_model.model.mha.lora_A.weight",
        "base_model.model.mha.lora_B.weight",
    ]
    other = Model().eval()
    load_adapter(other, tmp_path)
    torch.testing.assert_close(other(X), model(X))  # torch attends another way where gradients are wanted


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 4}], ids=str)
def test_two_adapters_come_and_go(options: dict[str, int | bool], tmp_path: Path) -> None:
    model = adapted(**options)
    expected = model(X)
    attach(model, LoraConfig(r=3, target_modules=["mha"]), "second")
    torch.testing.assert_close(model(X), expected)
    save_adapter(model, tmp_path)
    detach(model, "default")
    torch.testing.assert_close(model(X), Model(**options).eval()(X))
    load_adapter(model, tmp_path, "third")
    detach(model)
    assert list(model.state_dict()) == list(Model(**options).state_dict())
    assert type(model.mha) is nn.MultiheadAttention and not sites(model)


OUT = LoraConfig(r=2, lora_alpha=4, target_modules=["out_proj"], init_lora_weights=False)


@pytest.mark.parametrize("targets", [["out_proj"], "all-linear"], ids=str)
def test_its_out_projection_alone_is_adapted_through_its_weight(targets: list[str] | str, tmp_path: Path) -> None:
    model = Model().eval()
    attach(model, OUT.with_fields(target_modules=targets))
    assert [(site.path, site.kind) for site in sites(model)] == [("mha.out_proj", "InnerLinear")]
    expected = by_hand(model)
    torch.testing.assert_close(model(X), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected)
    model(X).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in sites(model)[0].layer.parameters_of("default"))
    with disable(model):
        torch.testing.assert_close(model(X), Model().eval()(X))
    save_adapter(model, tmp_path)
    other = Model().eval()
    load_adapter(other, tmp_path)
    torch.testing.assert_close(other(X), expected)
    merge(model)
    torch.testing.assert_close(model(X), expected)
    unmerge(model)
    torch.testing.assert_close(model(X), expected)
    detach(model)
    assert list(model.state_dict()) == list(Model().state_dict())


def test_its_out_projection_has_one_adapter_for_all_rows() -> None:
    model = Model().eval()
    attach(model, OUT, "a")
    with use(model, "a"):
        expected = model(X)
    with route(model, ["a"] * 3):
        assert torch.equal(model(X), expected)
    with route(model, ["a", None, None]), pytest.raises(RouteError, match="one weight for all rows"):
        model(X)


def test_it_is_adapted_as_a_whole_or_at_its_out_projection() -> None:
    with pytest.raises(TargetError) as caught:
        attach(Model(), LoraConfig(target_modules=["mha", "out_proj"]))
    assert (caught.value.fields["where"], caught.value.fields["what"]) == ("mha", "mha.out_proj")
    model = Model()
    attach(model, OUT)
    with pytest.raises(TargetError):
        attach(model, LoraConfig(target_modules=["mha"]), "second")
    assert [site.path for site in sites(model)] == ["mha.out_proj"]


def test_rows_with_different_adapters_are_refused() -> None:
    from lorakit.core import route

    model = adapted()
    with route(model, ["default", None, None]), pytest.raises(RouteError, match="one weight for all rows"):
        model(X)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_route_has_as_many_rows_as_the_batch(batch_first: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    model = nn.ModuleDict({"attention": attention})
    attach(model, LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False), "a")
    x = torch.randn(3, 5, 8)  # three rows of five tokens, or five of three
    rows = 3 if batch_first else 5
    given = {"query": x, "key": x, "value": x}
    layer: Any = model["attention"]
    with use(model, "a"):
        wanted = layer(x, x, x)[0]
    with route(model, ["a"] * rows):
        assert torch.equal(layer(x, x, x)[0], wanted)
        assert torch.equal(layer(**given)[0], wanted)
    for wrong in (8 - rows, 1):
        text = rf"rows in the route \({wrong}\) does not match the input of .* MultiheadAttention \(.*, rows: {rows}\)"
        with route(model, ["a"] * wrong), pytest.raises(RouteError, match=text):
            layer(x, x, x)
        with route(model, ["a"] * wrong), pytest.raises(RouteError, match=text):
            layer(**given)
    with route(model, ["a"]):
        assert layer(x[0], x[0], x[0])[0].shape == (5, 8)  # without a batch it is one row
    with route(model, ["a"] * 2), pytest.raises(RouteError, match=r"number of rows in the route \(2\) does not match"):
        layer(x[0], x[0], x[0])


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 4}], ids=str)
def test_what_was_loaded_is_saved_under_the_same_names(options: dict[str, int | bool], tmp_path: Path) -> None:
    model = adapted(**options)
    first = save_adapter(model, tmp_path / "1")
    loaded = Model(**options).eval()
    load_adapter(loaded, tmp_path / "1")
    assert [(s.path, s.layer.spec) for s in sites(loaded)] == [(s.path, s.layer.spec) for s in sites(model)]
    assert save_adapter(loaded, tmp_path / "2").weights_sha256 == first.weights_sha256
    again = Model(**options).eval()
    load_adapter(again, tmp_path / "2")
    torch.testing.assert_close(again(X), model(X))  # torch attends another way where a weight is trained
