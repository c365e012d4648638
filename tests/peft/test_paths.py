"""Module paths of PEFT below `lorakit.peft`: the import system treats them as it treats modules with files."""

from __future__ import annotations

import importlib.util
import pickle
import pkgutil
import subprocess
import sys
from importlib import import_module
from typing import Any
from unittest import mock

import pytest

import lorakit.peft
from lorakit.peft import paths


def run(code: str) -> str:
    """Output of the code in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("path", paths.PATHS)
def test_a_path_is_a_module_with_a_spec(path: str) -> None:
    name = f"lorakit.peft.{path}"
    module = sys.modules[name]
    parent, _, child = name.rpartition(".")
    assert getattr(sys.modules[parent], child) is module is import_module(name)
    assert module.__name__ == name
    spec = importlib.util.find_spec(name)
    assert spec is module.__spec__ and spec is not None
    assert spec.name == name and spec.loader is module.__loader__
    assert spec.parent == module.__package__ == (name if hasattr(module, "__path__") else parent)
    assert not hasattr(module, "__file__")
    assert dir(module) == sorted(module.__all__)


@pytest.mark.parametrize("path", paths.PATHS)
def test_a_path_is_a_package_if_it_is_one_in_the_installed_peft(path: str) -> None:
    theirs = importlib.util.find_spec(f"peft.{path}")
    ours = importlib.util.find_spec(f"lorakit.peft.{path}")
    assert theirs is not None and ours is not None
    assert (ours.submodule_search_locations is None) == (theirs.submodule_search_locations is None)
    assert hasattr(sys.modules[f"lorakit.peft.{path}"], "__path__") == (theirs.submodule_search_locations is not None)


@pytest.mark.parametrize("path", paths.PATHS)
def test_every_name_of_the_table_resolves(path: str) -> None:
    module = sys.modules[f"lorakit.peft.{path}"]
    names = list(paths.names_in(paths.PATHS[path]))
    assert len(names) == len(set(names))
    assert sorted(names) == module.__all__
    assert [name for name in names if not hasattr(module, name)] == []


def test_a_replaced_name_takes_effect_where_it_is_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.peft import config, hotswap
    from lorakit.peft.utils import hotswap as path

    before = path.hotswap_adapter
    with mock.patch("lorakit.peft.utils.hotswap.hotswap_adapter") as replaced:
        assert hotswap.hotswap_adapter is replaced is path.hotswap_adapter
    assert hotswap.hotswap_adapter is before is path.hotswap_adapter
    with monkeypatch.context() as patches:
        patches.setattr(config, "__version__", "0.10")
        assert lorakit.peft.LoraConfig().peft_version == "0.10"
        assert lorakit.peft.LoraConfig(peft_version="0.9").peft_version == "0.9"
        patches.setattr(config, "__version__", "0.11")
        assert lorakit.peft.LoraConfig().peft_version == config.__version__ == "0.11"
    assert lorakit.peft.LoraConfig().peft_version == config.__version__ == lorakit.peft.__version__
    with monkeypatch.context() as patches:
        patches.setattr(path, "of_mine", 1, raising=False)
        assert path.of_mine == 1 and not hasattr(hotswap, "of_mine")
    assert not hasattr(path, "of_mine")


def test_a_path_has_no_file_that_would_hide_it() -> None:
    for path in paths.PATHS:
        assert path.rpartition(".")[0] in ("", *paths.PATHS)
    below = {path for path in paths.PATHS if "." not in path}
    assert not below & {found.name for found in pkgutil.iter_modules(lorakit.peft.__path__)}


@pytest.mark.parametrize("path", ["config", "utils.hotswap", "tuners", "tuners.lora.layer"])
def test_find_spec_in_a_new_process(path: str) -> None:
    """Import a path in a new process with `find_spec`, which imports the parent and does not read `sys.modules`."""
    name = f"lorakit.peft.{path}"
    code = f"from importlib.util import find_spec; spec = find_spec({name!r}); print(spec.name, spec.origin)"
    assert run(code) == f"{name} {paths.__file__}"


@pytest.mark.parametrize("name", ["nothing", "tuners.nothing", "utils.hotswap.nothing"])
def test_what_does_not_exist(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=rf"No module named 'lorakit\.peft\.{name}'"):
        import_module(f"lorakit.peft.{name}")
    if name != "utils.hotswap.nothing":
        assert importlib.util.find_spec(f"lorakit.peft.{name}") is None
    with pytest.raises(ModuleNotFoundError, match="is not a package"):
        import_module("lorakit.peft.utils.hotswap.nothing")


@pytest.mark.costly
@pytest.mark.parametrize(
    ("statement", "value", "expected"),
    [
        ("import lorakit.peft.tuners.lora.layer", "lorakit.peft.tuners.lora.layer.__name__", "tuners.lora.layer"),
        ("import lorakit.peft.utils.save_and_load as x", "x.__name__", "utils.save_and_load"),
        ("from lorakit.peft.utils import other", "other.__name__", "utils.other"),
        ("from lorakit.peft.tuners.lora import layer", "layer.__name__", "tuners.lora.layer"),
        ("from lorakit.peft import config", "config.__name__", "config"),
        ("from importlib import import_module as i", "i('.lora', 'lorakit.peft.tuners').__name__", "tuners.lora"),
        ("from lorakit.peft.utils.peft_types import PeftType", "'lorakit.peft.' + PeftType.LORA", "LORA"),
        ("from lorakit.peft.config import *", "'lorakit.peft.' + PeftConfig.__name__", "PeftConfig"),
    ],
)
def test_a_path_is_imported_without_its_parent(statement: str, value: str, expected: str) -> None:
    assert run(f"{statement}; print({value})") == f"lorakit.peft.{expected}"


@pytest.mark.parametrize("statement", ["import lorakit.peft.tuners.lora.layer", "import lorakit.peft.utils.other"])
def test_importing_a_path_loads_no_torch(statement: str) -> None:
    assert run(f"import sys; {statement}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))") == "[]"


@pytest.mark.costly(cases=0)
def test_a_path_can_be_reloaded_and_the_package_keeps_its_modules() -> None:
    code = """
import importlib, sys
import lorakit.peft
from lorakit.peft.tuners.lora import layer
before = layer.Linear
for module in (layer, lorakit.peft.utils):
    assert importlib.reload(module) is module
importlib.invalidate_caches()
assert importlib.reload(lorakit.peft) is lorakit.peft
assert sys.modules["lorakit.peft.tuners.lora.layer"] is layer is lorakit.peft.tuners.lora.layer
assert layer.Linear is before
assert len(lorakit.peft.__path__) == 2
assert importlib.util.find_spec("lorakit.peft.tuners.nothing") is None
"""
    run(code)


@pytest.mark.parametrize(
    "taken",
    [
        lambda: lorakit.peft.LoraModel,
        lambda: lorakit.peft.PeftModel,
        lambda: lorakit.peft.tuners.lora.layer.Linear,
        lambda: lorakit.peft.utils.ModulesToSaveWrapper,
        lambda: lorakit.peft.utils.warning.PeftWarning,
        lambda: lorakit.peft.optimizers.lorafa.LoraFAOptimizer,
        lambda: lorakit.peft.utils.hotswap.hotswap_adapter,
    ],
)
def test_classes_and_functions_are_pickled_by_reference(taken: Any) -> None:
    value = taken()
    assert pickle.loads(pickle.dumps(value)) is value


@pytest.mark.costly(cases=0)
@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("tuners.lora.model", "LoraModel"),
        ("tuners.lora.layer", "Linear"),
        ("optimizers.lorafa", "LoraFAOptimizer"),
        ("utils.other", "ModulesToSaveWrapper"),
    ],
)
def test_a_pickle_that_names_a_path_is_read_in_a_new_process(path: str, name: str) -> None:
    """A protocol 0 pickle of a class is its reference alone: module and name."""
    data = f"clorakit.peft.{path}\n{name}\n.".encode()
    assert run(f"import pickle; print(pickle.loads({data!r}).__name__)") == pickle.loads(data).__name__


def test_a_config_is_pickled_into_a_new_process() -> None:
    data = pickle.dumps(lorakit.peft.LoraConfig(r=3))
    assert run(f"import pickle; print(pickle.loads({data!r}).r)") == "3"
