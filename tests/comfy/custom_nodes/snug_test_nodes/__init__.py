"""Nodes that only Snug's tests and demo use; importing the package also lets tiny models be detected."""

from __future__ import annotations

from .allocate import SnugTestAllocate
from .conditioning import SnugTestConditioning
from .digits import SnugTestDigits
from .model_info import SnugTestModelInfo
from .narrow_models import accept_narrow_models
from .small_t5 import accept_small_t5

accept_narrow_models()
accept_small_t5()

NODE_CLASS_MAPPINGS = {
    "SnugTestAllocate": SnugTestAllocate,
    "SnugTestConditioning": SnugTestConditioning,
    "SnugTestDigits": SnugTestDigits,
    "SnugTestModelInfo": SnugTestModelInfo,
}
