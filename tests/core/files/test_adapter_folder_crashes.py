"""A save that crashes at any file operation leaves the old adapter, the new one, or a folder that is rejected."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lorakit.config import CONFIG_FILE
from lorakit.core import adapters, inspect_adapter, load_adapter, save_adapter, save_as_trained
from lorakit.core.files import adapter_folder
from lorakit.core.files.adapter_folder import REPLACES, SIDECAR_FILE, WEIGHTS_FILE, replaced_files, sidecar_bytes
from lorakit.core.model.index import layers
from lorakit.durable import TEMPORARY
from lorakit.durable_folders import sweep
from lorakit.errors import AdapterFileError

from ...laws.crashing import How, Operations, at_every_operation
from ...laws.snapshots import bits, files
from ...laws.zoo import LINEARS, attach_fresh, randomise

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
Save = Callable[[Path], object]
OTHERS = ("README.md", "tokenizer.json", "b/", "link", "deep/")


def linears(**fields: Any) -> nn.Module:
    """A model with one adapter whose numbers follow from its alpha."""
    model = LINEARS.model()
    attach_fresh(model, LINEARS, "a", **fields)
    randomise(model, "a", int(fields["lora_alpha"]))
    return model


OLD = {"lora_alpha": 8}
NEW = {"lora_alpha": 2, "alpha_pattern": {"up": 5}}
"""Adapters of the same shapes, with other numbers and other alphas, some of them per site."""


def held(folder: Path) -> dict[str, Any]:
    """All that a loaded adapter computes with: bits of W, A and B, scales, config."""
    model = LINEARS.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_adapter(model, folder, trainable=True)
    found: dict[str, Any] = {"config": adapters(model)["default"].as_json()}
    for path, layer in layers(model):
        tensors = layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        found[path] = (*map(bits, tensors), layer.scaling["default"])
    return found


def furnished(root: Path, save: Save) -> Path:
    """A folder with an adapter, a neighbor below it, and what else may be in such a folder."""
    folder = root / "adapter"
    save(folder)
    save_adapter(linears(**NEW), folder / "b", "a")
    (folder / "README.md").write_text("mine")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "file").write_text("x")
    (folder / "deep").chmod(0o750)
    (folder / "link").symlink_to("README.md")
    (folder / CONFIG_FILE).chmod(0o640)
    folder.chmod(0o770)
    return folder


def others(folder: Path) -> dict[str, bytes]:
    """Everything in the folder that is not the adapter's."""
    return {name: data for name, data in files(folder).items() if name.startswith(OTHERS)}


class Judge:
    """Says which adapter a folder holds after a crash, and checks that nothing else was lost."""

    def __init__(self, tmp_path: Path, old: Save, new: Save) -> None:
        self.template, self.again = tmp_path / "template", new
        self.template.mkdir()
        self.others = others(furnished(self.template, old))
        assert len(self.others) == 7
        old(tmp_path / "old")
        new(tmp_path / "new")
        self.whole = {name: held(tmp_path / name) for name in ("old", "new")}
        assert self.whole["old"] != self.whole["new"]

    def __call__(self, root: Path) -> str:
        folder = root / "adapter"
        try:
            found = held(folder)
        except AdapterFileError as error:
            assert CONFIG_FILE in str(error) and "save the adapter again" in str(error).lower()
            verdict = "rejected"
        else:
            verdict = next((name for name, whole in self.whole.items() if found == whole), "mixed")
        self.check_the_rest(folder)
        self.again(folder)
        sweep(root)
        sweep(folder)
        assert held(folder) == self.whole["new"]
        self.check_the_rest(folder)
        assert not list(root.rglob(f"{TEMPORARY}*"))
        return verdict

    def check_the_rest(self, folder: Path) -> None:
        assert others(folder) == self.others
        assert (folder / "link").is_symlink()
        modes = [path.stat().st_mode & 0o777 for path in (folder, folder / "deep", folder / CONFIG_FILE)]
        assert modes == [0o770, 0o750, 0o640]

    def table(self, how: How, exchange: bool) -> Counter[str]:
        """Return what was found after a crash at each operation of a save over the old adapter."""
        found = at_every_operation(
            lambda root: self.again(root / "adapter"), self.template, self, how=how, exchange=exchange
        )
        assert len(found) > 40 and found[-1] == "new"
        return Counter(found[:-1])


@pytest.mark.costly(cases=0)
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "in order"])
@pytest.mark.parametrize(
    "how", ["kill", pytest.param("error", marks=pytest.mark.slow), pytest.param("full", marks=pytest.mark.slow)]
)
def test_a_crash_in_save_adapter(how: How, exchange: bool, tmp_path: Path) -> None:
    models = linears(**OLD), linears(**NEW)
    old, new = (lambda folder, model=model: save_adapter(model, folder, "a") for model in models)
    found = Judge(tmp_path, old, new).table(how, exchange)
    assert found["old"] and found["new"]
    assert set(found) <= {"old", "new"} | (set() if exchange or how == "full" else {"rejected"})


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "in order"])
@pytest.mark.parametrize("direction", ["to moved", "from moved"])
def test_a_crash_around_the_file_of_first_factors(direction: str, exchange: bool, tmp_path: Path) -> None:
    """An adapter with a residual base needs a fourth file, which is replaced and removed with the others."""
    plain, moved = linears(**OLD), linears(**NEW, init_lora_weights="pissa")
    saves: list[Save] = [
        lambda folder: save_adapter(plain, folder, "a"),
        lambda folder: save_as_trained(moved, folder, "a"),
    ]
    judge = Judge(tmp_path, *(saves if direction == "to moved" else saves[::-1]))
    found = judge.table("kill", exchange)
    assert found["old"] and found["new"]
    assert set(found) <= {"old", "new"} | (set() if exchange else {"rejected"})


def test_an_interrupted_save_says_what_it_left(tmp_path: Path) -> None:
    """Between the steps: the old adapter with a warning, a rejection that names the files, the new adapter."""
    for name, fields in (("old", OLD), ("new", NEW)):
        save_adapter(linears(**fields), tmp_path / name, "a")
    folder, new = tmp_path / "old", files(tmp_path / "new")
    about = json.loads(new[SIDECAR_FILE])
    between = sidecar_bytes(about, new[CONFIG_FILE], new[WEIGHTS_FILE], replaced_files(folder))
    whole = {name: held(tmp_path / name) for name in ("old", "new")}

    (folder / SIDECAR_FILE).write_bytes(between)
    assert held(folder) == whole["old"]
    assert any("save was interrupted" in finding for finding in inspect_adapter(folder).findings)
    (folder / CONFIG_FILE).write_bytes(new[CONFIG_FILE])
    text = f"{CONFIG_FILE} is the new one, {WEIGHTS_FILE} is the old one.*restore the old {CONFIG_FILE} from a copy"
    for read in (held, inspect_adapter):
        with pytest.raises(AdapterFileError, match=text):
            read(folder)
    nested = json.loads(sidecar_bytes(about, new[CONFIG_FILE], new[WEIGHTS_FILE], replaced_files(folder)))
    assert nested[REPLACES] == {"files": {}, "sidecar": None}  # a mixed folder is nothing to go back to
    (folder / WEIGHTS_FILE).write_bytes(new[WEIGHTS_FILE])
    assert held(folder) == whole["new"]
    assert inspect_adapter(folder).findings == ()


def test_an_interrupted_save_over_an_adapter_of_another_program(tmp_path: Path) -> None:
    """Without `lorakit.json` before, the old adapter is what its two files say."""
    for name, fields in (("old", OLD), ("new", NEW)):
        save_adapter(linears(**fields), tmp_path / name, "a")
    folder, new = tmp_path / "old", files(tmp_path / "new")
    (folder / SIDECAR_FILE).unlink()
    whole = held(folder)
    about = json.loads(new[SIDECAR_FILE])
    replaces = replaced_files(folder)
    (folder / SIDECAR_FILE).write_bytes(sidecar_bytes(about, new[CONFIG_FILE], new[WEIGHTS_FILE], replaces))
    assert held(folder) == whole
    (folder / WEIGHTS_FILE).write_bytes(new[WEIGHTS_FILE])
    with pytest.raises(AdapterFileError, match="do not belong together"):
        held(folder)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "in order"])
def test_a_save_while_the_adapter_is_read(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that has the old config and then finds new weights begins again."""
    for name, fields in (("old", OLD), ("new", NEW)):
        save_adapter(linears(**fields), tmp_path / name, "a")
    whole, model, times = held(tmp_path / "new"), linears(**NEW), []
    real = adapter_folder.read_tensors

    def late(path: Path) -> Any:
        if not times:
            with Operations(0, "error").watched(exchange):
                save_adapter(model, tmp_path / "old", "a")
        times.append(path)
        return real(path)

    monkeypatch.setattr(adapter_folder, "read_tensors", late)
    assert held(tmp_path / "old") == whole
    assert len(times) == 2


def test_an_adapter_that_keeps_changing_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(linears(**OLD), tmp_path, "a")
    real = adapter_folder.read_tensors

    def late(path: Path) -> Any:
        save_adapter(linears(**NEW), tmp_path, "a")
        return real(path)

    monkeypatch.setattr(adapter_folder, "read_tensors", late)
    with pytest.raises(AdapterFileError, match="changed while they were being read"):
        held(tmp_path)


def test_a_save_into_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays the working directory: its files are replaced in order."""
    folder = furnished(tmp_path, lambda folder: save_adapter(linears(**OLD), folder, "a"))
    save_adapter(linears(**NEW), tmp_path / "new", "a")
    before = others(folder)
    monkeypatch.chdir(folder)
    save_adapter(linears(**NEW), ".", "a")
    assert held(Path()) == held(tmp_path / "new")
    assert others(folder) == before and {path.name for path in Path().iterdir()} == {p.name for p in folder.iterdir()}
    assert files(folder)[SIDECAR_FILE] == files(tmp_path / "new")[SIDECAR_FILE]
