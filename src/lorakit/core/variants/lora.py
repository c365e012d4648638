"""LoRA, and rsLoRA, which differs only in the scale.

The output is h = W x + s·B(A x): the variant adds z = s·B(A x) to the output, or s·B·A to W.   [docs/math.md (2)]

Source: Hu et al. 2021, arXiv:2106.09685, eq. (3).
"""

from __future__ import annotations

from lorakit.core.kinds.kind import every_kind
from lorakit.core.variants.variant import Variant

PLAIN = Variant(name="plain", title="LoRA", field="", fits=every_kind)
