"""Where the core meets ComfyUI: the only modules that import `comfy`."""
