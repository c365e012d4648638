"""Other methods that programs would add to PEFT: refused, since this library is LoRA."""

from __future__ import annotations

from typing import Any, NoReturn

from lorakit.errors import NotYetSupported


def register_peft_method(*, name: str, **_: Any) -> NoReturn:
    """PEFT's way to add a method.

    Args:
        name: The method's name.

    Raises:
        NotYetSupported: Always.
    """
    raise NotYetSupported(
        f"The method {name!r} cannot be added: this library is LoRA. A kind of module, an init or a variant is a row "
        "of a table in lorakit.core."
    )
