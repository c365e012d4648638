"""Fused tensor operations and their backward passes. `reference.py` implements each operation in plain PyTorch."""
