"""Which layers keep their precision when a model's weights are cast to float8.

The names of modules decide, as in diffusers' layerwise casting (`diffusers/hooks/layerwise_casting.py`). Its patterns
were made for diffusers' names; models under their reference names get the lists of the GGUF converters as well.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from ..core.errors import SnugError
from ..writers.architecture import detect_architecture
from ..writers.precision import RULES, PrecisionRules

DEFAULT = "default"
# diffusers' DEFAULT_SKIP_MODULES_PATTERN.
DIFFUSERS = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$")
# The same roles in models that no list is published for: embedders, time and other conditioning, the last layer.
ROLES = (
    "(img|txt|time|vector|guidance|cond|conv)_in",
    "(x|t|y|p|s|cap|context|time|timestep|pixel)_embed",
    "(patch|time|text|label|class|add|size|caption)_(emb|proj)",
    "adaln_single",
    "patchify",
    "^(final_layer|final_linear|head|last_layer|proj_out|conv_out|out)",
)
# Text encoders: tables, which diffusers does not cast either, and the projection at the end. LTX-2's connectors behind
# it are transformers of their own.
TEXT_ENCODER = (
    "norm",
    "embed(?!dings_connector)",
    r"(^|\.)shared$",
    "relative_attention_bias",
    r"(^|_|\.)projection$",
    "lm_head",
)


@dataclass(frozen=True, slots=True)
class SkipRules:
    """patterns: regular expressions, searched in the names of a layer and of every module around it; table: the GGUF
    converters' list for the architecture.
    """

    patterns: tuple[str, ...]
    table: PrecisionRules = PrecisionRules()

    def reason(self, name: str) -> str | None:
        """What keeps the layer `name` (of the network itself, without ComfyUI's prefix) as it is; None: nothing."""
        parts = name.split(".")
        around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        for pattern in self.patterns:
            if any(re.search(pattern, module) for module in around):
                return pattern
        return next((part for part in self.table.half if part in f"{name}.weight"), None)


def parse_skip_patterns(text: str, names: Collection[str], is_text_encoder: bool = False) -> SkipRules:
    """What a user wrote: regular expressions between commas; the word "default" stands for the defaults.

    names: of all parameters of the network, which tell its architecture. Nothing written: everything is cast.
    Raises SnugError for what is no regular expression.
    """
    patterns: list[str] = []
    table = PrecisionRules()
    for item in filter(None, (item.strip() for item in text.split(","))):
        if item != DEFAULT:
            _check(item)
            patterns.append(item)
        elif is_text_encoder:
            patterns += TEXT_ENCODER
        else:
            known = RULES.get(detect_architecture(names) or "")
            table = known or table
            patterns += DIFFUSERS if known else (*DIFFUSERS, *ROLES)
    return SkipRules(tuple(patterns), table)


def _check(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise SnugError(
            f"The skip pattern {pattern!r} is no regular expression ({error}); write parts of layer names between "
            f"commas, for example: default, attn2."
        ) from error
