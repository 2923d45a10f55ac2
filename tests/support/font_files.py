"""Font files made for tests: TrueType with only the tables that FreeType asks for."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

EM = 1000


def write_font(path: Path, ranges: Iterable[tuple[int, int]]) -> None:
    """A font with a filled square, 600 of 1000 units wide, for every code point of the ranges (first, last).

    What it lacks it draws as nothing. Layout: https://learn.microsoft.com/typography/opentype/spec/otff
    """
    points = ((100, 0), (700, 0), (700, 600), (100, 600))
    square = struct.pack(">5h", 1, 100, 0, 700, 600)  # one contour, and its box
    square += struct.pack(">HH", len(points) - 1, 0)  # its last point; no instructions
    square += bytes([1] * len(points))  # all on the curve, coordinates as 16 bits
    for axis in (0, 1):
        places = [0, *(point[axis] for point in points)]
        square += struct.pack(f">{len(points)}h", *(b - a for a, b in zip(places, places[1:], strict=False)))
    # Format 13: many to one glyph.
    groups = b"".join(struct.pack(">III", first, last, 1) for first, last in sorted(ranges))
    cmap = struct.pack(">HHHHI", 0, 1, 3, 10, 12)
    cmap += struct.pack(">HHIII", 13, 0, 16 + len(groups), 0, len(groups) // 12) + groups
    tables = {
        b"cmap": cmap,
        b"glyf": square,
        b"head": struct.pack(
            ">IIIIHHqq4hHHhhh", 0x10000, 0, 0, 0x5F0F3CF5, 0, EM, 0, 0, 100, 0, 700, 600, 0, 8, 2, 1, 0
        ),
        b"hhea": struct.pack(
            ">I3hH3h3h4hhH", 0x10000, 800, -200, 0, 800, 100, 100, 700, 1, 0, 0, 0, 0, 0, 0, 0, 2
        ),
        b"hmtx": struct.pack(">HhHh", 800, 0, 800, 100),
        b"loca": struct.pack(">III", 0, 0, len(square)),
        b"maxp": struct.pack(">I14H", 0x10000, 2, 4, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0),
    }
    start = 12 + 16 * len(tables)
    header, body = struct.pack(">IHHHH", 0x10000, len(tables), 64, 2, 48), b""
    for tag, data in sorted(tables.items()):
        header += struct.pack(">4sIII", tag, 0, start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    path.write_bytes(header + body)
