"""PEFT's module paths, such as `peft.tuners.lora.layer`: one table, and a module object for each path.

`lorakit.peft` puts these modules into `sys.modules` when it is imported. They hold only names; what a name means is
imported from its home on first use (PEP 562). Importing a path imports `lorakit.peft` first, so the path is registered
by then. `lorakit.peft` always imports this file, so it imports nothing of lorakit and nothing slow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
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
"""Home of PEFT's errors and warnings, and of placeholders for what is not LoRA."""

OTHER_METHODS = """
    AdaLoraConfig AdaLoraModel AdamssConfig AdamssModel AdaptionPromptConfig AdaptionPromptModel BeftConfig
    BeftModel BOFTConfig BOFTModel C3AConfig C3AModel CartridgeConfig CartridgeEncoder CPTConfig CPTEmbedding
    create_arrow_model DeftConfig DeftModel DeloraConfig DeloraModel FourierFTConfig FourierFTModel FrodConfig
    FrodModel GloraConfig GloraModel GraloraConfig GraloraModel HiraConfig HiraModel HRAConfig HRAModel IA3Config
    IA3Model LilyConfig LilyModel LNTuningConfig LNTuningModel LoHaConfig LoHaModel LoKrConfig LoKrModel
    MissConfig MissModel MultitaskPromptTuningConfig MultitaskPromptTuningInit OFTConfig OFTModel OSFConfig
    OSFModel PeanutConfig PeanutModel PolyConfig PolyModel PrefixEncoder PrefixTuningConfig PromptEmbedding
    PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType PromptTuningConfig PromptTuningInit
    PsoftConfig PsoftModel PveraConfig PveraModel RandLoraConfig RandLoraModel RoadConfig RoadModel ShadowConfig
    ShadowModel ShiraConfig ShiraModel SupertuningConfig SupertuningModel TinyLoraConfig TinyLoraModel
    TrainableTokensConfig TrainableTokensModel UniLoraConfig UniLoraModel VBLoRAConfig VBLoRAModel VeraConfig
    VeraModel WaveFTConfig WaveFTModel XLoraConfig XLoraModel
"""
"""Names of PEFT's other methods that it lists under both `peft` and `peft.tuners`."""

LORA_CONFIGS = """
    ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig
    LoraRuntimeConfig MontecloraConfig VeloraConfig
"""
"""Names of the configs of LoRA and of what it can be combined with."""

_TABLES = """
    ADALORA_TARGET ADAMSS_TARGET BEFT_TARGET BOFT_TARGET C3A_TARGET DEFT_TARGET DELORA_TARGET FOURIERFT_TARGET
    FROD_TARGET GLORA_TARGET GRALORA_TARGET HRA_TARGET IA3_FEEDFORWARD IA3_TARGET LILY_TARGET LNTUNING_TARGET
    LOHA_TARGET LOKR_TARGET MISS_TARGET OFT_TARGET PEANUT_TARGET POLY_TARGET PSOFT_TARGET PVERA_TARGET
    RANDLORA_TARGET ROAD_TARGET SHIRA_TARGET SUPERTUNING_TARGET TINYLORA_TARGET UNILORA_TARGET VBLORA_TARGET
    VERA_TARGET WAVEFT_TARGET
"""
TARGET_TABLES = " ".join(f"TRANSFORMERS_MODELS_TO_{word}_MODULES_MAPPING" for word in _TABLES.split())
"""Names of other methods' tables of default targets."""

_CONSTANT_NAMES = """
    ALLOWED_COMPUTE_DTYPES CONFIG_NAME DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES
    INCLUDE_LINEAR_LAYERS_SHORTHAND MIN_TARGET_MODULES_FOR_OPTIMIZATION SAFETENSORS_WEIGHTS_NAME
    SEQ_CLS_HEAD_NAMES TOKENIZER_CONFIG_NAME TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
    UPCAST_DTYPES WEIGHTS_NAME
"""

_CONSTANTS: Mapping[str, str] = {
    "lorakit.peft.structure": _CONSTANT_NAMES,
    "lorakit.peft.tuner": "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
}

_STRUCTURE = """
    _freeze_adapter=unused _get_batch_size=get_batch_size _get_input_embeddings_name=input_embeddings_name
    _get_module_names_tied_with_embedding=names_tied_with_embedding _get_no_split_modules=no_split_modules
    _get_submodules=get_submodules _is_valid_match=is_valid_match _set_adapter=unused _set_trainable=unused
    fsdp_auto_wrap_policy get_gptqmodel_quant_linear=unused get_pattern_key get_quantization_config id_tensor_storage
    match_target_against_key set_additional_trainable_modules=unused str_to_bool transpose
"""

_OTHER: Mapping[str, str] = {
    **_CONSTANTS,
    "lorakit.peft.layer_classes": "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper",
    "lorakit.peft.preparing": """
        cast_mixed_precision_params infer_device prepare_model_for_kbit_training shift_tokens_right
    """,
    "lorakit.peft.structure": f"{_STRUCTURE} {_CONSTANT_NAMES}",
}

PATHS: Mapping[str, Mapping[str, str]] = {
    "auto": {
        "lorakit.peft.model_classes": """
            AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering
            AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification
        """,
    },
    "config": {"lorakit.config": "PeftConfig PeftConfigMixin", PLACEHOLDERS: "PromptLearningConfig"},
    "functional": {
        "lorakit.peft.mapping": "inject_adapter_in_model",
        "lorakit.peft.tuner": "delete_adapter set_adapter",
        "lorakit.peft.casting": "cast_adapter_dtype set_requires_grad",
        "lorakit.peft.state_dicts": "get_peft_model_state_dict set_peft_model_state_dict",
    },
    "helpers": {
        "lorakit.peft.adjusting": """
            check_if_peft_model DoraCaching find_kappa_target_modules KappaTuneSelector rescale_adapter_scale
            update_forward_signature update_generate_signature update_signature
        """,
        "lorakit.peft.structure": "disable_input_dtype_casting=empty_context",
        PLACEHOLDERS: "MontecloraTrainerMixin",
    },
    "import_utils": {
        "lorakit.peft.preparing": """
            is_aqlm_available is_bnb_4bit_available is_bnb_available is_diffusers_available is_eetq_available
            is_gptqmodel_available is_hqq_available is_inc_available is_optimum_available is_te_available
            is_te_pytorch_available is_torch_tpu_available is_torchao_available is_torchao_ge_v0_18_0
            is_transformers_ge_v4_57_0 is_transformers_ge_v5 is_transformers_ge_v5_13_0 is_transformers_ge_v5_17_0
            is_transformers_ge_v5_1_0 is_transformers_ge_v5_4_0 is_transformers_ge_v5_6_0 is_transformers_le_4_53
            is_xpu_available
        """,
    },
    "mapping_func": {"lorakit.peft.mapping": "get_peft_model"},
    "mixed_model": {"lorakit.peft.model_classes": "PeftMixedModel"},
    "optimizers": {
        "lorakit.peft.optimizer_factories": "create_lorafa_optimizer create_loraplus_optimizer",
        PLACEHOLDERS: "create_riemannian_optimizer",
    },
    "optimizers.lorafa": {"lorakit.peft.optimizer_factories": "create_lorafa_optimizer LoraFAOptimizer"},
    "optimizers.loraplus": {"lorakit.peft.optimizer_factories": "create_loraplus_optimizer"},
    "optimizers.riemannian": {PLACEHOLDERS: "create_riemannian_optimizer"},
    "peft_model": {
        "lorakit.peft.model": "PeftModel",
        "lorakit.peft.model_classes": """
            PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM
            PeftModelForSequenceClassification PeftModelForTokenClassification
        """,
        "lorakit.peft.status": "get_layer_status get_model_status TunerLayerStatus TunerModelStatus",
    },
    "tuners": {
        "lorakit.config": """
            ArrowConfig BdLoraConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig LoraRuntimeConfig
            MontecloraConfig VeloraConfig
        """,
        PLACEHOLDERS: f"{OTHER_METHODS} MixedModel MultitaskPromptEmbedding",
        "lorakit.peft.weighted": "convert_to_lora save_as_lora",
        "lorakit.peft.data_inits": "get_eva_state_dict initialize_lora_eva_weights preprocess_loraga",
        "lorakit.peft.tuner": "LoraModel",
    },
    "tuners._buffer_dict": {"lorakit.peft.structure": "BufferDict"},
    "tuners.delora": {PLACEHOLDERS: "DeloraConfig DeloraLayer DeloraModel"},
    "tuners.delora.model": {PLACEHOLDERS: "DeloraModel TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING"},
    "tuners.loha": {PLACEHOLDERS: "LoHaConfig LoHaLayer LoHaModel"},
    "tuners.loha.layer": {PLACEHOLDERS: "LoHaLayer"},
    "tuners.lokr": {PLACEHOLDERS: "LoKrConfig LoKrLayer LoKrModel"},
    "tuners.lokr.layer": {PLACEHOLDERS: "factorization LoKrLayer"},
    "tuners.lora": {
        "lorakit.config": LORA_CONFIGS,
        "lorakit.peft.layer_classes": """
            Conv1d Conv2d Conv3d Embedding GPTQLoraLinear Linear Linear4bit Linear8bitLt LoraLayer MultiheadAttention
            ParamWrapper
        """,
        "lorakit.peft.tuner": "LoraModel",
        "lorakit.peft.data_inits": """
            get_eva_state_dict initialize_lora_eva_weights preprocess_corda preprocess_loraga
        """,
        "lorakit.peft.weighted": "convert_to_lora reduce_intruder_dimension save_as_lora",
        PLACEHOLDERS: "create_arrow_model",
    },
    "tuners.lora.aqlm": {"lorakit.peft.layer_classes": "AqlmLoraLinear"},
    "tuners.lora.arrow": {PLACEHOLDERS: "_resolve_adapter_source ArrowLoraLinearLayer create_arrow_model"},
    "tuners.lora.awq": {"lorakit.peft.layer_classes": "AwqLoraLinear"},
    "tuners.lora.bnb": {"lorakit.peft.layer_classes": "dispatch_bnb_4bit dispatch_bnb_8bit Linear4bit Linear8bitLt"},
    "tuners.lora.config": {"lorakit.config": LORA_CONFIGS},
    "tuners.lora.conversion": {"lorakit.peft.weighted": "convert_to_lora save_as_lora"},
    "tuners.lora.corda": {"lorakit.peft.data_inits": "preprocess_corda"},
    "tuners.lora.dora": {
        PLACEHOLDERS: "DoraConv1dLayer DoraConv2dLayer DoraConv3dLayer DoraEmbeddingLayer DoraLinearLayer",
    },
    "tuners.lora.eetq": {"lorakit.peft.layer_classes": "EetqLoraLinear"},
    "tuners.lora.eva": {"lorakit.peft.data_inits": "get_eva_state_dict initialize_lora_eva_weights"},
    "tuners.lora.gptq": {"lorakit.peft.layer_classes": "GPTQLoraLinear"},
    "tuners.lora.hqq": {"lorakit.peft.layer_classes": "HqqLoraLinear"},
    "tuners.lora.inc": {"lorakit.peft.layer_classes": "IncLoraLinear"},
    "tuners.lora.intruders": {"lorakit.peft.weighted": "reduce_intruder_dimension"},
    "tuners.lora.layer": {
        "lorakit.peft.layer_classes": """
            _ConvNd _LoraFactorsProxy _LoraParameterProxy Conv1d Conv2d Conv3d dispatch_default Embedding Linear
            LoraLayer LoraParallelLinear MultiheadAttention ParamWrapper
        """,
    },
    "tuners.lora.loraga": {"lorakit.peft.data_inits": "preprocess_loraga"},
    "tuners.lora.model": {"lorakit.peft.tuner": "LoraModel TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"},
    "tuners.lora.monteclora": {PLACEHOLDERS: "MontecloraSampler"},
    "tuners.lora.te": {"lorakit.peft.layer_classes": "TeLinear"},
    "tuners.lora.torchao": {"lorakit.peft.layer_classes": "TorchaoLoraLinear"},
    "tuners.lora.variants": {
        PLACEHOLDERS: """
            ALoraLinearVariant ArrowLinearVariant BdLoraLinearVariant BlockDiagonalLinear DoraConv1dVariant
            DoraConv2dVariant DoraConv3dVariant DoraEmbeddingVariant DoraLinearVariant KasaLinearVariant
            MiCAEmbeddingVariant MiCALinearVariant MontecloraLinearVariant VeloraLinearVariant
        """,
        "lorakit.peft.mixed_batches": """
            calculate_alora_offsets get_alora_offsets_for_forward get_alora_offsets_for_generate
            is_alora_relevant_in_batch
        """,
    },
    "tuners.lora.velora": {
        PLACEHOLDERS: """
            _compress_activations _normalize_projection _reconstruct_activations _reshape_to_grouped_subtokens
            VeloraFunction
        """,
    },
    "tuners.trainable_tokens": {
        PLACEHOLDERS: "TrainableTokensConfig TrainableTokensModel",
        "lorakit.peft.layer_classes": "TrainableTokensLayer",
    },
    "tuners.trainable_tokens.layer": {"lorakit.peft.layer_classes": "TrainableTokensLayer"},
    "tuners.tuners_utils": {
        "lorakit.peft.tuner": "BaseTuner delete_adapter set_adapter",
        "lorakit.peft.layer_classes": "BaseTunerLayer",
        "lorakit.peft.matching": """
            _ExcludedModule=ExcludedModule _filter_state_dict_by_key_prefixes=filter_state_dict
            _find_minimal_target_modules=find_minimal_target_modules _get_in_out_features=in_out_features
            _get_tuner_state_dict_key_prefixes=adapter_prefixes
            _maybe_include_all_linear_layers=maybe_include_all_linear_layers check_adapters_to_merge
            check_target_module_exists ExcludedModule inspect_matched_modules
        """,
        "lorakit.peft.casting": "cast_adapter_dtype set_requires_grad",
        "lorakit.peft.structure": "find_parameter_name_by_module get_device_map onload_layer=empty_context",
    },
    "utils": {
        **_OTHER,
        "lorakit.peft.structure": f"{_STRUCTURE} {_CONSTANT_NAMES} map_cache_to_layer_device_map=unused",
        PLACEHOLDERS: f"""
            {TARGET_TABLES} _prepare_prompt_learning_config bloom_model_postprocess_past_key_value
            NoMatchingPeftModuleError PeftError PeftWarning register_peft_method
        """,
        "lorakit.config": "PeftType TaskType",
        "lorakit.peft.state_dicts": """
            get_base_model_state_dict get_peft_model_state_dict set_base_model_state_dict set_peft_model_state_dict
        """,
        "lorakit.peft.loaded": "load_peft_weights",
        "lorakit.peft.preparing": """
            cast_mixed_precision_params get_quantization_kwargs infer_device prepare_model_for_kbit_training
            quantization_extra_repr resolve_quantization_backend shift_tokens_right
        """,
        "lorakit.peft.data_inits": "replace_lora_weights_loftq",
    },
    "utils.constants": {
        **_CONSTANTS,
        PLACEHOLDERS: f"{TARGET_TABLES} bloom_model_postprocess_past_key_value",
    },
    "utils.error": {PLACEHOLDERS: "NoMatchingPeftModuleError PeftError"},
    "utils.hotswap": {
        "lorakit.peft.hotswap": """
            check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict
            prepare_model_for_compiled_hotswap
        """,
    },
    "utils.incremental_pca": {PLACEHOLDERS: "IncrementalPCA"},
    "utils.integrations": {
        "lorakit.peft.structure": """
            check_deepspeed_zero3_enabled dequantize_module_weight gather_params_ctx=empty_context get_bnb_param_type
            get_layer_device_map=unused init_empty_weights map_cache_to_layer_device_map=unused skip_init_on_device
        """,
    },
    "utils.loftq_utils": {"lorakit.peft.data_inits": "replace_lora_weights_loftq"},
    "utils.other": {
        **_OTHER,
        PLACEHOLDERS: f"""
            {TARGET_TABLES} _prepare_prompt_learning_config bloom_model_postprocess_past_key_value
            starcoder_model_postprocess_past_key_value
        """,
    },
    "utils.peft_types": {"lorakit.config": "PeftType TaskType", PLACEHOLDERS: "register_peft_method"},
    "utils.quantization_utils": {
        "lorakit.peft.preparing": """
            Bnb4bitBackend Bnb8bitBackend ForwardOnlyQuantizationBackend get_quantization_kwargs GptqBackend
            HqqBackend quantization_extra_repr QuantizationBackend resolve_quantization_backend TorchaoBackend
        """,
    },
    "utils.save_and_load": {
        "lorakit.peft.state_dicts": """
            get_base_model_state_dict get_peft_model_state_dict set_base_model_state_dict set_peft_model_state_dict
        """,
        "lorakit.peft.loaded": "load_peft_weights",
    },
    "utils.transformers_weight_conversion": {
        "lorakit.peft.structure": """
            build_peft_weight_mapping convert_peft_config_for_transformers=unused get_model_conversion_mapping
        """,
    },
    "utils.warning": {PLACEHOLDERS: "PeftWarning"},
}
"""Path below `peft` -> full name of a module -> names to take from it; a package comes before its modules.

An entry `alias=name` offers the module's `name` as `alias`.
"""

_PACKAGES = {path.rpartition(".")[0] for path in PATHS}
"""Paths that are packages; PEFT has a module below each."""


def lazy_names(module: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a module's `__getattr__` and `__dir__` from a table of names.

    Args:
        module: The module's full name.
        homes: Full name of a module -> the names to take from it, separated by spaces; `alias=name` renames one.

    Returns:
        The two functions.
    """
    table = _by_name(homes)
    return lambda name: _find(module, table, name), lambda: sorted(table)


def register() -> None:
    """Put a module for each path into `sys.modules` and into the module above it.

    The loader is also entered as the finder of `__file__`, which packages have in their `__path__`. The import
    system uses it to find the spec of a path, for `importlib.util.find_spec` in a new process and `importlib.reload`.
    """
    loader = _PathLoader()
    sys.path_importer_cache[__file__] = loader
    if __file__ not in sys.modules[PACKAGE].__path__:
        sys.modules[PACKAGE].__path__.append(__file__)
    for path in PATHS:
        spec = loader.find_spec(f"{PACKAGE}.{path}")
        if spec is not None and spec.name not in sys.modules:  # the modules stay if `lorakit.peft` is reloaded
            parent, _, child = spec.name.rpartition(".")
            sys.modules[spec.name] = loader.create_module(spec)
            setattr(sys.modules[parent], child, sys.modules[spec.name])


class _PathModule(ModuleType):
    """A module of lazy names. A class, since two new functions per module would slow down `import lorakit.peft`."""

    def __getattr__(self, name: str) -> Any:
        """Import what a name means."""
        return dir(self) if name == "__all__" else _find(self.__name__, _table(self.__name__), name)

    def __dir__(self) -> list[str]:
        """Return the names of the table."""
        return sorted(_table(self.__name__))


class _PathLoader(Loader):
    """Finds and creates the modules of `PATHS`."""

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of a path, or None for any other name."""
        above, _, path = fullname.partition(f"{PACKAGE}.")
        if above or path not in PATHS:
            return None
        spec = ModuleSpec(fullname, self, origin=__file__, is_package=path in _PACKAGES)
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(__file__)
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Create a module with all attributes that the import system would set."""
        path = spec.name.removeprefix(f"{PACKAGE}.")
        module = _PathModule(spec.name, f"Names of `peft.{path}`; they are defined in {', '.join(PATHS[path])}.")
        module.__spec__, module.__loader__, module.__package__ = spec, self, spec.parent
        if spec.submodule_search_locations is not None:
            module.__path__ = spec.submodule_search_locations
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the class of the module knows its names."""


@cache
def _table(module: str) -> dict[str, tuple[str, str]]:
    return _by_name(PATHS[module.removeprefix(f"{PACKAGE}.")])


def _by_name(homes: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return name -> the module that defines it, and its name there."""
    entries = [(home, *entry.partition("=")) for home, names in homes.items() for entry in names.split()]
    return {name: (home, target or name) for home, name, _, target in entries}


def _find(module: str, table: Mapping[str, tuple[str, str]], name: str) -> Any:
    """Import what a name of a module means: a name of its table, or a module below it (`lorakit.peft.mapping`)."""
    home, target = table.get(name, (None, name))
    if home == PLACEHOLDERS:
        return import_module(home).placeholder(target)
    if home is not None:
        return getattr(import_module(home), target)
    below = f"{module}.{name}"
    try:
        if not name.startswith("_"):
            return import_module(below)
    except ModuleNotFoundError as missing:
        if missing.name != below:
            raise
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
