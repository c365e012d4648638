"""Adapters for other runtimes: the common form, and the formats that runtimes read."""

from lorakit.export.common import CommonAdapter, common_form
from lorakit.export.formats import FORMATS, ExportFormat, export
from lorakit.export.request import Exported, ExportRequest, check_name, name_of, versioned

__all__ = [
    "FORMATS",
    "CommonAdapter",
    "ExportFormat",
    "ExportRequest",
    "Exported",
    "check_name",
    "common_form",
    "export",
    "name_of",
    "versioned",
]
