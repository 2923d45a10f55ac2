"""Snug's core: formats, kernels, readers and backends in plain torch, independent of ComfyUI."""
