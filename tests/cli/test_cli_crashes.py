"""A crash in `combine` or `merge`: the new directory is complete or absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit import core, hub
from lorakit.cli import combine
from lorakit.durable import TEMPORARY
from lorakit.durable_folders import sweep
from lorakit.session import merging, session_spec

from ..laws.crashing import How, at_every_operation
from ..laws.snapshots import files

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
Save = Callable[..., Path]


def judge_of(work: Callable[[Path], object], tmp_path: Path) -> Callable[[Path], str]:
    """Return a function that tells whether the output exists; it must equal that of an undisturbed run, byte for byte."""
    (tmp_path / "whole").mkdir()
    work(tmp_path / "whole")
    whole = files(tmp_path / "whole" / "out")

    def judge(root: Path) -> str:
        verdict = "nothing"
        if (root / "out").exists():
            assert files(root / "out") == whole
            verdict = "new"
        assert {path.name for path in root.iterdir() if not path.name.startswith(TEMPORARY)} <= {"out"}
        sweep(root)
        assert not list(root.rglob(f"{TEMPORARY}*"))
        return verdict

    return judge


@pytest.mark.costly(cases=0)
@pytest.mark.parametrize("how", ["error", "kill"])
def test_a_crash_in_combine(how: How, save_adapter: Save, tiny_model_directory: Path, tmp_path: Path) -> None:
    """The tokenizer is published with the adapter, not after it."""
    sources = [save_adapter(name, seed) for seed, name in enumerate(("one", "two"), 1)]
    for source in sources:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (source / name).write_text("{}")

    def work(root: Path) -> None:
        combine.run(flags=combine.Flags([str(source) for source in sources], root / "out", way="cat"))

    judge = judge_of(work, tmp_path)
    assert {"adapter_config.json", "lorakit.json", "tokenizer.json"} <= set(files(tmp_path / "whole" / "out"))
    (tmp_path / "template").mkdir()
    found = at_every_operation(work, tmp_path / "template", judge, how=how)
    assert len(found) > 30 and found[-1] == "new" and "nothing" in found
    core.load_adapter(hub.load_model(tiny_model_directory), tmp_path / "whole" / "out")


@pytest.mark.slow
def test_a_crash_in_merge(save_adapter: Save, tiny_model_directory: Path, tmp_path: Path) -> None:
    adapter = str(save_adapter("one"))

    def work(root: Path) -> None:
        spec = session_spec(str(tiny_model_directory), {adapter: core.read_adapter(adapter)})
        merging.write_merged(merging.MergeRequest(spec, root / "out"), lambda text: None)

    judge = judge_of(work, tmp_path)
    (tmp_path / "template").mkdir()
    found = at_every_operation(work, tmp_path / "template", judge, how="kill")
    assert len(found) > 10 and found[-1] == "new" and "nothing" in found
