"""Layers in a model: names, shapes, scale, arithmetic against the plain formula, mode, and copies of the model."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.config import LoraConfig
from lorakit.core import LoraLayer, activate, adapters, attach, detach, merge, sites, trainable_parameters, unmerge, use

from ...laws.snapshots import same_bits
from ...laws.tolerances import assert_close, assert_differs
from ...laws.zoo import BERT, CONV1DS, EMBEDDING, EVERY_KIND, GPT2, LINEARS, LLAMA, TIED, randomise, run, with_adapters


def test_names_and_shapes_in_the_model() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"lin": nn.Linear(6, 10), "conv": Conv1D(10, 6), "emb": nn.Embedding(9, 5)})
    attach(model, LoraConfig(r=3, target_modules=["lin", "conv", "emb"]), "ad")
    attach(model, LoraConfig(r=2, target_modules=["lin", "conv"], use_dora=True), "d2")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {
        "lin.base_layer.weight": (10, 6),
        "lin.base_layer.bias": (10,),
        "lin.lora_A.ad.weight": (3, 6),
        "lin.lora_B.ad.weight": (10, 3),
        "lin.lora_A.d2.weight": (2, 6),
        "lin.lora_B.d2.weight": (10, 2),
        "lin.lora_magnitude_vector.d2.weight": (10,),
        "conv.base_layer.weight": (6, 10),
        "conv.base_layer.bias": (10,),
        "conv.lora_A.ad.weight": (3, 6),
        "conv.lora_B.ad.weight": (10, 3),
        "conv.lora_A.d2.weight": (2, 6),
        "conv.lora_B.d2.weight": (10, 2),
        "conv.lora_magnitude_vector.d2.weight": (10,),
        "emb.base_layer.weight": (9, 5),
        "emb.lora_embedding_A.ad": (3, 9),
        "emb.lora_embedding_B.ad": (5, 3),
    }
    assert [(s.path, s.kind, s.out_features, s.in_features) for s in sites(model)] == [
        ("lin", "Linear", 10, 6), ("conv", "Conv1D", 10, 6), ("emb", "Embedding", 5, 9),
    ]  # fmt: skip
    assert all(isinstance(site.layer, LoraLayer) for site in sites(model))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 16 / 8**0.5)])
def test_output_is_the_formula(rslora: bool, scale: float) -> None:
    """h = W x + b + s·B(A x), with s = α/r, or α/√r for rsLoRA."""
    for specimen in (LINEARS, CONV1DS):
        model = specimen.model(torch.float64)
        attach(model, specimen.config(r=8, lora_alpha=16, use_rslora=rslora, target_modules=["up"]))
        randomise(model, "default", 1)
        layer, x = model.up, specimen.given(torch.float64)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert layer.scaling["default"] == scale
        torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * (x @ A.T) @ B.T)


def test_output_of_an_embedding_is_the_formula() -> None:
    model = EMBEDDING.model(torch.float64)
    attach(model, EMBEDDING.config(r=8, lora_alpha=4))
    randomise(model, "default", 1)
    layer, ids = model.embed, EMBEDDING.given()
    A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    torch.testing.assert_close(layer(ids), layer.base_layer(ids) + 0.5 * A.T[ids] @ B.T)


def test_dora_is_its_formula() -> None:
    """h = m · (W + s·B·A) x / ‖W + s·B·A‖ + b, row by row."""
    for specimen in (LINEARS, CONV1DS):
        model = specimen.model(torch.float64)
        attach(model, specimen.config(use_dora=True, target_modules=["up"]))
        randomise(model, "default", 1)
        layer, x = model.up, specimen.given(torch.float64)
        W = layer.base_layer.weight if specimen is LINEARS else layer.base_layer.weight.T
        V = W + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        m = layer.lora_magnitude_vector["default"].weight
        expected = x @ ((m / V.norm(dim=1))[:, None] * V).T
        torch.testing.assert_close(layer(x), expected + layer.base_layer.bias)


def test_gradients_are_those_of_the_formula() -> None:
    model = LINEARS.model(torch.float64)
    attach(model, LINEARS.config(r=3, lora_alpha=6, target_modules=["up"]))
    randomise(model, "default", 1)
    layer, x = model.up, LINEARS.given(torch.float64).requires_grad_()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    inputs = (x, A, B)
    found = torch.autograd.grad(layer(x).square().sum(), inputs)
    h = torch.nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias) + 2 * (x @ A.T) @ B.T
    for one, other in zip(found, torch.autograd.grad(h.square().sum(), inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_patterns_give_each_site_its_rank_and_scale() -> None:
    model = BERT.model()
    config = BERT.config(
        r=4, lora_alpha=8, rank_pattern={"query": 2, r"layer\.1\..*value": 6}, alpha_pattern={"value": 12}
    )
    report = attach(model, config)
    assert [(m.path.split("layer.")[1], m.rank, m.alpha) for m in report.matches] == [
        ("0.attention.self.query", 2, 8), ("0.attention.self.value", 4, 12),
        ("1.attention.self.query", 2, 8), ("1.attention.self.value", 6, 12),
    ]  # fmt: skip
    assert [site.layer.scaling["default"] for site in sites(model)] == [4, 3, 4, 2]


def test_a_config_is_copied_and_never_changed() -> None:
    config = GPT2.config(target_modules="all-linear", fan_in_fan_out=False)
    before = copy.deepcopy(config)
    model = GPT2.model()
    attach(model, config, "a")
    assert config == before
    config.r = 99
    config.rank_pattern["x"] = 1
    config.target_modules = ["other"]
    assert adapters(model)["a"].r == before.r and adapters(model)["a"].rank_pattern == {}


def test_new_modules_take_the_mode_of_what_they_stand_on() -> None:
    model = LINEARS.model()
    model.up.train()
    attach(model, LINEARS.config(lora_dropout=0.5), "a")
    assert model.up.training and model.up.lora_dropout["a"].training
    assert not model.square.training and not model.square.lora_dropout["a"].training
    model.eval()
    attach(model, LINEARS.config(lora_dropout=0.5), "b")
    assert not any(module.training for module in model.modules())
    model.train()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("mode", [True, False])
def test_every_module_that_comes_has_the_mode(mode: bool) -> None:
    model = BERT.model().train(mode)
    attach(model, BERT.config(lora_dropout=0.1, use_dora=True, modules_to_save=["classifier"], bias="all"))
    assert {module.training for module in model.modules()} == {mode}


def test_dropout_is_off_on_an_eval_base_and_on_in_training() -> None:
    model = with_adapters(LINEARS, "a", lora_dropout=0.5)
    given = LINEARS.given()
    assert same_bits(run(model, given), run(model, given))
    model.train()
    assert not same_bits(run(model, given), run(model, given))
    outputs = torch.stack([run(model.up, given) for _ in range(3000)])
    model.eval()
    torch.testing.assert_close(outputs.mean(0), run(model.up, given), atol=0.25, rtol=0.1)  # dropped, and scaled up


def copies_of(model: nn.Module) -> dict[str, nn.Module]:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(file, weights_only=False),
    }


@pytest.mark.parametrize("which", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["classifier"], "bias": "all"}], ids=str)
def test_an_adapted_model_can_be_copied(which: str, fields: dict[str, Any]) -> None:
    model, given = BERT.model(), BERT.given()
    attach(model, BERT.config(**fields), "a")
    attach(model, BERT.config(), "b")
    randomise(model, "a", 1)
    randomise(model, "b", 2)
    expected = {}
    for name in "ab":
        with use(model, name):
            expected[name] = run(model, given)
    with use(model, "b"):  # an open block is not copied
        twin = copies_of(model)[which]
        assert same_bits(run(twin, given), expected["a"])
    for name in "ab":
        with use(twin, name):
            assert same_bits(run(twin, given), expected[name])
            assert same_bits(run(model, given), expected["a"])
    randomise(twin, "a", 9)
    activate(twin, "b")
    assert same_bits(run(model, given), expected["a"])
    detach(twin)
    assert list(adapters(model)) == ["a", "b"]
    assert same_bits(run(twin, given), run(BERT.model(), given))


def test_a_copy_of_a_model_with_a_live_graph() -> None:
    model = with_adapters(LINEARS, "a")
    out = model(LINEARS.given())
    twin = copy.deepcopy(model)
    out.sum().backward()
    assert same_bits(run(twin, LINEARS.given()), run(model, LINEARS.given()))


def test_a_merged_model_can_be_copied_and_unmerged() -> None:
    model = with_adapters(EVERY_KIND, "a", dtype=torch.bfloat16)
    merge(model, "a")
    for twin in copies_of(model).values():
        unmerge(twin, "a")
        detach(twin)
        for (name, one), (_, other) in zip(
            twin.named_parameters(), EVERY_KIND.model(torch.bfloat16).named_parameters(), strict=True
        ):
            assert same_bits(one, other), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=str)
def test_a_cast_of_an_adapted_model(dtype: torch.dtype, fields: dict[str, Any]) -> None:
    for specimen in (LINEARS, CONV1DS, *([] if fields else [EMBEDDING])):
        expected = run(with_adapters(specimen, "a", **fields), specimen.given())
        model = with_adapters(specimen, "a", **fields).to(dtype)
        found = run(model, specimen.given(dtype))
        assert found.dtype == dtype
        assert_close(found, expected, dtype if dtype != torch.float64 else torch.float32)
        merge(model, "a")
        assert_close(run(model, specimen.given(dtype)), expected, dtype if dtype != torch.float64 else torch.float32)
        unmerge(model)
        assert same_bits(run(model, specimen.given(dtype)), found)


def test_a_cast_between_merge_and_unmerge() -> None:
    model = with_adapters(EVERY_KIND, "a")
    merge(model, "a")
    model.to(torch.bfloat16)
    unmerge(model, "a")
    detach(model)
    plain = EVERY_KIND.model(torch.bfloat16)
    assert all(same_bits(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_move_to_another_device_takes_all_along() -> None:
    model = with_adapters(BERT, "a", modules_to_save=["classifier"], bias="all").to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(input_ids=BERT.given()["input_ids"].to("meta")).logits.device.type == "meta"
    attach(model, BERT.config(), "b")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_autocast() -> None:
    model, given = with_adapters(LINEARS, "a"), LINEARS.given()
    expected = run(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, given)
    assert found.dtype == torch.bfloat16
    assert_close(found, expected, torch.bfloat16)


class Twice(nn.Module):
    """A module with two paths."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(8, 8)
        self.first, self.second, self.last = shared, shared, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x)).tanh())


def test_a_module_that_stands_in_two_places() -> None:
    model, x = Twice().eval(), torch.randn(4, 8)
    before = run(model, x)
    report = attach(model, LoraConfig(r=2, target_modules=["first", "last"]))
    assert model.first is model.second and isinstance(model.first, LoraLayer)
    assert report.trainable_parameters == 2 * 2 * 16 == sum(p.numel() for _, p in trainable_parameters(model))
    randomise(model, "default", 1)
    adapted = run(model, x)
    assert_differs(adapted, before, torch.float32)
    merge(model)
    assert_close(run(model, x), adapted, torch.float32)
    unmerge(model)
    detach(model)
    assert same_bits(run(model, x), before) and model.first is model.second


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_embeddings_stay_tied(target: str, tmp_path: Path) -> None:
    model = TIED.model()
    attach(model, TIED.config(target_modules=["q_proj", target]))
    randomise(model, "default", 1)
    embed, head = model.model.embed_tokens, model.lm_head
    weight = {m.base_layer.weight if isinstance(m, LoraLayer) else m.weight for m in (embed, head)}
    assert len(weight) == 1
    detach(model)
    assert model.model.embed_tokens.weight is model.lm_head.weight


def test_tied_embeddings_merged_with_a_word() -> None:
    model, given = with_adapters(TIED, "a", target_modules=["q_proj", "embed_tokens"]), TIED.given()
    before, base = run(model, given), run(TIED.model(), given)
    assert_differs(before, base, torch.float32)
    merge(model, "a", untie=True)
    assert_close(run(model, given), before, torch.float32)
    unmerge(model, "a")
    assert same_bits(run(model, given), before)
    detach(model)
    assert model.model.embed_tokens.weight is model.lm_head.weight
    assert same_bits(run(model, given), base)


def test_modules_to_save_by_the_end_of_a_path_after_a_dot() -> None:
    """`head` does not take `lm_head`."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.lm_head = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.head(self.body(x)), self.lm_head(x)], -1)

    model = Model().eval()
    attach(model, LoraConfig(r=1, target_modules=["body"], modules_to_save=["head"]), "a")
    assert type(model.lm_head) is nn.Linear and not model.lm_head.weight.requires_grad
    trained = {name for name, _ in trainable_parameters(model, "a")}
    assert trained == {
        "body.lora_A.a.weight", "body.lora_B.a.weight",
        "head.modules_to_save.a.weight", "head.modules_to_save.a.bias",
    }  # fmt: skip
    assert not model.head.original_module.weight.requires_grad


def test_attributes_of_the_base_are_in_reach() -> None:
    model = with_adapters(LLAMA, "a", target_modules=["q_proj", "embed_tokens"])
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.in_features == 16 and layer.weight.shape == (16, 16)
    assert model.get_input_embeddings().weight.shape == (50, 16)
    with pytest.raises(AttributeError, match="nope"):
        _ = layer.nope


def test_generation_through_the_cache_with_an_adapter() -> None:
    model = with_adapters(LLAMA, "a", "b")
    given = {**LLAMA.given(), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    texts = {}
    for name in "ab":
        with use(model, name):
            texts[name] = model.generate(**given, max_new_tokens=5, do_sample=False)
            ids, logits = texts[name], []
            with torch.no_grad():
                logits = model(input_ids=ids[:, :-1]).logits[:, 5:].argmax(-1)
            assert torch.equal(logits, ids[:, 6:])
    assert not torch.equal(texts["a"], texts["b"])
