"""Public names: what the LoRA part of the installed peft defines is here, or is listed below with the reason.

Names that a module of peft only imports from elsewhere are not compared.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import pytest
from torch import nn

import lorakit.peft as ours

from .rows import theirs

PATHS = (
    *(
        "auto",
        "config",
        "functional",
        "helpers",
        "import_utils",
        "mapping",
        "mapping_func",
        "mixed_model",
        "peft_model",
    ),
    *("optimizers.lorafa", "optimizers.loraplus", "optimizers.riemannian", "tuners.tuners_utils"),
    *("tuners._buffer_dict", "tuners.trainable_tokens.layer"),
    *(f"tuners.lora.{found.name}" for found in pkgutil.iter_modules(theirs.tuners.lora.__path__)),
    *(f"utils.{found.name}" for found in pkgutil.iter_modules(theirs.utils.__path__)),
)

NEEDS_PACKAGES = frozenset({"tuners.lora.aqlm", "tuners.lora.eetq", "tuners.lora.inc", "tuners.lora.te"})
"""Modules of peft that may need a package that is not installed."""

LEFT_OUT = {
    "steps of an init; `lorakit.core.collect_for` and the functions of the same modules replace them": """
        CordaEigens target_modules get_model_device calib_cov_distribution collect_eigens collect_eigens_for_layer
        crop_corda_eigens SVDHook HashHook find_equal_values get_device_with_meta_params move_inputs_to_device
        prepare_model_inputs_fn_language_modeling prepare_layer_inputs_fn_language_modeling get_target_modules
        estimate_gradients forward_fn_dict loftq_init
    """,
    "steps of PEFT's loading; lorakit reads no pickles, and asks nobody while it saves": """
        torch_load has_valid_embedding_base_layer get_embedding_layer_name check_file_exists_on_hf_hub PeftConcatenate
        FlattenDims PermuteDims
    """,
    "tensor parallelism: an error if targeted": """
        get_tp_plan_and_mesh add_lora_tp_hooks_dtensor dtensor_from_local_like LoraEmbeddingATPHolder TpInfo
        get_default_module_allowlist
    """,
    "learned prompts": "BasePromptEncoder create_attention_mask",
    "variants that are added elsewhere": """
        check_loaded_lora_compatibility_arrow ensure_adapters_target_linear_layers_only BufferedMontecloraSampler
    """,
    "helpers of PEFT's own modules": """
        cache_decorator clone_module replicate_layers dequantize_bnb_weight is_gptqmodel_quant_linear
        is_gptqmodel_awq_layer starcoder_model_postprocess_past_key_value
    """,
    "steps of a combination; no program or page calls them": """
        magnitude_based_pruning random_pruning reshape_weight_task_tensors
    """,
}
"""Reason -> names of functions and classes."""

WITHOUT_COUNTERPART = {
    "learned prompts": "get_prompt get_prompt_embedding_to_save",
    "a step of saving": "subtract_mutated_init",
    "inits of one layer that change the base; attach an adapter to the model instead": """
        corda_init loftq_init lora_ga_init mica_init olora_init orthogonal_init pissa_init
    """,
    "attributes in which PEFT's layers keep settings": """
        conv_fn device_mesh ephemeral_gpu_offload input_fns is_target_conv_1d_layer kwargs output_fns tp_layer
    """,
    "internals that only PEFT's own code and tests use": """
        frozen_peft_weight_names lora_variants resolve_lora_variant set_base_weight
    """,
}
"""Reason -> names of attributes and methods of wrappers, tuners and layers."""


def names_in(table: dict[str, str]) -> set[str]:
    """Return all names in a table of reasons."""
    return {name for names in table.values() for name in names.split()}


def defined(module: ModuleType) -> set[str]:
    """Return the public functions and classes that a module defines."""
    found = {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    return {name for name in found if not name.startswith("_")}


def missing(path: str) -> set[str]:
    """Return the names that a module of peft defines and that are not at the same path here."""
    try:
        module = importlib.import_module(f"peft.{path}")
    except ImportError:
        assert path in NEEDS_PACKAGES
        return set()
    here = importlib.import_module(f"lorakit.peft.{path}")
    return {name for name in defined(module) if not hasattr(here, name)}


@pytest.mark.parametrize("path", PATHS)
def test_functions_and_classes(path: str) -> None:
    assert missing(path) - names_in(LEFT_OUT) == set()


def test_the_list_of_names_that_are_left_out_is_exact() -> None:
    assert set().union(*map(missing, PATHS)) == names_in(LEFT_OUT)


def wrapped(library: Any) -> Any:
    """Return a model with adapters on three kinds of layers."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 2), nn.Conv2d(1, 1, 1))
    return library.get_peft_model(model, library.LoraConfig(target_modules=["0", "1", "2"]))


def test_attributes_and_methods_of_wrappers_tuners_and_layers() -> None:
    first, second = wrapped(theirs), wrapped(ours)
    lacking: set[str] = set()
    for at in ("", "base_model", *(f"base_model.model.{number}" for number in range(3))):
        one, other = first.get_submodule(at), second.get_submodule(at)
        names = {name for name in dir(one) if not name.startswith("_") and hasattr(one, name)}
        lacking |= {name for name in names if not hasattr(other, name)}
    assert lacking == names_in(WITHOUT_COUNTERPART)


def test_constants_have_the_same_values() -> None:
    from lorakit.peft import auto, import_utils
    from lorakit.peft.utils import hotswap

    of_peft = theirs.utils.hotswap.CONFIG_KEYS_TO_CHECK
    assert {str(key.value): value for key, value in hotswap.CONFIG_KEYS_TO_CHECK.items()} == {
        str(key.value): value for key, value in of_peft.items()
    }
    assert import_utils.is_transformers_dtensor_tp == theirs.import_utils.is_transformers_dtensor_tp
    assert auto.get_default_import_allowlist() == theirs.auto.get_default_import_allowlist()


@pytest.mark.parametrize(
    "name", ["transformers", "transformers.models", "transformers_x", "torch", "diffusers.pipelines", "", "megatron"]
)
def test_the_import_allowlist(name: str) -> None:
    for allowed in (theirs.auto.get_default_import_allowlist(), [], ["torch"]):
        answers = [library.auto.check_import_allowlist(allowed, name) for library in (theirs, ours)]
        assert answers[0] == answers[1]
