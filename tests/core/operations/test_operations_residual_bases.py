"""Operations on adapters with a residual base: exact if they are plain LoRA of twice the rank, else an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.core import (
    CombinationType,
    activate,
    combine,
    combine_folders,
    compare_adapters,
    compare_folders,
    compress,
    compress_folder,
    load_adapter,
    merge,
    merged_state_dict,
    reduce_intruders,
    save_adapter,
    save_as_trained,
    use,
)
from lorakit.core.files.adapter_folder import INITIAL_FILE
from lorakit.core.operations.tensor_sources import weights_of_folder
from lorakit.errors import AdapterError, AdapterFileError
from lorakit.plan.quantized import STORAGES

from ...laws.quantized import specimen
from ...laws.snapshots import snapshot
from ...laws.tolerances import assert_close
from ...laws.zoo import CONV1DS, LINEARS, Specimen, attach_fresh, randomise, run

FP32 = torch.float32
EXACT = ("pissa", "olora", "corda", "lora_ga")


def both(init: str, kind: Specimen = LINEARS, **fields: Any) -> nn.Module:
    """Return a model with an active adapter that has a residual base, and a plain one, "plain"."""
    model = kind.model()
    attach_fresh(model, kind, "moved", init_lora_weights=init, **fields)
    attach_fresh(model, kind, "plain")
    randomise(model, "moved", 11, size=0.3)
    randomise(model, "plain", 12, size=0.3)
    activate(model, "moved")
    return model


def effect(model: nn.Module, name: str, original: nn.Module) -> dict[str, Tensor]:
    """Return the update of each original weight by an adapter."""
    merged = merged_state_dict(model, name)
    return {key: merged[key] - tensor for key, tensor in original.state_dict().items() if key in merged}


@pytest.mark.parametrize("kind", [LINEARS, CONV1DS], ids=str)
@pytest.mark.parametrize("init", EXACT)
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_a_combination_is_the_sum_of_what_each_adds_to_the_original(
    init: str, dora: bool, kind: Specimen, tmp_path: Path
) -> None:
    model, original = both(init, kind, use_dora=dora), kind.model()
    parts = [effect(model, name, original) for name in ("moved", "plain")]
    wanted = {key: 0.5 * parts[0][key] - 2.0 * parts[1][key] for key in parts[0]}
    combine(model, ["moved", "plain"], [0.5, -2.0], "sum", way=CombinationType("cat"))
    folders = [tmp_path / "moved", tmp_path / "plain"]
    save_as_trained(model, folders[0], "moved")
    save_adapter(model, folders[1], "plain")
    assert (folders[0] / INITIAL_FILE).exists()
    combine_folders(folders, [0.5, -2.0], tmp_path / "sum", way=CombinationType("cat"), model=kind.model())
    loaded = kind.model()
    load_adapter(loaded, tmp_path / "sum")
    for found in (effect(model, "sum", original), effect(loaded, "default", original)):
        for key, delta in wanted.items():
            torch.testing.assert_close(found[key], delta, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("init", EXACT)
def test_as_it_is_trained_and_as_plain_lora_are_one_adapter(init: str, tmp_path: Path) -> None:
    model, given = both(init, use_rslora=True), LINEARS.given()
    save_as_trained(model, tmp_path / "trained", "moved")
    save_adapter(model, tmp_path / "plain", "moved")
    report = compare_folders(tmp_path / "trained", tmp_path / "plain")
    for site in report.sites:
        assert site.cosine == pytest.approx(1, abs=1e-4) and site.norms[0] == pytest.approx(site.norms[1], rel=1e-4)
    compress_folder(tmp_path / "trained", tmp_path / "small", rank=8)
    loaded = LINEARS.model()
    load_adapter(loaded, tmp_path / "small")
    assert_close(run(loaded, given), run(model, given), FP32)
    combine(model, ["moved"], [1.0], "twin", way=CombinationType("cat"))
    assert all(site.cosine == pytest.approx(1, abs=1e-4) for site in compare_adapters(model, "moved", "twin").sites)


OPERATIONS: list[Callable[[nn.Module], Any]] = [
    lambda model: combine(model, ["moved", "plain"], [1.0, 1.0], "new"),
    lambda model: compress(model, "moved", "new", rank=2),
    lambda model: compare_adapters(model, "moved", "plain"),
    lambda model: reduce_intruders(model, "moved", "new"),
]


@pytest.mark.parametrize("merged", [False, True])
def test_loftq_is_no_plain_lora_and_every_operation_says_so(merged: bool) -> None:
    model = both("loftq", loftq_config={"loftq_bits": 4})
    if merged:
        merge(model, "plain")
    before = snapshot(model)
    for operation in OPERATIONS:
        with pytest.raises(
            AdapterError, match=r"up: loftq changed the base by more than a low-rank product.*merged_state_dict"
        ):
            operation(model)
        assert snapshot(model) == before
    compress(model, "plain", "small", rank=2)  # the other one is


def test_what_the_sentence_points_to_is_right() -> None:
    model, given = both("loftq", loftq_config={"loftq_bits": 4}), LINEARS.given()
    plain = LINEARS.model(seed=99)
    plain.load_state_dict(merged_state_dict(model, "moved"))
    assert_close(run(plain, given), run(model, given), FP32)
    with use(model, "moved"):
        merge(model, "moved")
        assert_close(run(model, given), run(plain, given), FP32)


@pytest.mark.filterwarnings("ignore:.*specified but will be ignored when")
@pytest.mark.parametrize("init", ["loftq", "pissa", "olora", "corda", "lora_ga"])
def test_a_folder_that_does_not_say_how_the_base_was_moved_is_refused(init: str, tmp_path: Path) -> None:
    model = both(init, loftq_config={"loftq_bits": 4} if init == "loftq" else {})
    save_as_trained(model, tmp_path / "a", "moved")
    if init != "loftq":
        for name in ("lorakit.json", INITIAL_FILE):  # as PEFT writes them
            (tmp_path / "a" / name).unlink()
    save_adapter(model, tmp_path / "b", "plain")
    data = init in ("corda", "lora_ga")
    text = (
        "using data, and the file does not contain the changed base"
        if data
        else "changed, and the directory does not say how"
    )
    for operation in (
        lambda: combine_folders([tmp_path / "a", tmp_path / "b"], [1.0, 1.0], tmp_path / "new"),
        lambda: compress_folder(tmp_path / "a", tmp_path / "new", rank=2),
        lambda: compare_folders(tmp_path / "b", tmp_path / "a"),
    ):
        with pytest.raises(AdapterFileError, match=f"init_lora_weights is '{init}'.*{text}"):
            operation()
        assert not (tmp_path / "new").exists()
    (tmp_path / "a" / "adapter_config.json").write_text(
        (tmp_path / "a" / "adapter_config.json").read_text().replace(f'"{init}"', "true")
    )
    assert set(weights_of_folder(tmp_path / "a").factors) == {"up", "square"}  # the base at hand is the changed one


def test_first_factors_of_another_adapter_are_refused(tmp_path: Path) -> None:
    for name, r in (("a", 4), ("b", 2)):
        save_as_trained(both("pissa", r=r), tmp_path / name, "moved")
    (tmp_path / "a" / INITIAL_FILE).write_bytes((tmp_path / "b" / INITIAL_FILE).read_bytes())
    with pytest.raises(AdapterFileError, match="damaged, or from another adapter: its SHA-256"):
        weights_of_folder(tmp_path / "a")


def test_olora_on_a_quantized_base_was_rounded_twice_and_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    kind = specimen(next(storage for storage in STORAGES if storage.name == "nf4"))
    model = both("olora", kind)
    before = snapshot(model)
    for operation in OPERATIONS:
        with pytest.raises(AdapterError, match=r"olora changed a quantized weight, .* had to be requantized"):
            operation(model)
        assert snapshot(model) == before
    save_as_trained(model, tmp_path, "moved")
    with pytest.raises(AdapterFileError, match=r"changed while the base was quantized\..* had to be requantized"):
        weights_of_folder(tmp_path)
    again = kind.model()
    load_adapter(again, tmp_path)
    assert_close(run(again, kind.given()), run(model, kind.given()), FP32)
