"""New factors: shapes, the side that is zero, and the distribution of the other, as in PEFT and the papers."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from lorakit import choices
from lorakit.config import LoraConfig
from lorakit.core import attach, collect_for
from lorakit.core.inits import INITS, Init, init_named
from lorakit.errors import ConfigError

from ...laws.snapshots import same_bits

R, IN, OUT, VOCABULARY = 64, 1024, 512, 700


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(IN, OUT))


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(OUT, IN))


def factors(
    model: nn.Module, init: bool | str, seed: int | None = 0, **fields: object
) -> tuple[torch.Tensor, torch.Tensor]:
    attach(model, LoraConfig(r=R, target_modules=["0"], init_lora_weights=init, **fields), seed=seed)
    layer = model[0]
    if isinstance(layer.base_layer, nn.Embedding):
        return layer.lora_embedding_A["default"].detach(), layer.lora_embedding_B["default"].detach()
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


@pytest.mark.parametrize("make", [dense, conv1d])
def test_default_is_kaiming_uniform_and_zero(make: object) -> None:
    """kaiming_uniform_(a=√5) on (r, in): uniform within ±1/√in, so of standard deviation 1/√(3·in)."""
    A, B = factors(make(), True)
    bound = 1 / math.sqrt(IN)
    assert A.shape == (R, IN) and B.shape == (OUT, R)
    assert 0.99 * bound < A.abs().max().item() <= bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(A.mean().item()) < 4 * bound / math.sqrt(3 * A.numel())
    counts = torch.histc(A, bins=10, min=-bound, max=bound)
    assert counts.min() > 0.93 * A.numel() / 10  # flat
    assert torch.count_nonzero(B) == 0


@pytest.mark.parametrize("make", [dense, conv1d])
def test_gaussian_has_standard_deviation_1_over_r(make: object) -> None:
    A, B = factors(make(), "gaussian")
    assert A.std().item() == pytest.approx(1 / R, rel=0.02)
    assert A.abs().max().item() > 3.5 / R  # a uniform one of that deviation ends at 1.73
    assert torch.count_nonzero(B) == 0


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_an_embedding_has_the_sides_swapped(init: bool | str) -> None:
    A, B = factors(nn.Sequential(nn.Embedding(VOCABULARY, IN)), init)
    assert A.shape == (R, VOCABULARY) and B.shape == (IN, R)
    assert torch.count_nonzero(A) == 0
    assert B.std().item() == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("make", [dense, conv1d, lambda: nn.Sequential(nn.Embedding(VOCABULARY, IN))])
def test_random_fills_both(make: object) -> None:
    A, B = factors(make(), False)
    assert torch.count_nonzero(A) == A.numel() and torch.count_nonzero(B) == B.numel()


def test_two_sites_and_two_adapters_begin_differently() -> None:
    model = nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, IN))
    for name in ("a", "b"):
        attach(model, LoraConfig(r=R, target_modules=["0", "1"]), name)
    found = [model[site].lora_A[name].weight for site in (0, 1) for name in ("a", "b")]
    assert not any(same_bits(one, other) for index, one in enumerate(found) for other in found[index + 1 :])


def test_a_seed_gives_the_same_bits_and_leaves_torchs_generator_alone() -> None:
    state = torch.get_rng_state()
    one, other, third = factors(dense(), True, 5)[0], factors(dense(), True, 5)[0], factors(dense(), True, 6)[0]
    assert same_bits(one, other) and not same_bits(one, third)
    torch.set_rng_state(state)
    model = dense()
    before = torch.get_rng_state()
    factors(model, True, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_torchs_own_generator_decides() -> None:
    torch.manual_seed(3)
    model = dense()
    one = factors(model, True, None)[0]
    torch.manual_seed(3)
    model = dense()
    assert same_bits(factors(model, True, None)[0], one)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_the_values_are_those_after_new_modules_were_drawn(init: bool | str) -> None:
    """The first draws are those of a new nn.Linear for A and for B, as in PEFT, where the init then replaces them."""
    A, _ = factors(dense(), init, 5)
    generator = torch.Generator().manual_seed(5)
    for shape in ((R, IN), (OUT, R)):
        torch.empty(shape).uniform_(generator=generator)
    bound = 1 / math.sqrt(IN)
    drawn = torch.empty(R, IN)
    drawn.uniform_(-bound, bound, generator=generator) if init is True else drawn.normal_(0, 1 / R, generator=generator)
    assert same_bits(A, drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_factors_are_fp32_or_wider_on_the_device_of_their_site(dtype: torch.dtype) -> None:
    A, B = factors(dense().to(dtype), True)
    assert A.dtype == B.dtype == torch.promote_types(dtype, torch.float32)
    A, B = factors(dense().to("meta"), True)
    assert A.device.type == B.device.type == "meta"


def test_dora_begins_with_the_norm_of_each_output() -> None:
    for make in (dense, conv1d):
        model = make()
        W = model[0].weight.detach() if make is dense else model[0].weight.detach().T
        factors(model, True, use_dora=True)
        magnitude = model[0].lora_magnitude_vector["default"].weight
        assert magnitude.shape == (OUT,) and magnitude.requires_grad
        torch.testing.assert_close(magnitude, W.norm(dim=1))


def test_the_names_that_training_supports_are_those_of_the_table() -> None:
    names = {"default" if init.name is True else init.name for init in INITS}
    assert set(choices.INITS) == names - {False, "loftq"}


def test_names_that_are_not_there() -> None:
    assert [init_named(row.name) for row in INITS] == list(INITS)
    assert init_named("PiSSA_niter_16") is init_named("pissa")
    with pytest.raises(ConfigError, match=r"'gaussain'.*Did you mean gaussian\?"):
        init_named("gaussain")
    for name in ("zzzzzz", "pissa_niter_", "pissa_niter_x"):
        with pytest.raises(
            ConfigError, match=rf"init_lora_weights='{name}'; it must be True, False or one of gaussian, "
        ):
            init_named(name)


@pytest.mark.parametrize("name", ["eva", "corda"])
def test_an_init_without_a_meaning_on_a_kind_is_refused(name: str) -> None:
    config = LoraConfig(target_modules=["0"], init_lora_weights=name, **{f"{name}_config": {}})
    with pytest.raises(ConfigError, match=f"0: Embedding does not support .*'{name}'.*Supported: Linear"):
        attach(nn.Sequential(nn.Embedding(9, 4)), config)


@pytest.mark.parametrize("name", ["eva", "corda", "lora_ga"])
def test_data_is_not_collected_for_a_bare_parameter(name: str) -> None:
    fields = {"target_modules": [], "target_parameters": ["one.weight"], "init_lora_weights": name}
    model, batch = nn.Sequential(OrderedDict(one=nn.Linear(4, 4))), torch.ones(2, 4)
    with pytest.raises(ConfigError, match=rf"one\.weight: Parameter does not support init_lora_weights='{name}'"):
        collect_for(model, LoraConfig(**fields, **{f"{name}_config": {}}), [batch], lambda model, x: model(x).sum())


def test_gradient_directions_of_an_odd_number_fit_no_rank() -> None:
    """LoRA-GA needs 2·r directions; with 2·r + 1, which a file may hold, the parts of A and B would not be those of r."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(12, 10)), torch.randn(9, 12)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config={})
    found = collect_for(model, config, [batch], lambda model, x: model(x).square().sum())
    U, S, Vh = (found.sites["0"][name] for name in ("U", "S", "Vh"))
    odd = {"U": torch.cat([U, U[:, -1:]], 1), "S": torch.cat([S, S[-1:]]), "Vh": torch.cat([Vh, Vh[-1:]])}
    before = model[0].weight.clone()
    with pytest.raises(ConfigError, match=r"0: .*rank 2\.5, but r is 2"):
        attach(model, config, statistics=replace(found, sites={"0": odd}))
    assert torch.equal(model[0].weight, before)
    attach(model, config, statistics=found)


@pytest.mark.filterwarnings("ignore:.*is not specified")
@pytest.mark.parametrize("init", INITS, ids=lambda init: str(init.name))
def test_a_config_knows_which_factors_an_init_trains(init: Init) -> None:
    """`lorakit.plan` counts without torch, so it asks the config instead of the table."""
    fields: dict[str, object] = {"loftq_config": {"loftq_bits": 4}} if init.name == "loftq" else {}
    assert LoraConfig(init_lora_weights=init.name, **fields).trains_only_a is (init.trains == {"A"})
