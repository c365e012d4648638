"""Merge adapters into the base, and unmerge them."""
