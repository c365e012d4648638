"""Adapters for other runtimes: the formats that runtimes read, and how they are served."""

from lorakit.export.formats import FORMATS, ExportFormat, export
from lorakit.export.request import Exported, ExportRequest, check_name, name_of, versioned

__all__ = [
    "FORMATS",
    "ExportFormat",
    "ExportRequest",
    "Exported",
    "check_name",
    "export",
    "name_of",
    "versioned",
]
