"""How LoRA is applied to packed weights: settings that a MODEL carries from node to node."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

AUTOMATIC = "automatic"
MERGE = "merge while dequantizing"
BRANCH = "side branch"
# Under this name core's clones of a patcher hand the settings on.
_ATTACHMENT = "snug_lora_mode"


@dataclass(frozen=True)
class LoraSettings:
    """mode: AUTOMATIC, MERGE or BRANCH; the defaults are what a model without the node does.

    cache: whether weights with costly patches are kept merged and decoded where memory allows.
    beside: keys of weights that have AUTOMATIC where the others have MERGE, as they multiply in 8 bits.
    """

    mode: str = MERGE
    cache: bool = False
    beside: frozenset[str] = frozenset()

    def of_weight(self, key: str) -> LoraSettings:
        """What holds for one weight."""
        return replace(self, mode=AUTOMATIC) if self.mode == MERGE and key in self.beside else self


_DEFAULT = LoraSettings()


def lora_settings(patcher: Any) -> LoraSettings:
    return patcher.attachments.get(_ATTACHMENT, _DEFAULT)


def set_lora_settings(patcher: Any, settings: LoraSettings) -> None:
    patcher.set_attachments(_ATTACHMENT, settings)
