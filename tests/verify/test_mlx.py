"""Exported adapters in mlx-lm, and wrong exports that `verify` finds there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.verify.test_loaded import compared

from lorakit.export import formats
from lorakit.session import SessionOptions
from lorakit.verify import VerifyOptions, verify

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (lorakit[runtimes])")

FIELDS: dict[str, Any] = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
A, B, SCALED = "model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.mlp.up_proj.lora_b", ".lora_b"


@pytest.fixture
def base(tiny_model_directory: Path) -> Path:
    """A base whose config has `rope_theta`, as lorakit writes it."""
    config = json.loads((tiny_model_directory / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (tiny_model_directory / "config.json").write_text(json.dumps(config))
    return tiny_model_directory


def test_an_exported_adapter(save_adapter: Callable[..., Path], base: Path) -> None:
    (one,) = compared(save_adapter("notes", **FIELDS), base, "mlx", prompts=20).values()
    assert one.problems == []
    assert one.is_judged and 0 < one.difference < 1e-3
    assert (one.greedy_same, one.other_tokens) == (20, ())
    assert one.base_difference is not None and one.base_difference < 1e-3
    assert set(one.versions) == {"mlx", "mlx-lm"}


def transposed(tensors: dict[str, Any]) -> None:
    """Store B of a square site as (out, in)."""
    name = "model.layers.0.self_attn.o_proj"
    up, down = tensors[f"{name}.lora_b"], tensors[f"{name}.lora_a"]
    tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = up.T.contiguous(), down.T.contiguous()


def without_scale(tensors: dict[str, Any]) -> None:
    """Leave out the scale of every site."""
    for name in tensors:
        if name.endswith(SCALED):
            tensors[name] = tensors[name] / 4  # alpha 8, rank 4, rsLoRA: 8 / √4


def without_padding(tensors: dict[str, Any]) -> None:
    """Use a rank of another site in a padded one, whose zeros hold other values."""
    tensors[A][:, 2:] = 1.0
    tensors[A.replace("lora_a", "lora_b")][2:] = 1.0


def lost(tensors: dict[str, Any]) -> None:
    """Leave out one site."""
    del tensors[B], tensors[B.replace("lora_b", "lora_a")]


@pytest.mark.parametrize("change", [transposed, without_scale, without_padding, lost])
def test_wrong_exports(
    save_adapter: Callable[..., Path],
    base: Path,
    change: Callable[[dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from safetensors.torch import load_file, save_file

    entry = formats.FORMATS["mlx"]

    def wrong(request: Any, folder: Path) -> Any:
        exported = entry.write(request, folder)
        tensors = load_file(folder / "adapters.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapters.safetensors")
        return exported

    monkeypatch.setattr(formats, "FORMATS", {**formats.FORMATS, "mlx": replace(entry, write=wrong)})
    (one,) = compared(save_adapter("notes", **FIELDS), base, "mlx").values()
    assert one.difference > one.bound and one.problems
    assert one.base_difference is not None and one.base_difference < 1e-3


def test_the_dtype_of_the_base(save_adapter: Callable[..., Path], base: Path) -> None:
    (one,) = compared(save_adapter("notes"), base, "mlx", session=SessionOptions("auto", "cpu")).values()
    assert (one.dtype, one.is_judged, one.problems) == ("float32", True, [])


def test_a_base_that_mlx_lm_reads_otherwise(save_adapter: Callable[..., Path], base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["rope_theta"] = 100.0  # mlx-lm reads this one, transformers the other
    (base / "config.json").write_text(json.dumps(config))
    (one,) = verify(save_adapter("notes"), ["mlx"], VerifyOptions(model=str(base), prompts=2)).comparisons
    assert one.difference > one.bound and one.problems
