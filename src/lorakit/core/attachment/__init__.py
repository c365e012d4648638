"""Attach, detach, load and save adapters."""
