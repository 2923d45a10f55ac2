"""One model in several safetensors files, seen as one file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.errors import FileFormatError
from .gguf_values import shown
from .json_file import read_json_object
from .safetensors_file import PICKLE_HINT, SafetensorsFile
from .torchao_keys import NAMES

# huggingface_hub writes "<name>-00001-of-00003.safetensors"; anything that leads out of the folder is refused.
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\- ]{0,200}\.safetensors")
# A quantized model has some thousands of tensors, torchao describes each in the index as well.
MAX_INDEX_BYTES = 16 << 20
MAX_SHARDS = 1000
# One file of several, as huggingface_hub numbers them.
_PART = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$", re.IGNORECASE)
COMPLETE = "download the missing files of the folder, or all of it again"


def is_part(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one of several that are a model together, by its name: nothing in it says so."""
    match = _PART.search(os.fspath(path))
    return match is not None and int(match[1]) > 1


def refuse_part(path: str | os.PathLike[str]) -> None:
    """Raise FileFormatError for a file that is only a part of a model, whose other weights would be left at zero."""
    if is_part(path):
        raise FileFormatError(
            path,
            "the file is only one part of a model in several files, which this loader does not put together",
            "choose a version of the model in one file",
        )


class ShardedSafetensors(SafetensorsFile):
    """The shards that an index names, opened and checked, with the tensors of all of them.

    `path` is the index file. Raises FileFormatError when the index is damaged or names files outside its folder, when
    a shard is missing or damaged, or when index and shards disagree about where a tensor lies.
    """

    def __init__(self, index: str | os.PathLike[str]) -> None:
        self.path = Path(index)
        weight_map = self._read_index()
        shards = self._open(list(dict.fromkeys(weight_map.values())))
        self._owners: dict[str, SafetensorsFile] = {}
        self.tensors = {}
        for shard_name, shard in shards.items():
            for name, info in shard.tensors.items():
                if name in self._owners:
                    self.fail(
                        f"the tensor {shown(name)} lies in both {self._owners[name].path.name} and {shard_name}"
                    )
                self._owners[name] = shard
                self.tensors[name] = info
        for name, shard_name in weight_map.items():
            if name not in self._owners or self._owners[name] is not shards[shard_name]:
                self.fail(f"the tensor {shown(name)} should lie in {shard_name}, which does not have it")
        self.metadata = self._merged([shard.metadata for shard in shards.values()])

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype and shape, a view of its shard; KeyError for an unknown name."""
        return self._owners[name].read(name)

    def _read_index(self) -> dict[str, str]:
        weight_map: Any = read_json_object(self.path, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            self.fail("the index has no weight_map, which says in which file each tensor lies")
        for name, shard in weight_map.items():
            if isinstance(shard, str) and shard.endswith((".bin", ".pt", ".pth", ".ckpt")):
                self.fail(f"the index names the PyTorch pickle {shown(shard)}", PICKLE_HINT)
            if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
                self.fail(
                    f"the index puts {shown(name)} into {shown(str(shard))}, expected the name of a safetensors "
                    f"file in this folder"
                )
        return weight_map

    def _open(self, names: Sequence[str]) -> dict[str, SafetensorsFile]:
        if len(names) > MAX_SHARDS:
            self.fail(f"the index names {len(names)} files, expected at most {MAX_SHARDS}")
        missing = sorted(name for name in names if not (self.path.parent / name).is_file())
        if missing:
            more = f" and {len(missing) - 2} more" if len(missing) > 2 else ""
            self.fail(
                f"{len(missing)} of {len(names)} files are missing: {', '.join(missing[:2])}{more}", COMPLETE
            )
        return {name: SafetensorsFile(self.path.parent / name) for name in names}

    def _merged(self, found: Sequence[Mapping[str, str]]) -> dict[str, str]:
        """The metadata of all shards. diffusers writes the same into each; of other remarks the first counts."""
        if len({metadata.get(NAMES) for metadata in found}) > 1:
            self.fail("the files of the model list different torchao tensors", COMPLETE)
        return {key: value for metadata in reversed(found) for key, value in metadata.items()}
