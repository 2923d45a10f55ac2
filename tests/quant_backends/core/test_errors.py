from __future__ import annotations

from pathlib import Path

import pytest
from snug.quant_backends.core.errors import FileFormatError, SnugError


def test_a_file_error_is_one_sentence_with_path_problem_and_hint() -> None:
    error = FileFormatError(
        Path("models/flux.gguf"), "the file ends after 12 bytes of 24", "download it again"
    )
    assert str(error) == "models/flux.gguf: the file ends after 12 bytes of 24; download it again."
    assert (error.path, error.hint) == ("models/flux.gguf", "download it again")


def test_a_file_error_needs_no_hint() -> None:
    assert str(FileFormatError("a.gguf", "no tensors")) == "a.gguf: no tensors."


def test_every_error_can_be_caught_as_a_snug_error() -> None:
    with pytest.raises(SnugError):
        raise FileFormatError("a.gguf", "no tensors")
