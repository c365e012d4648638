"""Every module path and name of PEFT's LoRA side resolves, each to one object; other methods by name alone."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import lorakit.peft
from lorakit.errors import LorakitError, NotYetSupported
from lorakit.peft import LoraConfig, PeftConfig, placeholders

MODULES = [
    "config",
    "functional",
    "helpers",
    "import_utils",
    "mapping",
    "mapping_func",
    "auto",
    "mixed_model",
    "peft_model",
    "optimizers",
    "utils",
    "utils.constants",
    "utils.error",
    "utils.hotswap",
    "utils.incremental_pca",
    "utils.integrations",
    "utils.loftq_utils",
    "utils.other",
    "utils.peft_types",
    "utils.quantization_utils",
    "utils.save_and_load",
    "utils.transformers_weight_conversion",
    "utils.warning",
    "tuners",
    "tuners._buffer_dict",
    "tuners.tuners_utils",
    "tuners.lora",
    "tuners.lora.aqlm",
    "tuners.lora.arrow",
    "tuners.lora.awq",
    "tuners.lora.bnb",
    "tuners.lora.config",
    "tuners.lora.conversion",
    "tuners.lora.corda",
    "tuners.lora.dora",
    "tuners.lora.eetq",
    "tuners.lora.eva",
    "tuners.lora.gptq",
    "tuners.lora.hqq",
    "tuners.lora.inc",
    "tuners.lora.intruders",
    "tuners.lora.layer",
    "tuners.lora.loraga",
    "tuners.lora.model",
    "tuners.lora.monteclora",
    "tuners.lora.te",
    "tuners.lora.torchao",
    "tuners.lora.variants",
    "tuners.lora.velora",
    "tuners.loha.layer",
    "tuners.lokr.layer",
    "tuners.trainable_tokens.layer",
]


@pytest.mark.parametrize("path", MODULES)
def test_a_module_and_everything_that_it_lists(path: str) -> None:
    module = importlib.import_module(f"lorakit.peft.{path}")
    assert module.__doc__
    for name in getattr(module, "__all__", []):
        assert getattr(module, name) is getattr(module, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing_of_this_name'"):
        module.nothing_of_this_name  # noqa: B018


@pytest.mark.parametrize("path", ["", *MODULES])
def test_the_names_of_the_installed_peft_are_here(path: str) -> None:
    theirs = pytest.importorskip(f"peft.{path}".rstrip("."))
    ours = importlib.import_module(f"lorakit.peft.{path}".rstrip("."))
    missing = [name for name in getattr(theirs, "__all__", []) if not hasattr(ours, name)]
    assert missing == []


def test_one_name_is_one_object() -> None:
    from lorakit.peft import LoraModel
    from lorakit.peft.tuners import LoraModel as gathered
    from lorakit.peft.tuners.lora.layer import Linear, LoraLayer
    from lorakit.peft.tuners.lora.model import LoraModel as home
    from lorakit.peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    assert LoraModel is gathered is home and issubclass(home, BaseTuner)
    assert issubclass(Linear, LoraLayer) and issubclass(LoraLayer, BaseTunerLayer)
    assert issubclass(lorakit.peft.NoMatchingPeftModuleError, (ValueError, lorakit.peft.PeftError))


def test_other_methods_can_be_imported_and_asked_for_and_not_made() -> None:
    from lorakit.peft import IA3Config, LoHaModel, PrefixTuningConfig, PromptLearningConfig
    from lorakit.peft.tuners.lokr.layer import LoKrLayer, factorization

    config = LoraConfig()
    assert not isinstance(config, (IA3Config, PromptLearningConfig, LoHaModel, LoKrLayer))
    assert issubclass(PrefixTuningConfig, PromptLearningConfig) and issubclass(IA3Config, PeftConfig)
    for made in (IA3Config, LoHaModel, PrefixTuningConfig, factorization):
        with pytest.raises(NotYetSupported, match="belongs to another PEFT method"):
            made()
    assert placeholders.placeholder("IA3Config") is IA3Config
    with pytest.raises(LorakitError, match="The method 'mine' cannot be added"):
        lorakit.peft.utils.register_peft_method(name="mine")


def test_importing_the_face_imports_no_transformers() -> None:
    code = "import sys, lorakit.peft; assert not {'transformers', 'torch', 'accelerate'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
    code = (
        "import sys; from lorakit.peft import *; assert 'transformers' not in sys.modules and callable(get_peft_model)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_which_packages_are_there_is_asked_without_importing_them() -> None:
    from lorakit.peft import import_utils

    assert import_utils.is_transformers_ge_v5 is True and import_utils.is_transformers_le_4_53 is False
    assert import_utils.is_gptqmodel_available() in (True, False)
    assert import_utils.is_xpu_available() in (True, False)


@pytest.mark.costly
@pytest.mark.parametrize(
    "name", ["tuners.lora.layer.Linear", "utils.other", "tuners.tuners_utils", "mapping", "config"]
)
def test_modules_below_are_reached_where_the_face_alone_was_imported(name: str) -> None:
    code = f"import lorakit.peft; print(lorakit.peft.{name})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert name.rpartition(".")[2] in done.stdout


def test_what_is_no_module_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match=r"module 'lorakit\.peft' has no attribute 'nothing'"):
        lorakit.peft.nothing  # noqa: B018
    assert not hasattr(lorakit.peft.utils.hotswap, "nothing")
