"""`install_as_peft`: one finder, the same module objects, an error if called too late; programs in new processes."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from lorakit.config import API_LEVEL
from lorakit.peft.installing import BIND_AT_IMPORT

from .running import SOURCES, run

TRAINING = [
    f"{trainer}: {part}"
    for trainer in ("Trainer", "SFTTrainer")
    for part in (
        "checkpoints hold the adapter alone",
        "a resumed run ends with the same bits",
        "the best checkpoint is loaded at the end",
        "gradient checkpointing changes no bit",
        "what was saved generates as what was trained",
        "the base is what it was",
    )
]
ADAPTERS = [
    "transformers: adapters are added, chosen and disabled",
    "transformers: an adapter is saved and loaded",
    "transformers: adapters are deleted",
    "transformers: adapters with and on fused experts",
    "transformers: adapters with tensors for each expert",
    "transformers: from_pretrained opens the folder of an adapter",
    "pipeline: over a wrapper, a folder and an opened model",
    "accelerate: prepared, stepped, saved and brought back",
]
SENTENCES = ["sentence-transformers: an adapter is added, saved and opened"]
DIFFUSERS = [
    "diffusers: a LoRA is added, saved, loaded, weighted, fused and deleted",
    "diffusers: inject_adapter_in_model",
]
FOUR_BITS = [
    f"4 bits: {part}"
    for part in (
        "the adapter is trained and saved alone",
        "a resumed run ends with the same bits",
        "gradient checkpointing changes no bit",
        "SFTTrainer trains, saves and resumes to the same bits",
        "what was saved answers as what was trained",
        "the base is given back and can be saved",
    )
]

IDENTITY = """
import warnings
warnings.simplefilter("error")
from lorakit.peft import install_as_peft
import sys
before = set(sys.modules)
install_as_peft()
install_as_peft()
assert sum(type(finder).__module__ == "lorakit.peft.installing" for finder in sys.meta_path) == 1
import peft, lorakit.peft
assert peft is lorakit.peft and peft.__name__ == "lorakit.peft" and peft.__spec__.name == "lorakit.peft"
import peft.tuners.lora.layer, lorakit.peft.tuners.lora.layer
assert peft.tuners.lora.layer is lorakit.peft.tuners.lora.layer is sys.modules["peft.tuners.lora.layer"]
assert peft.tuners is sys.modules["lorakit.peft.tuners"]
from peft.utils import ModulesToSaveWrapper
from lorakit.peft.utils import ModulesToSaveWrapper as ours
assert ModulesToSaveWrapper is ours
for missing in ("peft.nothing", "peft.tuners.nothing"):
    try:
        __import__(missing)
    except ModuleNotFoundError as error:
        assert missing in str(error)
    else:
        raise AssertionError(missing)
import importlib, importlib.metadata, importlib.util
assert importlib.util.find_spec("peft") is not None and importlib.util.find_spec("peft.nothing") is None
import peft.model_adapters
assert importlib.reload(peft.model_adapters) is peft.model_adapters
assert importlib.metadata.version("peft") == lorakit.peft.__version__ == "0.22.0"
assert importlib.metadata.metadata("peft")["Name"] == "peft"
assert "peft" in importlib.metadata.packages_distributions()["peft"]
assert importlib.metadata.version("torch")
import pickle
config = peft.LoraConfig(r=3)
assert pickle.loads(pickle.dumps(config)) == config
from transformers.utils import is_peft_available
from transformers.utils.peft_utils import check_peft_version
check_peft_version("0.22.0")
assert is_peft_available()
from accelerate.utils import is_peft_model
from torch import nn
assert not is_peft_model(nn.Linear(1, 1))
assert is_peft_model(peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"])))
"""

ASKED_BEFORE = """
from transformers.utils.import_utils import is_peft_available, is_peft_greater_or_equal
assert not is_peft_available()
assert not is_peft_greater_or_equal("0.1")
from lorakit.peft import install_as_peft
install_as_peft()
assert is_peft_available()
assert is_peft_greater_or_equal("0.22.0")
"""


def interpret(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter of this environment."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.costly(cases=0)
def test_names_and_modules_are_the_same_objects() -> None:
    done = interpret(IDENTITY)
    assert done.returncode == 0, done.stderr


def test_importing_lorakit_changes_nothing() -> None:
    code = "import sys; before = list(sys.meta_path); import lorakit.peft; from lorakit.peft import install_as_peft; "
    done = interpret(code + "assert sys.meta_path == before and 'peft' not in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("imported", ["peft", *BIND_AT_IMPORT])
def test_too_late_is_an_error_that_names_who_came_first(imported: str) -> None:
    code = f"import sys, types; sys.modules[{imported!r}] = types.ModuleType({imported!r}); "
    done = interpret(code + "from lorakit.peft import install_as_peft; install_as_peft()")
    assert done.returncode == 1
    assert f"install_as_peft() was called too late: {imported}." in done.stderr
    assert "Call it before importing peft, transformers.trainer, " in done.stderr


def test_the_finder_answers_for_peft_alone() -> None:
    code = f"""
import sys
from importlib.metadata import DistributionFinder
from importlib.util import find_spec
from lorakit.peft import install_as_peft

before = [*sys.meta_path]
install_as_peft()
(finder,) = [one for one in sys.meta_path if one not in before]
assert find_spec("json").origin.endswith("__init__.py") and find_spec("pefty") is None and find_spec("peft.nothing") is None
assert [finder.find_spec(name) for name in ("json", "pefty", "peft.nothing")] == [None] * 3
assert find_spec("peft").submodule_search_locations is not None
context = DistributionFinder.Context
for asked in (context(name="peft"), context()):
    assert [found.version for found in finder.find_distributions(asked)] == [{API_LEVEL!r}]
assert not list(finder.find_distributions(context(name="torch")))
(found,) = finder.find_distributions(context(name="peft"))
assert str(found.locate_file("model.py")) == {str(SOURCES / "lorakit" / "peft" / "model.py")!r}
assert found.read_text("RECORD") is None
"""
    done = interpret(code)
    assert done.returncode == 0, done.stderr


def test_answers_that_were_remembered_are_asked_again(tmp_path: Path) -> None:
    program = tmp_path / "asked.py"
    program.write_text(ASKED_BEFORE, encoding="utf-8")
    run(program, peft=False, links=tmp_path / "links")


def installed(*names: str) -> bool:
    """Return whether all these distributions are installed."""
    try:
        return all(version(name) for name in names)
    except PackageNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("peft", [True, False], ids=["peft_installed", "peft_absent"])
def test_unmodified_trainers(peft: bool, tiny_model_directory: Any, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    runs = tmp_path / "runs"
    runs.mkdir()
    assert (
        run("training", "install_as_peft", tiny_model_directory, runs, peft=peft, links=tmp_path / "links") == TRAINING
    )


@pytest.mark.slow
def test_trainers_of_trl_without_installing(tiny_model_directory: Any, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    assert run("without_installing", tiny_model_directory, tmp_path / "runs", peft=True, links=tmp_path / "links") == [
        *(f"{name}, {given}" for name in ("SFTTrainer", "DPOTrainer") for given in ("config", "model")),
        "the mixin trains",
        "classes are as usual otherwise",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("peft", [True, False], ids=["peft_installed", "peft_absent"])
def test_adapters_of_bare_models(peft: bool, tiny_model_directory: Any, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    expected = ADAPTERS + SENTENCES * installed("sentence-transformers") + DIFFUSERS * installed("diffusers")
    assert run("adapters", tiny_model_directory, files, peft=peft, links=tmp_path / "links") == expected


@pytest.mark.slow
@pytest.mark.parametrize("peft", [True, False], ids=["peft_installed", "peft_absent"])
def test_trainers_over_a_base_in_four_bits(peft: bool, tiny_model_directory: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("trl")
    files = tmp_path / "files"
    files.mkdir()
    assert (
        run("quantized", "install_as_peft", tiny_model_directory, files, peft=peft, links=tmp_path / "links")
        == FOUR_BITS
    )


@pytest.mark.slow
@pytest.mark.parametrize("peft", [True, False], ids=["peft_installed", "peft_absent"])
def test_other_trainers_of_trl(peft: bool, tiny_model_directory: Any, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    runs = tmp_path / "runs"
    runs.mkdir()
    done = run("preferences", tiny_model_directory, runs, peft=peft, links=tmp_path / "links")
    assert [line.partition(":")[0] for line in done] == ["DPOTrainer", "KTOTrainer", "RewardTrainer", "GRPOTrainer"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["install_as_peft", "mixin"])
def test_two_processes(way: str, tiny_model_directory: Any, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    done = run("distributed", way, tiny_model_directory, runs, peft=True, links=tmp_path / "links", processes=2)
    assert done == ["two processes: the adapter alone is saved; a resumed run ends with the same bits"]
