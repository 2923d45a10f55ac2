"""The command line: `python -m snug …`, or `python path/to/ComfyUI-Snug …` where the pack is not installed."""

from __future__ import annotations

import sys
from importlib import import_module, util
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def main() -> int:
    if (
        not __package__
    ):  # started by the folder's path: the folder is the package `snug`, not a place to import from
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
        spec = util.spec_from_file_location(
            "snug", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec is not None and spec.loader is not None
        package = util.module_from_spec(spec)
        sys.modules["snug"] = package
        spec.loader.exec_module(package)
    return import_module(f"{__package__ or 'snug'}.quant_backends.cli").main()


if __name__ == "__main__":
    sys.exit(main())
