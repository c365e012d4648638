"""Variants under PEFT's module path; what computes them are rows of `lorakit.core.variants`."""

from lorakit.peft.lazy import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {
        "peft.variants_by_name": """
            ALoraLinearVariant ArrowLinearVariant BdLoraLinearVariant BlockDiagonalLinear
            DoraConv1dVariant DoraConv2dVariant DoraConv3dVariant DoraEmbeddingVariant DoraLinearVariant
            KasaLinearVariant MiCAEmbeddingVariant MiCALinearVariant MontecloraLinearVariant VeloraLinearVariant
        """,
        "peft.starting": """
            calculate_alora_offsets get_alora_offsets_for_forward get_alora_offsets_for_generate
            is_alora_relevant_in_batch
        """,
    },
)
__all__ = __dir__()
