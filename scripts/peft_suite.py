"""Run PEFT's own published tests with `lorakit.peft`, by renaming the import, and count the results.

        make peft-suite                       # files that need no model from the Hub
    make peft-suite ARGS="test_other.py"  # some of them

The tests come from the source distribution of the installed `peft` on the package index; nothing is copied. Cases of
PEFT's other methods, and of LoRA variants that lorakit does not support, are skipped and counted. Failures unrelated
to the PEFT-compatible API are counted separately: cases that need a model from the Hub, cases of other methods or
unsupported variants that their parameters do not show, and cases that use pickles, which lorakit rejects.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

FILES = (
    "test_bufferdict.py",
    "test_config.py",
    "test_custom_models.py",
    "test_helpers.py",
    "test_hub_features.py",
    "test_initialization.py",
    "test_lora_conversion.py",
    "test_lora_ga.py",
    "test_lora_intruders.py",
    "test_lora_variants.py",
    "test_lorafa.py",
    "test_loraplus.py",
    "test_low_level_api.py",
    "test_mapping.py",
    "test_mixed.py",
    "test_other.py",
    "test_target_parameters.py",
    "test_trainable_tokens.py",
    "test_tuners_utils.py",
)
IRRELEVANT = {
    "need a hub": re.compile(
        r"offline mode|LocalEntryNotFound|couldn't connect to|Cannot reach|Couldn't reach|is not a local folder|"
        r"HF_HUB_OFFLINE|Can't load the (configuration|tokenizer)|does not appear to have a file|ConnectionError|"
        r"OfflineModeIsEnabled|not fully cached locally"
    ),
    "other methods": re.compile(
        r"it must be a lorakit LoraConfig|Cannot combine adapters with different peft types|only LORA is supported|"
        r"not (built|supported) yet|belongs to another (PEFT )?method|'(?!Lora)\w+Config' object has no attribute"
    ),
    "ask for a pickle": re.compile(r"does not write pickle files|pickle weights are not loaded"),
}
"""Category of irrelevant failures -> pattern of their messages."""

CONFTEST = """
import collections
import time
import pytest
from lorakit.peft import placeholders

wait = time.sleep
time.sleep = lambda seconds: wait(min(seconds, 0.01))  # retries of a hub's client that no hub will answer

# Cases contain configs of other methods: count them instead of raising an error.
placeholders._refusing = lambda name: lambda *_, **__: None
REFUSED = set()
LEFT_OUT = collections.Counter()


def reason(value, depth=0):
    kind = value if isinstance(value, type) else type(value)
    if kind.__name__.endswith("Config") and "peft" in kind.__module__ and kind.__name__ != "LoraConfig":
        return "another method"
    if isinstance(value, dict):
        if any(value.get(name) for name in REFUSED):
            return "a variant that is refused by name"
        value = list(value.values())
    if isinstance(value, (list, tuple)) and depth < 4:
        return next(filter(None, (reason(item, depth + 1) for item in value)), None)
    return None


def pytest_collection_modifyitems(config, items):
    kept = []
    for item in items:
        values = list(getattr(item, "callspec").params.values()) if hasattr(item, "callspec") else []
        why = reason(values)
        if why:
            LEFT_OUT[why] += 1
        else:
            kept.append(item)
    items[:] = kept


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line("left out: " + ", ".join(f"{n} of {why}" for why, n in LEFT_OUT.items()))
"""


def fetch(folder: Path) -> Path:
    """Return the tests of the installed `peft`, with the import renamed."""
    version = importlib.metadata.version("peft")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
    subprocess.run([*pip, f"peft=={version}"], check=True)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    tests = folder / f"peft-{version}" / "tests"
    for path in tests.glob("*.py"):
        text = re.sub(r"^(\s*)(from|import) peft\b", r"\1\2 lorakit.peft", path.read_text("utf-8"), flags=re.MULTILINE)
        text = re.sub(r"^(\s*)import lorakit\.peft$", r"\1import lorakit.peft as peft", text, flags=re.MULTILINE)
        text = re.sub(r"(patch(?:\.object)?\(\s*[\"'])peft\.", r"\1lorakit.peft.", text)
        path.write_text(text, "utf-8")
    needed = [sys.executable, "-m", "pip", "install", "-q", "--target", str(tests.parent), "parameterized"]
    subprocess.run(needed, check=True)
    (tests / "__init__.py").touch()
    (tests.parent / "pyproject.toml").unlink()  # its options require plugins
    (tests / "conftest.py").write_text(CONFTEST, "utf-8")
    return tests


def main() -> int:
    """Download and run the tests file by file, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=FILES, help="files of PEFT's tests (default: those without a hub)")
    parser.add_argument("--failed", action="store_true", help="name each test that failed")
    options = parser.parse_args()
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryDirectory() as temporary:
        tests = fetch(Path(temporary))
        for name in options.files:
            report = tests.parent / "report.xml"
            report.unlink(missing_ok=True)
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-n", "1", f"--junitxml={report}"]
            run = subprocess.run(
                [*command, "-W", "ignore", f"tests/{name}"],
                cwd=tests.parent,
                env={**os.environ, **offline, "PYTHONPATH": str(tests.parent)},
                capture_output=True,
                text=True,
                check=False,
            )
            line = counted(report, options.failed) if report.exists() else (run.stdout + run.stderr)[-300:].strip()
            print(f"{name}: {line}", flush=True)
    return 0


def counted(report: Path, names: bool) -> str:
    """Summarize a file's results in one line; with `names`, list each failure."""
    counts: collections.Counter[str] = collections.Counter()
    failed = []
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [child for child in case if child.tag in {"failure", "error"}]
        text = f"{bad[0].get('message')} {bad[0].text}" if bad else ""
        why = next((word for word, pattern in IRRELEVANT.items() if pattern.search(text)), None)
        if why is not None:
            counts[why] += 1
        elif bad:
            counts["failed"] += 1
            failed.append(f"    {case.get('name')}: {(bad[0].get('message') or '').splitlines()[0][:140]}")
        else:
            counts["skipped" if any(child.tag == "skipped" for child in case) else "passed"] += 1
    words = ("passed", "failed", "skipped", *IRRELEVANT)
    line = ", ".join(f"{counts[word]} {word}" for word in words if counts[word])
    return "\n".join([line or "no test", *(failed if names else [])])


if __name__ == "__main__":
    raise SystemExit(main())
