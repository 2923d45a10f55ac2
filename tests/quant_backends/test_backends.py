"""What every backend promises, for each format that the registry lists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from quantized_files import KINDS, quantize_tensors
from random_packed import random_packed
from safetensors.torch import save_file
from snug.quant_backends import registry
from snug.quant_backends.core.backend import Backend, FormatFamily, Status
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.formats.scaled import format_called
from snug.quant_backends.kernels.dequantize import dequantize_packed
from snug.quant_backends.readers.conventions import KNOWN, open_quantized_safetensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = list(registry.BACKENDS.values())
PACKED = [(backend, family) for backend in BACKENDS for family in backend.families if family.examples]
EXAMPLES = [(backend, name) for backend, family in PACKED for name in family.examples]
# What writes a file of each family; GGUF has its own tests of the same (formats/test_decode, readers).
FILES: dict[str, tuple[str, ...]] = {
    "NF4 (bitsandbytes)": ("nf4", "nf4-nested"),
    "FP4 (bitsandbytes)": ("fp4",),
    "INT8 (bitsandbytes)": ("int8",),
    "Scaled FP8": ("fp8", "fp8-rows"),
    "Block-scaled FP8": ("fp8-blocks",),
    "INT8 (ComfyUI)": ("core-int8", "core-int8-rotated"),
    "qint8 (quanto)": ("quanto-int8",),
    "qfloat8 (quanto)": ("quanto-float8",),
    "qint4, qint2 (quanto)": ("quanto-int4",),
    "INT8 (torchao)": ("torchao-int8",),
    "FP8 (torchao)": ("torchao-float8",),
}
# What a library cannot do with a format that is its own: it says so, and Snug decodes alone.
ALONE = {
    ("gguf", "Q1_0"): "the gguf package 0.19 does not know it",
    ("fp8", "float8_e4m3fn-rows"): "comfy-kitchen scales whole tensors",
    ("fp8", "float8_e5m2-rows"): "comfy-kitchen scales whole tensors",
    ("fp8", "float8_e4m3fn-128x128"): "comfy-kitchen scales whole tensors",
}
# The library adds up a matrix product in an order of its own.
CLOSE = ("int8-rows-rotated-256",)
# Libraries that calculate in the type of the scales alone, and those whose result is rounded once from float32.
ONE_DTYPE, EXACT = ("quanto",), ("gguf", "bitsandbytes")
# bitsandbytes always stores float32 here.
SCALES = {"int8-rows-scb": (torch.float32,)}

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
every_example = pytest.mark.parametrize(
    ("backend", "name"), EXAMPLES, ids=[f"{backend.name}-{name}" for backend, name in EXAMPLES]
)


def needs(backend: type[Backend]) -> None:
    if backend.unavailable():
        pytest.skip(str(backend.unavailable()))


def steps_apart(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> int:
    """The largest distance in units in the last place of `dtype`; a NaN is where a NaN is."""
    found, expected = found.to(dtype), expected.to(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    words = torch.int32 if dtype == torch.float32 else torch.int16
    ordered = []
    for values in (found, expected):
        bits = values.nan_to_num(0, float("inf"), float("-inf")).contiguous().view(words).long()
        ordered.append(torch.where(bits < 0, -(bits & torch.iinfo(words).max), bits))
    return int((ordered[0] - ordered[1]).abs().max())


def coarser(*dtypes: torch.dtype) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def test_the_backends_are_those_of_the_documents() -> None:
    assert [backend.name for backend in BACKENDS] == [
        "gguf",
        "bitsandbytes",
        "fp8",
        "int8",
        "quanto",
        "torchao",
    ]


@every_backend
def test_each_backend_is_one_file_of_its_name(backend: type[Backend]) -> None:
    assert backend.__module__.endswith(f".quant_backends.{backend.name}")


@every_backend
def test_an_absent_library_is_explained(backend: type[Backend], monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def absent(package: str) -> str:
        if package == backend.package:
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(metadata, "version", absent)
    sentence = backend.unavailable()
    assert sentence is not None
    assert f"`pip install {backend.package}`" in sentence and "files load without it" in sentence
    packed = random_packed(backend.families[0].examples[0], (4, 256))
    with pytest.raises(SnugError, match="not installed"):
        backend.dequantize(packed)
    dequantize_packed(packed)


@every_backend
def test_a_broken_library_is_explained(backend: type[Backend], monkeypatch: pytest.MonkeyPatch) -> None:
    needs(backend)

    def broken(module: str = "") -> None:
        raise OSError("libsomething.so.12: cannot open shared object file\nmore lines")

    monkeypatch.setattr(backend, "library", broken)
    expected = (
        rf"{backend.package} \d.* cannot decode a .*\(OSError: libsomething.so.12: .* file\); use Snug's"
    )
    with pytest.raises(SnugError, match=expected):
        backend.dequantize(random_packed(backend.families[0].examples[0], (4, 256)))


@every_backend
def test_foreign_formats_are_refused(backend: type[Backend]) -> None:
    needs(backend)
    foreign = "int8-rows-scb" if backend.name == "gguf" else "Q8_0"
    with pytest.raises(SnugError, match=f"does not decode {foreign}; it decodes the like of"):
        backend.dequantize(random_packed(foreign, (4, 256)))


def test_asking_imports_no_library(root: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(root / "scripts")!r})
from snug_path import register_snug
register_snug()
from snug.quant_backends import registry
before = set(sys.modules)
[backend.unavailable() for backend in registry.BACKENDS.values()], registry.summary_for_tooltip()
heavy = ("gguf", "bitsandbytes", "torchao", "optimum", "comfy_kitchen")
print([name for name in sys.modules if name.split(".")[0] in heavy])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@every_example
def test_example_names_resolve(backend: type[Backend], name: str) -> None:
    fmt = format_called(name)
    assert fmt.name == name
    assert backend.handles(fmt) or (backend.name, name) in ALONE


@pytest.mark.parametrize("family", [family for _, family in PACKED], ids=lambda family: family.title)
def test_bits_per_weight(family: FormatFamily) -> None:
    assert family.bits is not None
    for name in family.examples:
        for shape in ((256, 1024), (1024, 4096)):
            found = random_packed(name, shape).nbytes * 8 / (shape[0] * shape[1])
            assert family.bits[0] <= found <= family.bits[1], name


@pytest.mark.parametrize("family", registry.families(), ids=lambda family: family.title)
def test_what_the_registry_says_is_so(family: FormatFamily) -> None:
    readers = {name for name, _, _ in KNOWN} | {"gguf", "core", "snug", "plain", ""}
    assert family.convention in readers
    assert family.recognised_by
    if family.status is Status.PACKED:
        assert family.convention and family.examples and family.label and family.files
    if family.status is Status.REFUSED:
        assert family.note


def test_every_convention_is_listed() -> None:
    listed = {family.convention for family in registry.families()}
    assert {name for name, _, _ in KNOWN} <= listed
    assert set(registry.gguf_types()) <= set(FORMATS)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of random bytes that are no numbers
@every_example
@pytest.mark.parametrize("shape", [(1, 256), (6, 512), (3, 1024)], ids=str)
def test_decoding_equals_the_library(backend: type[Backend], name: str, shape: tuple[int, ...]) -> None:
    """Bit for bit in the type of the scales, else within one unit in the last place of the narrower type."""
    needs(backend)
    if (backend.name, name) in ALONE:
        with pytest.raises(SnugError, match="does not decode|cannot decode"):
            backend.dequantize(random_packed(name, shape))
        return
    for scale_dtype in DTYPES:
        packed = random_packed(name, shape, scale_dtype)
        for dtype in DTYPES:
            if (
                dtype != scale_dtype
                and backend.name in ONE_DTYPE
                or scale_dtype not in SCALES.get(name, DTYPES)
            ):
                continue
            expected, found = backend.dequantize(packed, dtype), dequantize_packed(packed, dtype)
            assert found.shape == expected.shape == shape and found.dtype == expected.dtype == dtype
            if name in CLOSE:
                torch.testing.assert_close(
                    found, expected, rtol=0.02, atol=1e-5 if dtype == torch.float32 else 0.02
                )
                continue
            exact = dtype == scale_dtype or backend.name in EXACT
            apart = steps_apart(found, expected, coarser(dtype, scale_dtype))
            assert apart <= (0 if exact else 1), (scale_dtype, dtype)


def write_blocks(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Block-scaled FP8 as DeepSeek's conversion script computes it: weight_scale_inv for squares of 128."""
    written = {}
    for name, weight in tensors.items():
        if weight.dim() < 2:
            written[name] = weight
            continue
        rows, columns = weight.shape
        squares = weight.view(rows // 128, 128, columns // 128, 128)
        scale = squares.abs().amax((1, 3)).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        written[name] = (squares / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
        written[name.removesuffix("weight") + "weight_scale_inv"] = scale
    return written, {}


def write_core_int8(
    tensors: dict[str, torch.Tensor], rotated: bool
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """As ComfyUI's layers save themselves: comfy-kitchen's layout, described beside the weight."""
    layout = pytest.importorskip("comfy_kitchen.tensor").TensorWiseINT8Layout
    options = {"is_weight": True, "per_channel": True, "convrot": rotated, "convrot_groupsize": 64}
    data, params = layout.quantize(tensors["a.weight"], **options)
    written = {"a.bias": tensors["a.bias"], "a.weight": data, "a.weight_scale": params.scale}
    described = {"format": "int8_tensorwise"} | (
        {"convrot": True, "convrot_groupsize": 64} if rotated else {}
    )
    written["a.comfy_quant"] = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)
    return written, {}


def test_every_family_has_a_writer() -> None:
    assert set(FILES) == {family.title for _, family in PACKED} - {"GGUF"}
    kinds = {kind for kinds in FILES.values() for kind in kinds}
    assert kinds == {*KINDS, "fp8-blocks", "core-int8", "core-int8-rotated"}


@pytest.mark.parametrize(
    ("backend", "family", "kind"),
    [(backend, family, kind) for backend, family in PACKED for kind in FILES.get(family.title, ())],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_the_real_writers(
    backend: type[Backend], family: FormatFamily, kind: str, tmp_path: Path
) -> None:
    values = torch.randn(256, 384, generator=torch.Generator().manual_seed(1)) / 20
    values[:128, :128] = 0
    write: Callable[..., tuple[dict[str, torch.Tensor], dict[str, str]]] = quantize_tensors
    arguments: tuple[object, ...] = (kind,)
    if kind == "fp8-blocks":
        write, arguments = write_blocks, ()
    elif kind.startswith("core"):
        write, arguments = write_core_int8, (kind == "core-int8-rotated",)
    tensors, extra = write({"a.weight": values, "a.bias": torch.ones(256)}, *arguments)
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=extra)
    loaded = open_quantized_safetensors(path)
    assert loaded.convention.name == family.convention
    packed = loaded.state_dict["a.weight"]
    assert isinstance(packed, PackedTensor)
    assert backend.handles(packed.format) or backend.name == "fp8"
    found = dequantize_packed(packed)
    assert not found[:128, :128].any() or "rotated" in kind
    assert (found - values).norm() < 0.2 * values.norm()
    if backend.handles(packed.format):
        needs(backend)
        expected = backend.dequantize(packed, torch.float32)
        assert (
            torch.allclose(found, expected, atol=1e-6) if "rotated" in kind else torch.equal(found, expected)
        )


@every_example
def test_encoding_by_the_library(backend: type[Backend], name: str) -> None:
    """A library's own encoding decodes to about the weights, or it says in one sentence that it has none."""
    needs(backend)
    values = torch.randn(64, 512, generator=torch.Generator().manual_seed(3)) / 30
    fmt = format_called(name)
    try:
        packed = backend.quantize(values, fmt)
    except SnugError as error:
        # tests/quant_backends/formats compares the encodings of those that have one byte by byte.
        assert re.search("does not encode|cannot encode", str(error)) and str(error).endswith(".")
        assert backend.name in ("gguf", "fp8", "quanto")
        return
    assert packed.format == fmt and packed.shape == values.shape
    assert (dequantize_packed(packed) - values).norm() < 0.85 * values.norm()


@pytest.mark.parametrize("name", ["bnb-nf4-64", "bnb-fp4-128-nested-256"])
def test_bitsandbytes_decodes_blocks_that_cross_rows(name: str) -> None:
    """The library's code for AVX-512 takes every row for blocks of its own."""
    values = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    packed = registry.BACKENDS["bitsandbytes"].quantize(values, format_called(name))
    assert torch.equal(registry.BACKENDS["bitsandbytes"].dequantize(packed), dequantize_packed(packed))
