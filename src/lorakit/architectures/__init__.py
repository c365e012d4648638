"""Shapes and default targets of transformers models, without importing torch."""
