"""Fused tensor operations with their backward passes; `reference.py` has each in plain PyTorch."""
