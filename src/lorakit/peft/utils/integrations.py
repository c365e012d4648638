"""What other libraries do to a model, under PEFT's module path."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.structure": """
            check_deepspeed_zero3_enabled dequantize_module_weight gather_params_ctx get_bnb_param_type
            get_layer_device_map init_empty_weights map_cache_to_layer_device_map skip_init_on_device
        """,
    },
)
__all__ = __dir__()
