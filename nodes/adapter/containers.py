"""Which file a model goes into: GGUF, or safetensors in the convention of the weights' formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch

from ...quant_backends.core.errors import SnugError
from ...quant_backends.core.packed import PackedTensor
from ...quant_backends.formats import FORMATS
from ...quant_backends.formats.scaled import format_called
from ...quant_backends.readers.text_encoder_tables import FAMILIES
from ...quant_backends.writers import CONVENTIONS, write_gguf, write_safetensors, write_text_encoder_gguf
from ...quant_backends.writers.gguf_file import MetadataValue

AUTO, GGUF, SAFETENSORS = "auto", "GGUF", "safetensors"
_CONVENTION = {f"{SAFETENSORS} ({name})": name for name in CONVENTIONS}
CONTAINERS = (AUTO, GGUF, SAFETENSORS, *_CONVENTION)
_CORE, _OWN = "comfy_quant", "snug"
# Which convention weights are written in that no library stands behind, by their backend.
_PREFERRED = {"fp8": "scaled_fp8", "int8": _CORE}

Tensors: TypeAlias = "Mapping[str, PackedTensor | torch.Tensor]"
Progress: TypeAlias = Callable[[int, int], None]


class Renamed(Mapping[str, "PackedTensor | torch.Tensor"]):
    """Tensors under other names (new to old), and a few more behind them."""

    def __init__(self, tensors: Tensors, names: Mapping[str, str], more: Tensors) -> None:
        self._tensors, self._names, self._more = tensors, names, more

    def __getitem__(self, name: str) -> PackedTensor | torch.Tensor:
        return self._tensors[self._names[name]] if name in self._names else self._more[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._names
        yield from self._more

    def __len__(self) -> int:
        return len(self._names) + len(self._more)

    def __contains__(self, name: object) -> bool:
        return name in self._names or name in self._more


@dataclass(frozen=True)
class Content:
    """What goes into one file.

    tensors: of one network; made when they are asked for. formats: how many weights are in each quantized format, by
    its name. nbytes: of all tensors, at most. texts: metadata. backend: what the weights were quantized for, if known.
    is_text_encoder, encoder: whether it is of a CLIP, and which of its networks, None for what belongs to none.
    architecture: general.architecture of a GGUF file; "" finds it from the names. metadata: its further metadata.
    """

    tensors: Tensors
    formats: Mapping[str, int]
    nbytes: int
    texts: Mapping[str, str] = field(default_factory=dict)
    backend: str = ""
    is_text_encoder: bool = False
    encoder: torch.nn.Module | None = None
    architecture: str = ""
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)


def file_kind(content: Content, container: str) -> tuple[str, str]:
    """(ending of the file, convention of a safetensors file) for a choice of CONTAINERS.

    AUTO takes GGUF for weights in GGUF's types, else safetensors, whose convention is that of the library that the
    weights were quantized for, or the first that holds them.
    Raises SnugError when a weight's format does not fit.
    """
    ggml = [name for name in content.formats if name in FORMATS]
    others = [name for name in content.formats if name not in FORMATS]
    if container not in CONTAINERS:
        raise SnugError(f"There is no file format {container!r}; choose one of {', '.join(CONTAINERS)}.")
    if container == GGUF or (container == AUTO and ggml and not others):
        if others:
            raise SnugError(
                f"{content.formats[others[0]]} weights are in {others[0]}, which GGUF files do not have; set format to "
                f"'{SAFETENSORS}', or quantize to a GGUF type with Quantize Model (Snug) first."
            )
        return ".gguf", ""
    if ggml:
        beside = f" beside others in {others[0]}" if others else ""
        hint = (
            "quantize all of them to one format"
            if others
            else f"set format to '{GGUF}', or quantize them to another"
        )
        raise SnugError(
            f"{content.formats[ggml[0]]} weights are in GGUF's {ggml[0]}{beside}, which safetensors files do not have; "
            f"{hint} with Quantize Model (Snug) and its input requantize."
        )
    formats = [format_called(name) for name in others]
    if container in _CONVENTION:
        convention = CONVENTIONS[_CONVENTION[container]]
        unfit = [fmt.name for fmt in formats if not convention.holds(fmt)]
        if unfit:
            raise SnugError(
                f"{content.formats[unfit[0]]} weights are in {unfit[0]}, which {convention.title} does not hold; it "
                f"holds {convention.formats}: set format to '{AUTO}', or quantize to one of these first."
            )
        return ".safetensors", convention.name
    # ComfyUI's own convention late: newer ComfyUI loads such files itself and calculates in another way. What nobody
    # else reads is the last choice.
    others_first = sorted(CONVENTIONS, key=lambda name: (name == _OWN, name == _CORE))
    for name in (_PREFERRED.get(content.backend, content.backend), *others_first):
        if name in CONVENTIONS and all(map(CONVENTIONS[name].holds, formats)):
            return ".safetensors", name
    unfit = [fmt.name for fmt in formats if not any(kind.holds(fmt) for kind in CONVENTIONS.values())]
    if unfit:
        raise SnugError(
            f"{content.formats[unfit[0]]} weights are in {unfit[0]}, which no kind of safetensors file holds; quantize "
            f"them to another format with Quantize Model (Snug) and its input requantize."
        )
    raise SnugError(
        f"The weights are in {', '.join(others)}, and no kind of safetensors file holds all of these; quantize all of "
        f"them to one format with Quantize Model (Snug) and its input requantize."
    )


def write(path: Path, content: Content, convention: str, progress: Progress) -> None:
    """Writes the file `path`, whole or not at all: GGUF by its ending, else safetensors of this convention.

    progress: called with what is done and all there is to do; may raise to stop. Raises SnugError as the writers do,
    and when the file cannot be written, such as when the disk fills up meanwhile.
    """
    try:
        _write(path, content, convention, progress)
    except OSError as error:
        raise SnugError(
            f"{path} could not be written ({error.strerror or error}), and nothing of it was left behind; see that its "
            f"folder can be written to and its disk has {content.nbytes / 1e9:.2f} GB free."
        ) from error


def _write(path: Path, content: Content, convention: str, progress: Progress) -> None:
    if path.suffix != ".gguf":
        write_safetensors(
            path,
            content.tensors,
            convention,
            metadata=content.texts,
            expected_bytes=content.nbytes,
            progress=progress,
        )
        return
    # Keys are named as GGUF wants it, with what they belong to in front; LTX-Video's is the exception.
    known = {"config": "config", "snug_provenance": "snug.provenance"}
    texts = {
        known.get(name, f"comfy.{name}"): text for name, text in content.texts.items() if name != "format"
    }
    metadata = {**texts, **content.metadata}
    tensors = _Exact(content.tensors)
    if content.architecture in FAMILIES:
        write_text_encoder_gguf(
            path, tensors, content.architecture, None, metadata=metadata, progress=progress
        )
    else:
        architecture = content.architecture or None
        write_gguf(path, tensors, None, architecture=architecture, metadata=metadata, progress=progress)


class _Exact(Mapping[str, "PackedTensor | torch.Tensor"]):
    """Matrices that need 32 bits are marked as such: the writer would round them to 16."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> PackedTensor | torch.Tensor:
        value = self._tensors[name]
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and 2 <= value.dim() <= 4:
            data = value.contiguous().view(-1).view(torch.uint8)
            return PackedTensor(data, FORMATS["F32"], tuple(value.shape))
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors
