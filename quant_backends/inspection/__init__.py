"""What is in a model: from a file's header alone, or from weights in memory."""

from __future__ import annotations
