"""Names of the layer types in `lorakit.core.kinds.KINDS`, for code that handles shapes without torch."""

from __future__ import annotations

LINEAR, CONV1D, EMBEDDING = "Linear", "Conv1D", "Embedding"
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
ATTENTION, INNER_LINEAR = "MultiheadAttention", "InnerLinear"
PARAMETER = "Parameter"
"""The layer type of a bare parameter, which `target_parameters` selects."""

DENSE = (LINEAR, CONV1D)
"""Types of modules that multiply their input by a matrix; "all-linear" selects such modules."""

PLANNED = (*DENSE, EMBEDDING)
"""Layer types that plans support and that error messages suggest as targets."""
