"""Files that are out in the world go on being read, whatever is installed: the same tensors, the same outputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorakit.peft
from lorakit import core
from lorakit.durable import sha256_file
from lorakit.errors import AdapterFileError

from .make import GOLDEN, HERE, INPUT, OURS, base_of, output_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _expected(name: str) -> tuple[str, Tensor]:
    facts = json.loads((HERE / name / "expected.json").read_text())
    return facts["base"], torch.tensor(facts["outputs"])


def _copy(name: str, folder: Path, **changes: Any) -> Path:
    """A copy of a golden folder with fields of its config changed; None takes a field out."""
    shutil.copytree(HERE / name, folder, dirs_exist_ok=True)
    config = json.loads((folder / CONFIG).read_text())
    for field, value in changes.items():
        config.pop(field, None)
        config |= {} if value is None else {field: value}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", sorted({**GOLDEN, **OURS}))
def test_outputs_are_those_of_the_writer(name: str) -> None:
    base, outputs = _expected(name)
    plain = output_of(base_of(base))
    assert float((plain - outputs).abs().max()) > 1e-2
    model = base_of(base)
    core.load_adapter(model, HERE / name)
    torch.testing.assert_close(output_of(model), outputs, rtol=1e-5, atol=1e-6)
    wrapped = lorakit.peft.PeftModel.from_pretrained(base_of(base), HERE / name)
    torch.testing.assert_close(output_of(wrapped), outputs, rtol=1e-5, atol=1e-6)
    core.merge_and_unload(model, "default")
    torch.testing.assert_close(output_of(model), outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_saved_again_the_tensors_and_fields_are_the_same(name: str, tmp_path: Path) -> None:
    model = base_of(GOLDEN[name][0])
    core.load_adapter(model, HERE / name)
    core.save_adapter(model, tmp_path)
    first, second = (load_file(folder / WEIGHTS) for folder in (HERE / name, tmp_path))
    assert {n: (t.shape, t.dtype) for n, t in second.items()} == {n: (t.shape, t.dtype) for n, t in first.items()}
    assert all(torch.equal(first[n], second[n]) for n in first)
    before, after = (json.loads((folder / CONFIG).read_text()) for folder in (HERE / name, tmp_path))
    assert {k for k in before | after if _plain(before.get(k)) != _plain(after.get(k))} <= {"peft_version"}


@pytest.mark.parametrize("name", sorted(OURS))
def test_our_own_format_is_verified(name: str) -> None:
    report = core.load_adapter(base_of(OURS[name][0]), HERE / name)
    assert (report.base, report.warnings) == ("same", ())
    summary = core.inspect_adapter(HERE / name)
    assert summary.config.use_dora


def test_the_format_of_today_has_a_golden_folder() -> None:
    from lorakit.core.files.adapter_folder import FORMAT_VERSION

    assert f"lorakit-format-{FORMAT_VERSION}" in OURS


def test_an_old_config_with_few_fields(tmp_path: Path) -> None:
    """PEFT before 0.5 wrote less than half of today's fields."""
    folder = _copy("plain", tmp_path)
    kept = {"peft_type", "task_type", "r", "lora_alpha", "target_modules", "bias", "fan_in_fan_out", "inference_mode"}
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if k in kept}))
    model = base_of("dense")
    core.load_adapter(model, folder)
    torch.testing.assert_close(output_of(model), _expected("plain")[1], rtol=1e-5, atol=1e-6)


def test_an_old_name_of_the_magnitude(tmp_path: Path) -> None:
    """PEFT 0.9 to 0.11 wrote the vector with `.weight` at its end."""
    folder = _copy("dora", tmp_path)
    tensors = load_file(folder / WEIGHTS)
    old = {f"{n}.weight" if n.endswith("lora_magnitude_vector") else n: t for n, t in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, folder / WEIGHTS, {"format": "pt"})
    model = base_of("dense")
    core.load_adapter(model, folder)
    torch.testing.assert_close(output_of(model), _expected("dora")[1], rtol=1e-5, atol=1e-6)


def test_a_newer_config_says_what_was_left_out(tmp_path: Path) -> None:
    folder = _copy("plain", tmp_path, magic_word=True, peft_version="9.9.9")
    with pytest.warns(UserWarning, match="unknown fields in adapter_config.json were ignored: magic_word"):
        core.load_adapter(base_of("dense"), folder)


def test_the_folders_are_small() -> None:
    files = [path for name in {**GOLDEN, **OURS} for path in (HERE / name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 100_000


def test_the_input_is_the_one_that_was_run() -> None:
    assert INPUT.tolist() == [[1, 7, 3], [2, 9, 4]]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def test_format_1_is_read_as_it_was(tmp_path: Path) -> None:
    """No seal, hashes that are not required, and weights that were being replaced."""
    folder = _copy("lorakit-format-1", tmp_path)
    shutil.copy(HERE / "lorakit-format-1" / CONFIG, folder / CONFIG)
    about = json.loads((folder / "lorakit.json").read_text())
    about["weights"] |= {"sha256": "0" * 64, "previous_sha256": about["weights"]["sha256"]}
    (folder / "lorakit.json").write_text(json.dumps(about))
    model = base_of("dense")
    assert core.load_adapter(model, folder).warnings == ()
    torch.testing.assert_close(output_of(model), _expected("lorakit-format-1")[1], rtol=1e-5, atol=1e-6)
    del about["config"], about["weights"]["previous_sha256"]
    (folder / "lorakit.json").write_text(json.dumps(about))
    with pytest.raises(AdapterFileError, match="damaged: its SHA-256"):
        core.load_adapter(base_of("dense"), folder)
    about["weights"]["sha256"] = sha256_file(folder / WEIGHTS)
    (folder / "lorakit.json").write_text(json.dumps(about))
    with pytest.warns(UserWarning, match="was edited"):
        core.load_adapter(base_of("dense"), folder)
