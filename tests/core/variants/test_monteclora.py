"""MonteCLoRA: samples, output, gradients and penalty against peft and the formula; merging, saving, restrictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit.peft as ours
from lorakit import core
from lorakit.config import LoraConfig
from lorakit.config.nested import MontecloraConfig
from lorakit.config.variants import costs_of
from lorakit.core.variants import monteclora
from lorakit.errors import ConfigError

from ...laws.quantized import specimen as quantized
from ...laws.quantized import storages
from ...laws.snapshots import snapshot
from ...laws.tolerances import assert_close
from ...laws.zoo import EMBEDDING, LINEARS, MHA, Specimen, output, randomise, run

FP32 = torch.float32
theirs = pytest.importorskip("peft")
SETTINGS = {"num_samples": 3, "sample_scaler": 0.5, "kl_loss_weight": 0.1, "dirichlet_prior": 0.3, "buffer_size": 1}


def adapted(*names: str, **fields: Any) -> nn.Module:
    model = LINEARS.model()
    for index, name in enumerate(names):
        core.attach(model, LINEARS.config(**{"monteclora_config": SETTINGS, **fields}), name, seed=index)
        randomise(model, name, seed=100 + index)
    return model.train()


def pair(**more: Any) -> tuple[Any, Any]:
    """peft's model and ours with the same values; peft has used up the sample that it drew at its creation."""
    made = []
    for library in (theirs, ours):
        part = library.MontecloraConfig(**{**SETTINGS, **more})
        fields = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "square"], "monteclora_config": part}
        made.append(library.get_peft_model(LINEARS.model(), library.LoraConfig(**fields)).train())
    generator = torch.Generator().manual_seed(3)
    given = dict(made[0].named_parameters())
    with torch.no_grad():
        for name, parameter in made[1].named_parameters():
            if ".lora_" in name:
                given[name].copy_(0.4 * torch.randn(parameter.shape, generator=generator))
                parameter.copy_(given[name])
        output(made[0], LINEARS.given())
    return made[0], made[1]


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("entropy", [False, True])
def test_with_one_seed_samples_gradients_penalty_and_buffers_are_peft_s(entropy: bool) -> None:
    models = pair(use_entropy=entropy)
    found: list[tuple[Tensor, Tensor]] = []
    for model in models:
        torch.manual_seed(7)
        for _ in range(2):
            y = output(model, LINEARS.given())
        penalty = model._get_monteclora_loss()
        (y.square().sum() + penalty).backward()
        found.append((y, penalty))
    torch.testing.assert_close(found[1], found[0])
    expected, gradients = trained(models[0]), trained(models[1])
    assert gradients.keys() == expected.keys() and sum("_prior" in name for name in gradients) == 4
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-4)  # of values up to some hundred
    buffers = dict(models[0].named_buffers())
    assert buffers.keys() == dict(models[1].named_buffers()).keys()
    for name, buffer in models[1].named_buffers():
        torch.testing.assert_close(buffer, buffers[name])
    plain = {name: model._get_kasa_loss() for name, model in zip("po", models, strict=True)}
    assert plain == {"p": 0.0, "o": 0.0}


def test_outside_training_output_and_penalty_are_those_of_lora() -> None:
    models = pair(use_entropy=True)
    plain = LINEARS.model()
    core.attach(plain, LINEARS.config(), "a")
    model = adapted("a").eval()
    with torch.no_grad():
        for one, other in zip(core.sites(model), core.sites(plain), strict=True):
            for part in "AB":
                getattr(other.layer.factor("a"), part).copy_(getattr(one.layer.factor("a"), part))
    given = LINEARS.given()
    assert torch.equal(run(model, given), run(plain, given))
    assert core.penalties(model) == 0.0
    for library in models:
        library.eval()
    assert models[0]._get_monteclora_loss() == models[1]._get_monteclora_loss() == 0.0
    torch.testing.assert_close(output(models[1], given), output(models[0], given))


def test_the_mean_of_many_samples_is_a() -> None:
    model = adapted("a")
    factor = core.sites(model)[0].layer.factor("a")
    torch.manual_seed(0)
    with torch.no_grad():
        samples = torch.stack([monteclora.sampled(factor) for _ in range(4000)])
        factor.own[monteclora.SPREAD].fill_(-9.0)  # below the smallest variance
        monteclora.sampled(factor)
    spread = samples.std(0)
    assert ((samples.mean(0) - factor.A).abs() < 5 * spread / 4000**0.5).all()
    assert torch.equal(factor.own[monteclora.VARIANCE], torch.full((4,), monteclora.MIN_VARIANCE).diag())


def test_a_recomputed_forward_pass_draws_the_same_samples() -> None:
    layer = core.sites(adapted("a"))[0].layer
    A, x, found = layer.factor("a").A, torch.randn(3, 12), []
    for again in (False, True):
        torch.manual_seed(3)
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        found.append(torch.autograd.grad(y.square().sum(), A)[0])
    assert torch.equal(*found)


def test_the_penalty_needs_no_graph_of_the_forward_pass() -> None:
    model, given = adapted("a", monteclora_config={**SETTINGS, "use_entropy": True}), LINEARS.given()
    output(model, given).square().sum().backward()
    model.zero_grad()
    for _ in range(2):
        penalty = core.penalties(model)
        assert penalty is not None
        output(model, given)  # overwrites the buffers before the backward pass
        penalty.backward()
    assert {name.rpartition(".")[2] for name in trained(model)} == {"std_prior", "expert_weights_prior"}
    many = torch.full((64,), 1.0)  # Γ of their sum overflows
    wide = adapted("a", monteclora_config={**SETTINGS, "num_samples": 64})
    with torch.no_grad():
        for site in core.sites(wide):
            site.layer.factor("a").own[monteclora.CONCENTRATION].copy_(many)
    assert torch.isfinite(core.penalties(wide))


def test_the_trainer_mixin_adds_the_penalty() -> None:
    class Parent:
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = output(model, inputs).sum()
            return (loss, "outputs") if return_outputs else loss

    class Trainer(ours.helpers.MontecloraTrainerMixin, Parent):  # type: ignore[misc, name-defined]
        pass

    model = adapted("a").eval()
    model.train()
    torch.manual_seed(1)
    loss = Parent().compute_loss(model, LINEARS.given())
    penalty = core.penalties(model)
    torch.manual_seed(1)
    torch.testing.assert_close(Trainer().compute_loss(model, LINEARS.given()), loss + penalty)
    torch.manual_seed(1)
    found, outputs = Trainer().compute_loss(model, LINEARS.given(), return_outputs=True)
    torch.testing.assert_close(found, loss + penalty)
    assert outputs == "outputs"
    plain = LINEARS.model()
    core.attach(plain, LINEARS.config())
    assert torch.equal(Trainer().compute_loss(plain, LINEARS.given()), Parent().compute_loss(plain, LINEARS.given()))


def test_rows_of_a_batch_have_their_own_adapters() -> None:
    model, given = adapted("a", "b"), LINEARS.given()
    names = ["a", "b", "a", "b"]
    with core.route(model.eval(), names):
        mixed = run(model, given)
    for row, name in enumerate(names):
        with core.use(model, name):
            assert_close(mixed[row], run(model, given)[row], FP32)
    with core.route(model.train(), names):
        output(model, given).sum().backward()
    assert all(gradient.isfinite().all() for gradient in trained(model).values())


def test_it_is_merged_and_comes_back_from_disk(tmp_path: Path) -> None:
    model, given = adapted("a"), LINEARS.given()
    output(model, given)
    before = run(model.eval(), given)
    core.save_adapter(model, tmp_path / "a", "a")
    again = LINEARS.model()
    core.load_adapter(again, tmp_path / "a", "a", trainable=True)
    assert torch.equal(run(again, given), before)
    for one, other in zip(core.sites(model), core.sites(again), strict=True):
        first, second = (site.layer.factor("a").own for site in (one, other))
        assert len(first) == 4 and all(torch.equal(second[name], tensor) for name, tensor in first.items())
    torch.testing.assert_close(core.penalties(again.train()), core.penalties(model.train()))
    core.merge(model.eval(), "a")
    assert_close(run(model, given), before, FP32)
    core.unmerge(model)
    core.detach(model)
    assert not any("monteclora" in name for name in model.state_dict())


def test_a_sum_of_several_and_a_cut_are_plain_lora() -> None:
    model, given = adapted("a", "b"), LINEARS.given()
    core.activate(model, "a", "b")
    before = run(model.eval(), given)
    made = core.combine(model, ["a", "b"], [1.0, 1.0], "sum", way="cat")
    assert made.config.monteclora_config is None
    with core.use(model, "sum"):
        assert_close(run(model, given), before, FP32)
    assert core.compress(model, "a", "small", rank=2).config.monteclora_config is None


@pytest.mark.parametrize("specimen", [EMBEDDING, MHA], ids=str)
def test_kinds_without_a_dense_layer_are_refused(specimen: Specimen) -> None:
    model = specimen.model()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="does not support MonteCLoRA;") as refused:
        core.attach(model, specimen.config(monteclora_config={}), "a")
    assert refused.value.field == "monteclora_config" and refused.value.allowed == ("Linear", "Conv1D")
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["num_samples", "dirichlet_prior", "buffer_size"])
def test_settings_are_checked(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        LoraConfig(monteclora_config={name: 0})
    assert refused.value.field == f"monteclora_config.{name}"


def test_it_excludes_other_variants_and_inits_that_change_the_base() -> None:
    with pytest.raises(ConfigError, match="mutually exclusive"):
        core.attach(LINEARS.model(), LINEARS.config(monteclora_config={}, use_dora=True), "a")
    with pytest.raises(ConfigError, match="depends on the rank") as refused:
        core.attach(LINEARS.model(), LINEARS.config(monteclora_config={}, init_lora_weights="pissa"), "a")
    assert refused.value.field == "init_lora_weights"


def test_a_plan_counts_its_parameters() -> None:
    model = adapted("a")
    number = sum(4 * (site.in_features + site.out_features) + 4 + 3 for site in core.sites(model))
    assert sum(p.numel() for _, p in core.trainable_parameters(model, "a")) == number
    config = LoraConfig(monteclora_config=MontecloraConfig(num_samples=3))
    assert costs_of(config).trained(config, "up", 4, 8, 12) == 7


@pytest.mark.parametrize("storage", storages())
def test_a_quantized_base_is_trained(storage: Any) -> None:
    made = quantized(storage)
    model = made.model()
    core.attach(model, made.config(monteclora_config=SETTINGS), "a")
    randomise(model, "a", seed=1)
    output(model.train(), made.given()).float().sum().backward()
    for site in core.sites(model):
        factor = site.layer.factor("a")
        assert factor.own[monteclora.SPREAD].grad is not None and factor.own[monteclora.WEIGHTS].std() > 0


def test_the_fields_reach_each_library_alike() -> None:
    assert vars(theirs.MontecloraConfig()) == vars(MontecloraConfig())


def test_programs_find_the_tensors_of_an_adapter_by_the_class_of_their_module() -> None:
    from lorakit.peft.tuners.lora.monteclora import MontecloraSampler

    model = pair()[1]
    found = {name for name, module in model.named_modules() if isinstance(module, MontecloraSampler)}
    assert len(found) == 2 and all(name.endswith(".lora_monteclora_sampler.default") for name in found)
