"""The steps for adding a training setting in CONTRIBUTING.md: the files exist, and one entry is enough."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPE = PAGE[PAGE.index("**A training setting**") :].split("\n\nIf an entry")[0]
ENTRY = '    patience_margin: float = _evaluation("Smallest improvement that counts", 0.5, "noise is smaller", ge=0)\n'
CODE = """
import json, sys
from pathlib import Path
from lorakit.cli import main
from lorakit.errors import LorakitError
from lorakit.train.settings.sources import gather

folder, file = Path(sys.argv[1]), Path(sys.argv[2])
given = {"model": "m", "data": "a.txt", "output_dir": str(folder)}
settings = gather(given, file)
assert main(["train", "--help-all"]) == 0
wrong = main(["train", "--model", "m", "--data", "a.txt", "--output-dir", "b", "--patience-margin", "-1"])
(folder / "run.json").write_text(json.dumps({"format": 1, "settings": settings.as_dict()}))
try:
    gather({"output_dir": str(folder), "resume": True, "patience_margin": 0.1})
except LorakitError as error:
    changed = error.fields["field"]
resumed = gather({"output_dir": str(folder), "resume": True})
print(json.dumps([settings.patience_margin, wrong, changed, resumed.patience_margin]))
"""


def test_every_file_of_the_recipe_exists_and_has_what_is_named() -> None:
    files = {
        name: (ROOT / name).read_text(encoding="utf-8") for name in re.findall(r"`((?:src|tests)/[\w/.]+)`", RECIPE)
    }
    assert len(files) == 3
    source = "".join(files.values())
    for name in ("SettingFields", "Setting", "is_changeable", "Conflict", "TrainSettings"):
        assert f"`{name}`" in RECIPE or f".{name}`" in RECIPE
        assert name in source


def test_a_setting_added_as_described_is_a_flag_a_yaml_key_and_part_of_the_record(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "src/lorakit/train/settings/defaults.py"
    text, before = path.read_text(encoding="utf-8"), "    resume: bool = "
    assert text.count(before) == 1
    path.write_text(text.replace(before, ENTRY + before), encoding="utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "a.txt").write_text("some text\n")
    (tmp_path / "run.yaml").write_text("patience-margin: 0.25\n")
    words = [sys.executable, "-c", CODE, str(tmp_path / "run"), str(tmp_path / "run.yaml")]
    environment = {"PYTHONPATH": str(tmp_path / "src"), "COLUMNS": "200"}
    ran = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == [0.25, pytest.approx(1, abs=1), "patience_margin", 0.25]
    assert "--patience-margin" in ran.stdout and "Smallest improvement that counts. Default 0.5" in ran.stdout
    assert "patience_margin is -1.0; it must be at least 0" in ran.stderr
