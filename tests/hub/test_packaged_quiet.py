"""Messages of quantization packages, which transformers imports, do not reach users who did not ask for them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "demo": "import sys; sys.path.insert(0, 'scripts'); import demo; demo.resident_bytes()",
    "shapes": "from lorakit import hub; hub.shape_for_task(hub.resolve(MODEL), 'causal', {})",
    "models": "from lorakit import hub; hub.load_model(hub.resolve(MODEL))",
    "peft": "from lorakit.peft import AutoPeftModelForCausalLM as A; A.from_pretrained(ADAPTER)",
    "embedding": "from lorakit.tasks.embedding import _check_installed; _check_installed()",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_imports_print_nothing(name: str, tmp_path: Path, tiny_model_directory: Path) -> None:
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(tiny_model_directory)}
    code = (
        f"import sys; MODEL, ADAPTER = {str(tiny_model_directory)!r}, {str(tmp_path / 'adapter')!r}\n"
        f"{PROGRAMS[name]}\n"
        "assert 'torchao' in sys.modules"
    )
    if name == "peft":
        _write_adapter(tmp_path / "adapter", config, tiny_model_directory)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    chatter = [line for line in done.stderr.splitlines() if "Loading weights" not in line and line.strip()]
    assert not chatter, chatter


def _write_adapter(folder: Path, config: dict[str, str], model: Path) -> None:
    from transformers import AutoModelForCausalLM

    from lorakit import LoraConfig, attach, save_adapter

    base = AutoModelForCausalLM.from_pretrained(model)
    attach(base, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    save_adapter(base, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    (folder / "lorakit.json").unlink()
