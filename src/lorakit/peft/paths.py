"""PEFT's module paths, such as `peft.tuners.lora.layer`: a table of paths, and a module object for each path.

Importing `lorakit.peft` adds these modules to `sys.modules`. The modules contain only names; the object behind a name
is imported from its defining module on first use (PEP 562). Importing a path first imports `lorakit.peft`, which
registers the path. Since `lorakit.peft` always imports this file, this file imports no slow modules and no other
lorakit modules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader
else:
    Loader = object  # importlib.abc takes 12 ms to import

PACKAGE = "lorakit.peft"
PLACEHOLDERS = "lorakit.peft.placeholders"
"""Module that defines PEFT's errors and warnings, and placeholders for names that lorakit does not implement."""

_WITH_TARGET_TABLES = """
    AdaLora Adamss Beft BOFT C3A Deft Delora FourierFT Frod Glora Gralora HRA IA3 Lily LNTuning LoHa LoKr Miss OFT
    Peanut Poly Psoft Pvera RandLora Road Shira Supertuning TinyLora UniLora VBLoRA Vera WaveFT
"""
_METHODS = f"{_WITH_TARGET_TABLES} AdaptionPrompt Hira OSF Shadow TrainableTokens XLora"

PROMPTS = """
    CartridgeConfig CartridgeEncoder CPTConfig CPTEmbedding MultitaskPromptTuningConfig
    MultitaskPromptTuningInit PrefixEncoder PrefixTuningConfig PromptEmbedding PromptEncoder PromptEncoderConfig
    PromptEncoderReparameterizationType PromptTuningConfig PromptTuningInit
"""
"""Names that belong to prompt-learning methods."""

OTHER_METHODS = " ".join([PROMPTS, *(f"{method}Config {method}Model" for method in _METHODS.split())])
"""Names that belong to other methods and that PEFT exports from both `peft` and `peft.tuners`."""

_NESTED_CONFIGS = """
    ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig LoraRuntimeConfig
    MontecloraConfig VeloraConfig
"""
LORA_CONFIGS = f"LoraConfig {_NESTED_CONFIGS}"
"""Names of the config classes for LoRA and its extensions."""

TARGET_TABLES = " ".join(
    f"TRANSFORMERS_MODELS_TO_{method.upper()}_MODULES_MAPPING"
    for method in ("IA3_FEEDFORWARD", *(f"{method}_TARGET" for method in _WITH_TARGET_TABLES.split()))
)
"""Names of the dicts that specify other methods' default targets."""

PENALTY_METHODS: Mapping[str, str] = {"_get_kasa_loss": "kasa_config", "_get_monteclora_loss": "monteclora_config"}
"""Methods of PEFT's `LoraModel` that return a variant's penalty -> the config field that selects the variant."""

_TASKS = "CausalLM FeatureExtraction QuestionAnswering Seq2SeqLM SequenceClassification TokenClassification"
AUTO_CLASSES = " ".join(["AutoPeftModel", *(f"AutoPeftModelFor{task}" for task in _TASKS.split())])
"""Names of the classes that load an adapter together with its base."""

TASK_CLASSES = " ".join(f"PeftModelFor{task}" for task in _TASKS.split())
"""Names of the task-specific wrapper classes."""

_CONSTANTS = """
    ALLOWED_COMPUTE_DTYPES CONFIG_NAME DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES
    INCLUDE_LINEAR_LAYERS_SHORTHAND MIN_TARGET_MODULES_FOR_OPTIMIZATION SAFETENSORS_WEIGHTS_NAME SEQ_CLS_HEAD_NAMES
    TOKENIZER_CONFIG_NAME TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING UPCAST_DTYPES WEIGHTS_NAME
"""

_TABLES = f"{_CONSTANTS} {TARGET_TABLES} bloom_model_postprocess_past_key_value"

_TASK_TENSORS = """
    calculate_majority_sign_mask dare_linear dare_ties disjoint_merge magnitude_prune prune task_arithmetic ties
"""

_OTHER = """
    AuxiliaryTrainingWrapper cast_mixed_precision_params _freeze_adapter fsdp_auto_wrap_policy _get_batch_size
    get_gptqmodel_quant_linear _get_input_embeddings_name _get_module_names_tied_with_embedding _get_no_split_modules
    get_pattern_key get_quantization_config _get_submodules id_tensor_storage infer_device _is_valid_match
    match_target_against_key ModulesToSaveWrapper prepare_model_for_kbit_training _set_adapter
    set_additional_trainable_modules _set_trainable shift_tokens_right str_to_bool TrainableTokensWrapper transpose
"""

_AVAILABILITY = """
    is_aqlm_available is_bnb_4bit_available is_bnb_available is_diffusers_available is_eetq_available
    is_gptqmodel_available is_hqq_available is_inc_available is_optimum_available is_te_available
    is_te_pytorch_available is_torch_tpu_available is_torchao_available is_torchao_ge_v0_18_0 is_transformers_ge_v4_57_0
    is_transformers_ge_v5 is_transformers_ge_v5_13_0 is_transformers_ge_v5_17_0 is_transformers_ge_v5_1_0
    is_transformers_ge_v5_4_0 is_transformers_ge_v5_6_0 is_transformers_dtensor_tp is_transformers_le_4_53
    is_xpu_available
"""

_BACKENDS = """
    Bnb4bitBackend Bnb8bitBackend ForwardOnlyQuantizationBackend GptqBackend HqqBackend QuantizationBackend
    resolve_quantization_backend TorchaoBackend
"""

HOMES: Mapping[str, str] = {
    "lorakit.config": "LoraConfig PeftConfig PeftConfigMixin PeftType TaskType",
    "lorakit.config.nested": _NESTED_CONFIGS,
    "lorakit.config.lora": "__version__=API_LEVEL",
    "lorakit.core.factor": "BufferDict MontecloraSampler=OwnTensors",
    "lorakit.core.layers.adapter_component": "AuxiliaryTrainingWrapper=ReplacingModule BaseTunerLayer=TunerLayer",
    "lorakit.core.layers.lora_layer": "LoraLayer",
    "lorakit.core.layers.modules_to_save": "ModulesToSaveWrapper=ModulesToSave",
    "lorakit.core.layers.named_layers": "Conv1d Conv2d Conv3d Embedding Linear MultiheadAttention ParamWrapper",
    "lorakit.core.variants": "LoraVariant=Variant",
    "lorakit.core.layers.trainable_tokens": "TrainableTokensLayer=TokenAdapter TrainableTokensWrapper=TrainableTokens",
    "lorakit.peft.adjusting": """
        check_if_peft_model disable_input_dtype_casting DoraCaching find_kappa_target_modules KappaTuneSelector
        rescale_adapter_scale update_forward_signature update_generate_signature update_signature
    """,
    "lorakit.peft.arrow": "create_arrow_model _resolve_adapter_source=source_of",
    "lorakit.peft.attached_inits": "get_eva_state_dict initialize_lora_eva_weights replace_lora_weights_loftq",
    "lorakit.peft.data_inits": "preprocess_corda preprocess_loraga",
    "lorakit.peft.hotswap": """
        check_hotswap_configs_compatible CONFIG_KEYS_TO_CHECK hotswap_adapter hotswap_adapter_from_state_dict
        prepare_model_for_compiled_hotswap
    """,
    "lorakit.peft.installing": "install_as_peft",
    "lorakit.peft.loaded": "load_peft_weights",
    "lorakit.peft.mapping": """
        get_peft_config get_peft_model inject_adapter_in_model PEFT_TYPE_TO_CONFIG_MAPPING
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING PEFT_TYPE_TO_TUNER_MAPPING
    """,
    "lorakit.peft.matching": """
        check_adapters_to_merge check_target_module_exists ExcludedModule _ExcludedModule=ExcludedModule
        _filter_state_dict_by_key_prefixes=filter_state_dict _find_minimal_target_modules=find_minimal_target_modules
        _get_tuner_state_dict_key_prefixes=adapter_prefixes inspect_matched_modules
        _maybe_include_all_linear_layers=maybe_include_all_linear_layers
    """,
    "lorakit.peft.mixed_batches": """
        calculate_alora_offsets get_alora_offsets_for_forward get_alora_offsets_for_generate is_alora_relevant_in_batch
    """,
    "lorakit.peft.model": f"{TASK_CLASSES} PeftModel",
    "lorakit.peft.model_adapters": "cast_adapter_dtype delete_adapter set_adapter set_requires_grad",
    "lorakit.peft.model_classes": f"""
        {AUTO_CLASSES} check_import_allowlist get_default_import_allowlist MODEL_TYPE_TO_PEFT_MODEL_MAPPING
        PeftMixedModel
    """,
    "lorakit.peft.optimizer_factories": """
        _collect_lora_pairs=lora_pairs create_lorafa_optimizer create_loraplus_optimizer create_riemannian_optimizer
        LoraFAOptimizer _RiemannianPreconditioner=RiemannianPreconditioner
    """,
    "lorakit.peft.state_dicts": """
        get_base_model_state_dict get_peft_model_state_dict set_base_model_state_dict set_peft_model_state_dict
    """,
    "lorakit.peft.status": "get_layer_status get_model_status TunerLayerStatus TunerModelStatus",
    "lorakit.peft.trainer_mixin": "LoraTrainerMixin MontecloraTrainerMixin",
    "lorakit.peft.tuner": "BaseTuner LoraModel",
    "lorakit.peft.utilities": f"""
        {_AVAILABILITY} {_BACKENDS} {_CONSTANTS} cast_mixed_precision_params dequantize_module_weight
        fsdp_auto_wrap_policy gather_params_ctx=empty_context
        _get_module_names_tied_with_embedding=names_tied_with_embedding _get_no_split_modules=no_split_modules
        get_pattern_key get_quantization_config _get_submodules=get_submodules infer_device init_empty_weights
        onload_layer=empty_context prepare_model_for_kbit_training shift_tokens_right skip_init_on_device transpose
    """,
    "lorakit.peft.weight_conversion": """
        build_peft_weight_mapping convert_peft_adapter_state_dict_for_transformers convert_peft_config_for_transformers
        get_model_conversion_mapping
    """,
    "lorakit.core.variants.bdlora": "BlockDiagonalLinear",
    "lorakit.core.variants.velora": """
        _compress_activations=compressed _normalize_projection=unit _reshape_to_grouped_subtokens=grouped
    """,
    "lorakit.peft.layer_methods": """
        ALoraLinearVariant ArrowLinearVariant BdLoraLinearVariant DoraConv1dVariant DoraConv2dVariant DoraConv3dVariant
        DoraEmbeddingVariant DoraLinearVariant KasaLinearVariant MontecloraLinearVariant QALoraLinearVariant
        VeloraLinearVariant
    """,
    "lorakit.peft.weighted": f"{_TASK_TENSORS} convert_to_lora reduce_intruder_dimension save_as_lora",
}
"""Names that each module defines; `alias=name` exports its `name` as `alias`. All other PEFT names are placeholders."""

PATHS: Mapping[str, str] = {
    "auto": f"""
        {AUTO_CLASSES} check_import_allowlist get_default_import_allowlist MODEL_TYPE_TO_PEFT_MODEL_MAPPING
        TOKENIZER_CONFIG_NAME
    """,
    "config": "CONFIG_NAME __version__ PeftConfig PeftConfigMixin PromptLearningConfig",
    "functional": f"""
        {HOMES["lorakit.peft.model_adapters"]} get_peft_model_state_dict inject_adapter_in_model
        set_peft_model_state_dict
    """,
    "helpers": f"{HOMES['lorakit.peft.adjusting']} MontecloraTrainerMixin",
    "import_utils": _AVAILABILITY,
    "mapping_func": """
        get_peft_model MODEL_TYPE_TO_PEFT_MODEL_MAPPING PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING
    """,
    "mixed_model": "DUMMY_MODEL_CONFIG PeftMixedModel",
    "optimizers": "create_lorafa_optimizer create_loraplus_optimizer create_riemannian_optimizer",
    "optimizers.lorafa": "create_lorafa_optimizer is_bf16_available LoraFAOptimizer",
    "optimizers.loraplus": "create_loraplus_optimizer",
    "optimizers.riemannian": "_collect_lora_pairs create_riemannian_optimizer _RiemannianPreconditioner",
    "peft_model": f"""
        {HOMES["lorakit.peft.model"]} {HOMES["lorakit.peft.status"]} DUMMY_MODEL_CONFIG PEFT_TYPE_TO_CONFIG_MAPPING
        PEFT_TYPE_TO_PREFIX_MAPPING PEFT_TYPE_TO_TUNER_MAPPING SAFETENSORS_WEIGHTS_NAME
        TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING WEIGHTS_NAME
    """,
    "tuners": f"""
        {OTHER_METHODS} ArrowConfig BdLoraConfig convert_to_lora create_arrow_model EvaConfig get_eva_state_dict
        initialize_lora_eva_weights KasaConfig LoftQConfig LoraConfig LoraGAConfig LoraModel LoraRuntimeConfig
        MixedModel MontecloraConfig MultitaskPromptEmbedding preprocess_loraga save_as_lora VeloraConfig
    """,
    "tuners._buffer_dict": "BufferDict",
    "tuners.delora": "DeloraConfig DeloraLayer DeloraModel",
    "tuners.delora.model": "DeloraModel TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING",
    "tuners.loha": "LoHaConfig LoHaLayer LoHaModel",
    "tuners.loha.layer": "LoHaLayer",
    "tuners.lokr": "LoKrConfig LoKrLayer LoKrModel",
    "tuners.lokr.layer": "factorization LoKrLayer",
    "tuners.lora": f"""
        {LORA_CONFIGS} Conv1d Conv2d Conv3d convert_to_lora create_arrow_model Embedding get_eva_state_dict
        GPTQLoraLinear initialize_lora_eva_weights Linear Linear4bit Linear8bitLt LoraLayer LoraModel MultiheadAttention
        ParamWrapper preprocess_corda preprocess_loraga reduce_intruder_dimension save_as_lora
    """,
    "tuners.lora.aqlm": "AqlmLoraLinear dispatch_aqlm",
    "tuners.lora.arrow": "ArrowLoraLinearLayer create_arrow_model _resolve_adapter_source",
    "tuners.lora.awq": "AwqLoraLinear dispatch_awq",
    "tuners.lora.bnb": "dispatch_bnb_4bit dispatch_bnb_8bit Linear4bit Linear8bitLt",
    "tuners.lora.config": LORA_CONFIGS,
    "tuners.lora.conversion": "convert_to_lora save_as_lora",
    "tuners.lora.corda": "preprocess_corda",
    "tuners.lora.dora": "DoraConv1dLayer DoraConv2dLayer DoraConv3dLayer DoraEmbeddingLayer DoraLinearLayer",
    "tuners.lora.eetq": "EetqLoraLinear dispatch_eetq",
    "tuners.lora.eva": "get_eva_state_dict initialize_lora_eva_weights",
    "tuners.lora.gptq": "GPTQLoraLinear dispatch_gptq",
    "tuners.lora.hqq": "HqqLoraLinear dispatch_hqq",
    "tuners.lora.inc": "IncLoraLinear dispatch_inc",
    "tuners.lora.intruders": "reduce_intruder_dimension",
    "tuners.lora.layer": """
        Conv1d Conv2d Conv3d _ConvNd dispatch_default Embedding Linear _LoraFactorsProxy LoraLayer LoraParallelLinear
        _LoraParameterProxy LoraVariant MultiheadAttention ParamWrapper
    """,
    "tuners.lora.loraga": "preprocess_loraga",
    "tuners.lora.model": "LoraModel TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "tuners.lora.monteclora": "MontecloraSampler",
    "tuners.lora.te": "dispatch_transformer_engine TeLinear",
    "tuners.lora.tp_layer": "dispatch_megatron LoraParallelLinear",
    "tuners.lora.torchao": "TorchaoLoraLinear dispatch_torchao",
    "tuners.lora.variants": f"""
        {HOMES["lorakit.peft.mixed_batches"]} {HOMES["lorakit.peft.layer_methods"]} BlockDiagonalLinear
        MiCAEmbeddingVariant MiCALinearVariant
    """,
    "tuners.lora.velora": """
        _compress_activations _normalize_projection _reconstruct_activations _reshape_to_grouped_subtokens
        VeloraFunction
    """,
    "tuners.trainable_tokens": "TrainableTokensConfig TrainableTokensLayer TrainableTokensModel",
    "tuners.trainable_tokens.layer": "TrainableTokensLayer",
    "tuners.tuners_utils": """
        BaseTuner BaseTunerLayer cast_adapter_dtype check_adapters_to_merge check_target_module_exists delete_adapter
        DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES ExcludedModule _ExcludedModule
        _filter_state_dict_by_key_prefixes _find_minimal_target_modules
        find_parameter_name_by_module get_device_map _get_in_out_features _get_tuner_state_dict_key_prefixes
        INCLUDE_LINEAR_LAYERS_SHORTHAND inspect_matched_modules _maybe_include_all_linear_layers
        MIN_TARGET_MODULES_FOR_OPTIMIZATION onload_layer PEFT_TYPE_TO_PREFIX_MAPPING SEQ_CLS_HEAD_NAMES set_adapter
        set_requires_grad UPCAST_DTYPES
    """,
    "utils": f"""
        {_OTHER} {_TABLES} {HOMES["lorakit.peft.state_dicts"]} get_quantization_kwargs load_peft_weights
        map_cache_to_layer_device_map NoMatchingPeftModuleError PeftError PeftType PeftWarning
        _prepare_prompt_learning_config quantization_extra_repr register_peft_method replace_lora_weights_loftq
        resolve_quantization_backend TaskType
    """,
    "utils.constants": _TABLES,
    "utils.error": "NoMatchingPeftModuleError PeftError",
    "utils.hotswap": f"{HOMES['lorakit.peft.hotswap']} PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING",
    "utils.incremental_pca": "IncrementalPCA",
    "utils.integrations": """
        check_deepspeed_zero3_enabled dequantize_module_weight gather_params_ctx get_bnb_param_type get_layer_device_map
        init_empty_weights map_cache_to_layer_device_map skip_init_on_device
    """,
    "utils.loftq_utils": "replace_lora_weights_loftq",
    "utils.merge_utils": _TASK_TENSORS,
    "utils.other": f"""
        {_OTHER} {_TABLES} _prepare_prompt_learning_config starcoder_model_postprocess_past_key_value
    """,
    "utils.peft_types": "PeftType register_peft_method TaskType",
    "utils.quantization_utils": f"{_BACKENDS} get_quantization_kwargs quantization_extra_repr",
    "utils.save_and_load": f"""
        {HOMES["lorakit.peft.state_dicts"]} EMBEDDING_LAYER_NAMES load_peft_weights PEFT_TYPE_TO_TUNER_MAPPING
        SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME
    """,
    "utils.transformers_weight_conversion": HOMES["lorakit.peft.weight_conversion"],
    "utils.warning": "PeftWarning",
}
"""Names that each path under `peft` exports; each package precedes its modules."""

_PACKAGES = {path.rpartition(".")[0] for path in PATHS}
"""Paths that are packages, since they contain other modules in PEFT."""


def lazy_names(module: str, names: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Create `__getattr__` and `__dir__` for a module that imports its names on first use."""
    known = frozenset(names.split())
    return lambda name: _find(module, known, name), lambda: sorted(known)


def register() -> None:
    """Add a module to `sys.modules` for each path, and set the module as an attribute of its parent.

    The loader is also the finder for `__file__`, an entry in every package's `__path__`, so that the import system
    finds each module's spec, as `importlib.reload` and (in a new process) `importlib.util.find_spec` require.
    """
    loader = _PathLoader()
    sys.path_importer_cache[__file__] = loader
    if __file__ not in sys.modules[PACKAGE].__path__:
        sys.modules[PACKAGE].__path__.append(__file__)
    for path in PATHS:
        spec = loader.find_spec(f"{PACKAGE}.{path}")
        if spec is not None and spec.name not in sys.modules:  # reloading `lorakit.peft` keeps existing modules
            parent, _, child = spec.name.rpartition(".")
            sys.modules[spec.name] = loader.create_module(spec)
            setattr(sys.modules[parent], child, sys.modules[spec.name])


ORIGINALS = "_originals"


class _PathModule(ModuleType):
    """A module whose names are imported lazily. Creating two functions per module instead would slow the import."""

    def __getattr__(self, name: str) -> Any:
        """Import and return the object behind a name."""
        return dir(self) if name == "__all__" else _find(self.__name__, _names(self.__name__), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a name here and, if it is listed, in the module that defines it, so that a replacement takes effect."""
        if home := _home(self, name):
            module = import_module(home[0])
            self.__dict__.setdefault(ORIGINALS, {}).setdefault(name, getattr(module, home[1]))
            setattr(module, home[1], value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Delete a name that was set here; the module that defines it gets the original object again."""
        super().__delattr__(name)
        originals = self.__dict__.get(ORIGINALS, {})
        if name in originals and (home := _home(self, name)):
            setattr(import_module(home[0]), home[1], originals.pop(name))

    def __dir__(self) -> list[str]:
        """Return the names that `PATHS` lists for this module."""
        return sorted(_names(self.__name__))


class _PathLoader(Loader):
    """Finder and loader for the modules in `PATHS`."""

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the module spec for a name in `PATHS`, or None for any other name."""
        above, _, path = fullname.partition(f"{PACKAGE}.")
        if above or path not in PATHS:
            return None
        spec = ModuleSpec(fullname, self, origin=__file__, is_package=path in _PACKAGES)
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(__file__)
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Create a module with all the attributes that the import system would set."""
        path = spec.name.removeprefix(f"{PACKAGE}.")
        module = _PathModule(spec.name, f"Names of `peft.{path}`; `lorakit.peft.paths` lists where each is defined.")
        module.__spec__, module.__loader__, module.__package__ = spec, self, spec.parent
        if spec.submodule_search_locations is not None:
            module.__path__ = spec.submodule_search_locations
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing, since the module's class looks up names on access."""


@cache
def _names(module: str) -> frozenset[str]:
    return frozenset(PATHS[module.removeprefix(f"{PACKAGE}.")].split())


@cache
def _homes() -> dict[str, tuple[str, str]]:
    """Return a dict from each exported name to its defining module and its name in that module."""
    entries = [(home, *entry.partition("=")) for home, names in HOMES.items() for entry in names.split()]
    return {name: (home, target or name) for home, name, _, target in entries}


def _home(module: ModuleType, name: str) -> tuple[str, str] | None:
    """Return the module that defines a listed name, and the name there; None for other names and placeholders."""
    is_listed = not name.startswith("__") or name == "__version__"
    return _homes().get(name) if is_listed and name in _names(module.__name__) else None


def _find(module: str, names: Collection[str], name: str) -> Any:
    """Import the object behind a name: an exported object, or a submodule such as `lorakit.peft.mapping`."""
    if name in names:
        home, target = _homes().get(name, (PLACEHOLDERS, name))
        found = import_module(home)
        return found.placeholder(name) if home == PLACEHOLDERS else getattr(found, target)
    below = f"{module}.{name}"
    try:
        if not name.startswith("_"):
            return import_module(below)
    except ModuleNotFoundError as missing:
        if missing.name != below:
            raise
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
