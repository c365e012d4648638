"""Compiled kernels that fuse several PyTorch passes: C for CPUs, Triton for CUDA."""
