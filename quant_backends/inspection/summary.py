"""The summary of a model, from a file or from memory, as data and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .blocks import BlockGroup, group_blocks
from .choices import Choice, explain
from .fit import Fit
from .stored import StoredWeight

# Longer metadata is cut; names of tensors beyond so many are only counted.
MAX_VALUE = 160
MAX_METADATA = 60
MAX_NAMES = 20


@dataclass(frozen=True, slots=True)
class FormatUse:
    """One format of a model."""

    format: str
    tensors: int
    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights if self.weights else 0.0


@dataclass(frozen=True, slots=True)
class Match:
    """How the tensors of a file fit the model that ComfyUI builds of them. model: its class there."""

    model: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """title: what was inspected. facts: label to value, for people, in order. match: None where no model could be built
    to compare with, no_match says why. fit: None for what is not run alone."""

    title: str
    architecture: str | None
    facts: Mapping[str, str]
    formats: Sequence[FormatUse]
    groups: Sequence[BlockGroup]
    choices: Sequence[Choice]
    metadata: Mapping[str, str]
    match: Match | None = None
    no_match: str = ""
    fit: Fit | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def parameters(self) -> int:
        return sum(use.weights for use in self.formats)

    @property
    def nbytes(self) -> int:
        return sum(use.nbytes for use in self.formats)

    def as_dict(self) -> dict[str, Any]:
        """Plain data: bytes and counts as whole numbers."""
        match = None if self.match is None else asdict(self.match)
        return {
            "title": self.title,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "facts": dict(self.facts),
            "formats": [{**asdict(use), "bits_per_weight": use.bits_per_weight} for use in self.formats],
            "groups": [
                {"name": group.name, "tensors": group.tensors, "weights": group.weights}
                | {"bytes": group.nbytes, "blocks": dict(group.blocks)}
                for group in self.groups
            ],
            "choices": [asdict(choice) for choice in self.choices],
            "metadata": dict(self.metadata),
            "match": match,
            "no_match": self.no_match,
            "fit": None if self.fit is None else _fit_as_dict(self.fit),
            "notes": list(self.notes),
        }


def to_json(summaries: Iterable[Summary]) -> str:
    """A list with one object for each summary."""
    return json.dumps([summary.as_dict() for summary in summaries], indent=2, ensure_ascii=False)


def summarize(
    title: str,
    weights: Sequence[StoredWeight],
    architecture: str | None,
    *,
    facts: Mapping[str, str],
    metadata: Mapping[str, Any],
    match: Match | None = None,
    no_match: str = "",
    fit: Fit | None = None,
    notes: Sequence[str] = (),
) -> Summary:
    """Counts what the weights are in, and says why."""
    return Summary(
        title=title,
        architecture=architecture,
        facts=facts,
        formats=count_formats(weights),
        groups=group_blocks(weights),
        choices=explain(weights, architecture),
        metadata=shorten(metadata),
        match=match,
        no_match=no_match,
        fit=fit,
        notes=notes,
    )


def count_formats(weights: Iterable[StoredWeight]) -> list[FormatUse]:
    """The histogram of formats, the largest part of the bytes first."""
    found: dict[str, list[StoredWeight]] = {}
    for weight in weights:
        found.setdefault(weight.format, []).append(weight)
    uses = [
        FormatUse(
            name,
            len(members),
            sum(weight.weights for weight in members),
            sum(weight.nbytes for weight in members),
        )
        for name, members in found.items()
    ]
    return sorted(uses, key=lambda use: -use.nbytes)


def shorten(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as text on one line each; of more than MAX_METADATA entries the first.

    What is said of single tensors (shapes in GGUF files, torchao's descriptions) is only counted.
    """
    shown = {}
    keys = [key for key in metadata if not key.endswith((".weight", ".bias"))]
    for key in keys[:MAX_METADATA]:
        value = metadata[key]
        if isinstance(value, tuple) and len(value) > 8:
            shown[key] = f"{len(value)} values: {_cut(', '.join(map(str, value[:8])))}, …"
        else:
            shown[key] = _cut(str(value))
    if len(keys) > MAX_METADATA:
        shown["…"] = f"{len(keys) - MAX_METADATA} more entries"
    if len(metadata) > len(keys):
        shown["of single tensors"] = f"{len(metadata) - len(keys)} entries"
    return shown


def _cut(text: str) -> str:
    text = " ".join(text[: 2 * MAX_VALUE].split())
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}…"


def _fit_as_dict(fit: Fit) -> dict[str, Any]:
    return {
        "device": asdict(fit.device),
        "weights": fit.demand.weights,
        "computing": fit.demand.computing,
        "work": fit.demand.work,
        "needed": fit.needed,
        "fits": not fit.offloaded,
        "offloaded": fit.offloaded,
        "offloaded_blocks": fit.offloaded_blocks,
        "blocks": len(fit.demand.blocks),
        "verdict": fit.verdict,
        "streaming": fit.streaming,
    }
