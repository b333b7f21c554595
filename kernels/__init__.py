"""Triton kernels, one module a family, installed as `unifiedar.kernels`. They import torch and triton only.

Each module holds the kernels, their tile choices (functions of the shape), launchers that fill outputs which the caller
allocated, and COMPILE_CASES: what `triton.compile` needs to build each kernel without a GPU.
"""
