"""Write the tables of supported formats into README.md and docs/formats.md, between their markers.

    python scripts/support_table.py            # rewrites what is out of date
    python scripts/support_table.py --check    # only says what is, and fails

The tables come from `quant_backends/registry.py`; needs torch, nothing else.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from snug_path import ROOT, register_snug

BEGIN, END = "<!-- support table: made by scripts/support_table.py -->", "<!-- end of support table -->"


def blocks() -> dict[Path, Callable[[], str]]:
    """The files with a table and what makes it."""
    register_snug()
    from snug.quant_backends import registry

    def readme() -> str:
        return f"{registry.support_table()}\n\nGGUF types: {', '.join(registry.gguf_types())}."

    return {ROOT / "README.md": readme, ROOT / "docs" / "formats.md": registry.details_table}


def updated(text: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with `block` between the markers; ValueError unless they occur once."""
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"expected once: {begin} … {end}")
    return pattern.sub(lambda _: f"{begin}\n{_wrapped(block)}\n{end}", text)


def outdated() -> dict[Path, str]:
    """The files whose table is not what the registry says, with what they should contain."""
    found = {}
    for path, block in blocks().items():
        text = path.read_text(encoding="utf-8")
        wanted = updated(text, block())
        if wanted != text:
            found[path] = wanted
    return found


def _wrapped(block: str) -> str:
    """Lines of running text cut at 118 characters, as in the rest of the documents; tables as they are."""
    lines = (
        [line] if line.startswith("|") else textwrap.wrap(line, 118, break_on_hyphens=False) or [""]
        for line in block.splitlines()
    )
    return "\n".join(part for line in lines for part in line)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    found = outdated()
    for path, text in found.items():
        print(f"{path.relative_to(ROOT)} is out of date" + ("" if check else ": rewritten"))
        if not check:
            path.write_text(text, encoding="utf-8")
    if check and found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
