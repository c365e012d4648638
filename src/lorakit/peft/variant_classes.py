"""PEFT's classes of variants, such as `DoraLinearVariant`, for `isinstance` checks of a layer's `lora_variant`.

In lorakit, a variant is an entry of `lorakit.core.variants`, not a class; an entry is an instance of the classes here
that have its name.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from lorakit.core.variants import Variant
from lorakit.errors import NotYetSupported


class _VariantType(type):
    """Metaclass whose classes have the entry of one variant as their only instance."""

    variant: ClassVar[str]

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, Variant) and value.name == cls.variant

    def __call__(cls, *_: Any, **__: Any) -> NoReturn:
        text = f"{cls.__name__} cannot be instantiated; select the variant with a field of LoraConfig."
        raise NotYetSupported(text, what=cls.__name__)


def _type(name: str, variant: str) -> _VariantType:
    about = f"PEFT's class of the variant {variant!r}; the variant's entry is its only instance."
    return _VariantType(name, (), {"variant": variant, "__doc__": about, "__module__": __name__})


ALoraLinearVariant = _type("ALoraLinearVariant", "alora")
ArrowLinearVariant = _type("ArrowLinearVariant", "arrow-router")
BdLoraLinearVariant = _type("BdLoraLinearVariant", "bdlora")
DoraConv1dVariant = _type("DoraConv1dVariant", "dora")
DoraConv2dVariant = _type("DoraConv2dVariant", "dora")
DoraConv3dVariant = _type("DoraConv3dVariant", "dora")
DoraEmbeddingVariant = _type("DoraEmbeddingVariant", "dora")
DoraLinearVariant = _type("DoraLinearVariant", "dora")
KasaLinearVariant = _type("KasaLinearVariant", "kasa")
MontecloraLinearVariant = _type("MontecloraLinearVariant", "monteclora")
QALoraLinearVariant = _type("QALoraLinearVariant", "qalora")
VeloraLinearVariant = _type("VeloraLinearVariant", "velora")
