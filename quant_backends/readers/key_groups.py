"""The tensors of a safetensors file while they are put together to weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..core.errors import FileFormatError, SnugError
from ..core.packed import PackedTensor
from ..formats.scaled import scaled_format
from .gguf_values import REDOWNLOAD, shown
from .safetensors_file import SafetensorsFile, strict_json

# The JSON texts inside such files have a few hundred bytes.
MAX_JSON_BYTES = 1 << 16


class KeyGroups:
    """What is done and what is left of a file.

    left: names nobody has taken yet. state_dict: the result. extras: tensors that are no part of the model's
    weights but might be wanted, such as activation scales. shapes: logical shapes that the caller knows.
    """

    def __init__(self, file: SafetensorsFile, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.file = file
        self.left = set(file.tensors)
        self.state_dict: dict[str, PackedTensor | torch.Tensor] = {}
        self.extras: dict[str, torch.Tensor] = {}
        self.shapes = shapes

    def ending(self, suffix: str) -> list[str]:
        """What stands before `suffix` in every name left that ends with it, in the order of the file."""
        names = (name for name in self.file.tensors if name in self.left and name.endswith(suffix))
        return [name.removesuffix(suffix) for name in names]

    def take(self, name: str) -> torch.Tensor:
        """The tensor `name`, which is then no longer left; FileFormatError when there is none."""
        if name not in self.left:
            self.file.fail(f"the tensor {shown(name)} is missing")
        self.left.remove(name)
        return self.file.read(name)

    def keep(self, names: Iterable[str]) -> None:
        """Move those of the tensors that exist to the extras."""
        self.extras.update({name: self.take(name) for name in names if name in self.left})

    def pack(
        self,
        name: str,
        data: torch.Tensor,
        format_name: str,
        shape: tuple[int, ...],
        parts: Mapping[str, torch.Tensor],
    ) -> None:
        """Add a packed weight; FileFormatError when its tensors do not fit together."""
        if name in self.state_dict or name in self.left:
            self.file.fail(f"the weight {shown(name)} is stored twice")
        try:
            self.state_dict[name] = PackedTensor(data, scaled_format(format_name), shape, parts)
        except FileFormatError:
            raise
        except SnugError as error:
            problem = f"the weight {shown(name)} is inconsistent: {str(error).removesuffix('.')}"
            raise FileFormatError(self.file.path, problem, REDOWNLOAD) from error

    def json(self, content: bytes, what: str) -> dict:
        """A JSON object of the file; FileFormatError when it is none."""
        try:
            found = strict_json(content) if len(content) <= MAX_JSON_BYTES else None
        except ValueError as error:
            self.file.fail(f"{what} is not valid JSON ({error})")
        if not isinstance(found, dict):
            self.file.fail(f"{what} is not a JSON object of at most {MAX_JSON_BYTES} bytes")
        return found
