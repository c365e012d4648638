"""The hash of source is the same in every Python version, and source is matched with live code in each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from lorakit.identity import source

FOLDER = Path(transformers.__file__).parent
FILES = (
    *("models/llama/modeling_llama.py", "models/bert/modeling_bert.py", "models/t5/modeling_t5.py"),
    *("models/gpt2/modeling_gpt2.py", "integrations/sdpa_attention.py", "modeling_layers.py", "utils/deprecation.py"),
)

SCRIPT = """
import ast, hashlib, importlib, importlib.util, sys, types, warnings
warnings.simplefilter("ignore")
spec = importlib.util.spec_from_file_location("read_source", sys.argv[1])
made = importlib.util.module_from_spec(spec)
sys.modules["read_source"] = made
spec.loader.exec_module(made)
hashes = hashlib.sha256()
for path in sys.argv[2:]:
    for node in ast.walk(ast.parse(open(path, encoding="utf-8").read())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            hashes.update(made.hash_of(node).encode())
wrong, count = [], 0
for name in ("argparse", "inspect", "dataclasses", "logging", "unittest.mock", "tarfile", "typing", "statistics"):
    module = importlib.import_module(name)
    for value in list(vars(module).values()):
        inner = list(vars(value).values()) if isinstance(value, type) else [value]
        for function in inner:
            is_own = isinstance(function, types.FunctionType) and function.__module__ == name
            if is_own and function.__name__ != "<lambda>" and not function.__code__.co_filename.startswith("<"):
                count += 1
                wrong += [] if made.source_of(function) else [function.__qualname__]
print(hashes.hexdigest(), count, wrong)
"""


def read(python: str) -> list[str]:
    """Return the digest of all hashes, the number of live functions, and those that do not match their source."""
    paths = [source.__file__, *(str(FOLDER / name) for name in FILES)]
    made = subprocess.run([python, "-c", SCRIPT, *paths], capture_output=True, text=True, env=dict(os.environ))
    if made.returncode:
        pytest.skip(f"{python} does not run: {made.stderr[-200:]}")
    return made.stdout.split(maxsplit=2)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_other_versions(version: str) -> None:
    python = shutil.which(f"python{version}")
    if python is None:
        pytest.skip(f"there is no Python {version}")
    digest, count, wrong = read(python)
    assert digest == read(sys.executable)[0] and int(count) > 500 and wrong.strip() == "[]"


def test_this_version() -> None:
    _, count, wrong = read(sys.executable)
    assert int(count) > 500 and wrong.strip() == "[]"
