"""Bare parameters by name: matrices and fused experts against the plain formula; one or several, merged and on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.layers.experts import MARKS, shows_tokens
from lorakit.core.layers.named_layers import ParamWrapper
from lorakit.errors import AdapterFileError, ConfigError, MergeError, RouteError, TargetError

from ...laws.zoo import EVERY_KIND, run

EXPERTS, D, HIDDEN, TOP = 3, 6, 10, 2


class Experts(nn.Module):
    """Fused experts whose source is not known; `in_first` as GPT-OSS stores them."""

    def __init__(self, in_first: bool) -> None:
        super().__init__()
        up, down = (2 * HIDDEN, D), (D, HIDDEN)
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, *(up[::-1] if in_first else up)) / 3)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, *(down[::-1] if in_first else down)) / 3)
        self.act_fn, self.is_transposed = nn.SiLU(), in_first

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        flip = (lambda W: W.T) if self.is_transposed else (lambda W: W)
        parts = []
        for token in range(len(hidden_states)):
            y = torch.zeros(D, dtype=hidden_states.dtype)
            for expert, weight in zip(top_k_index[token].tolist(), top_k_weights[token], strict=True):
                gate, up = F.linear(hidden_states[token], flip(self.gate_up_proj[expert])).chunk(2, dim=-1)
                y = y + weight * F.linear(self.act_fn(gate) * up, flip(self.down_proj[expert]))
            parts.append(y)
        return torch.stack(parts)


def known_experts(in_first: bool) -> nn.Module:
    """Return experts whose source is known: those of GPT-OSS are `in_first`, and have biases."""
    sizes = {"hidden_size": D, "intermediate_size": HIDDEN, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP}
    made: nn.Module = GptOssExperts(GptOssConfig(**sizes)) if in_first else MixtralExperts(MixtralConfig(**sizes))
    made.config._experts_implementation = "eager"
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=1 / 3)
    return made


class Block(nn.Module):
    """A router and its experts, over (rows, length, d)."""

    def __init__(self, known: bool, in_first: bool) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, EXPERTS), (known_experts if known else Experts)(in_first)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, index = self.router(flat).softmax(-1).topk(TOP)
        return self.experts(flat, index, weights).view_as(x)


class Net(nn.Module):
    """Two such blocks, and a dense layer."""

    def __init__(self, known: bool = False, in_first: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(known, in_first), Block(known, in_first)])
        self.head = nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(3))
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
LAYOUTS = pytest.mark.parametrize(
    ("known", "in_first"),
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["plain", "plain in-first", "known", "known in-first"],
)


def made(known: bool = False, in_first: bool = False, dtype: torch.dtype = torch.float32) -> Net:
    """The same model every time."""
    torch.manual_seed(0)
    return Net(known, in_first).to(dtype).eval()


def config(**fields: Any) -> LoraConfig:
    """Both parameters of the experts, rank 2, alpha 6."""
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": [], "target_parameters": BOTH, **fields})


def randomise(model: nn.Module, name: str, seed: int) -> None:
    """Numbers that no other adapter has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in core.trainable_parameters(model, name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)


def adapted(*names: str, known: bool = False, in_first: bool = False, **fields: Any) -> Net:
    """A model with adapters that differ in every number."""
    model = made(known, in_first)
    for seed, name in enumerate(names):
        core.attach(model, config(**fields), name)
        randomise(model, name, seed)
    return model


def updated_by_hand(model: Net, name: str, plain: Net, scale: float = 3.0) -> Net:
    """The plain model with W₀ + s·B_e A_e in each expert's weight, from the layout on disk, expert by expert."""
    for path, layer in ((site.path, site.layer) for site in core.sites(model)):
        A, B, r = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.r[name]
        owner = plain.get_submodule(path.split(".base_layer")[0])
        weight = owner._parameters[layer.parameter_name]
        for expert in range(EXPERTS):
            delta = scale * B[:, expert::EXPERTS] @ A[expert * r : (expert + 1) * r]
            weight.data[expert] += delta.T if owner.is_transposed else delta
    return plain


@LAYOUTS
def test_the_output_is_that_of_the_formula(known: bool, in_first: bool) -> None:
    model = adapted("a", "b", known=known, in_first=in_first)
    for name in ("a", "b"):
        with core.use(model, name):
            wanted = updated_by_hand(model, name, made(known, in_first))(X)
            torch.testing.assert_close(model(X), wanted, atol=1e-5, rtol=1e-5)


@LAYOUTS
def test_gradients_are_those_of_the_formula(known: bool, in_first: bool) -> None:
    model = adapted("a", known=known, in_first=in_first)
    model(X).square().mean().backward()
    plain = updated_by_hand(model, "a", made(known, in_first))
    plain(X).square().mean().backward()
    for site in core.sites(model):
        layer, r = site.layer, 2
        A, B = layer.lora_A["a"].weight, layer.lora_B["a"].weight
        owner = plain.get_submodule(site.path.split(".base_layer")[0])
        G = owner._parameters[layer.parameter_name].grad
        for expert in range(EXPERTS):
            g = G[expert].T if in_first else G[expert]
            rows = slice(expert * r, (expert + 1) * r)
            torch.testing.assert_close(A.grad[rows], 3 * B[:, expert::EXPERTS].T @ g, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(B.grad[:, expert::EXPERTS], 3 * g @ A[rows].T, atol=1e-4, rtol=1e-4)


@LAYOUTS
def test_a_fresh_adapter_changes_nothing(known: bool, in_first: bool) -> None:
    model = made(known, in_first)
    y = model(X)
    core.attach(model, config(), seed=1)
    torch.testing.assert_close(model(X), y, atol=1e-6, rtol=1e-6)


@LAYOUTS
def test_several_at_once_are_the_sum_of_their_updates(known: bool, in_first: bool) -> None:
    model, plain = adapted("a", "b", known=known, in_first=in_first), made(known, in_first)
    for name in ("a", "b"):
        updated_by_hand(model, name, plain)
    with core.use(model, "a", "b"):
        torch.testing.assert_close(model(X), plain(X), atol=1e-5, rtol=1e-5)


@LAYOUTS
def test_merged_is_unmerged_and_other_routes_still_see_the_base(known: bool, in_first: bool) -> None:
    model = adapted("a", "b", known=known, in_first=in_first)
    outputs = {}
    for name in ("a", "b"):
        with core.use(model, name):
            outputs[name] = model(X)
    bits = {name: p.clone() for name, p in made(known, in_first).named_parameters()}
    report = core.merge(model, "a")
    assert report.kept_bytes > 0
    torch.testing.assert_close(model(X), outputs["a"], atol=1e-5, rtol=1e-5)
    with core.use(model, "b"):
        torch.testing.assert_close(model(X), outputs["b"], atol=1e-5, rtol=1e-5)
    with core.use(model, "a", "b"):
        both = model(X)
    with core.disable(model):
        torch.testing.assert_close(model(X), made(known, in_first)(X), atol=1e-6, rtol=1e-6)
    core.unmerge(model)
    with core.use(model, "a", "b"):
        torch.testing.assert_close(model(X), both, atol=1e-5, rtol=1e-5)
    core.detach(model)
    assert all(torch.equal(p, bits[name]) for name, p in model.named_parameters())


def test_merge_and_unload_gives_the_plain_model() -> None:
    model = adapted("a")
    y = model(X)
    core.merge_and_unload(model)
    assert all(type(layer.experts) is Experts for layer in model.layers)
    torch.testing.assert_close(model(X), y, atol=1e-5, rtol=1e-5)


def test_merged_state_dict_has_the_bases_names() -> None:
    model = adapted("a")
    state = core.merged_state_dict(model)
    plain = made()
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(X), model(X), atol=1e-5, rtol=1e-5)


def test_layers_stand_in_the_order_of_definition_and_lie_so_on_disk(tmp_path: Path) -> None:
    model = adapted("a")
    outer = model.layers[0].experts
    assert isinstance(outer, ParamWrapper)
    assert [outer.parameter_name, outer.base_layer.parameter_name] == ["down_proj", "gate_up_proj"]
    assert "parameter_name='down_proj'" in repr(outer)
    core.save_adapter(model, tmp_path, "a")
    assert [site.path for site in core.inspect_adapter(tmp_path).sites] == [
        "layers.0.experts",
        "layers.0.experts.base_layer",
        "layers.1.experts",
        "layers.1.experts.base_layer",
    ]


@LAYOUTS
def test_saved_is_loaded(tmp_path: Path, known: bool, in_first: bool) -> None:
    patterns = {"rank_pattern": {"layers.0.experts.down_proj": 1}, "alpha_pattern": {"experts.gate_up_proj": 4}}
    model = adapted("a", known=known, in_first=in_first, use_rslora=True, **patterns)
    core.save_adapter(model, tmp_path, "a")
    fresh = made(known, in_first)
    core.load_adapter(fresh, tmp_path, "b", trainable=True)
    assert torch.equal(fresh(X), model(X))
    found = {site.path: (site.r, site.experts, site.scale) for site in core.inspect_adapter(tmp_path).sites}
    assert found["layers.0.experts"] == (1, EXPERTS, 6.0)
    assert found["layers.1.experts"] == (2, EXPERTS, pytest.approx(6 / 2**0.5))
    assert found["layers.0.experts.base_layer"] == (2, EXPERTS, pytest.approx(4 / 2**0.5))


def test_inspect_tells_norms_expert_by_expert_also_without_our_file(tmp_path: Path) -> None:
    model = adapted("a")
    core.save_adapter(model, tmp_path, "a")
    plain = updated_by_hand(model, "a", made())
    moved = plain.layers[0].experts.down_proj - made().layers[0].experts.down_proj
    with_ours = core.inspect_adapter(tmp_path).sites[0]
    (tmp_path / "lorakit.json").unlink()
    without = core.inspect_adapter(tmp_path).sites[0]
    assert with_ours == without
    assert without.norm == pytest.approx(float(moved.detach().norm()), rel=1e-4)


def test_adapters_may_name_different_parameters_of_one_module(tmp_path: Path) -> None:
    model = made()
    for seed, (name, parameters) in enumerate({"down": ["down_proj"], "both": BOTH, "up": ["gate_up_proj"]}.items()):
        core.attach(model, config(target_parameters=parameters), name)
        randomise(model, name, seed)
    assert model.layers[0].experts.parameter_name == "down_proj"
    for name in ("down", "both", "up"):
        with core.use(model, name):
            y = model(X)
        core.save_adapter(model, tmp_path / name, name)
        alone = made()
        core.load_adapter(alone, tmp_path / name)
        torch.testing.assert_close(alone(X), y, atol=1e-6, rtol=1e-6)
        paths = {site.path for site in core.inspect_adapter(tmp_path / name).sites}
        assert ("layers.0.experts.base_layer" in paths) == (name == "both")
    core.detach(model, "both")
    with core.use(model, "up"):
        model(X)
    core.detach(model)
    assert torch.equal(model(X), made()(X))


def test_a_matrix_of_a_linear_layer_acts_as_the_layer_would() -> None:
    as_parameter, as_module = made(), made()
    core.attach(as_parameter, config(target_parameters=["head.weight"]), "a")
    core.attach(as_module, config(target_modules=["head"], target_parameters=None), "a")
    for model in (as_parameter, as_module):
        randomise(model, "a", 5)
    torch.testing.assert_close(as_parameter(X), as_module(X), atol=1e-6, rtol=1e-6)


@LAYOUTS
def test_all_rows_alike_work_and_mixed_rows_are_refused(known: bool, in_first: bool) -> None:
    model = adapted("a", "b", known=known, in_first=in_first)
    with core.use(model, "b"):
        y = model(X)
    with core.route(model, ["b", "b"]):
        assert torch.equal(model(X), y)
    with core.route(model, [None, None]):
        torch.testing.assert_close(model(X), made(known, in_first)(X))
    with core.route(model, ["a", "b"]), pytest.raises(RouteError, match="has one weight for all rows"):
        model(X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("known", [False, True], ids=["plain", "known"])
def test_other_dtypes_keep_theirs(dtype: torch.dtype, known: bool) -> None:
    model = made(known, dtype=dtype)
    core.attach(model, config())
    randomise(model, "default", 1)
    site = model.layers[0].experts
    assert site.lora_A["default"].weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    y = model(X.to(dtype))
    assert y.dtype == dtype
    core.merge(model)
    tolerance = {torch.float64: 1e-9, torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]
    torch.testing.assert_close(model(X.to(dtype)), y, atol=tolerance, rtol=tolerance)


def test_under_autocast_the_weight_keeps_dtype_and_precision() -> None:
    model = adapted("a")
    layer = core.sites(model)[0].layer
    wanted = layer.effective(model.layers[0].experts.state.default)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer.effective(model.layers[0].experts.state.default)
    assert torch.equal(found, wanted)


def test_dropout_acts_on_the_tokens_of_known_experts_in_training_alone() -> None:
    model = adapted("a", known=True, lora_dropout=0.5)
    y = model(X)
    assert torch.equal(model(X), y)
    torch.testing.assert_close(y, adapted("a", known=True)(X))
    model.train()
    torch.manual_seed(1)
    one, other = model(X), model(X)
    assert not torch.equal(one, other)
    many = torch.stack([model(X) for _ in range(3)])
    assert bool(torch.isfinite(many).all())


def test_dropout_is_refused_where_the_module_never_shows_its_input() -> None:
    model = made()
    with pytest.raises(ConfigError, match=r"does not work with lora_dropout != 0: Experts at layers.0.experts"):
        core.attach(model, config(lora_dropout=0.1))
    assert not core.adapters(model)


@pytest.mark.parametrize("mark", MARKS)
def test_experts_with_another_mark_are_not_known(mark: str) -> None:
    experts = known_experts(False)
    assert shows_tokens(experts, "down_proj")
    setattr(experts, mark, not getattr(experts, mark))
    assert not shows_tokens(experts, "down_proj")


def test_experts_in_parallel_take_the_dense_weight() -> None:
    experts = known_experts(False)
    experts._is_expert_parallel = True
    assert not shows_tokens(experts, "down_proj")


class Largest(TorchDispatchMode):
    """Record the size of the largest tensor that an operation creates; views and arguments do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for one in tree_leaves(made):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, one.numel())
        return made


@pytest.mark.parametrize("in_first", [False, True])
def test_known_experts_make_no_dense_weight(in_first: bool) -> None:
    """No tensor of a step is as large as one of the weights."""
    model = adapted("a", known=True, in_first=in_first)
    with Largest() as largest:
        model(X[:1, :2]).sum().backward()
    assert 0 < largest.numel < EXPERTS * D * HIDDEN
    with Largest() as dense:
        adapted("a", in_first=in_first)(X[:1, :2]).sum().backward()
    assert dense.numel >= EXPERTS * D * HIDDEN


def test_a_copy_and_a_pickle_work(tmp_path: Path) -> None:
    model = adapted("a")
    y = model(X)
    assert torch.equal(copy.deepcopy(model)(X), y)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(X), y)


class Computed(nn.Module):
    """A parametrisation: twice what is stored."""

    def forward(self, W: Tensor) -> Tensor:
        return 2 * W


def test_a_parameter_that_is_computed_is_adapted_as_it_comes_out_and_never_merged() -> None:
    model = made()
    nn.utils.parametrize.register_parametrization(model.head, "weight", Computed())
    y = model(X)
    core.attach(model, config(target_parameters=["head.weight"]), "a")
    torch.testing.assert_close(model(X), y)
    randomise(model, "a", 2)
    layer, inside = model.head, {}
    model.head.register_forward_pre_hook(lambda _, args: inside.update(x=args[0]))
    found = model(X)
    W = layer.owner.weight + 3 * layer.lora_B["a"].weight @ layer.lora_A["a"].weight
    torch.testing.assert_close(found, F.linear(inside["x"], W, layer.owner.bias))
    with pytest.raises(MergeError, match=r"is computed by torch\.nn\.utils\.parametrize"):
        core.merge(model)
    core.detach(model)
    torch.testing.assert_close(model(X), y)


def wrong_module(model: Net) -> LoraConfig:
    core.attach(model, config(target_parameters=["head.weight"]), "a")
    return config(target_modules=["head"], target_parameters=None)


def wrong_parameter(model: Net) -> LoraConfig:
    core.attach(model, config(target_modules=["head"], target_parameters=None), "a")
    return config(target_parameters=["head.weight"])


REFUSED: dict[str, tuple[Callable[[Net], LoraConfig], str]] = {
    "no such parameter": (
        lambda _: config(target_parameters=["gate_up"]),
        "entry 'gate_up' matches no parameter; nearest: gate_up_proj",
    ),
    "one of two": (lambda _: config(target_parameters=[*BOTH, "other"]), "entry 'other' matches no parameter"),
    "no pattern": (lambda _: config(target_parameters=[".*down_proj"]), "No `target_modules` passed but also no"),
    "a vector": (lambda _: config(target_parameters=["head.bias"]), "requires a parameter with two or three axes"),
    "module and parameter": (
        lambda _: config(target_modules=["head"], target_parameters=["head.weight"]),
        "Trying to wrap an `nn.Parameter` of layer 'head' of type Linear, which is not a valid target",
    ),
    "another's module": (wrong_parameter, "Trying to wrap an `nn.Parameter` of layer 'head'"),
    "another's parameter": (wrong_module, "Trying to wrap an `nn.Parameter` of layer 'head'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_name_and_nothing_changes(name: str) -> None:
    prepare, said = REFUSED[name]
    model = made()
    wanted = prepare(model)
    before = [type(module) for module in model.modules()]
    with pytest.raises(TargetError, match=said):
        core.attach(model, wanted, "other")
    assert [type(module) for module in model.modules()] == before


def test_a_parameter_of_the_model_itself_is_refused() -> None:
    model = Experts(False)
    with pytest.raises(TargetError, match=r"top-level module is not supported \(parameter 'down_proj'\)"):
        core.attach(model, config(target_parameters=["down_proj"]))


def test_a_module_that_holds_other_sites_is_refused() -> None:
    model = made()
    model.layers[0].register_parameter("extra", nn.Parameter(torch.randn(3, 3)))
    with pytest.raises(TargetError, match=r"layers\.0\.router is adapted too"):
        core.attach(model, config(target_modules=["router"], target_parameters=["0.extra"]))


def test_dora_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Parameter does not support DoRA"):
        core.attach(made(), config(use_dora=True))


def test_a_file_with_other_parameters_than_the_model_names_every_mismatch(tmp_path: Path) -> None:
    core.save_adapter(adapted("a"), tmp_path, "a")
    with pytest.raises(AdapterFileError, match=r"unexpected site layers\.1\.experts"):
        other = made()
        other.layers = other.layers[:1]
        core.load_adapter(other, tmp_path, allow=["base_mismatch"])


def test_ranks_and_counts_are_reported() -> None:
    model = made()
    report = core.attach(model, config(rank_pattern={"experts.down_proj": 1}))
    assert {(match.path, match.parameter, match.rank) for match in report.matches} == {
        (f"layers.{i}.experts", name, rank) for i in (0, 1) for name, rank in (("gate_up_proj", 2), ("down_proj", 1))
    }
    one = 2 * EXPERTS * (D + 2 * HIDDEN) + 1 * EXPERTS * (HIDDEN + D)
    assert report.trainable_parameters == 2 * one


@pytest.mark.parametrize("name", ["conv.weight", "embed.weight"])
def test_a_matrix_that_its_module_holds_transposed_is_adapted_as_it_lies(name: str, tmp_path: Path) -> None:
    """As in peft: rows of the parameter are B's, whatever the module does with them, in forwards, merges and files."""
    model = EVERY_KIND.model(torch.float64)
    W = model.get_parameter(name).detach().clone()
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=[name])
    core.attach(model, config, "a")
    randomise(model, "a", 3)
    (site,) = core.sites(model)
    A, B = (t.detach() for t in (site.layer.factor("a").A, site.layer.factor("a").B))
    assert (A.shape, B.shape) == ((2, W.shape[1]), (W.shape[0], 2))
    plain = EVERY_KIND.model(torch.float64)
    plain.get_parameter(name).data = W + 1.5 * B @ A
    expected = run(plain, EVERY_KIND.given())
    torch.testing.assert_close(run(model, EVERY_KIND.given()), expected)
    core.save_adapter(model, tmp_path / "a", "a")
    core.load_adapter(model, tmp_path / "a", "again")
    with core.use(model, "again"):
        torch.testing.assert_close(run(model, EVERY_KIND.given()), expected)
    base = EVERY_KIND.model(torch.float64)
    report = core.extract(base, plain, config, rank=2)
    assert report.captured == pytest.approx(1)
    torch.testing.assert_close(run(base, EVERY_KIND.given()), expected)
    core.merge_and_unload(model, "a")
    torch.testing.assert_close(model.get_parameter(name), plain.get_parameter(name))
