"""What `state_dict()` shows for a packed weight: the logical tensor, at its packed size, decoded when it is used.

ComfyUI uses state dicts in three ways: it lists keys (LoRA), sums sizes (memory accounting) and saves or copies
values (ModelSave, Control-LoRA). One stand-in serves all three without decoding a whole model for the first two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .compat import sizes_are_read_from_nbytes
from .layout import stored_nbytes

if TYPE_CHECKING:
    from .packed_module import PackedWeightModule


class _LazyDevice(NamedTuple):
    """No real device: makes safetensors call `.to("cpu")`, as ComfyUI's own lazy tensors do."""

    type: str = "snug-packed"
    index: int = 0


class PackedStateTensor(torch.nn.Parameter):
    """Stand-in for the weight of `module`: shape and dtype are logical, `nbytes` is packed, any use decodes."""

    module: PackedWeightModule

    def __new__(cls, module: PackedWeightModule) -> PackedStateTensor:
        weight = module.weight
        stand_in = super().__new__(cls, torch.empty(weight.shape, dtype=weight.dtype, device="meta"), False)
        stand_in.module = module
        return stand_in

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing to do; Parameter(stand_in) calls it a second time."""

    @property
    def device(self) -> Any:
        return _LazyDevice()

    @property
    def nbytes(self) -> int:
        return stored_nbytes(self.module.weight)

    def nelement(self) -> int:
        """ComfyUI 0.3.75 multiplies this by element_size() to get bytes; it is made to get the packed ones."""
        return super().nelement() if sizes_are_read_from_nbytes() else self.nbytes

    def element_size(self) -> int:
        return super().element_size() if sizes_are_read_from_nbytes() else 1

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The decoded weight with its patches merged, then `.to(...)` of that."""
        return self.module.dense_weight().to(*args, **kwargs)

    # torch.nn.Parameter(x) goes through detach() and requires_grad_(), and wants the same type back.

    def detach(self) -> PackedStateTensor:
        return self

    def requires_grad_(self, requires_grad: bool = True) -> PackedStateTensor:
        return self

    @property
    def data(self) -> PackedStateTensor:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.nn.Parameter:
        return torch.nn.Parameter(self.module.dense_weight(), requires_grad=False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__deepcopy__({}).__reduce_ex__(protocol)

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
    for name in (
        "shape",
        "dtype",
        "layout",
        "ndim",
        "itemsize",
        "is_meta",
        "is_cuda",
        "is_sparse",
        "is_quantized",
        "requires_grad",
        "grad",
    )
} | {
    getattr(torch.Tensor, name)
    for name in (
        "size",
        "stride",
        "dim",
        "numel",
        "nelement",
        "element_size",
        "__len__",
        "is_contiguous",
        "is_floating_point",
        "is_inference",
        "untyped_storage",
    )
}


def _dense(value: Any) -> Any:
    if isinstance(value, PackedStateTensor):
        return value.module.dense_weight()
    if isinstance(value, list | tuple):
        return type(value)(_dense(item) for item in value)
    return value
