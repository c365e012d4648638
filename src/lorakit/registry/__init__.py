"""Adapters in a directory, under names with versions that can be rolled back; readers need no lock and no torch."""

from lorakit.registry.contents import content_hash, files_hash
from lorakit.registry.leases import Lease, Version
from lorakit.registry.names import Event, NameEntry, check_name, name_of, version_id
from lorakit.registry.registry import Change, Collected, Listing, Problem, Registry, is_registry

__all__ = [
    "Change",
    "Collected",
    "Event",
    "Lease",
    "Listing",
    "NameEntry",
    "Problem",
    "Registry",
    "Version",
    "check_name",
    "content_hash",
    "files_hash",
    "is_registry",
    "name_of",
    "version_id",
]
