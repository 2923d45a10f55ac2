"""float8 weights with scales beside them: ComfyUI's first "scaled fp8" and files with the newer key alone.

`L.weight` float8, `L.scale_weight` (or `L.weight_scale`) float, one element or one a row; `L.scale_input` (or
`L.input_scale`) scales activations and is kept as an extra, as is the marker `[prefix]scaled_fp8`, whose dtype only
repeats the weights'.
"""

from __future__ import annotations

import torch

from .gguf_values import shown
from .key_groups import KeyGroups
from .safetensors_file import SafetensorsFile

KEYS = ((".scale_weight", ".scale_input"), (".weight_scale", ".input_scale"))
MARKER = "scaled_fp8"
FLOAT8 = {
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
    torch.float8_e4m3fnuz: "float8_e4m3fnuz",
    torch.float8_e5m2fnuz: "float8_e5m2fnuz",
}


def has_scaled_fp8(file: SafetensorsFile) -> bool:
    if any(name == MARKER or name.endswith("." + MARKER) for name in file.tensors):
        return True
    for name, info in file.tensors.items():
        if info.dtype in FLOAT8 and name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            if any(layer + scale in file.tensors for scale, _ in KEYS):
                return True
    return False


def load_scaled_fp8(groups: KeyGroups) -> None:
    groups.keep([name for name in groups.file.tensors if name == MARKER or name.endswith("." + MARKER)])
    for scale_key, input_key in KEYS:
        for layer in groups.ending(scale_key):
            name = f"{layer}.weight"
            info = groups.file.tensors.get(name)
            if info is None or name not in groups.left:
                continue
            groups.keep([layer + input_key])
            weight, scale = groups.take(name), groups.take(layer + scale_key)
            if info.dtype in FLOAT8:
                block = "tensor" if scale.numel() == 1 else "rows"
                groups.pack(name, weight, f"{FLOAT8[info.dtype]}-{block}", info.shape, {"scale": scale})
            elif scale.numel() == 1 and info.dtype.is_floating_point and scale.dtype.is_floating_point:
                # Converters write a scale, mostly 1, beside layers that they left as they were.
                groups.state_dict[name] = (weight.float() * scale.float().view(())).to(weight.dtype)
            else:
                groups.file.fail(f"the weight {shown(name)} is {info.dtype_name} with {scale.numel()} scales")
