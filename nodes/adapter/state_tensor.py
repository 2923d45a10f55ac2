"""What `state_dict()` shows for a packed weight: the logical tensor, at its packed size, decoded when saved.

ComfyUI uses state dicts in three ways: it lists keys (LoRA), sums sizes (memory accounting; 0.3.75 multiplies
elements by element size, later versions read nbytes) and saves values (ModelSave writes a dense file). One
stand-in serves all three without decoding a whole model for the first two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from .packed_module import PackedWeightModule


class _LazyDevice(NamedTuple):
    """No real device: makes safetensors call `.to("cpu")`, as ComfyUI's own lazy tensors do."""

    type: str = "snug-packed"
    index: int = 0


class PackedStateTensor(torch.nn.Parameter):
    """Stand-in for the weight of `module`: shape and dtype are logical, sizes are packed, `.to()` decodes."""

    module: PackedWeightModule

    def __new__(cls, module: PackedWeightModule) -> PackedStateTensor:
        weight = module.weight
        return super().__new__(cls, torch.empty(weight.shape, dtype=weight.dtype, device="meta"), False)

    def __init__(self, module: PackedWeightModule) -> None:
        self.module = module

    @property
    def device(self) -> Any:
        return _LazyDevice()

    @property
    def nbytes(self) -> int:
        return self.module.weight.nbytes

    def nelement(self) -> int:
        return self.module.weight.nbytes

    def element_size(self) -> int:
        return 1

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The decoded weight with its patches merged, then `.to(...)` of that."""
        return self.module.dense_weight().to(*args, **kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Anything that calculates with the stand-in gets the decoded weight."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*(_dense(a) for a in args), **{k: _dense(v) for k, v in kwargs.items()})


# What may look at the stand-in without decoding the weight: properties, then methods.
_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "layout", "ndim", "is_meta", "is_sparse", "requires_grad", "data")
} | {
    getattr(torch.Tensor, name)
    for name in ("size", "dim", "numel", "is_contiguous", "requires_grad_", "detach", "untyped_storage")
}


def _dense(value: Any) -> Any:
    if isinstance(value, PackedStateTensor):
        return value.module.dense_weight()
    if isinstance(value, list | tuple):
        return type(value)(_dense(item) for item in value)
    return value
