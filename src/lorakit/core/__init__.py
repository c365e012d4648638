"""The LoRA itself: attach, use, merge, save and load adapters on the user's own model.

The functions act on a model and return reports; nothing wraps or impersonates it. This part knows torch and
safetensors, and nothing of transformers, training or the command line.
"""

from lorakit.core.activation import (
    activate,
    adapters,
    checkpoint_contexts,
    disable,
    route,
    trainable_parameters,
    use,
)
from lorakit.core.attaching import AttachReport, attach, detach
from lorakit.core.fingerprinting import Fingerprint, fingerprint
from lorakit.core.inspecting import AdapterSummary, inspect_adapter
from lorakit.core.layer import LoraLayer
from lorakit.core.loading import LoadReport, load_adapter
from lorakit.core.merging import MergeReport, merge, merge_and_unload, merged_state_dict, unmerge
from lorakit.core.saving import SavedAdapter, save_adapter
from lorakit.core.sitemap import Site, sites

__all__ = [
    "AdapterSummary",
    "AttachReport",
    "Fingerprint",
    "LoadReport",
    "LoraLayer",
    "MergeReport",
    "SavedAdapter",
    "Site",
    "activate",
    "adapters",
    "attach",
    "checkpoint_contexts",
    "detach",
    "disable",
    "fingerprint",
    "inspect_adapter",
    "load_adapter",
    "merge",
    "merge_and_unload",
    "merged_state_dict",
    "route",
    "save_adapter",
    "sites",
    "trainable_parameters",
    "unmerge",
    "use",
]
