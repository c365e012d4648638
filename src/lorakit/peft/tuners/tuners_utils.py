"""The base classes of tuners and layers, and what is asked of a config, under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.tuner": "BaseTuner",
        "peft.layer_classes": "BaseTunerLayer",
        "peft.matching": "check_target_module_exists ExcludedModule inspect_matched_modules",
        "peft.private_names": """
            _ExcludedModule _filter_state_dict_by_key_prefixes _find_minimal_target_modules _get_in_out_features
            _get_tuner_state_dict_key_prefixes _maybe_include_all_linear_layers check_adapters_to_merge
        """,
        "peft.injected": "delete_adapter set_adapter",
        "peft.casting": "cast_adapter_dtype",
        "peft.flags": "set_requires_grad",
        "peft.structure": "find_parameter_name_by_module get_device_map onload_layer",
    },
)
__all__ = __dir__()
