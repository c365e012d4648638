"""Run the LoRA part of PEFT's own published tests with `lorakit.peft` and with `peft`, and compare the results.

    make peft-suite                                    # all files that have LoRA cases and need no GPU
    make peft-suite ARGS="test_other.py"               # some of them
    make peft-suite ARGS="--folder /tmp/suite"         # keep the tests and peft's results there, and reuse them
    make peft-suite ARGS="--hub"                       # with models from the Hub
    make peft-suite ARGS="--write"                     # write docs/peft-suite.md

The tests come from the source distribution of the installed `peft` on the package index; nothing is copied. In one copy
of them, the import is renamed to `lorakit.peft`, and the names of other methods are stubs. Nothing else is changed.

A case belongs to the LoRA part unless its parameters contain a config of another method, or it uses one when it runs
with `peft`. A case counts against lorakit if it passes with `peft` and does not pass here: a failure, an error, a skip,
an expected failure, or a case that does not run. Without `--hub`, cases that need the Hub fail with `peft` too.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "peft-suite.md"

FILES = (
    "test_arrow.py",
    "test_bdlora.py",
    "test_bufferdict.py",
    "test_config.py",
    "test_custom_models.py",
    "test_helpers.py",
    "test_hub_features.py",
    "test_incremental_pca.py",
    "test_initialization.py",
    "test_integrations.py",
    "test_lora_conversion.py",
    "test_lora_ga.py",
    "test_lora_intruders.py",
    "test_lora_megatron.py",
    "test_lora_variants.py",
    "test_lorafa.py",
    "test_loraplus.py",
    "test_low_level_api.py",
    "test_mapping.py",
    "test_mixed.py",
    "test_other.py",
    "test_riemannian_lora.py",
    "test_target_parameters.py",
    "test_trainable_tokens.py",
    "test_tuners_utils.py",
    "test_velora.py",
)
"""Files with LoRA cases that need neither a GPU nor, for most of their cases, the Hub."""

HUB_FILES = (
    "test_auto.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_quantization.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
    "test_vision_models.py",
)
"""Files whose LoRA cases all need the Hub."""

REASONS = {
    "pickles are neither read nor written": r"does not write pickle files|pickle weights are not loaded",
    "message in other words, same class of error": r"mha_with_dora_raises|kasa_config_invalid|"
    r"targets_lora_layer_raises|rank_not_divisible_by_groups|incremental_pca_validation|module_to_save_raises",
    "a field that peft lacks is written only if it is set": r"test_from_json_file",
    "an invalid config is rejected earlier": r"lora_with_bias_argument",
    "an error in peft that works here": r"mixed_adapter_batches_(merged|lora_with_dora)|"
    r"mha_with_separate_qkv|num_beams|adding_multiple_adapters_with_different_target_parameters",
    "modules without adapters are plain modules again": r"delete_adapter_multiple_adapters_with_modules_to_save|"
    r"mica_freezes_B_when_switching",
    "KaSA: the original base is restored": r"disable_adapters_with_merging.*KaSA|kasa_truncation_changes_base_forward",
    "the matrix of a targeted embedding is not saved": r"targeting_lora_to_embedding_layer\[.*auto",
    "no norm is cached": r"dora_caching_conv",
    "layers and variants are registry entries, not subclasses": r"target_layer_without_in_features|TestLoraVariants::",
    "the recorded version of PEFT is never a development version": r"test_peft_version_(is_dev_version|warn_when)",
    "an adapter that does not exist cannot be made active": r"transient_attribute_access_non_existing",
    "internals that only PEFT's own code and tests use": r"test_incremental_pca::|velora_grouping_pads|"
    r"reshape_to_grouped_subtokens_pads|velora_backward_matches_manual",
}
"""Reason that a case does not pass -> pattern of its name and message; the first that matches counts."""

OTHER = "other"

HEAD = """# PEFT's own tests

The cases of the LoRA part of the tests of peft {version} that pass with `peft` and do not pass with `lorakit.peft`, by
reason. Written by `make peft-suite ARGS="--write"`; the script's docstring states which cases count.

"""

CONFTEST = """
import os
import time

import pytest
import torch

PACKAGE = os.environ["SUITE_PACKAGE"]
if PACKAGE == "peft":
    from peft.config import PeftConfigMixin
else:
    from lorakit.peft import placeholders

    placeholders._refusing = lambda name: lambda *_, **__: None  # cases contain configs of other methods

wait = time.sleep
time.sleep = lambda seconds: wait(min(seconds, 0.01))  # retries of the client of a hub that will not answer
LORA = {"LoraConfig", "PeftConfig", "PeftConfigMixin", "PromptLearningConfig"}
USED = set()


def is_other(kind):
    parts = kind.__module__.split(".")
    is_lora = "lora" in parts or kind.__name__ in LORA
    is_config = kind.__name__.endswith("Config") and ("peft" in parts)
    return is_config and not is_lora


def has_other(value, depth=0):
    if is_other(value if isinstance(value, type) else type(value)):
        return True
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, (list, tuple)) and depth < 4 and any(has_other(item, depth + 1) for item in value)


if PACKAGE == "peft":

    def read(config, name):
        if is_other(type(config)):
            USED.add(type(config).__name__)
        return object.__getattribute__(config, name)

    PeftConfigMixin.__getattribute__ = read


def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if not has_other(getattr(getattr(item, "callspec", None), "params", {}))]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    USED.clear()
    torch.manual_seed(0)
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_teardown(item):
    item.user_properties.append(("other", ",".join(sorted(USED))))
    yield
"""


class Case(NamedTuple):
    """The result of one test case.

    Attributes:
        outcome: "passed", "failed" or "skipped"; an expected failure is "skipped".
        message: The beginning of the message of the failure or skip.
        other: Names of the configs of other methods that the case used.
    """

    outcome: str
    message: str = ""
    other: str = ""


Results = dict[str, Case]


def fetch(folder: Path) -> None:
    """Write two copies of the tests of the installed `peft`, `peft/tests` and `lorakit/tests`, unless they exist."""
    if (folder / "lorakit").is_dir():
        return
    version = importlib.metadata.version("peft")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
    subprocess.run([*pip, f"peft=={version}"], check=True)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    tests = folder / f"peft-{version}" / "tests"
    (tests / "__init__.py").touch()
    (tests / "conftest.py").write_text(CONFTEST, "utf-8")
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder / "packages"), "parameterized"]
    subprocess.run(install, check=True)
    shutil.copytree(tests, folder / "peft" / "tests")
    for path in tests.glob("test*.py"):
        path.write_text(renamed(path.read_text("utf-8")), "utf-8")
    shutil.copytree(tests, folder / "lorakit" / "tests")


def renamed(text: str) -> str:
    """Return a test file's text with the import of `peft` renamed, also in the targets of `patch`."""
    text = re.sub(r"^(\s*)(from|import) peft\b", r"\1\2 lorakit.peft", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s*)import lorakit\.peft$", r"\1import lorakit.peft as peft", text, flags=re.MULTILINE)
    return re.sub(r"(patch(?:\.object)?\(\s*[\"'])peft\.", r"\1lorakit.peft.", text)


def run(folder: Path, package: str, files: Iterable[str], *, hub: bool) -> Results:
    """Run files with one of the two packages, "peft" or "lorakit"; return the results by name of the case."""
    report = folder / f"{package}.xml"
    report.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(folder / "packages")]),
        "SUITE_PACKAGE": package,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not hub:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    options = ("-q", "-p", "no:cacheprovider", "-n", "1", "-W", "ignore", "--continue-on-collection-errors")
    command = [sys.executable, "-m", "pytest", *options]
    with (folder / f"{package}.log").open("w", encoding="utf-8") as log:
        subprocess.run(
            [*command, f"--junitxml={report}", *(f"tests/{name}" for name in files)],
            cwd=folder / package,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if not report.exists():
        raise SystemExit(f"the tests did not run with {package}; see {log.name}")
    return read(report)


def read(report: Path) -> Results:
    """Read the results of a report in JUnit's format."""
    results = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{str(case.get('classname')).removeprefix('tests.')}::{case.get('name')}"
        bad = [child for child in case if child.tag in {"failure", "error"}]
        skipped = case.find("skipped")
        other = next((p.get("value") or "" for p in case.iter("property") if p.get("name") == "other"), "")
        if bad:
            results[name] = Case("failed", f"{bad[0].get('message')}"[:600], other)
        elif skipped is not None:
            results[name] = Case("skipped", f"{skipped.get('message')}"[:600], other)
        else:
            results[name] = Case("passed", "", other)
    return results


def reference(folder: Path, files: Iterable[str], *, hub: bool) -> Results:
    """Return the results with `peft`: those of earlier runs in this folder, and of a new run for the other files."""
    path = folder / "peft.json"
    known = (
        {name: Case(*values) for name, values in json.loads(path.read_text("utf-8")).items()} if path.exists() else {}
    )
    done = {file_of(name) for name in known}
    left = [name for name in files if name not in done]
    if left:
        known |= run(folder, "peft", left, hub=hub)
        path.write_text(json.dumps(known, indent=0), "utf-8")
    return {name: case for name, case in known.items() if file_of(name) in files}


def file_of(name: str) -> str:
    """Return the file of a case."""
    return re.split(r"[.:]", name, maxsplit=1)[0] + ".py"


def not_passed(theirs: Mapping[str, Case], ours: Mapping[str, Case]) -> Results:
    """Return the cases of the LoRA part that pass with `peft` and do not pass here."""
    missing = Case("failed", "the case did not run")
    unnumbered = {without_number(name): case for name, case in ours.items() if name not in theirs}
    lora = (name for name, case in theirs.items() if case.outcome == "passed" and not case.other)
    found = {name: ours.get(name) or unnumbered.get(without_number(name), missing) for name in lora}
    return {name: case for name, case in found.items() if case.outcome != "passed"}


def without_number(name: str) -> str:
    """Return a case's name without the numbers of its parameters, which change if a list lacks other methods."""
    return re.sub(r"kwargs\d+", "kwargs", name)


def reason(name: str, case: Case) -> str:
    """Return the reason that a case does not pass, one of `REASONS` or `OTHER`."""
    text = f"{case.outcome} {name} {case.message}"
    return next((why for why, pattern in REASONS.items() if re.search(pattern, text)), OTHER)


def grouped(cases: Mapping[str, Case]) -> dict[str, list[str]]:
    """Return the names of cases by reason, the most frequent reason first."""
    groups = collections.defaultdict(list)
    for name, case in cases.items():
        groups[reason(name, case)].append(name)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))


def main() -> int:
    """Run the tests, print a line for each file, then the cases that pass with `peft` only, by reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="files of PEFT's tests (default: all with LoRA cases)")
    parser.add_argument("--folder", type=Path, help="keep the tests and peft's results here (default: temporary)")
    parser.add_argument("--hub", action="store_true", help="let the tests load models from the Hub")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    files = options.files or (*FILES, *(HUB_FILES if options.hub else ()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        fetch(folder)
        theirs = reference(folder, files, hub=options.hub)
        ours = run(folder, "lorakit", files, hub=options.hub)
    for name in files:
        print(f"{name}: {counts({case: theirs[case] for case in theirs if file_of(case) == name}, ours)}")
    print(text := summary(theirs, ours))
    if options.write:
        PAGE.write_text(HEAD.format(version=importlib.metadata.version("peft")) + text, "utf-8")
    return 0


def counts(theirs: Mapping[str, Case], ours: Mapping[str, Case]) -> str:
    """Return one line with the counts of the LoRA part of a file."""
    lora = [name for name, case in theirs.items() if not case.other]
    passed = sum(theirs[name].outcome == "passed" for name in lora)
    missed = len(not_passed(theirs, ours))
    return f"{len(lora)} LoRA cases, passed by peft: {passed}, not passed here, passed by peft: {missed}"


def summary(theirs: Mapping[str, Case], ours: Mapping[str, Case]) -> str:
    """Return the counts of all files and a Markdown table of the cases that pass with `peft` only, by reason."""
    lines = [f"{counts(theirs, ours)}.", "", "| reason | cases | names |", "|---|---|---|"]
    for why, names in grouped(not_passed(theirs, ours)).items():
        listed = ", ".join(f"`{name}`" for name in names).replace("|", r"\|")
        lines.append(f"| {why} | {len(names)} | {listed} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
