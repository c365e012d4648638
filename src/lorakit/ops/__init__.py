"""Fused tensor operations with their backward passes; `reference.py` implements each in plain PyTorch."""
