"""A save that crashes at any file operation leaves the old adapter, the new one, or a folder that is rejected."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lorakit.config import CONFIG_FILE
from lorakit.core import adapters, load_adapter, save_adapter
from lorakit.core.layering.sitemap import layers
from lorakit.durable import TEMPORARY, sweep
from lorakit.errors import AdapterFileError

from ...laws.crashing import How, at_every_operation
from ...laws.snapshots import bits, files
from ...laws.zoo import LINEARS, attach_fresh, randomise

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
OTHERS = ("README.md", "tokenizer.json", "b/", "link", "deep/")


def two_adapters() -> nn.Module:
    """Adapters "old" and "new" of the same shapes, with other numbers and other alphas, some of them per site."""
    model = LINEARS.model()
    attach_fresh(model, LINEARS, "old", lora_alpha=8)
    attach_fresh(model, LINEARS, "new", lora_alpha=2, alpha_pattern={"up": 5})
    for seed, name in enumerate(("old", "new")):
        randomise(model, name, seed)
    return model


def held(folder: Path) -> dict[str, Any]:
    """All that a loaded adapter computes with: bits of A and B, scales, config."""
    model = LINEARS.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_adapter(model, folder)
    found: dict[str, Any] = {"config": adapters(model)["default"].as_json()}
    for path, layer in layers(model):
        factor = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        found[path] = (*map(bits, factor), layer.scaling["default"])
    return found


def furnished(root: Path, model: nn.Module) -> Path:
    """A folder with the old adapter, a neighbor below it, and what else may be in such a folder."""
    folder = root / "adapter"
    save_adapter(model, folder, "old")
    save_adapter(model, folder / "b", "new")
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

    def __init__(self, tmp_path: Path, again: Any) -> None:
        model = two_adapters()
        self.template, self.again = tmp_path / "template", again
        self.template.mkdir()
        self.others = others(furnished(self.template, model))
        for name in ("old", "new"):
            save_adapter(model, tmp_path / name, name)
        self.whole = {name: held(tmp_path / name) for name in ("old", "new")}
        assert self.whole["old"] != self.whole["new"]

    def __call__(self, root: Path) -> str:
        folder = root / "adapter"
        try:
            found = held(folder)
        except AdapterFileError as error:
            assert CONFIG_FILE in str(error) and "save" in str(error).lower()
            verdict = "rejected"
        else:
            verdict = next((name for name, whole in self.whole.items() if found == whole), "mixed")
        self.check_the_rest(folder)
        self.again(root)
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


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "in order"])
@pytest.mark.parametrize("how", ["error", "full", "kill"])
def test_a_crash_in_save_adapter(how: How, exchange: bool, tmp_path: Path) -> None:
    model = two_adapters()

    def work(root: Path) -> None:
        save_adapter(model, root / "adapter", "new")

    judge = Judge(tmp_path, work)
    found = at_every_operation(work, judge.template, judge, how=how, exchange=exchange)
    outcomes = Counter(found)
    print(len(found) - 1, dict(outcomes))
    assert len(found) > 15 and found[-1] == "new" and outcomes["old"]
    assert set(outcomes) <= {"old", "new"} | (set() if exchange else {"rejected"})
