"""LoRA, and rsLoRA, which differs only in the scale.

h = W x + s·B(A x): the addition to the output is z = s·B(A x), that to the weight is s·B·A.   [docs/math.md (2)]

Source: Hu et al. 2021, arXiv:2106.09685, eq. (3).
"""

from __future__ import annotations

from lorakit.core.kinds.kind import every_kind
from lorakit.core.variants.variant import Variant

PLAIN = Variant(name="plain", title="LoRA", field="", fits=every_kind)
