"""Every format of model files that Snug knows, what becomes of it, and the texts that are made from that.

`python scripts/support_table.py` writes the tables into README.md and docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Iterable

# Importing a backend registers it, in this order.
from . import gguf, bitsandbytes, fp8, int8, quanto, torchao  # isort: skip
from .core.backend import BACKENDS, Backend, FileKind, FormatFamily, Status
from .readers.conventions import ALTERNATIVE, OWN, REFUSED
from .readers.safetensors_file import PICKLE_HINT

__all__ = [
    "BACKENDS",
    "OTHERS",
    "Backend",
    "FileKind",
    "FormatFamily",
    "Status",
    "bitsandbytes",
    "details_table",
    "families",
    "fp8",
    "gguf",
    "gguf_types",
    "int8",
    "quanto",
    "summary_for_tooltip",
    "support_table",
    "torchao",
]

_SAFETENSORS = (FileKind.SAFETENSORS,)


def _together(endings: Iterable[str]) -> str:
    return " with ".join(f"`{ending}`" for ending in endings)


# What no backend stands for: Snug's own, ComfyUI's own formats, and what is refused.
OTHERS: tuple[FormatFamily, ...] = (
    FormatFamily(
        title="INT8 and FP8 that multiply in 8 bits (Snug)",
        convention=OWN,
        recognised_by="`snug_activations` in the metadata",
        writers="Snug",
        files=_SAFETENSORS,
        examples=(
            "product-int8-dynamic",
            "product-int8-static",
            "product-float8_e4m3fn-dynamic",
            "product-float8_e4m3fn-static",
        ),
        bits=(8.0, 8.5),
        label="INT8",
        note="other programs read the weights of all but static INT8, which they refuse",
    ),
    FormatFamily(
        title="ComfyUI's own (FP8, NVFP4, MXFP8, INT8 …)",
        convention="core",
        recognised_by="`.comfy_quant`, or `_quantization_metadata` in the metadata",
        writers="ComfyUI's own conversion scripts",
        files=_SAFETENSORS,
        status=Status.COMFYUI,
        note="FP8 by Snug where ComfyUI does not know it yet, the rest needs a ComfyUI that does",
    ),
    *(
        FormatFamily(
            title=kind,
            convention="",
            recognised_by=", or ".join(_together(endings) for endings, other, _ in REFUSED if other == kind),
            writers="",
            files=_SAFETENSORS,
            status=Status.REFUSED,
            note=f"{reason}; {ALTERNATIVE}",
        )
        for kind, reason in {kind: reason for _, kind, reason in REFUSED}.items()
    ),
    FormatFamily(
        title="Pickles (.ckpt, .pt, .pth, .bin)",
        convention="",
        recognised_by="the first bytes of the file",
        writers="PyTorch",
        files=(),
        status=Status.REFUSED,
        note=PICKLE_HINT,
    ),
)


def families() -> list[FormatFamily]:
    """Every family, those that stay packed first, refused ones last; otherwise in the order of the backends."""
    found = [*(family for backend in BACKENDS.values() for family in backend.families), *OTHERS]
    return sorted(found, key=lambda family: list(Status).index(family.status))


def gguf_types() -> list[str]:
    """The GGUF types that weights come in, largest first."""
    bits = {fmt.name: fmt.block_bytes / fmt.block_size for fmt in gguf.TYPES}
    return sorted(bits, key=lambda name: -bits[name])


def summary_for_tooltip() -> str:
    """What loads, in one line: "GGUF (27 types), NF4, FP4, …, diffusers folders"."""
    packed = [family for family in families() if family.status is Status.PACKED]
    labels = dict.fromkeys(family.label for family in packed if family.label)
    folders = any(FileKind.FOLDER in family.files for family in packed)
    return ", ".join([*labels, *(["diffusers folders"] if folders else [])])


def support_table() -> str:
    """The table of the README in Markdown: what a user wants to know about a file."""
    header = ("format", "bits per weight", "found as", "made with", "how it loads")
    return _markdown(
        header,
        (
            (family.title, _bits(family), _files(family), family.writers or "–", _loads(family))
            for family in families()
        ),
    )


def details_table() -> str:
    """The table of docs/formats.md: how a format is recognised, what Snug calls it, where it can be decoded."""
    header = ("format", "recognised by", "names in Snug", "decoded on", "its library")
    backends = {family: backend for backend in BACKENDS.values() for family in backend.families}
    rows = []
    for family in families():
        package = backends[family].package if family in backends and family.examples else None
        names = ", ".join(family.examples[:4]) + (", …" if len(family.examples) > 4 else "")
        devices = family.devices if family.status is Status.PACKED else "–"
        rows.append((family.title, family.recognised_by, names or "–", devices, package or "–"))
    return _markdown(header, rows)


def _bits(family: FormatFamily) -> str:
    if family.bits is None:
        return "–"
    least, most = (f"{bits:.1f}".removesuffix(".0") for bits in family.bits)
    return least if least == most else f"{least}–{most}"


def _files(family: FormatFamily) -> str:
    return (
        ", ".join(f"`{kind.value}`" if kind.value.startswith(".") else kind.value for kind in family.files)
        or "–"
    )


def _loads(family: FormatFamily) -> str:
    return f"{family.status.value}: {family.note}" if family.note else family.status.value


def _markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [tuple(header), *(tuple(row) for row in rows)]
    lines.insert(1, ("---",) * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
