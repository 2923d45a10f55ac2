"""SnugTorchCompile where something is missing or fails: one sentence, or the uncompiled model if the user wants it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compiled_models import compiled, fresh_compiler, predict  # noqa: F401
from memory_states import load_whole


@pytest.fixture
def broken_backend() -> Iterator[str]:
    """A backend that fails like a compiler that is not there."""
    from torch._dynamo.backends import registry

    def compiler(*_: Any) -> Any:
        raise RuntimeError("no compiler here.\nSet THIS=1 for details")

    registry.register_backend(compiler, name="snug_broken")
    yield "snug_broken"
    for known in (registry._BACKENDS, registry._COMPILER_FNS):
        known.pop("snug_broken", None)


def test_failure_is_one_sentence(sd3: Any, broken_backend: str) -> None:
    patcher = compiled(sd3[0], backend=broken_backend)
    load_whole(patcher)
    with pytest.raises(Exception, match=r"^JointBlock could not .* \(no compiler here\); .*bypass") as caught:
        predict(patcher, "sd3")
    assert type(caught.value).__name__ == "SnugError"
    assert "\n" not in str(caught.value)


def test_fallback_warns_once(sd3: Any, broken_backend: str, caplog: pytest.LogCaptureFixture) -> None:
    plain, _ = sd3
    patcher = compiled(plain, backend=broken_backend, fallback=True)
    load_whole(patcher)
    wanted = predict(plain, "sd3")
    caplog.clear()
    assert all(torch.equal(predict(patcher, "sd3"), wanted) for _ in range(2))
    assert [r.getMessage().split(":")[0] for r in caplog.records if r.name == "snug"] == [
        "The model runs uncompiled"
    ]


def test_missing_compiler(sd3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from snug.nodes.adapter import compile_backends

    monkeypatch.setattr(compile_backends, "_has_cpp_compiler", lambda: False)
    with pytest.raises(
        Exception, match=r"'inductor' needs a C\+\+ compiler, and none was found .* install it"
    ):
        compiled(sd3[0], backend="inductor")
    patcher = compiled(sd3[0], backend="inductor", fallback=True)
    assert not patcher.wrappers.get("apply_model", {}).get("torch.compile")


@pytest.mark.parametrize(
    ("present", "wanted"), [((), "Triton, which is not installed"), (("triton",), "a C compiler, and none")]
)
def test_missing_triton(present: tuple[str, ...], wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked up alone, as there is no GPU to compile for."""
    from snug.nodes.adapter import compile_backends

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in present else None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert wanted in (compile_backends.missing_for("inductor", torch.device("cuda")) or "")
    assert compile_backends.missing_for("eager", torch.device("cuda")) is None


def test_backends_that_cannot_work_are_not_offered() -> None:
    from snug.nodes.adapter.compile_backends import backends

    assert backends()[0] == "inductor"
    assert not {"cudagraphs", "openxla", "tvm"} & set(backends())


def test_backends_are_torchs_own_and_those_of_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named without loading any, which is what torch's own list does."""
    from snug.nodes.adapter.compile_backends import PACKAGES, backends

    assert set(torch._dynamo.list_backends()) == {*backends(), "cudagraphs", *PACKAGES} - {
        "eager",
        "aot_eager",
    }
    entry = importlib.metadata.EntryPoint("mine", "no_such_package:compile", "torch_dynamo_backends")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    assert backends() == ["inductor", "mine", "aot_eager", "eager"]


def test_no_repeated_blocks(sd3: Any) -> None:
    plain, _ = sd3
    del plain.model.diffusion_model.joint_blocks[1:]
    with pytest.raises(Exception, match="no repeated blocks to compile; choose the scope 'whole model'"):
        compiled(plain)


def test_dynamic_vram_without_a_way_to_load_again(sd3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from snug.nodes.adapter import compilation

    monkeypatch.setattr(compilation, "is_dynamic", lambda _: True)
    sd3[0].cached_patcher_init = None
    with pytest.raises(Exception, match="pages its weights"):
        compiled(sd3[0])
