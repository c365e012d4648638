"""Names of the layer types on which LoRA sits, for code that knows shapes and no torch.

They are those of the entries of `lorakit.core.kinds.KINDS`; code that has a kind asks it for its attributes instead.
"""

from __future__ import annotations

LINEAR, CONV1D, EMBEDDING = "Linear", "Conv1D", "Embedding"
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
ATTENTION, INNER_LINEAR = "MultiheadAttention", "InnerLinear"
PARAMETER = "Parameter"
"""A bare parameter, named by `target_parameters`."""

DENSE = (LINEAR, CONV1D)
"""Types whose modules multiply their input by a matrix; "all-linear" means these."""

PLANNED = (*DENSE, EMBEDDING)
"""Types whose shapes plans know, and that messages suggest."""
