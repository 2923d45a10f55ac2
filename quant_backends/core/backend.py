"""What a quantization backend is: the formats of its files, and the library whose own decoding it can borrow.

A backend is a class that is never instantiated, registered by being defined. Files load without any library, in
plain torch; `dequantize` here is the library's, for those who want its numbers exactly.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .errors import SnugError

if TYPE_CHECKING:
    from ..formats.base import Format
    from ..formats.scaled_base import ScaledFormat
    from .packed import PackedTensor

BACKENDS: dict[str, type[Backend]] = {}


class FileKind(str, Enum):
    """Where a format is found; the value is what users call it."""

    GGUF = ".gguf"
    SAFETENSORS = ".safetensors"
    FOLDER = "diffusers folder"


class Status(str, Enum):
    """What becomes of a file; the value completes "how it loads"."""

    PACKED = "stays packed"
    COMFYUI = "by ComfyUI itself"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class FormatFamily:
    """One line of the table of supported formats.

    title: what users call it. convention: its name in `readers/conventions.py`, "gguf" or "core"; empty where no
    reader knows it. examples: format names that `formats.scaled.format_called` takes. bits: least and most bits per
    weight of the examples, scales included, for matrices of at least 256 x 1024. files: where it is found.
    recognised_by: what in a file tells it. writers: who makes such files. label: its word in the one-line summary,
    empty to leave it out. note: the reason for a refusal, or a limit.
    """

    title: str
    convention: str
    recognised_by: str
    writers: str
    files: tuple[FileKind, ...]
    examples: tuple[str, ...] = ()
    bits: tuple[float, float] | None = None
    label: str = ""
    devices: str = "every device"
    status: Status = Status.PACKED
    note: str = ""


class Backend:
    """One quantization library or convention.

    name: as in the file name; title: for sentences; package: what pip calls the library, None where there is none;
    module: what Python imports; families: what it loads.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    package: ClassVar[str | None] = None
    module: ClassVar[str] = ""
    families: ClassVar[tuple[FormatFamily, ...]]

    def __init_subclass__(cls) -> None:
        BACKENDS[cls.name] = cls

    @classmethod
    def unavailable(cls) -> str | None:
        """Why the library cannot be used and how to get it, in one sentence; None when it is installed.

        Looks only whether it is there; importing it takes seconds, and `dequantize` says when that fails.
        """
        if cls.package is None or (cls._version() and _is_there(cls.module)):
            return None
        return (
            f"{cls.title}'s own kernels need the Python package {cls.package}, which is not installed: files load "
            f"without it, and `pip install {cls.package}` adds it."
        )

    @classmethod
    def handles(cls, fmt: type[Format] | ScaledFormat) -> bool:
        """Whether the library can decode this format."""
        raise NotImplementedError

    @classmethod
    def dequantize(cls, packed: PackedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Decode with the library's own code: its result in `dtype`, of the logical shape, on packed's device.

        Raises SnugError when the library is missing or broken, or does not take this tensor.
        """
        fmt, shape = packed.format, tuple(packed.shape)
        with cls._asked_to("decode", fmt, f"a {fmt.name} tensor of shape {shape} to {dtype}"):
            return cls.decode(packed, dtype)

    @classmethod
    def quantize(cls, values: torch.Tensor, fmt: type[Format] | ScaledFormat) -> PackedTensor:
        """Encode with the library's own code, its defaults where the format leaves a choice; on values' device.

        values: float [out, in]. Raises SnugError when the library is missing or broken, or does not write the format.
        """
        with cls._asked_to(
            "encode", fmt, f"a tensor of shape {tuple(values.shape)} in {values.dtype} to {fmt.name}"
        ):
            return cls.encode(values.detach(), fmt)

    @classmethod
    @contextmanager
    def _asked_to(cls, verb: str, fmt: type[Format] | ScaledFormat, what: str) -> Iterator[None]:
        problem = cls.unavailable()
        if problem:
            raise SnugError(problem)
        if not cls.handles(fmt):
            known = ", ".join(name for family in cls.families for name in family.examples)
            raise SnugError(f"{cls.title} does not {verb} {fmt.name}; it {verb}s the like of {known}.")
        try:
            yield
        except Exception as error:  # whatever the library raises, or its import
            raise SnugError(
                f"{cls.package} {cls._version()} cannot {verb} {what} ({_first_line(error)}); use Snug's own "
                f"{verb[:-1]}ing, or update it."
            ) from error

    @classmethod
    def decode(cls, packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        """`dequantize` of a format that the backend handles; may raise anything."""
        raise NotImplementedError

    @classmethod
    def encode(cls, values: torch.Tensor, fmt: type[Format] | ScaledFormat) -> PackedTensor:
        """`quantize` to a format that the backend handles; may raise anything."""
        raise NotImplementedError(f"it does not write {fmt.name}")

    @classmethod
    def library(cls, module: str = "") -> Any:
        """The library's module, or the one called `module` inside it; imported when first asked for."""
        return importlib.import_module(f"{cls.module}.{module}" if module else cls.module)

    @classmethod
    def _version(cls) -> str | None:
        try:
            return metadata.version(cls.package or "")
        except (metadata.PackageNotFoundError, ValueError):
            return None


def _is_there(module: str) -> bool:
    """Whether the top package of `module` can be found; looking deeper would import it."""
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except ValueError:  # something half-imported lies in the way
        return False


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}".removesuffix(": ")
