from __future__ import annotations

import gguf
import pytest
import torch
from snug.quant_backends.core.errors import SnugError
from snug.quant_backends.formats import FORMATS, Format, format_by_ggml_type, quantizable_formats

# Only ever intermediate results of ggml's matrix products, never stored in a file.
NEVER_STORED = {"Q8_1", "Q8_K"}


def test_every_stored_ggml_type_has_a_format() -> None:
    assert set(FORMATS) == {ggml_type.name for ggml_type in gguf.GGMLQuantizationType} - NEVER_STORED


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_type_numbers_and_sizes_are_ggml_s(fmt: type[Format]) -> None:
    ggml_type = gguf.GGMLQuantizationType[fmt.name]
    assert fmt.ggml_type == ggml_type.value
    assert (fmt.block_size, fmt.block_bytes) == gguf.GGML_QUANT_SIZES[ggml_type]
    assert format_by_ggml_type(ggml_type.value) is fmt


def test_an_unknown_type_number_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        format_by_ggml_type(9999)


def test_everything_that_the_gguf_package_writes_can_be_written() -> None:
    plain = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 TQ1_0 TQ2_0 MXFP4"
    searched = "Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS"  # which the package only reads
    assert set(quantizable_formats()) == {*plain.split(), *searched.split()}


def test_a_format_that_cannot_be_written_names_those_that_can() -> None:
    with pytest.raises(SnugError, match=r"cannot write IQ3_S; choose one of .*Q8_0"):
        FORMATS["IQ3_S"].quantize_blocks(torch.zeros(1, 256))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_sizes_follow_from_the_shape(fmt: type[Format]) -> None:
    assert fmt.nbytes((3, 5, 2 * fmt.block_size)) == 30 * fmt.block_bytes
    assert fmt.nbytes((0, fmt.block_size)) == 0


def test_a_row_of_part_blocks_is_refused() -> None:
    with pytest.raises(SnugError, match=r"last dimension 100 is not a multiple of the block size 32"):
        FORMATS["Q4_0"].nbytes((4, 100))
    with pytest.raises(SnugError, match="last dimension 1 "):
        FORMATS["Q4_0"].nbytes(())
