"""LoRA as it was published, and rsLoRA, which differs in the scale alone.

H = W x + s·B(A x): the addition to the output is z = s·B(A x), that to the weight s·B·A.   [docs/math.md (2)]

Source: Hu et al. 2021, arXiv:2106.09685, eq. (3).
"""

from __future__ import annotations

from lorakit.core.kinds import every_kind
from lorakit.core.variants.variant import NO_SETTING, Variant

PLAIN = Variant(name="plain", title="LoRA", field="", setting=lambda config, path: NO_SETTING, fits=every_kind)
