"""`snug quantize`: real files, read back by Snug's reader and the gguf package."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from snug.quant_backends.cli import console, quantize, writing
from snug.quant_backends.cli.opening import open_tensors
from snug.quant_backends.core.packed import PackedTensor
from snug.quant_backends.formats import FORMATS
from snug.quant_backends.kernels.dequantize import dequantize_packed, quantize_packed
from snug.quant_backends.quantization import LayerInfo, make_recipe
from snug.quant_backends.quantization.calibration import Calibration, LayerStatistics, save_calibration
from snug.quant_backends.readers import load_diffusion_gguf
from snug.quant_backends.readers.safetensors_file import SafetensorsFile

Run = Callable[..., tuple[int, str, str]]
Tensors = dict[str, torch.Tensor]
T5 = {
    "shared.weight": torch.ones(64, 32),
    "encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(32, 32),
}
LAYERS = [f"blocks.{block}.ffn.0.weight" for block in range(3)]


def test_a_gguf_file(model: Path, tensors: Tensors, snug: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    code, _, messages = snug("quantize", model, out, "--to", "GGUF Q8_0")
    assert code == 0 and "3 layers quantized (3 in Q8_0)" in messages
    found = load_diffusion_gguf(out)
    assert found.kind == "GGUF, architecture 'wan'" and found.state_dict.keys() == tensors.keys()
    for name, value in found.state_dict.items():
        if name in LAYERS:
            assert isinstance(value, PackedTensor)
            assert torch.equal(value.data, quantize_packed(tensors[name], FORMATS["Q8_0"]).data)
        else:
            assert isinstance(value, torch.Tensor) and torch.equal(value.float(), tensors[name].float())
    field = gguf.GGUFReader(out).get_field(writing.PROVENANCE)
    assert field is not None
    provenance = json.loads(field.contents())
    assert provenance["sources"] == [
        {
            "file": model.name,
            "bytes": model.stat().st_size,
            "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        }
    ]
    assert provenance["recipes"][0]["target"] == "GGUF Q8_0"


@pytest.mark.parametrize(
    "target",
    ["FP8 e4m3fn per row", "INT8 per row rotated", "bitsandbytes NF4 double", "torchao int8", "quanto int4"],
)
def test_a_safetensors_file(target: str, model: Path, tensors: Tensors, snug: Run, tmp_path: Path) -> None:
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    code, _, messages = snug("quantize", model, out, "--to", target)
    assert code == 0 and "3 layers quantized" in messages
    recipe = make_recipe(target, [LayerInfo(LAYERS[0].removesuffix(".weight"), (128, 256))])
    expected = recipe.quantize(LayerInfo(LAYERS[0].removesuffix(".weight"), (128, 256)), tensors[LAYERS[0]])
    assert expected is not None
    file = SafetensorsFile(out)
    assert json.loads(file.metadata[writing.PROVENANCE])["recipes"][0]["target"] == target
    assert snug("convert", out, again)[0] == 0
    for path in (out, again):  # converting from one to the other changes nothing
        found = open_tensors(path)
        assert found.keys() == tensors.keys()
        packed = found[LAYERS[0]]
        assert isinstance(packed, PackedTensor)
        assert torch.equal(dequantize_packed(packed), dequantize_packed(expected))
        kept = found["text_embedding.0.weight"]
        assert isinstance(kept, torch.Tensor) and torch.equal(kept, tensors["text_embedding.0.weight"])


@pytest.mark.parametrize(
    "target", ["INT8 dynamic", "FP8 static", "INT8 static", "bitsandbytes LLM.int8 threshold 3"]
)
def test_layers_that_multiply_in_8_bits(
    target: str, model: Path, tensors: Tensors, snug: Run, tmp_path: Path
) -> None:
    """Written, and copied by convert as they are; static ones with what a calibration file says."""
    out, again, file = (tmp_path / f"{name}.safetensors" for name in ("out", "again", "calibration"))
    seen = LayerStatistics(torch.ones(256), torch.ones(256) * 3, torch.tensor([-1.0, 3.0]), 1)
    save_calibration(Calibration({name.removesuffix(".weight"): seen for name in LAYERS}, {}), file)
    arguments = ("quantize", model, out, "--to", target)
    if "static" in target:
        code, _, messages = snug(*arguments)
        assert code == 1 and "needs a calibration" in messages and not out.exists()
        arguments = (*arguments, "--calibration", file)
    code, _, messages = snug(*arguments)
    assert code == 0 and "3 layers quantized" in messages
    layer = LayerInfo(LAYERS[0].removesuffix(".weight"), (128, 256))
    recipe = make_recipe(target, [layer], statistics={layer.name: seen})
    expected = recipe.quantize(layer, tensors[LAYERS[0]])
    assert expected is not None and snug("convert", out, again)[0] == 0
    for path in (out, again):
        packed = open_tensors(path)[LAYERS[0]]
        assert isinstance(packed, PackedTensor) and packed.format == expected.format
        assert torch.equal(packed.data.view(torch.uint8), expected.data.view(torch.uint8))
        for name, part in expected.parts.items():
            assert torch.equal(packed.parts[name].view(-1), part.view(-1))


def test_own_exclusions(model: Path, snug: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert snug("quantize", model, out, "--to", "GGUF Q8_0", "--skip", r"default, blocks\.1")[0] == 0
    packed = {
        n for n, value in load_diffusion_gguf(out).state_dict.items() if isinstance(value, PackedTensor)
    }
    assert packed == {LAYERS[0], LAYERS[2]}


def test_a_size_to_fit(model: Path, snug: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    # One of three layers may keep its 16 bits.
    budget = (
        2 * FORMATS["Q8_0"].nbytes((128, 256))
        + 128 * 256 * 2
        + 64 * 256 * 2
        + 4 * (512 + 256 + 3 * 128)
        + 100
    )
    code, _, messages = snug("quantize", model, out, "--to", "GGUF Q8_0", "--fit", budget / 2**30)
    assert code == 0 and "automatic mix" in messages
    reader = gguf.GGUFReader(out)
    nbytes = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert 0.8 * budget < nbytes <= budget
    field = reader.get_field(writing.PROVENANCE)
    assert field is not None and set(json.loads(field.contents())["recipes"][0]["overrides"]) == {
        name.removesuffix(".weight") for name in LAYERS
    }


def test_a_size_that_cannot_be_reached(model: Path, snug: Run, tmp_path: Path) -> None:
    code, _, messages = snug("quantize", model, tmp_path / "o.gguf", "--to", "GGUF Q8_0", "--fit", "0.00001")
    assert code == 1 and "cannot be brought to" in messages and not (tmp_path / "o.gguf").exists()


def test_calibration_is_used(model: Path, tensors: Tensors, snug: Run, tmp_path: Path) -> None:
    statistics = LayerStatistics(torch.ones(256), torch.ones(256), torch.tensor([-1.0, 1.0]), 1)
    save_calibration(Calibration({"blocks.0.ffn.0": statistics}, {}), tmp_path / "known.safetensors")
    save_calibration(Calibration({"other": statistics}, {}), tmp_path / "other.safetensors")
    out, arguments = tmp_path / "out.gguf", ("--to", "GGUF Q8_0", "--calibration")
    assert snug("quantize", model, out, *arguments, tmp_path / "known.safetensors")[0] == 0
    field = gguf.GGUFReader(out).get_field(writing.PROVENANCE)
    assert field is not None and json.loads(field.contents())["recipes"][0]["calibrated_layers"] == 1
    code, _, messages = snug(
        "quantize", model, tmp_path / "no.gguf", *arguments, tmp_path / "other.safetensors"
    )
    assert code == 1 and "recorded with another model" in messages


def test_what_is_quantized_already(model: Path, tensors: Tensors, snug: Run, tmp_path: Path) -> None:
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    assert snug("quantize", model, first, "--to", "GGUF Q8_0")[0] == 0
    code, _, messages = snug("quantize", first, second, "--to", "GGUF Q4_0")
    assert code == 1 and "is quantized already (3 layers" in messages and not second.exists()
    assert snug("quantize", first, second, "--to", "GGUF Q4_0", "--requantize")[0] == 0
    packed = load_diffusion_gguf(second).state_dict[LAYERS[0]]
    assert isinstance(packed, PackedTensor) and packed.format is FORMATS["Q4_0"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("missing.safetensors", "out.gguf", "--to", "GGUF Q8_0"), "missing.safetensors does not exist"),
        (("model.safetensors", "old.gguf", "--to", "GGUF Q8_0"), "old.gguf exists already"),
        (
            ("model.safetensors", "model.safetensors", "--to", "FP8 e4m3fn per row"),
            "is the file that is read",
        ),
        (("model.safetensors", "out.safetensors", "--to", "GGUF Q8_0"), "is stored in .gguf files"),
        (("model.safetensors", "out.bin", "--to", "GGUF Q8_0"), "to end in .gguf or .safetensors"),
        (("model.safetensors", "no/out.gguf", "--to", "GGUF Q8_0"), "no does not exist"),
        (("model.safetensors", "out.gguf", "--to", "Q9"), "There is no quantization called 'Q9'"),
        (("model.safetensors", "out.gguf", "--to", "GGUF Q8_0", "--skip", "("), "is no regular expression"),
        (("model.safetensors", "out.gguf", "--to", "GGUF Q8_0", "--skip", "."), "No layer of"),
        (("model.safetensors", "out.gguf", "--to", "GGUF Q8_0", "--device", "abacus"), "There is no device"),
        (("lora.safetensors", "out.gguf", "--to", "GGUF Q8_0"), "is a LoRA"),
        (("old.gguf", "out.gguf", "--to", "GGUF Q8_0"), "old.gguf: "),
        (
            ("t5.safetensors", "out.gguf", "--to", "GGUF Q8_0"),
            "ComfyUI has no tokenizer for this text encoder",
        ),
    ],
)
def test_one_sentence_for_what_is_wrong(
    arguments: tuple[str, ...],
    sentence: str,
    model: Path,
    snug: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "old.gguf").write_bytes(b"old")
    save_file({"x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    save_file(T5, tmp_path / "t5.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    code, output, messages = snug("quantize", *arguments)
    assert code == 1 and not output
    assert sentence in messages and messages.startswith("snug: ") and messages.endswith(".\n")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("moment", range(10))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_leaves_the_old_file_whole(
    number: signal.Signals,
    moment: int,
    model: Path,
    snug: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    (tmp_path / "out.gguf").write_bytes(b"old")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    calls = iter(range(1000))

    @contextmanager
    def progress(*_: Any) -> Iterator[console.Progress]:
        def update(done: int, total: int, /) -> None:
            if next(calls) == 2 * moment:
                signal.raise_signal(number)

        yield update

    for module in (quantize, writing):
        monkeypatch.setattr(module, "progress", progress)
    arguments = ("quantize", model, tmp_path / "out.gguf", "--to", "GGUF Q8_0", "--overwrite")
    if number == signal.SIGINT:
        assert snug(*arguments)[0] == 130
    else:
        with pytest.raises(SystemExit, match="143"):
            snug(*arguments)
    assert next(calls) > 2 * moment
    assert (tmp_path / "out.gguf").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "out.gguf"}


def test_memory_holds_a_few_tensors(snug: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the system does not say how much memory of its own a process has")
    names = {"head.modulation": (1, 2, 256), "blocks.0.self_attn.norm_q.weight": (256,)}
    tensors = {name: torch.zeros(shape) for name, shape in names.items()}
    tensors.update({f"blocks.{block}.ffn.0.weight": torch.ones(2048, 1024).bfloat16() for block in range(48)})
    save_file(tensors, tmp_path / "large.safetensors")
    tensors.clear()
    peak = [0]

    def own_memory() -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    @contextmanager
    def progress(*_: Any) -> Iterator[console.Progress]:
        yield lambda done, total, /: peak.__setitem__(0, max(peak[0], own_memory()))

    for module in (quantize, writing):
        monkeypatch.setattr(module, "progress", progress)
    before = own_memory()
    code, _, _ = snug("quantize", tmp_path / "large.safetensors", tmp_path / "out.gguf", "--to", "GGUF Q8_0")
    assert code == 0
    # A tensor takes 8 MiB in float32, and encoding it some more; together, quantized, they take 102.
    assert peak[0] - before < 64 << 20
