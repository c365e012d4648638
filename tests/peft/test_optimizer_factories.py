"""LoRA+, LoRA-FA and the preconditioned optimizers of `lorakit.peft`: the installed peft's groups, rates and steps, except its errors."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import peft.optimizers.lorafa as theirs
import peft.optimizers.riemannian as peft_riemannian
import pytest
import torch
from torch import nn

from lorakit import peft as face
from lorakit.errors import ConfigError
from lorakit.peft.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from lorakit.peft.optimizers.lorafa import LoraFAOptimizer
from lorakit.peft.optimizers.riemannian import _collect_lora_pairs, _RiemannianPreconditioner


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.norm = nn.LayerNorm(12)
        self.lin0 = nn.Linear(12, 10)
        self.lin1 = nn.Linear(10, 6)

    def forward(self, ids: torch.Tensor) -> Any:
        return self.lin1(self.lin0(self.norm(self.embedding(ids))).relu())


CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["lin0", "lin1"]},
    "embedding": {"target_modules": ["embedding", "lin0"]},
    "biases": {"target_modules": ["lin0", "lin1"], "bias": "all"},
    "dora": {"target_modules": ["lin0", "lin1"], "use_dora": True},
    "copies": {"target_modules": ["lin0"], "modules_to_save": ["norm", "lin1"]},
    "patterns": {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin0": 2}, "alpha_pattern": {"lin1": 12}},
    "rslora": {"target_modules": ["lin0", "lin1"], "use_rslora": True},
}


def pair(case: str, **more: Any) -> tuple[Any, Any]:
    """The same adapted model in both libraries, with the same random numbers in every tensor of the adapter."""
    torch.manual_seed(3)
    base = Net()
    options = {"r": 4, "lora_alpha": 8, **CASES[case], **more}
    ours = face.get_peft_model(copy.deepcopy(base), face.LoraConfig(**options))
    other = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
    tensors, twins = dict(ours.named_parameters()), dict(other.named_parameters())
    assert set(tensors) == set(twins)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if "lora_" in name or "modules_to_save" in name:
                tensor.copy_(torch.randn_like(tensor))
            twins[name].copy_(tensor)
    return ours, other


def named_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[float, float, list[str]]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [(g["lr"], g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in optimizer.param_groups]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> dict[str, torch.Tensor]:
    for step in range(steps):
        ids = torch.randint(0, 30, (4, 5), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(ours: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, other[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", CASES)
def test_loraplus_is_that_of_peft(case: str) -> None:
    ours, other = pair(case)
    options = {"lr": 0.01, "loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 0.003}
    one = create_loraplus_optimizer(ours, torch.optim.AdamW, **options, eps=1e-7)
    two = peft.optimizers.create_loraplus_optimizer(other, torch.optim.AdamW, **options, eps=1e-7)
    assert named_groups(ours, one) == named_groups(other, two)
    assert isinstance(one, torch.optim.AdamW)
    assert one.defaults["eps"] == 1e-7
    assert_same(train(ours, one), train(other, two))


def test_loraplus_defaults_and_a_model_without_adapters() -> None:
    model: Any = face.get_peft_model(Net(), face.LoraConfig(target_modules=["embedding", "lin0"]))
    rates = [
        g["lr"] for g in create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=2).param_groups
    ]
    assert rates == [0.1, 1e-6, 0.2, 0.2]
    plain = create_loraplus_optimizer(Net(), torch.optim.SGD, lr=0.1, loraplus_lr_ratio=2)
    assert [len(g["params"]) for g in plain.param_groups] == [3, 0, 0, 4]


def test_loraplus_tells_bitsandbytes_about_embeddings() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model: Any = face.get_peft_model(Net(), face.LoraConfig(target_modules=["lin0"]))
    known = bnb.optim.GlobalOptimManager.get_instance()
    before = len(known.module_weight_config_triple)
    create_loraplus_optimizer(model, bnb.optim.AdamW8bit, lr=0.1, loraplus_lr_ratio=2)
    told = known.module_weight_config_triple[before:]
    assert [(name, options) for _, name, options in told] == [("weight", {"optim_bits": 32})]


@pytest.mark.parametrize("case", ["plain", "biases", "patterns", "rslora"])
def test_lorafa_is_that_of_peft(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, which peft leaves where it finds bf16."""
    monkeypatch.setattr(theirs, "is_bf16_available", lambda: False)
    ours, other = pair(case)
    one = create_lorafa_optimizer(ours, 4, 8, lr=0.01, weight_decay=0.1)
    two = peft.optimizers.create_lorafa_optimizer(other, 4, 8, lr=0.01, weight_decay=0.1)
    keys = ("lr", "names", "scaling_factors", "scaling_factor", "betas", "weight_decay", "eps", "correct_bias")
    assert [{k: g[k] for k in keys} for g in one.param_groups] == [{k: g[k] for k in keys} for g in two.param_groups]
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {n for n, p in other.named_parameters() if p.requires_grad}  # fmt: skip
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    after = train(ours, one)
    assert_same(after, train(other, two), atol=2e-6)
    assert all(torch.equal(after[n], before[n]) for n in after if "lora_A" in n)
    assert all(not torch.equal(after[n], before[n]) for n in after if "lora_B" in n)
    site = "base_model.model.lin0.lora"
    torch.testing.assert_close(one.state[site]["exp_avg_B"], two.state[site]["exp_avg_B"], rtol=1e-4, atol=1e-5)


def test_lorafa_in_bf16_as_peft_takes_it_by_default_is_near() -> None:
    ours, other = pair("plain")
    one, two = (
        create_lorafa_optimizer(ours, 4, 8, lr=0.01),
        peft.optimizers.create_lorafa_optimizer(other, 4, 8, lr=0.01),
    )
    assert_same(train(ours, one), train(other, two), atol=0.02)


def test_lorafa_of_an_embedding_learns_where_peft_does_not() -> None:
    """A is the zero side there: peft leaves it at zero, so nothing is learned; here B stays and A learns."""
    model: Any = face.get_peft_model(Net(), face.LoraConfig(r=4, target_modules=["embedding", "lin1"]))
    optimizer = create_lorafa_optimizer(model, 4, 8, lr=0.01)
    layer = model.base_model.model.embedding
    before = layer.lora_embedding_B["default"].detach().clone()
    train(model, optimizer)
    assert torch.equal(layer.lora_embedding_B["default"], before)
    twin = peft.get_peft_model(Net(), peft.LoraConfig(r=4, target_modules=["embedding", "lin1"]))
    train(twin, peft.optimizers.create_lorafa_optimizer(twin, 4, 8, lr=0.01))
    assert not bool(twin.base_model.model.embedding.lora_embedding_A["default"].any())
    assert bool(layer.lora_embedding_A["default"].any())


def test_lorafa_pairs_by_adapter_beside_magnitudes_and_a_second_adapter() -> None:
    """peft pairs by order, so a magnitude, or a second adapter, pairs A with the wrong B there."""
    model: Any = face.get_peft_model(Net(), face.LoraConfig(r=4, target_modules=["lin0", "lin1"], use_dora=True))
    model.add_adapter("other", face.LoraConfig(r=2, target_modules=["lin0", "lin1"]))
    optimizer = create_lorafa_optimizer(model, 4, 8, lr=0.01)
    by_trained = {id(p.trained): p for p in optimizer.pairs.values()}
    for layer in (model.base_model.model.lin0, model.base_model.model.lin1):
        found = by_trained[id(layer.lora_B["default"].weight)]
        assert found.frozen is layer.lora_A["default"].weight
        assert found.scale == layer.scaling["default"]
    train(model, optimizer)
    assert bool(model.base_model.model.lin1.lora_B["default"].weight.any())
    assert not bool(model.base_model.model.lin1.lora_B["other"].weight.any())


def test_lorafa_state_is_saved_and_loaded() -> None:
    ours, other = pair("plain")[0], pair("plain")[0]
    one, two = (create_lorafa_optimizer(m, 4, 8, lr=0.01) for m in (ours, other))
    train(ours, one)
    train(other, two)
    again = create_lorafa_optimizer(other, 4, 8, lr=0.01)
    again.load_state_dict(two.state_dict())
    assert_same(train(ours, one), train(other, again), atol=0.0)


def test_lorafa_checks_rslora() -> None:
    model: Any = face.get_peft_model(Net(), face.LoraConfig(target_modules=["lin0"], use_rslora=True))
    with pytest.raises(ConfigError, match="`use_rslora=False` was passed to create_lorafa_optimizer, but it is True"):
        create_lorafa_optimizer(model, 4, 8, lr=0.1, use_rslora=False)
    with pytest.warns(FutureWarning, match="`use_rslora` of create_lorafa_optimizer is deprecated"):
        create_lorafa_optimizer(model, 4, 8, lr=0.1, use_rslora=True)


def test_lorafa_by_hand_with_names_and_one_scale() -> None:
    A, B, w = (nn.Parameter(torch.randn(s)) for s in ((2, 5), (4, 2), (3,)))
    names = ["m.lora_A.default.weight", "m.lora_B.default.weight", "bias"]
    group = {"params": [A, B, w], "names": names, "scaling_factor": 2.0}
    optimizer = LoraFAOptimizer([group], lr=0.1, correct_bias=False)
    B.grad, w.grad = torch.ones_like(B), torch.ones_like(w)
    with pytest.warns(FutureWarning, match="`scaling_factor` is deprecated"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once only
        optimizer.step()
    inverse = torch.linalg.inv(A.detach() @ A.detach().T)
    torch.testing.assert_close(optimizer.state[B]["exp_avg"], 0.19 * (torch.ones(4, 2) @ inverse) / 4)
    assert A.grad is None
    with pytest.raises(ConfigError, match=r"betas\[0\] is 1\.0"):
        LoraFAOptimizer([group], betas=(1.0, 0.9))
    assert optimizer.step(lambda: 7) == 7


KINDS_OF_PAIRS = ["plain", "embedding", "dora", "copies", "patterns", "rslora"]


@pytest.mark.parametrize("case", KINDS_OF_PAIRS)
@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.AdamW, 0.01), (torch.optim.SGD, 1e-3)])
def test_the_preconditioned_steps_are_peft_s(case: str, optimizer: type[torch.optim.Optimizer], lr: float) -> None:
    ours, other = pair(case)
    ours.double(), other.double()  # in fp32, rounding errors grow from step to step
    options = {"lr": lr, "reg": 0.05, "weight_decay": 0.1}
    made = create_riemannian_optimizer(ours, optimizer, **options)
    twin = peft_riemannian.create_riemannian_optimizer(other, optimizer, **options)
    assert isinstance(made, optimizer) and len(made.param_groups) == 1
    begun = {name: tensor.clone() for name, tensor in ours.named_parameters() if ".lora_A." in name}
    ids = torch.arange(30).reshape(5, 6)
    for _ in range(3):
        for model, stepper in ((ours, made), (other, twin)):
            stepper.zero_grad()
            model(ids).square().mean().backward()
            stepper.step()
    tensors = dict(other.named_parameters())
    for name, tensor in ours.named_parameters():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-6, atol=1e-9)
        assert name not in begun or float((tensor - begun[name]).detach().abs().max()) > 1e-4


def test_what_the_preconditioner_refuses() -> None:
    ours, _ = pair("plain")
    before = {name: tensor.clone() for name, tensor in ours.named_parameters()}
    with pytest.raises(TypeError, match="must be a subclass") as refused:
        create_riemannian_optimizer(ours, nn.Linear, lr=0.1)  # type: ignore[arg-type]
    assert refused.value.field == "optimizer_cls"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="requires a closure") as refused_closure:
        create_riemannian_optimizer(ours, torch.optim.LBFGS, lr=0.1)
    assert (refused_closure.value.what, refused_closure.value.field) == ("LBFGS", "optimizer_cls")
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="reg is") as refused_damping:
            create_riemannian_optimizer(ours, torch.optim.SGD, lr=0.1, reg=wrong)
        assert refused_damping.value.field == "reg"
    frozen, _ = pair("plain")
    frozen.requires_grad_(False)
    with pytest.raises(ConfigError, match="does not have any trainable lora_A/lora_B"):
        create_riemannian_optimizer(frozen, torch.optim.SGD, lr=0.1)
    optimizer = create_riemannian_optimizer(ours, torch.optim.SGD, lr=0.1)
    for call in (lambda: optimizer.step(lambda: 1.0), lambda: optimizer.step(closure=lambda: 1.0)):
        with pytest.raises(ConfigError, match="does not support closures"):
            call()
    assert all(tensor.equal(before[name]) for name, tensor in ours.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_and_the_preconditioner_alone(dtype: torch.dtype) -> None:
    ours, other = pair("dora")
    for one, twins in zip(_collect_lora_pairs(ours), peft_riemannian._collect_lora_pairs(other), strict=True):
        assert all(factor.equal(twin) for factor, twin in zip(one, twins, strict=True))
    results = []
    for module, kind in ((ours, _RiemannianPreconditioner), (other, peft_riemannian._RiemannianPreconditioner)):
        factors = [
            tuple(nn.Parameter(factor.detach().to(dtype)) for factor in factors)
            for factors in peft_riemannian._collect_lora_pairs(module)
        ]
        generator = torch.Generator().manual_seed(0)
        for factor in (factor for both in factors for factor in both):
            factor.grad = torch.randn(factor.shape, generator=generator).to(dtype)
        kind(factors, reg=0.1).step()  # type: ignore[operator]
        results.append([factor.grad for both in factors for factor in both])
    for one, twin in zip(*results, strict=True):
        torch.testing.assert_close(one, twin)
