"""Caches and entry points of inits that use data, compared with the installed peft: its pickles and our safetensors
hold the same tensors under the same names, so either can be converted to the other; a pickle itself is rejected.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_eva_state_dict as their_state_dict
from peft import initialize_lora_eva_weights as their_initialize
from peft.tuners.lora.config import CordaConfig as TheirCordaConfig
from peft.tuners.lora.config import LoraGAConfig as TheirLoraGAConfig
from peft.tuners.lora.corda import preprocess_corda as their_corda
from peft.tuners.lora.loraga import preprocess_loraga as their_loraga
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit.peft as ours
from lorakit.errors import AdapterError, AdapterFileError, ConfigError, ConfigTypeError, DataError
from lorakit.peft.tuners.lora.corda import preprocess_corda
from lorakit.peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from lorakit.peft.tuners.lora.loraga import preprocess_loraga

from .rows import quiet_peft, theirs
from .test_inits import IN, rows, small, train_step

TARGETS = ["up", "conv", "down"]
PICKLE = r"may be a pickle, which is never loaded\. Only safetensors caches are read.* safetensors\.torch\.save_file"


def corda(library: Any, method: str = "ipm", r: int = 4, **settings: Any) -> Any:
    config_class = TheirCordaConfig if library is theirs else ours.CordaConfig
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    inner = config_class(corda_method=method, **settings)
    return library.LoraConfig(r=r, lora_alpha=6, target_modules=TARGETS, init_lora_weights="corda", corda_config=inner)


def runs(model: nn.Module) -> Any:
    return lambda: [model(rows(seed)) for seed in (1, 2, 3)]


def never() -> None:
    raise AssertionError("the data were run though a file holds the result")


def adapted(library: Any, model: nn.Module, config: Any) -> Any:
    with quiet_peft():
        return library.get_peft_model(model, config)


def output(model: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(rows(9))
    return y


def products(model: Any) -> list[Tensor]:
    found = []
    for site in TARGETS:
        layer = getattr(model.base_model.model, site)
        found.append((layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach())
    return found


def alike(one: Any, other: Any) -> None:
    for first, second in zip(products(one), products(other), strict=True):
        torch.testing.assert_close(first, second, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(output(one), output(other), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", ["covariance_file", "cache_file"])
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_files_hold_the_same_and_go_both_ways(which: str, method: str, tmp_path: Path) -> None:
    theirs_at, ours_at = tmp_path / "theirs.bin", tmp_path / "new" / "ours.safetensors"
    their_model, our_model = small(), small()
    their_corda(their_model, corda(theirs, method, **{which: theirs_at}), runs(their_model))
    expected = adapted(theirs, their_model, corda(theirs, method))
    preprocess_corda(our_model, corda(ours, method, **{which: ours_at}), runs(our_model))
    alike(adapted(ours, our_model, corda(ours, method)), expected)

    pickled, plain = torch.load(theirs_at), load_file(ours_at)
    assert set(plain) == set(pickled)
    for name, tensor in pickled.items():
        torch.testing.assert_close(plain[name].abs(), tensor.abs(), atol=2e-4, rtol=2e-3)
    before = ours_at.read_bytes()
    again = small()
    preprocess_corda(again, corda(ours, method, **{which: ours_at}), never)
    alike(adapted(ours, again, corda(ours, method)), expected)
    assert ours_at.read_bytes() == before

    model = small()
    with pytest.raises(AdapterFileError, match=PICKLE):
        preprocess_corda(model, corda(ours, method, **{which: theirs_at}), never)
    assert not any(hasattr(module, "eigens") for module in model.modules())
    save_file({name: tensor.contiguous() for name, tensor in pickled.items()}, tmp_path / "x.safetensors")
    preprocess_corda(model, corda(ours, method, **{which: tmp_path / "x.safetensors"}), never)
    alike(adapted(ours, model, corda(ours, method)), expected)
    torch.save(plain, tmp_path / "x.bin")
    model = small()
    their_corda(model, corda(theirs, method, **{which: tmp_path / "x.bin"}), never)
    alike(adapted(theirs, model, corda(theirs, method)), expected)


def test_one_covariance_serves_every_rank_and_method_and_one_cache_a_single_one(tmp_path: Path) -> None:
    spread, cache = tmp_path / "covariance.safetensors", tmp_path / "cache.safetensors"
    spread.touch()  # a name that was reserved
    model = small()
    preprocess_corda(model, corda(ours, covariance_file=spread, cache_file=cache), runs(model))
    for method, r in (("kpm", 2), ("ipm", 6)):
        other, fresh = small(), small()
        preprocess_corda(other, corda(ours, method, r, covariance_file=spread))
        preprocess_corda(fresh, corda(ours, method, r), runs(fresh))
        alike(adapted(ours, other, corda(ours, method, r)), adapted(ours, fresh, corda(ours, method, r)))

    def refused(text: str, config: Any, given: nn.Module | None = None) -> None:
        asked = small() if given is None else given
        with pytest.raises(ConfigError, match=text):
            preprocess_corda(asked, config, never)
        assert not any(hasattr(module, "eigens") for module in asked.modules())

    refused("corda_method is 'ipm', but the config has 'kpm'", corda(ours, "kpm", cache_file=cache))
    narrow = nn.Sequential()
    narrow.up, narrow.conv, narrow.down = nn.Linear(5, 20), nn.Linear(20, 20), nn.Linear(20, 16)
    refused(r"up has shape \(12, 12\); expected \(5, 5\)", corda(ours, covariance_file=spread), narrow)
    refused(r"up.eigens.V_WC has shape \(12, 4\); expected \(5, 4\)", corda(ours, cache_file=cache), narrow)
    whole = load_file(cache)
    for change, text in (
        (
            {n: t for n, t in whole.items() if "down" not in n},
            "down.eigens.S_WC not found; the file belongs to another",
        ),
        (
            {**whole, "conv.eigens.U_WC": whole["conv.eigens.U_WC"] * torch.inf},
            "conv.eigens.U_WC contains NaN or infinite",
        ),
    ):
        save_file(change, tmp_path / "changed.safetensors")
        refused(text, corda(ours, cache_file=tmp_path / "changed.safetensors"))
    model = small()
    preprocess_corda(model, corda(ours, r=2, cache_file=cache), never)
    with pytest.raises(ConfigError, match="up: the statistics were collected for rank 4, but r is 2"):
        ours.get_peft_model(model, corda(ours, r=2))
    (tmp_path / "damaged.safetensors").write_bytes(cache.read_bytes()[:-3])
    with pytest.raises(AdapterFileError, match="truncated or damaged"):
        preprocess_corda(small(), corda(ours, cache_file=tmp_path / "damaged.safetensors"), never)


def test_what_corda_asks_for_and_leaves(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run_model must be specified when covariance file and cache file aren't"):
        preprocess_corda(small(), corda(ours))
    with pytest.raises(ConfigError, match="preprocess_corda needs a corda_config"):
        preprocess_corda(small(), ours.LoraConfig(target_modules=TARGETS), never)
    with pytest.raises(ConfigError, match="Invalid corda_method found: x, it should be 'ipm' or 'kpm'"):
        preprocess_corda(small(), corda(ours, "x"), never)
    with pytest.raises(
        ConfigError, match="`eigens` attribute not found for layer, please run `preprocess_corda` first"
    ):
        ours.get_peft_model(small(), corda(ours))
    with pytest.raises(DataError, match="down: run_model does not reach this module"):
        model = small()
        preprocess_corda(model, corda(ours), lambda: model.conv(model.up(rows(1))))
    with pytest.raises(DataError, match="up: Invalid value found in input"):
        model = small()
        preprocess_corda(model, corda(ours), lambda: model(rows(1) * torch.nan))
    assert not model.up._forward_hooks
    fields = ("sample_count", "covariance_matrix", "corda_method", "rank")
    for prune in (True, False):
        them, us = small(), small().train()
        us.conv.eval()
        their_corda(them, corda(theirs, prune_temporary_fields=prune), runs(them))
        preprocess_corda(us, corda(ours, prune_temporary_fields=prune, verbose=True), runs(us))
        assert [m.training for m in (us, us.up, us.conv)] == [True, True, False]
        for site in TARGETS:
            left = {name: getattr(getattr(them, site), name) for name in fields if hasattr(getattr(them, site), name)}
            assert bool(left) != prune
            for name in fields:
                assert hasattr(getattr(us, site), name) == (name in left)
                if name in left and not isinstance(left[name], Tensor):
                    assert getattr(getattr(us, site), name) == left[name]
        adapted(ours, us, corda(ours))
        assert not hasattr(us.up, "eigens")
    hooked, us, half = small(), small(), small()
    preprocess_corda(us, corda(ours), runs(hooked), hooked_model=hooked)
    preprocess_corda(half, corda(ours, use_float16_for_covariance=True), runs(half))
    expected = adapted(theirs, them, corda(theirs))
    alike(adapted(ours, us, corda(ours)), expected)
    for first, second in zip(products(adapted(ours, half, corda(ours))), products(expected), strict=True):
        torch.testing.assert_close(first, second, atol=0.02, rtol=0.05)


def ga(library: Any, targets: list[str] = TARGETS) -> Any:
    inner = TheirLoraGAConfig() if library is theirs else ours.LoraGAConfig()
    return library.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, init_lora_weights="lora_ga", lora_ga_config=inner
    )


def test_lora_ga_files_hold_the_same_and_go_both_ways(tmp_path: Path) -> None:
    theirs_at, ours_at = tmp_path / "theirs.bin", tmp_path / "new" / "ours.safetensors"
    their_model, our_model = small(), small()
    their_loraga(their_model, ga(theirs), lambda: train_step(their_model), str(theirs_at))
    preprocess_loraga(our_model, ga(ours), lambda: train_step(our_model), ours_at)
    expected = adapted(theirs, their_model, ga(theirs, ["up", "down"]))
    pickled, plain = torch.load(theirs_at), load_file(ours_at)
    assert set(plain) == set(pickled) == {f"{site}._peft_loraga_grad" for site in TARGETS}
    for name, tensor in pickled.items():
        torch.testing.assert_close(plain[name], tensor, atol=1e-6, rtol=1e-4)
    model = small()
    with pytest.raises(AdapterFileError, match=PICKLE):
        preprocess_loraga(model, ga(ours), never, theirs_at)
    assert not any(hasattr(module, "_peft_loraga_grad") for module in model.modules())
    save_file(pickled, tmp_path / "x.safetensors")
    torch.save(plain, tmp_path / "x.bin")
    for path in (ours_at, tmp_path / "x.safetensors"):
        model = small()
        preprocess_loraga(model, ga(ours, ["up", "down"]), never, path)
        found = adapted(ours, model, ga(ours, ["up", "down"]))
        torch.testing.assert_close(output(found), output(expected), atol=1e-5, rtol=1e-5)
    model = small()
    their_loraga(model, ga(theirs, ["up", "down"]), never, str(tmp_path / "x.bin"))
    found = adapted(theirs, model, ga(theirs, ["up", "down"]))
    torch.testing.assert_close(output(found), output(expected), atol=1e-5, rtol=1e-5)


def test_what_lora_ga_refuses_and_leaves(tmp_path: Path) -> None:
    cache = tmp_path / "cache.safetensors"

    def refused(text: str, config: Any, model: nn.Module | None = None, path: Path | None = None) -> None:
        asked = small() if model is None else model
        with pytest.raises(ConfigError, match=text):
            preprocess_loraga(asked, config, never, path)
        assert not any(hasattr(module, "_peft_loraga_grad") for module in asked.modules())

    refused("initialize the LoraConfig with lora_ga_config", ours.LoraConfig(target_modules=["up"]))
    refused("No supported layers found for LoRA-GA", ga(ours, ["0"]), nn.Sequential(nn.Embedding(4, 4)))
    with pytest.raises(
        ConfigError, match="`_peft_loraga_grad` attribute not found for layer, please run `preprocess_l"
    ):
        ours.get_peft_model(small(), ga(ours))

    model = small().train()
    model.conv.eval()
    model.up.weight.grad = torch.ones_like(model.up.weight)
    model.down.bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    preprocess_loraga(model, ga(ours), lambda: model.up(rows(1).requires_grad_()).square().sum().backward(), cache)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in (model, model.up, model.conv)] == [True, True, False]
    assert bool((model.up.weight.grad == 1).all()) and model.down.weight.grad is None and not model.up._backward_hooks
    for again in (model, small()):  # the second knows from the file which modules had none
        preprocess_loraga(again, ga(ours), never, cache)
        with pytest.warns(UserWarning, match="LoRA-GA has no gradient for conv, down; these modules use init_lora"):
            found = ours.get_peft_model(again, ga(ours))
        assert not found.base_model.model.down.lora_B["default"].weight.any()
    narrow = nn.Sequential()
    narrow.up = nn.Linear(5, 20)
    refused(r"up._peft_loraga_grad has shape \(20, 12\); expected \(20, 5\)", ga(ours, ["up"]), narrow, cache)
    save_file({"other._peft_loraga_grad": torch.ones(2, 2)}, cache)
    refused("up._peft_loraga_grad not found; the file belongs to another model or config", ga(ours), path=cache)

    def fails() -> None:
        raise KeyboardInterrupt

    model = small().train()
    with pytest.raises(KeyboardInterrupt):
        preprocess_loraga(model, ga(ours), fails)
    assert all(p.requires_grad for p in model.parameters()) and model.training


HOW = {"forward_fn": lambda model, x: model(x), "prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
BATCHES = [rows(seed) * torch.logspace(0, -2, IN) for seed in range(3)]


def eva(library: Any, **settings: Any) -> Any:
    import peft

    inner = (peft.EvaConfig if library is theirs else ours.EvaConfig)(**{"rho": 2.0, "tau": 0.9999, **settings})
    return library.LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, init_lora_weights="eva", eva_config=inner)


def test_eva_state_dicts_go_both_ways_through_a_file(tmp_path: Path) -> None:
    them, us = adapted(theirs, small(), eva(theirs)), adapted(ours, small(), eva(ours))
    with quiet_peft():
        found = {"theirs": their_state_dict(them, BATCHES, show_progress_bar=False, **HOW)}
    found["ours"] = get_eva_state_dict(us, BATCHES, show_progress_bar=False, **HOW)
    assert set(found["ours"]) == set(found["theirs"])
    for name, directions in found.items():
        save_file({key: A.contiguous() for key, A in directions.items()}, tmp_path / f"{name}.safetensors")
    for name in found:
        directions = load_file(tmp_path / f"{name}.safetensors")
        made = []
        for library, initialize in ((theirs, their_initialize), (ours, initialize_lora_eva_weights)):
            model = adapted(library, small(), eva(library))
            with quiet_peft():
                initialize(model, eva_state_dict=copy.copy(directions))
            made.append(model)
        expected, mine = made
        assert mine.peft_config["default"].rank_pattern == expected.peft_config["default"].rank_pattern
        assert mine.peft_config["default"].alpha_pattern == expected.peft_config["default"].alpha_pattern
        assert sorted(mine.peft_config["default"].target_modules) == sorted(
            expected.peft_config["default"].target_modules
        )
        theirs_by_name, ours_by_name = (
            {n: p for n, p in model.state_dict().items() if "lora_A" in n} for model in made
        )
        assert set(ours_by_name) == set(theirs_by_name)
        for key, A in theirs_by_name.items():
            assert torch.equal(ours_by_name[key], A)
        torch.testing.assert_close(output(mine), output(expected))


def test_eva_on_a_bare_model_gives_bare_names_as_in_peft() -> None:
    with quiet_peft():
        expected = their_state_dict(small(), BATCHES, eva(theirs), show_progress_bar=False, **HOW)
    found = get_eva_state_dict(small(), BATCHES, eva(ours), **HOW)
    assert {name: A.shape for name, A in found.items()} == {name: A.shape for name, A in expected.items()}
    assert set(found) == set(TARGETS)
    model = adapted(ours, small(), eva(ours))
    initialize_lora_eva_weights(model, eva_state_dict=found)  # PEFT finds none of these names again
    assert torch.equal(model.base_model.model.up.lora_A["default"].weight, found["up"])


def test_what_eva_refuses_by_text_and_nothing_changes() -> None:
    model = adapted(ours, small(), eva(ours))
    good = get_eva_state_dict(model, BATCHES, **HOW)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def refused(error: type[Exception], text: str, **words: Any) -> None:
        given = words.pop("model", model)
        with pytest.raises(error, match=text):
            initialize_lora_eva_weights(given, **words)
        after = model.state_dict()
        assert set(after) == set(before) and all(torch.equal(after[name], tensor) for name, tensor in before.items())

    up = "base_model.model.up"
    refused(ConfigError, "model must be a PeftModel", model=small())
    refused(AdapterError, "Adapter x not found. Available: default", adapter_name="x", eva_state_dict=good)
    refused(ConfigError, "dataloader is required if eva_state_dict is not provided")
    refused(DataError, "dataloader is empty", dataloader=[])
    wide = {**good, up: torch.ones(2, IN + 1)}
    refused(ConfigError, rf"up has shape \(2, {IN + 1}\); expected \(rank, {IN}\)", eva_state_dict=wide)
    sick = {**good, up: good[up] * torch.nan}
    refused(ConfigError, "eva_state_dict: up contains NaN or infinite values", eva_state_dict=sick)
    none = {name: A[:0] for name, A in good.items()}
    refused(ConfigError, "assigns rank 0 to every module of adapter 'default'", eva_state_dict=none)
    refused(ConfigError, "no entries for adapter 'default'.* elsewhere", eva_state_dict={"elsewhere": good[up]})
    plain = ours.get_peft_model(small(), ours.LoraConfig(target_modules=["up"]))
    refused(ConfigError, "can only be used with `init_lora_weights='eva'`", model=plain, eva_state_dict=good)
    with pytest.raises(ConfigError, match="peft_config is required if model is not a PeftModel"):
        get_eva_state_dict(small(), BATCHES, **HOW)
    with pytest.raises(ConfigError, match=r"were not found in the model: \['nowhere'\]"):
        get_eva_state_dict(small(), BATCHES, eva(ours), **{**HOW, "prepare_layer_inputs_fn": {"nowhere": None}})
    with pytest.raises(ConfigTypeError, match="inputs must be a dictionary"):
        get_eva_state_dict(small(), BATCHES, eva(ours), forward_fn=HOW["forward_fn"])
    with pytest.raises(DataError, match="down: No batch reached this site"):
        get_eva_state_dict(small(), BATCHES, eva(ours), **{**HOW, "forward_fn": lambda m, x: m.conv(m.up(x))})
    with pytest.warns(UserWarning, match=r"names modules that adapter 'default' does not have: \['elsewhere'\]"):
        initialize_lora_eva_weights(model, eva_state_dict={**good, "elsewhere": good[up]})
    model.base_model.inject("second", eva(ours))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match="only works with a single active adapter"):
        initialize_lora_eva_weights(model, eva_state_dict=good)


def test_eva_leaves_modes_and_hooks_as_they_were() -> None:
    model = adapted(ours, small().train(), eva(ours))
    inner = model.base_model.model
    inner.conv.eval()
    modes = [module.training for module in model.modules()]
    get_eva_state_dict(model, BATCHES, **HOW)
    assert [module.training for module in model.modules()] == modes

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get_eva_state_dict(model, BATCHES, **{**HOW, "forward_fn": fails})
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in inner.modules())
