"""lorakit.cli.inspect: the report on an adapter as text and JSON, and the exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import hub
from lorakit.cli import main
from lorakit.cli.inspect import groups
from lorakit.core import inspect_adapter
from lorakit.tables import format_bytes

Save = Callable[..., Path]


def test_a_healthy_adapter(save_adapter: Save, capsys: pytest.CaptureFixture[str]) -> None:
    one = save_adapter("one", rank_pattern={"down_proj": 2}, use_rslora=True)
    assert main(["inspect", str(one)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{one}: healthy (values finite, every B nonzero, scales in range)\n")
    assert "parameters at 14 sites, " in out
    assert "SHA-256" not in out and "adapter_model.safetensors" not in out
    assert "r=4, lora_alpha=8, lora_dropout=0.0" in out
    assert "use_rslora=True, rank_pattern={'down_proj': 2}" in out
    assert "base       tiny (LlamaForCausalLM, " in out
    (down,) = [line.split() for line in out.splitlines() if line.startswith("down_proj")]
    assert down[:6] == ["down_proj", "2", "32", "×", "64", "2"]
    assert down[6] == f"{8 / 2**0.5:.6g}"
    assert main(["inspect", str(one), "--verbose"]) == 0
    out = capsys.readouterr().out
    assert "samples    fingerprint " in out and "weights    SHA-256 " in out
    assert "adapter_model.safetensors " in out


def test_the_size_is_that_of_the_weights_as_in_training(save_adapter: Save, capsys: pytest.CaptureFixture[str]) -> None:
    one = save_adapter("one")
    (one / "tokenizer.json").write_bytes(b" " * 3_000_000)
    assert main(["inspect", str(one)]) == 0
    size = (one / "adapter_model.safetensors").stat().st_size
    assert f"parameters at 14 sites, {format_bytes(size)}\n" in capsys.readouterr().out


def test_json_says_the_same(save_adapter: Save, capsys: pytest.CaptureFixture[str]) -> None:
    one = save_adapter("one")
    assert main(["inspect", str(one), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is True
    assert found["findings"] == []
    assert found["config"]["r"] == 4
    assert len(found["sites"]) == 14
    assert {group["module"]: group["sites"] for group in found["groups"]}["q_proj"] == 2
    assert found["files"]["lorakit.json"] == (one / "lorakit.json").stat().st_size
    assert found["base"]["architecture"] == "LlamaForCausalLM"
    assert len(found["weights_sha256"]) == 64


def test_norms_are_those_of_the_products(save_adapter: Save) -> None:
    from safetensors.torch import load_file

    one = save_adapter("one")
    tensors = load_file(one / "adapter_model.safetensors")
    (group,) = [found for found in groups(inspect_adapter(one)) if found["module"] == "q_proj"]
    stem = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    norms = [float(torch.linalg.norm(tensors[stem.format(i, "B")] @ tensors[stem.format(i, "A")])) * 2 for i in (0, 1)]
    assert group["norm"]["min"] == pytest.approx(min(norms), rel=1e-5)
    assert group["norm"]["max"] == pytest.approx(max(norms), rel=1e-5)
    assert group["norm"]["median"] == pytest.approx(sum(norms) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"spread": 0.0}, "B·A is zero at all sites"),
        ({"spread": float("nan")}, "NaN or infinite values (tensors: 14)"),
    ],
)
def test_findings_end_with_exit_code_1(
    save_adapter: Save, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], said: str
) -> None:
    one = save_adapter("one", **fields)
    assert main(["inspect", str(one)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{one}: 1 problem\n  - ")
    assert said in out
    assert "healthy" not in out


def test_a_packaged_base_has_its_name_not_the_path_in_the_cache(
    save_adapter: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save_adapter("one")
    config = json.loads((one / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = f"/home/me/.cache/models/{hub.PACKAGED['smollm2'].folder}"
    (one / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    main(["inspect", str(one)])
    assert "base       smollm2 (" in capsys.readouterr().out


def test_an_adapter_of_peft_without_our_file_is_no_finding(
    save_adapter: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save_adapter("one")
    (one / "lorakit.json").unlink()
    assert main(["inspect", str(one)]) == 0
    assert "no fingerprint, so another base" in capsys.readouterr().out


def test_what_is_no_adapter_is_refused(
    save_adapter: Save, tmp_path: Path, tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save_adapter("one")
    shutil.copytree(one, tmp_path / "run" / "adapter")
    for folder, said in (
        (tmp_path / "no", "adapter directory not found"),
        (tiny_model_directory, "no adapter_config.json, so this is not an adapter"),
    ):
        assert main(["inspect", str(folder)]) == 1
        assert said in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert f"{tmp_path / 'run' / 'adapter'}: healthy" in capsys.readouterr().out
    (one / "adapter_model.safetensors").write_bytes(b"\x80\x02pickle, not safetensors")
    assert main(["inspect", str(one), "--json"]) == 1
    assert "which is never loaded" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_several_adapters(save_adapter: Save, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = save_adapter("one"), save_adapter("two", spread=0.0)
    assert main(["inspect", str(one), str(two)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{one}: healthy") and f"\n\n{two}: 1 problem" in out
    assert main(["inspect", str(one), str(two), "--json"]) == 1
    assert [found["healthy"] for found in json.loads(capsys.readouterr().out)] == [True, False]
    assert main(["inspect", str(one), str(one)]) == 2


def test_brief_shows_what_differs(save_adapter: Save, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(save_adapter("one")), str(save_adapter("two", r=8, target_modules=["q_proj", "up_proj"]))]
    assert main(["inspect", *names, "--brief"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    at = lines.index(["r", names[0], "4"])
    assert lines[at + 1] == [names[1], "8"]
    assert not any(line[0] == "lora_alpha" for line in lines)
    assert main(["inspect", *names, "--brief", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sites"] == dict(zip(names, (14, 4), strict=True))
    assert found["target_modules"][names[1]] == ["q_proj", "up_proj"]
    assert main(["inspect", names[0], "--brief"]) == 2
