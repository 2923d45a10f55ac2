"""Kernels for NVIDIA GPUs, written in Triton.

`operands` says what there is, without importing Triton; `dispatch` in the folder above asks it. Everything else here is
imported when a kernel is first used, because Triton is optional.
"""
