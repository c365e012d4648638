"""Adapters written into the base, and out again."""
