"""A variant is one entry of VARIANTS: test variants are attached, trained, saved, merged and combined like ours.

No other source knows them. Together they use every field of an entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit import core, peft
from lorakit.config import LoraConfig, checks
from lorakit.core import variants
from lorakit.core.attachment.attaching import reset_factor
from lorakit.core.kinds import Kind, WeightSpec, kind_named
from lorakit.core.kinds.kind import Shape
from lorakit.core.optimizers import Rates, rates_by_name, trained_parts
from lorakit.core.variants import NO_SETTING, At, Factor, Move, OwnTensor, Parts, Penalty, Setting, Start, Variant
from lorakit.data import Batch
from lorakit.errors import AdapterError, AdapterFileError, ConfigError, MergeError
from lorakit.peft import tuner
from lorakit.train.loop.optimizer import build_adamw
from lorakit.train.loop.step import StepOptions, train_step

from ...laws.snapshots import same_bits, snapshot
from ...laws.zoo import LINEARS, randomise, run

FIELD, ON = "megatron_config", {"toy": True}
"""A field of PEFT's that asks for nothing built here, and a value; the entries of this file take it over."""


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


DIAGONAL, GATE = "lora_toy_diagonal", "lora_toy_gate"


def _asked(config: LoraConfig, path: str) -> Setting | None:
    return NO_SETTING if getattr(config, FIELD) else None


def _is_dense(kind: Kind) -> bool:
    return kind.is_dense


def _per_rank(kind: Kind, spec: WeightSpec, r: int, setting: Setting) -> Shape:
    return (r,)


def _per_output(kind: Kind, spec: WeightSpec, r: int, setting: Setting) -> Shape:
    return kind.vector(spec)


def _scaled(factor: Factor, training: bool) -> tuple[Tensor, Tensor]:
    return factor.own[DIAGONAL][:, None] * factor.A, factor.B


def _energy(factor: Factor, training: bool) -> Tensor:
    return factor.own[DIAGONAL].square().sum()


TOY = Variant(
    name="toy",
    title="Toy",
    field=FIELD,
    setting=_asked,
    fits=_is_dense,
    parts=Parts(
        extras=(
            OwnTensor(DIAGONAL, "parameter", _per_rank, lambda start: torch.full((start.rank,), 0.5)),
            OwnTensor(
                GATE,
                "module",
                _per_output,
                lambda start: start.B.new_zeros(start.spec.out_features),
                trained=False,
                older_names=(f"{GATE}.weight",),
            ),
        )
    ),
    factors=_scaled,
    penalty=Penalty(_energy),
)


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Callable[[Variant], None]:
    """Make a variant an entry of the table, for one test."""

    def entered(variant: Variant) -> None:
        monkeypatch.setattr(variants, "VARIANTS", (*variants.VARIANTS, variant))
        left = {name: value for name, value in checks.NOT_BUILT.items() if name != FIELD}
        monkeypatch.setattr(checks, "NOT_BUILT", left)

    return entered


def adapted(*names: str, **fields: Any) -> nn.Module:
    model = LINEARS.model()
    for index, name in enumerate(names):
        core.attach(model, LINEARS.config(**{FIELD: ON, **fields}), name)
        randomise(model, name, seed=100 + index)
    return model


def factors_of(model: nn.Module, name: str) -> dict[str, Factor]:
    return {site.path: site.layer.factor(name) for site in core.sites(model)}


def test_it_begins_acts_and_is_trained(put: Callable[[Variant], None]) -> None:
    put(TOY)
    model, given = LINEARS.model(), LINEARS.given()
    before = run(model, given)
    core.attach(model, LINEARS.config(**{FIELD: ON}), "a")
    assert torch.equal(run(model, given), before)
    trained = [name for name, _ in core.trainable_parameters(model)]
    assert sum(DIAGONAL in name for name in trained) == len(core.sites(model))
    assert not any(GATE in name for name in trained)
    core.set_trained(model, {"a": False})
    core.set_trained(model, {"a": True})
    assert [name for name, _ in core.trainable_parameters(model)] == trained
    randomise(model, "a", seed=1)
    site = core.sites(model)[0]
    layer, x = site.layer, torch.randn(3, site.in_features, requires_grad=True)
    factor = layer.factor("a")
    expected = F.linear(x, layer.read(), layer.original_bias())
    expected = expected + F.linear(F.linear(x, factor.A) * factor.own[DIAGONAL] * factor.scale, factor.B)
    found = layer(x)
    torch.testing.assert_close(found, expected)
    inputs = [x, factor.A, factor.B, factor.own[DIAGONAL]]
    gradients = (torch.autograd.grad(y.sum(), inputs) for y in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_it_comes_back_from_disk(put: Callable[[Variant], None], tmp_path: Path) -> None:
    put(TOY)
    model, given = adapted("a"), LINEARS.given()
    core.save_adapter(model, tmp_path / "a", "a")
    again = LINEARS.model()
    core.load_adapter(again, tmp_path / "a", "a", trainable=True)
    assert torch.equal(run(again, given), run(model, given))
    names = [name for name, _ in core.trainable_parameters(model)]
    assert [name for name, _ in core.trainable_parameters(again)] == names
    core.detach(again)
    fresh = dict(LINEARS.model().named_parameters())
    assert all(same_bits(parameter, fresh[name]) for name, parameter in again.named_parameters())


def test_it_is_merged_and_unmerged(put: Callable[[Variant], None]) -> None:
    put(TOY)
    model, given = adapted("a", "b"), LINEARS.given()
    core.activate(model, "a", "b")
    before, bits = run(model, given), snapshot(model)["tensors"]
    core.merge(model, "a", "b")
    assert_close(run(model, given), before)
    core.unmerge(model)
    assert snapshot(model)["tensors"] == bits


@pytest.mark.parametrize("way", ["cat", "svd"])
def test_a_sum_of_several_is_plain_lora(put: Callable[[Variant], None], way: str) -> None:
    put(TOY)
    model, given = adapted("a", "b"), LINEARS.given()
    core.activate(model, "a", "b")
    before = run(model, given)
    wide = core.CombinationType(way, rank=8) if way == "svd" else way
    made = core.combine(model, ["a", "b"], [1.0, 1.0], "sum", way=wide)
    assert not getattr(made.config, FIELD)
    with core.use(model, "sum"):
        assert_close(run(model, given), before)
    assert all(factor.variant is variants.PLAIN and not factor.own for factor in factors_of(model, "sum").values())


def test_a_cut_of_it_is_plain_lora(put: Callable[[Variant], None]) -> None:
    put(TOY)
    model, given = adapted("a"), LINEARS.given()
    before = run(model, given)
    made = core.compress(model, "a", "small", energy=1.0)
    assert not getattr(made.config, FIELD)
    with core.use(model, "small"):
        assert_close(run(model, given), before)


def test_rows_of_a_batch_may_have_it(put: Callable[[Variant], None]) -> None:
    put(TOY)
    model, given = adapted("a", "b"), LINEARS.given()
    with core.route(model, ["a", "b", None, "a"]):
        mixed = run(model, given)
    for row, name in enumerate(["a", "b", None, "a"]):
        with core.use(model, name) if name else core.disable(model):
            assert_close(mixed[row], run(model, given)[row])


def test_its_penalty_is_added_once_per_step(put: Callable[[Variant], None], tiny_llama: nn.Module) -> None:
    put(TOY)
    assert core.penalties(tiny_llama) is None
    core.attach(tiny_llama, LoraConfig(r=2, target_modules=["q_proj"], **{FIELD: ON}), "a")
    core.attach(tiny_llama, LoraConfig(r=2, target_modules=["q_proj"]), "plain")
    number = sum("a" in site.layer.r for site in core.sites(tiny_llama))
    penalty = core.penalties(tiny_llama)
    assert penalty is not None and penalty.requires_grad and penalty.item() == number * 2 * 0.25
    core.activate(tiny_llama, "plain")
    assert core.penalties(tiny_llama) is None
    core.activate(tiny_llama, "a")
    core.set_trained(tiny_llama, {"plain": False})
    named = core.trainable_parameters(tiny_llama, "a")
    optimizer, options = build_adamw(named, 1.0, 0.0), StepOptions(torch.device("cpu"), max_grad_norm=0)
    tiny_llama.train()
    gradients = []
    for split in (1, 2):
        train_step(tiny_llama, named, optimizer, _batches(split), 0.0, options)
        gradients.append({name: p.grad.clone() for name, p in named if DIAGONAL in name and p.grad is not None})
    for name, gradient in gradients[0].items():  # B is zero, so the loss itself does not depend on the diagonal
        torch.testing.assert_close(gradient, torch.ones(2))
        torch.testing.assert_close(gradients[1][name], gradient)


def _batches(split: int) -> list[Batch]:
    ids = torch.arange(24).reshape(4, 6)
    rows = ids.chunk(split)
    found = []
    for part in rows:
        labels = part.clone()
        labels[:, 0] = -100
        found.append(Batch(part, torch.ones_like(part), labels, 0.5, part.numel(), part[:, 1:].numel()))
    return found


def _pooled_shapes(kind: Kind, spec: WeightSpec, r: int, setting: Setting) -> tuple[Shape, Shape]:
    return (r, spec.in_features // 2), (spec.out_features, r)


def _pooled_down(kind: Kind, module: nn.Module, x: Tensor, factor: Factor, training: bool) -> Tensor:
    return F.linear(x.unflatten(-1, (-1, 2)).mean(-1), factor.A.to(x.dtype))


def test_pooled_inputs_need_factors_of_another_shape(put: Callable[[Variant], None], tmp_path: Path) -> None:
    pooled = dataclasses.replace(
        TOY,
        parts=Parts(shapes=_pooled_shapes),
        factors=None,
        penalty=None,
        down=_pooled_down,
        update="its input is pooled",
    )
    put(pooled)
    model, given = adapted("a"), LINEARS.given()
    site = core.sites(model)[0]
    factor = site.layer.factor("a")
    assert factor.A.shape == (4, site.in_features // 2)
    x = torch.randn(2, site.in_features)
    y0 = F.linear(x, site.layer.read(), site.layer.original_bias())
    z = F.linear(F.linear(x.view(2, -1, 2).mean(-1), factor.A) * factor.scale, factor.B)
    torch.testing.assert_close(site.layer(x), y0 + z)
    with pytest.raises(MergeError, match="is Toy, which cannot be merged: its input is pooled"):
        core.merge(model, "a")
    core.save_adapter(model, tmp_path / "a", "a")
    again = LINEARS.model()
    core.load_adapter(again, tmp_path / "a", "a")
    assert torch.equal(run(again, given), run(model, given))


COUNT = "lora_toy_count"


def _counted_down(kind: Kind, module: nn.Module, x: Tensor, factor: Factor, training: bool) -> Tensor:
    if training:
        factor.own[COUNT].add_(1)
    return F.linear(x, factor.A.to(x.dtype))


def test_a_buffer_is_saved_and_never_trained(put: Callable[[Variant], None], tmp_path: Path) -> None:
    count = OwnTensor(
        COUNT,
        "buffer",
        lambda kind, spec, r, setting: (1,),
        lambda start: torch.zeros(1),
        trained=False,
        depends_on_rank=False,
    )
    put(dataclasses.replace(TOY, parts=Parts(extras=(count,)), factors=None, penalty=None, down=_counted_down))
    model, given = adapted("a", "b"), LINEARS.given()
    core.activate(model, "a")
    run(model.train(), given)
    run(model.eval(), given)
    assert [factor.own[COUNT].item() for factor in factors_of(model, "a").values()] == [1.0, 1.0]
    assert [factor.own[COUNT].item() for factor in factors_of(model, "b").values()] == [0.0, 0.0]
    assert not any(COUNT in name for name, _ in model.named_parameters())
    assert sum(COUNT in name for name, _ in model.named_buffers()) == sum(COUNT in n for n in model.state_dict()) == 4
    core.set_trained(model, {"a": False})
    core.set_trained(model, {"a": True})
    core.save_adapter(model, tmp_path / "a", "a")
    again = LINEARS.model()
    core.load_adapter(again, tmp_path / "a", "a")
    assert [factor.own[COUNT].item() for factor in factors_of(again, "a").values()] == [1.0, 1.0]
    core.detach(model, "b")
    assert sum(COUNT in name for name in model.state_dict()) == 2
    core.detach(again)
    assert not any(COUNT in name for name in again.state_dict())


def _without_the_last_direction(start: Start) -> Tensor:
    U, S, Vh = torch.linalg.svd(start.read(), full_matrices=False)
    return (U[:, :-1] * S[:-1]) @ Vh[:-1]


def test_it_may_move_the_base_while_it_is_attached(put: Callable[[Variant], None], tmp_path: Path) -> None:
    put(dataclasses.replace(TOY, move=Move(_without_the_last_direction)))
    model, given = LINEARS.model(), LINEARS.given()
    bits, plain = snapshot(model)["tensors"], run(model, given)
    core.attach(model, LINEARS.config(**{FIELD: ON}), "a")
    randomise(model, "a", seed=1)
    acting = run(model, given)
    layer = core.sites(model)[0].layer
    assert torch.linalg.matrix_rank(layer.read("a")) == min(layer.read().shape) - 1
    with core.disable(model):
        assert torch.equal(run(model, given), plain)
    core.save_adapter(model, tmp_path / "a", "a")
    again = LINEARS.model()
    core.load_adapter(again, tmp_path / "a", "a")
    assert_close(run(again, given), acting)
    core.merge(model, "a")
    assert_close(run(model, given), acting)
    core.detach(model)
    assert snapshot(model)["tensors"] == bits
    with pytest.raises(ConfigError, match="changes the base weight, and Toy changes it too"):
        core.attach(model, LINEARS.config(init_lora_weights="pissa", **{FIELD: ON}), "b")
    with pytest.raises(AdapterError, match="Toy changed the base by more than a low-rank product"):
        core.compress(again, "a", rank=1)


def test_adapters_of_one_rank_share_the_base_that_they_moved(put: Callable[[Variant], None]) -> None:
    put(dataclasses.replace(TOY, move=Move(_without_the_last_direction)))
    model, given = LINEARS.model(), LINEARS.given()
    bits, plain = snapshot(model)["tensors"], run(model, given)
    for name in ("a", "b"):
        core.attach(model, LINEARS.config(**{FIELD: ON}), name)
        randomise(model, name, seed=ord(name))
    alone = {}
    for name in ("a", "b"):
        single = LINEARS.model()
        core.attach(single, LINEARS.config(**{FIELD: ON}), name)
        randomise(single, name, seed=ord(name))
        alone[name] = run(single, given)
    for merged in ((), ("a",), ("a", "b")):
        if merged:
            core.merge(model, *merged)
        for name, expected in alone.items():
            with core.use(model, name):
                assert_close(run(model, given), expected)
        with core.disable(model):
            assert torch.equal(run(model, given), plain)
        with core.route(model, ["a", None, "b", "a"]):
            mixed = run(model, given)
        for row, expected in enumerate((alone["a"], plain, alone["b"], alone["a"])):
            assert_close(mixed[row], expected[row])
        if merged:
            core.unmerge(model)
    core.detach(model, "a")
    core.activate(model, "b")
    assert_close(run(model, given), alone["b"])
    with pytest.raises(
        ConfigError, match="Toy changes the base weight, but adapter 'b' has already changed"
    ) as refused:
        core.attach(model, LINEARS.config(r=2, **{FIELD: ON}), "c")
    assert (refused.value.what, refused.value.where) == ("b", "up")
    core.detach(model)
    assert snapshot(model)["tensors"] == bits


def test_one_that_moves_the_base_is_no_plain_lora_on_disk(put: Callable[[Variant], None], tmp_path: Path) -> None:
    put(dataclasses.replace(TOY, move=Move(_without_the_last_direction)))
    core.save_adapter(adapted("a"), tmp_path / "a", "a")
    with pytest.raises(AdapterFileError, match="Toy changed the base by more than a low-rank product") as refused:
        core.compress_folder(tmp_path / "a", tmp_path / "small", rank=1)
    assert refused.value.field == FIELD


def test_an_init_subtracts_nothing_that_it_does_not_add(put: Callable[[Variant], None]) -> None:
    put(
        dataclasses.replace(TOY, parts=Parts(), factors=lambda factor, training: (factor.A, 2 * factor.B), penalty=None)
    )
    model = LINEARS.model()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="and Toy does not add back what the init subtracts from it") as refused:
        core.attach(model, LINEARS.config(init_lora_weights="pissa", **{FIELD: ON}), "a")
    assert (refused.value.what, refused.value.where) == ("pissa", "up")
    assert snapshot(model) == before


def test_an_init_that_changes_the_base_needs_tensors_that_do_not_depend_on_the_rank(
    put: Callable[[Variant], None],
) -> None:
    """The adapter would be saved as plain LoRA with twice the rank, which these tensors do not fit."""
    put(TOY)
    assert any(tensor.depends_on_rank for tensor in TOY.parts.extras)
    model = LINEARS.model()
    with pytest.raises(ConfigError, match=r"pissa.* Toy has tensors whose shape depends on the rank") as refused:
        core.attach(model, LINEARS.config(init_lora_weights="pissa", **{FIELD: ON}), "a")
    assert (refused.value.what, refused.value.where) == ("pissa", "up")
    assert not core.adapters(model)


def test_it_may_exclude_others_from_its_model(put: Callable[[Variant], None], tmp_path: Path) -> None:
    put(dataclasses.replace(TOY, move=Move(_without_the_last_direction, "it needs its own base")))
    core.save_adapter(adapted("a"), tmp_path / "a", "a")
    for fields, others in (({}, {FIELD: ON}), ({FIELD: ON}, {})):
        model = LINEARS.model()
        core.attach(model, LINEARS.config(**others), "a")
        core.attach(model, LINEARS.config(**others), "b")
        before = snapshot(model)
        with pytest.raises(
            ConfigError, match=r"Toy cannot be combined with adapters that don't use Toy.* it needs its own base"
        ) as refused:
            core.attach(model, LINEARS.config(**fields), "c")
        assert (refused.value.what, refused.value.field) == ("a", FIELD)
        assert snapshot(model) == before
    model = LINEARS.model()
    core.attach(model, LINEARS.config(), "plain")
    with pytest.raises(ConfigError, match="Toy cannot be combined with adapters"):
        core.load_adapter(model, tmp_path / "a", "a")


def _narrow_shapes(kind: Kind, spec: WeightSpec, r: int, setting: Setting) -> tuple[Shape, Shape]:
    return (r, spec.in_features // 2), (spec.out_features, r)


def _repeated(factor: Factor, training: bool) -> tuple[Tensor, Tensor]:
    return torch.cat([factor.A, factor.A], dim=1), factor.B


@pytest.mark.parametrize("way", ["cat", "svd"])
def test_factors_in_other_shapes_are_combined_as_they_are_multiplied(
    put: Callable[[Variant], None], way: str, tmp_path: Path
) -> None:
    put(dataclasses.replace(TOY, parts=Parts(shapes=_narrow_shapes), factors=_repeated, penalty=None))
    with pytest.raises(
        ConfigError, match="needs A and B in their standard shapes, and Toy uses other shapes"
    ) as refused:
        core.attach(LINEARS.model(), LINEARS.config(init_lora_weights="pissa", **{FIELD: ON}), "a")
    assert refused.value.what == "pissa"
    model, given = adapted("a", "b"), LINEARS.given()
    core.activate(model, "a", "b")
    before = run(model, given)
    wide = core.CombinationType(way, rank=8) if way == "svd" else way
    assert not getattr(core.combine(model, ["a", "b"], [1.0, 1.0], "sum", way=wide).config, FIELD)
    with core.use(model, "sum"):
        assert_close(run(model, given), before)
    core.save_adapter(model, tmp_path / "a", "a")
    core.compress_folder(tmp_path / "a", tmp_path / "small", energy=1.0)
    core.load_adapter(model, tmp_path / "small", "small")
    with core.use(model, "a"):
        expected = run(model, given)
    with core.use(model, "small"):
        assert_close(run(model, given), expected)


def test_its_penalty_has_a_method_in_pefts_model(put: Callable[[Variant], None], monkeypatch: Any) -> None:
    put(TOY)
    monkeypatch.setattr(tuner, "PENALTY_METHODS", {"_toy_loss": FIELD})
    model = peft.get_peft_model(LINEARS.model(), LINEARS.config(**{FIELD: ON}), adapter_name="a")
    model.add_adapter("b", LINEARS.config())
    found = model._toy_loss()
    assert found.requires_grad and found.item() == 2 * 4 * 0.25
    assert model._toy_loss(["b"]) == 0.0
    model.set_adapter("b")
    assert model._toy_loss() == 0.0
    assert model._toy_loss("a").item() == 2


def test_it_may_see_the_other_adapters_of_its_site(put: Callable[[Variant], None]) -> None:
    def routed(at: At) -> Tensor:
        assert at.x is not None
        others = [F.linear(F.linear(at.x, one.A), one.B) * one.scale for one in at.siblings().values()]
        return at.z + sum(others)

    put(
        dataclasses.replace(
            TOY, parts=Parts(), factors=None, penalty=None, output=routed, update="it depends on the other adapters"
        )
    )
    model, given = LINEARS.model(), LINEARS.given()
    core.attach(model, LINEARS.config(**{FIELD: ON}), "router")
    for index, name in enumerate(("a", "b")):
        core.attach(model, LINEARS.config(), name)
        randomise(model, name, seed=index)
    core.activate(model, "router")
    acting = run(model, given)
    core.activate(model, "a", "b")
    assert_close(run(model, given), acting)


def test_what_it_does_not_fit_is_refused(put: Callable[[Variant], None]) -> None:
    put(TOY)
    with pytest.raises(
        ConfigError, match=f"e: Embedding does not support Toy.*set {FIELD} to .*Supported: Linear, Conv1D"
    ):
        variants.variant_for(LoraConfig(**{FIELD: ON}), kind_named("Embedding"), "e")
    with pytest.raises(ConfigError, match=f"kasa_config and {FIELD} at p: these variants are mutually exclusive"):
        variants.variant_at(LoraConfig(kasa_config={}, **{FIELD: ON}), "p")


CORE = "lora_toy_core"


def _of_the_base(start: Start) -> tuple[Tensor, Tensor]:
    W = start.read().detach()
    return W[: start.rank].clone(), W[:, : start.rank].clone()


BETWEEN = dataclasses.replace(
    TOY,
    parts=Parts(
        start=_of_the_base,
        trains=frozenset(),
        extras=(
            OwnTensor(
                CORE,
                "parameter",
                lambda kind, spec, r, setting: (r, r),
                lambda start: torch.zeros(start.rank, start.rank),
                role="whole",
            ),
        ),
    ),
    factors=lambda factor, training: (factor.A, factor.B @ factor.own[CORE]),
    penalty=None,
)
"""A variant whose A and B are parts of W that stay, and whose one trained tensor is a matrix between them."""


def test_it_says_how_its_factors_start_and_which_are_trained(put: Callable[[Variant], None], tmp_path: Path) -> None:
    put(BETWEEN)
    model, given = LINEARS.model(), LINEARS.given()
    before = run(model, given)
    core.attach(model, LINEARS.config(**{FIELD: ON}), "a")
    assert torch.equal(run(model, given), before)
    layer = core.sites(model)[0].layer
    W, factor = layer.read(), layer.factor("a")
    assert torch.equal(factor.A, W[:4]) and torch.equal(factor.B, W[:, :4])
    core.set_trained(model, {"a": False})
    core.set_trained(model, {"a": True})
    assert all(CORE in name for name, _ in core.trainable_parameters(model))
    randomise(model, "a", seed=3)
    acting = run(model, given)
    core.save_adapter(model, tmp_path / "a", "a")
    again = LINEARS.model()
    core.load_adapter(again, tmp_path / "a", "a", trainable=True)
    assert torch.equal(run(again, given), acting)
    assert all(CORE in name for name, _ in core.trainable_parameters(again))


def test_a_reset_gives_back_what_its_factors_start_with(put: Callable[[Variant], None]) -> None:
    put(BETWEEN)
    model, given = LINEARS.model(), LINEARS.given()
    before = run(model, given)
    core.attach(model, LINEARS.config(**{FIELD: ON}), "a")
    randomise(model, "a", seed=3)
    assert not torch.equal(run(model, given), before)
    for site in core.sites(model):
        reset_factor(site.layer, "a", True)
        assert torch.equal(site.layer.factor("a").B, site.layer.read()[:, :4])
    assert torch.equal(run(model, given), before)
    with pytest.raises(ConfigError):
        reset_factor(core.sites(model)[0].layer, "a", "gaussian")


@pytest.mark.parametrize("init", ["gaussian", False, "pissa", "mica"])
def test_factors_that_it_starts_take_no_other_init(put: Callable[[Variant], None], init: Any) -> None:
    put(BETWEEN)
    model = LINEARS.model()
    bits = snapshot(model)
    with pytest.raises(ConfigError) as refused:
        core.attach(model, LINEARS.config(init_lora_weights=init, **{FIELD: ON}), "a")
    assert (refused.value.where, refused.value.field) == ("up", "init_lora_weights")
    assert snapshot(model) == bits


def test_the_role_of_its_tensor_gives_its_rate(put: Callable[[Variant], None]) -> None:
    put(BETWEEN)
    model = LINEARS.model()
    core.attach(model, LINEARS.config(**{FIELD: ON}), "a")
    parts = trained_parts(model)
    assert {part.role for part in parts} == {"whole"}
    assert set(rates_by_name(parts, Rates(1.0, b_ratio=16.0)).values()) == {1.0}


def test_a_vector_gets_the_rate_of_B(put: Callable[[Variant], None]) -> None:
    put(TOY)
    rates = rates_by_name(trained_parts(adapted("a")), Rates(1.0, b_ratio=16.0))
    assert {rate for name, rate in rates.items() if DIAGONAL in name} == {16.0}
