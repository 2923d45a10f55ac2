"""Which files the loaders list, and where they lie."""

from __future__ import annotations

import folder_paths

from ...quant_backends.core.errors import SnugError

# ComfyUI lists no .gguf files under "diffusion_models"; other packs share this key for them.
GGUF_KEY = "unet_gguf"
EXTENSIONS = {"diffusion_models": ".safetensors", GGUF_KEY: ".gguf"}


def register() -> None:
    """Makes the `unet_gguf` folder key known, unless another pack already has.

    It shares ComfyUI's own list of diffusion-model folders (the list object itself), so folders that are
    added later through extra_model_paths.yaml are seen as well.
    """
    known = folder_paths.folder_names_and_paths
    if GGUF_KEY not in known:
        known[GGUF_KEY] = (known["diffusion_models"][0], {".gguf"})


def diffusion_model_files() -> list[str]:
    """Names of the diffusion-model files that Snug can load, relative to their folders, sorted."""
    names: set[str] = set()
    for key, extension in EXTENSIONS.items():
        names.update(n for n in folder_paths.get_filename_list(key) if n.lower().endswith(extension))
    return sorted(names)


def find_diffusion_model(name: str) -> str:
    """Full path of a listed file. Raises SnugError when it is gone."""
    for key, extension in EXTENSIONS.items():
        path = folder_paths.get_full_path(key, name) if name.lower().endswith(extension) else None
        if path is not None:
            return path
    folders = ", ".join(folder_paths.get_folder_paths("diffusion_models"))
    raise SnugError(
        f"The diffusion model '{name}' was not found in {folders}; put the file there, or press R in ComfyUI "
        f"to refresh the list and choose another one."
    )
