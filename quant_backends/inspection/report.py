"""A summary as text for people: tables in fixed columns, and sentences."""

from __future__ import annotations

from collections.abc import Sequence

from ..memory.plan import size_text
from .summary import MAX_NAMES, Match, Summary


def report(summary: Summary) -> str:
    """All that the summary says, in sections."""
    sections = [
        _head(summary),
        ["Formats", *_formats(summary)],
        ["Blocks", *_groups(summary)],
        ["Why", *_choices(summary)],
        ["Tensors", *_match(summary)],
    ]
    if summary.fit is not None:
        sections.append(["Fit", *_fit(summary)])
    if summary.metadata:
        sections.append(["Metadata", *(f"  {key}: {value}" for key, value in summary.metadata.items())])
    return "\n\n".join("\n".join(lines) for lines in sections)


def count_text(count: int) -> str:
    """A large number of weights: "11.90 B", "820 M"."""
    if count >= 10**9:
        return f"{count / 10**9:.2f} B"
    return f"{count / 10**6:.1f} M" if count >= 10**6 else f"{count:,}"


def _head(summary: Summary) -> list[str]:
    facts = {
        "architecture": summary.architecture or "not recognised",
        **summary.facts,
        "parameters": f"{count_text(summary.parameters)} in {size_text(summary.nbytes)}",
    }
    return [
        summary.title,
        *_table([(f"{label}:", value) for label, value in facts.items()], ""),
        *summary.notes,
    ]


def _formats(summary: Summary) -> list[str]:
    rows = [
        (
            use.format,
            f"{use.tensors} tensors",
            f"{count_text(use.weights)} weights",
            size_text(use.nbytes),
            f"{use.bits_per_weight:.2f} bits/weight",
            f"{100 * use.nbytes / (summary.nbytes or 1):.1f} %",
        )
        for use in summary.formats
    ]
    return _table(rows, ">>>>>")


def _groups(summary: Summary) -> list[str]:
    rows = []
    for group in summary.groups:
        sizes = [nbytes for _, nbytes in group.blocks]
        each = size_text(min(sizes))
        if max(sizes) - min(sizes) > 0.01 * max(sizes):
            each = f"{each} to {size_text(max(sizes))}"
        blocks = f"{len(sizes)} × {each}" if len(sizes) > 1 else ""
        rows.append((group.name, size_text(group.nbytes), blocks))
    return _table(rows, ">")


def _choices(summary: Summary) -> list[str]:
    lines = []
    for choice in summary.choices:
        island = " [precision island]" if choice.is_island else ""
        count = "1 tensor" if choice.tensors == 1 else f"{choice.tensors} tensors"
        lines.append(f"  {choice.format}, {count}, {size_text(choice.nbytes)}: {choice.reason}{island}")
        if choice.is_island:
            lines.append(f"    such as {', '.join(choice.examples)}")
    return lines


def _match(summary: Summary) -> list[str]:
    match: Match | None = summary.match
    if match is None:
        return [f"  Missing and unexpected ones are not known: {summary.no_match}"]
    lines = [f"  ComfyUI builds {match.model} of them."]
    for label, names in (("Missing", match.missing), ("Unexpected", match.unexpected)):
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        listed = f": {', '.join(names[:MAX_NAMES])}{more}" if names else ""
        lines.append(f"  {label}: {len(names) or 'none'}{listed}")
    return lines


def _fit(summary: Summary) -> list[str]:
    fit = summary.fit
    if fit is None:
        return []
    computing = "not known" if fit.demand.computing is None else size_text(fit.demand.computing)
    rows = [
        ("weights", size_text(fit.demand.weights), "when loaded"),
        ("computing", computing, fit.demand.work),
        ("reserve", size_text(fit.device.reserve), "for the desktop and other programs"),
    ]
    return [*_table(rows, ">"), f"  {fit.verdict}", *([f"  {fit.streaming}"] if fit.streaming else [])]


def _table(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    """Rows in columns. alignment: ">" for each column after the first that is set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [False, *(sign == ">" for sign in alignment)] + [False] * len(widths)
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=False)
        ).rstrip()
        for row in rows
    ]
