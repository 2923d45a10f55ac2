"""The command line: quantize, inspect, convert and compare model files, without ComfyUI."""

from __future__ import annotations

from .main import main

__all__ = ["main"]
