"""lorakit.cli.early: wrong arguments are reported before torch is loaded, and before any other output."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.cli import early
from lorakit.errors import ConfigError
from lorakit.generate import Sampling

CASES = [
    ("plan gpt2 --rr 8", "Unknown option"),
    ("plan gpt2 --r 0", "r is 0"),
    ("train --bad", "Unknown option"),
    ("train --model smollm2 --output-dir new --data missing.md", "missing.md: data file not found. Did you mean"),
    ("train --model smollm2 --output-dir run --data notes.md", "a run exists in run; pass --resume"),
    ("train --model ./no --output-dir new --data notes.md", "'./no': model directory not found"),
    ("train --model smollm2 --output-dir new --data notes.md --r 0", "r is 0"),
    ("train --model smollm2 --output-dir new --data notes.md --config no.yaml", "no.yaml"),
    ("train --model smollm2 --data notes.md", "output_dir is missing"),
    ("eval --model smollm2 --data missing.txt", "missing.txt: data file not found"),
    ("eval --model smollm2 --data notes.md --adapter no", "no: adapter directory not found"),
    ("eval --model smollm2 --data notes.md --adapter run run/adapter", "--adapter lists run/adapter twice"),
    (
        "eval --model smollm2 --data notes.md --dtype float8",
        "dtype is 'float8'; it must be one of auto, bfloat16, float16, float32.",
    ),
    ("eval --model smollm2 --data notes.md --device gpu", "device is 'gpu'; it must be auto, cpu"),
    ("eval --model smollm2 --data notes.md --quantization q4", "quantization is 'q4'"),
    ("generate --model smollm2 --prompt x --adapter no", "no: adapter directory not found"),
    ("generate --model smollm2 --prompt x --adapter empty", "empty: no adapter_config.json, so this is not an adapter"),
    ("eval --data notes.md --adapter stopped", "directory. It contains adapters; pass stopped/checkpoint-2."),
    ("generate --model smollm2 --prompt x --adapter .", "directory. It contains adapters; pass run."),
    ("generate --model smollm2 --prompt x --temperature -1", "temperature is -1.0"),
    ("generate --model smollm2 --prompt x --top-p 0", "top_p is 0.0"),
    ("generate --model smollm2 --prompt x --max-new-tokens 0", "max_new_tokens is 0"),
    ("generate --model smollm2 --prompt-file no.txt", "no.txt"),
    ("merge --model smollm2 --adapter no --output-dir new", "no: adapter directory not found"),
    ("merge --model smollm2 --adapter run/adapter --output-dir run", "run: is not empty"),
    ("merge --model smollm2 --adapter run/adapter --output-dir notes.md", "notes.md: is a file"),
    (
        "merge --model smollm2 --adapter run/adapter --output-dir new --dtype int8",
        "dtype is 'int8'; it must be one of auto",
    ),
    ("compress --adapter no --rank 2 --output-dir new", "no: adapter directory not found"),
    ("combine --adapter no --output-dir new", "no: adapter directory not found"),
    ("extract --base ./no --tuned ./other --rank 2 --output-dir new", "'./no': model directory not found"),
    ("compare no run/adapter", "no: adapter directory not found"),
    ("inspect no", "no: adapter directory not found"),
    ("doctor --quik", "Unknown option"),
    ("trian", "unknown command 'trian'"),
]
CHECK = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from lorakit.cli import main
found = []
for line in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(line.split())
    found.append([code, out.getvalue(), err.getvalue(), "torch" in sys.modules])
print(json.dumps(found))
"""


def test_wrong_arguments_load_no_torch_and_print_nothing_else(tmp_path: Path) -> None:
    import json

    (tmp_path / "notes.md").write_text("a note", encoding="utf-8")
    (tmp_path / "missin.md").write_text("a note", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "stopped" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "stopped" / "checkpoint-2" / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "run" / "run.json").write_text("{}", encoding="utf-8")
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", CHECK, json.dumps([line for line, _ in CASES])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    for (line, said), (code, out, err, torch_is_loaded) in zip(CASES, json.loads(done.stdout), strict=True):
        assert code in (1, 2), line
        assert out == "", line
        assert err.startswith("error: ") and said in err, f"{line}: {err}"
        assert not torch_is_loaded, line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_k", -1),
        ("seed", 2**63),
        ("min_p", 2),
    ],
)
def test_sampling_is_rejected_with_the_same_words(name: str, value: float) -> None:
    with pytest.raises(ConfigError) as first:
        early.check_sampling(**{name: value})
    with pytest.raises(ConfigError) as second:
        Sampling(**{name: value})
    assert str(first.value) == str(second.value)


def test_what_is_right_passes(tmp_path: Path) -> None:
    early.check_model("smollm2")
    early.check_model(str(tmp_path))
    early.check_new_directory(tmp_path)
    early.check_sampling(temperature=0.7, top_p=0.9, top_k=40, seed=1)
    for device in ("auto", "cpu", "cuda", "cuda:3", "mps"):
        early.check_device(device)
