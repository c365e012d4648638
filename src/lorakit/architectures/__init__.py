"""Shapes and default targets of `transformers` models. This package does not import torch."""
