"""The LoRA itself: attach, use, merge, save and load adapters on the user's own model.

The functions act on a model and return reports; nothing wraps or impersonates it. This part knows torch and
safetensors, and nothing of transformers, training or the command line.
"""

from lorakit.core.data.inits import collect_for
from lorakit.core.data.statistics import Statistics, load_statistics
from lorakit.core.files.fingerprinting import Fingerprint, fingerprint
from lorakit.core.files.inspecting import AdapterSummary, inspect_adapter
from lorakit.core.files.loading import LoadReport, load_adapter
from lorakit.core.files.saving import SavedAdapter, save_adapter, save_as_trained
from lorakit.core.kinds import Kind, Slot, kind_named
from lorakit.core.layering.layer import LoraLayer
from lorakit.core.layering.sitemap import Site, sites
from lorakit.core.making.attaching import AttachReport, attach, detach
from lorakit.core.merging.exactness import why_merge_is_inexact
from lorakit.core.merging.merging import MergeReport, merge, merge_and_unload, merged_state_dict, unmerge
from lorakit.core.operations.combining import average, combine, combine_folders, rescale, subtract
from lorakit.core.operations.comparing import Comparison, compare_adapters, compare_folders
from lorakit.core.operations.compressing import compress, compress_folder
from lorakit.core.operations.extracting import ExtractReport, extract, extract_to_folder
from lorakit.core.operations.intruders import SiteIntruders, reduce_intruders
from lorakit.core.operations.lowrank import Cut
from lorakit.core.operations.reports import MadeReport
from lorakit.core.operations.sources import TensorSource, source_of_folder, source_of_model
from lorakit.core.operations.ways import WAYS, Way
from lorakit.core.routes.activation import (
    activate,
    adapters,
    checkpoint_contexts,
    disable,
    route,
    trainable_parameters,
    use,
)
from lorakit.core.routes.invoking import invocation_offsets, invoked
from lorakit.core.routes.training_flags import set_trained

__all__ = [
    "WAYS",
    "AdapterSummary",
    "AttachReport",
    "Comparison",
    "Cut",
    "ExtractReport",
    "Fingerprint",
    "Kind",
    "LoadReport",
    "LoraLayer",
    "MadeReport",
    "MergeReport",
    "SavedAdapter",
    "Site",
    "SiteIntruders",
    "Slot",
    "Statistics",
    "TensorSource",
    "Way",
    "activate",
    "adapters",
    "attach",
    "average",
    "checkpoint_contexts",
    "collect_for",
    "combine",
    "combine_folders",
    "compare_adapters",
    "compare_folders",
    "compress",
    "compress_folder",
    "detach",
    "disable",
    "extract",
    "extract_to_folder",
    "fingerprint",
    "inspect_adapter",
    "invocation_offsets",
    "invoked",
    "kind_named",
    "load_adapter",
    "load_statistics",
    "merge",
    "merge_and_unload",
    "merged_state_dict",
    "reduce_intruders",
    "rescale",
    "route",
    "save_adapter",
    "save_as_trained",
    "set_trained",
    "sites",
    "source_of_folder",
    "source_of_model",
    "subtract",
    "trainable_parameters",
    "unmerge",
    "use",
    "why_merge_is_inexact",
]
