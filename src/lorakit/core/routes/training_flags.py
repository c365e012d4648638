"""Which parameters of adapters are trained: the one place that switches `requires_grad` of a whole adapter.

What an init freezes (MiCA's B) stays frozen, whatever is switched. Knows nothing of which adapter is active.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lorakit.core.layering.sitemap import find_state
from lorakit.core.layering.walking import walk
from lorakit.core.parts.bias_switch import BiasSwitch


def set_trained(model: nn.Module, wanted: Mapping[str, bool], others: bool | None = None) -> None:
    """Train adapters, or freeze them.

    Args:
        model: An adapted model; only `requires_grad` is changed.
        wanted: Adapter -> whether its parameters require gradients; one that is not here is no matter.
        others: The same for all adapters that are not named; None leaves them.
    """
    state = find_state(model)
    for module in () if state is None else state.members():
        for name in module.available_adapters():
            flag = wanted.get(name, others)
            if flag is not None:
                module.set_trained(name, flag)
    if state is not None and state.biased:
        for _, module in walk(model):
            for switch in BiasSwitch.on(module):
                flag = wanted.get(switch.adapter, others)
                for leaf in switch.originals if flag is not None else ():
                    module._parameters[leaf].requires_grad_(flag)  # type: ignore[union-attr, arg-type]
