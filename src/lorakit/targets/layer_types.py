"""Names of the layer types that LoRA supports, for code that handles shapes without torch.

The entries in `lorakit.core.kinds.KINDS` have the same names. Code that has a `Kind` uses its attributes instead.
"""

from __future__ import annotations

LINEAR, CONV1D, EMBEDDING = "Linear", "Conv1D", "Embedding"
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
ATTENTION, INNER_LINEAR = "MultiheadAttention", "InnerLinear"
PARAMETER = "Parameter"
"""A bare parameter, named by `target_parameters`."""

DENSE = (LINEAR, CONV1D)
"""Types whose modules multiply their input by a matrix; "all-linear" selects them."""

PLANNED = (*DENSE, EMBEDDING)
"""Types that plans support and that messages suggest as targets."""
