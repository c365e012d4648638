"""Biases that an adapter trains in place, together with everything else that changes or reads a bias."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorakit import LoraConfig
from lorakit.core import (
    attach,
    detach,
    disable,
    load_adapter,
    merge,
    merged_state_dict,
    route,
    save_adapter,
    trainable_parameters,
    unmerge,
    use,
)
from lorakit.errors import ConfigError, MergeError, RouteError

from ...laws.snapshots import same_bits

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).eval()


def shaken(model: nn.Module, config: LoraConfig, name: str) -> None:
    """Attach an adapter and give everything that it trains random numbers."""
    attach(model, config, name, seed=1)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    for _, parameter in trainable_parameters(model, name):
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3


def own(**fields: object) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["0"], lora_bias=True, **fields)  # type: ignore[arg-type]


def trains(bias: str = "all", **fields: object) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["0"], "bias": bias, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_bias_with_another_merged_into_it_is_not_trained(bias: str, tmp_path: Path) -> None:
    other = plain()
    shaken(other, trains(bias), "b")
    save_adapter(other, tmp_path, "b")
    model, base = plain(), plain().state_dict()
    shaken(model, own(), "a")
    merge(model, "a")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"bias at 0 cannot be trained while a is merged there.*\(lora_bias\)"):
        attach(model, trains(bias), "b")
    with pytest.raises(ConfigError, match="bias at 0 cannot be trained while a is merged there"):
        load_adapter(model, tmp_path, "b")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    unmerge(model, "a")
    load_adapter(model, tmp_path, "b")
    with use(model, "b"):
        torch.testing.assert_close(model(X), other(X))
    detach(model)
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())


def test_an_own_bias_is_not_merged_into_one_that_another_trains() -> None:
    model, base = plain(), plain().state_dict()
    shaken(model, trains(), "b")
    shaken(model, own(), "a")
    with use(model, "a"):
        before = model(X)
    for call in (merge, merged_state_dict):
        with pytest.raises(MergeError, match="'b' trains the base's bias at 0") as error:
            call(model, "a")
        assert (error.value.what, error.value.where, error.value.field) == ("a", "0", "lora_bias")
    with use(model, "a"):
        assert same_bits(model(X), before)
    detach(model, "b")
    merge(model, "a")
    torch.testing.assert_close(model(X), before)
    detach(model)
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())


def test_an_adapter_that_trains_the_bias_and_brings_one_is_merged_and_comes_out() -> None:
    model, x = plain(), X
    shaken(model, own(bias="all"), "a")
    shaken(model, LoraConfig(r=2, target_modules=["0"]), "c")
    answers: dict[str, Tensor] = {}
    for name in "ac":
        with use(model, name):
            answers[name] = model(x)
    merge(model, "a")
    for name in "ac":
        with use(model, name):
            torch.testing.assert_close(model(x), answers[name])
    with disable(model):
        assert same_bits(model(x), plain()(x))
    with route(model, ["a", "c", None, "a"]):
        mixed = model(x)
    torch.testing.assert_close(mixed[[0, 3]], answers["a"][[0, 3]])
    torch.testing.assert_close(mixed[1], answers["c"][1])
    detach(model)
    assert all(torch.equal(value, plain().state_dict()[key]) for key, value in model.state_dict().items())


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.attn = nn.Linear(6, 6), nn.MultiheadAttention(6, 2, batch_first=True)
        nn.init.normal_(self.attn.in_proj_bias)
        nn.init.normal_(self.attn.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.inner(x)
        out: Tensor = self.attn(h, h, h)[0]
        return out


@pytest.mark.parametrize("targets", [["inner"], ["attn"]])
@pytest.mark.parametrize("grad", [True, False])
def test_attention_reads_its_projection_s_bias_and_other_routes_see_the_base_s(targets: list[str], grad: bool) -> None:
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    model, base = Attends().eval(), Attends().eval()
    shaken(model, trains(target_modules=targets), "b")
    shaken(model, LoraConfig(r=2, target_modules=targets), "c")
    alone = Attends().eval()
    shaken(alone, LoraConfig(r=2, target_modules=targets), "c")
    with torch.set_grad_enabled(grad):
        assert not torch.allclose(model(x), base(x))
        with disable(model):
            torch.testing.assert_close(model(x), base(x))
        with use(model, "c"):
            torch.testing.assert_close(model(x), alone(x))
        with route(model, ["b", "c", None]), pytest.raises(RouteError, match="use different adapters"):
            model(x)
    detach(model)
    assert same_bits(model(x), base(x))


def test_a_moved_base_and_trained_biases_in_a_mixed_batch() -> None:
    model = plain()
    shaken(model, trains("lora_only", init_lora_weights="pissa"), "p")
    shaken(model, LoraConfig(r=2, target_modules=["0"]), "q")
    answers = {None: plain()(X)}
    for name in "pq":
        with use(model, name):
            answers[name] = model(X)  # type: ignore[index]
    for rows, copies in ((["p", None, "q", "p"], 1), (["q", "p"], 2)):
        with route(model, rows, copies=copies):
            found = model(X)
        for index in range(4):
            torch.testing.assert_close(found[index], answers[rows[index // copies]][index])  # type: ignore[index]


@pytest.mark.parametrize("dora", [False, True])
def test_other_people_s_hooks_run_once(dora: bool) -> None:
    model, seen = plain(), []
    model[0].register_forward_pre_hook(lambda _, args: seen.append(("before", len(args[0]))))
    model[0].register_forward_hook(lambda _, args, output: seen.append(("after", len(output))))
    shaken(model, trains("lora_only", init_lora_weights="pissa"), "p")
    shaken(model, LoraConfig(r=2, target_modules=["0"], use_dora=dora), "q")
    contexts: list[Callable[[], object]] = [
        lambda: use(model, "p"),
        lambda: use(model, "p", "q"),
        lambda: disable(model),
        lambda: route(model, ["p", None, "q", "p"]),
    ]
    for context in contexts:
        seen.clear()
        with context():  # type: ignore[attr-defined]
            model(X)
        assert seen == [("before", 4), ("after", 4)]


def test_a_hook_of_the_base_that_changes_its_output_acts_on_every_route() -> None:
    model = plain()
    model[2].register_forward_hook(lambda _, args, output: output * 2)
    model[2].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    before = model(X)
    shaken(model, trains(), "b")
    with disable(model):
        assert same_bits(model(X), before)


@pytest.mark.parametrize("trainer_first", [True, False])
def test_no_other_module_in_the_place_of_one_whose_bias_is_trained(trainer_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)).eval()
    if trainer_first:
        shaken(model, trains(), "b")
        shaken(model, LoraConfig(r=2, target_modules=["0"]), "a")
        for names in (("a",), ("b",), ("a", "b")):
            with pytest.raises(
                MergeError, match=r"dense=True replaces the module at 0, but adapter 'b' trains its bias"
            ):
                merge(model, *names, dense=True)
    else:
        shaken(model, LoraConfig(r=2, target_modules=["0"]), "a")
        merge(model, "a", dense=True)
        with pytest.raises(ConfigError, match="bias at 0 cannot be trained while a is merged there with dense=True"):
            attach(model, trains(), "b")


def test_a_model_that_is_cast_takes_its_old_biases_along() -> None:
    model, base = plain(), plain().to(torch.bfloat16)
    shaken(model, trains(), "b")
    shaken(model, LoraConfig(r=2, target_modules=["0"], use_dora=True), "c")
    model.to(torch.bfloat16)
    x = X.to(torch.bfloat16)
    with disable(model):
        assert same_bits(model(x), base(x))
    with use(model, "c"):
        assert model(x).dtype == torch.bfloat16
    with route(model, ["b", "c", None, "b"]):
        assert same_bits(model(x)[2], base(x)[2])
    detach(model)
    assert same_bits(model(x), base(x))


def test_a_merged_bias_is_cast_with_the_model() -> None:
    model, base = plain(), plain().to(torch.bfloat16)
    shaken(model, own(), "a")
    merge(model, "a")
    model.to(torch.bfloat16)
    x = X.to(torch.bfloat16)
    with disable(model):
        assert same_bits(model(x), base(x))
    unmerge(model, "a")
    assert model[0].base_layer.bias.dtype == torch.bfloat16
    assert model[0].kept_bias is None
    detach(model)
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in model.state_dict().items())


def test_of_an_attention_lora_only_trains_the_out_projections_bias_as_peft(tmp_path: Path) -> None:
    import peft

    config = LoraConfig(r=2, target_modules=["0"], bias="lora_only")
    models = [nn.Sequential(nn.MultiheadAttention(6, 2), nn.Identity()) for _ in range(2)]
    shaken(models[0], config, "a")
    names = {name for name, _ in trainable_parameters(models[0], "a") if "bias" in name}
    assert names == {"0.base_layer.out_proj.base_layer.bias"}
    save_adapter(models[0], tmp_path / "ours", "a")

    theirs = peft.PeftModel.from_pretrained(models[1], str(tmp_path / "ours"))
    bias = models[0][0].owner.out_proj.bias
    assert torch.equal(theirs.base_model.model[0].base_layer.out_proj.base_layer.bias, bias)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    third = nn.Sequential(nn.MultiheadAttention(6, 2), nn.Identity())
    load_adapter(third, tmp_path / "theirs", "a", allow=["base_mismatch"])
    assert torch.equal(third[0].owner.out_proj.bias, bias)
