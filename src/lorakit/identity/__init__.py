"""Identify what a module computes: the source that it runs, its digest, and the values that the source reads."""
