"""The demo's helpers, and the commands that it tells a person to try next."""

import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from .loading import load

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    return load("scripts/demo.py")


def test_two_texts_stand_in_two_columns(demo: ModuleType) -> None:
    lines = demo.side_by_side("base", "adapter", "one two three four", "", width=9).splitlines()
    assert lines[0] == "  base      │ adapter"
    assert lines[2:] == ["  one two   │ (nothing)", "  three     │ ", "  four      │ "]


def test_paths_are_shown_as_a_person_would_type_them(demo: ModuleType) -> None:
    assert demo.show(ROOT / "runs" / "demo") == "runs/demo"
    assert demo.show("/elsewhere/x") == "/elsewhere/x"


def test_three_commands_of_three_verbs(demo: ModuleType) -> None:
    verbs = [shlex.split(command)[1] for command in demo.next_commands("runs/demo/adapter", "runs/demo-merged")]
    assert verbs == ["generate", "inspect", "merge"]


@pytest.mark.slow
def test_the_next_commands_run(demo: ModuleType, tmp_path: Path) -> None:
    from lorakit import LoraConfig, core, hub

    adapter = tmp_path / "adapter"
    model = hub.load_model("smollm2")
    core.attach(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    core.save_adapter(model, adapter)
    for command in demo.next_commands(str(adapter), str(tmp_path / "merged")):
        _, *arguments = shlex.split(command)
        done = subprocess.run(
            [sys.executable, "-m", "lorakit", *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert (tmp_path / "merged" / "model.safetensors").exists()
