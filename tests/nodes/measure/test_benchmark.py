"""Models that sample side by side, on a clock that the test turns: what counts, what is compared, what is told."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from digits import LATENT, WEIGHTS, prompts
from PIL import ImageColor

LATENTS = {"samples": torch.zeros(2, *LATENT)}
STEPS = 3


class Clock:
    """Stands for time.perf_counter. Loading a model takes 5 s, its first call 10 s and the others 1 s."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def slow(self, patcher: Any) -> Any:
        """A clone that takes its time."""
        from comfy.patcher_extension import WrappersMP

        first = True

        def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal first
            self.now += 10 if first else 1
            first = False
            return executor(*args, **kwargs)

        def load(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.now += 5
            return executor(*args, **kwargs)

        clone = patcher.clone()
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "slow", call)
        clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "slow", load)
        return clone


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    from snug.nodes.adapter import timed_sampling

    clock = Clock()
    monkeypatch.setattr(timed_sampling.time, "perf_counter", clock)
    return clock


@pytest.fixture(scope="module")
def dense(comfy: Any) -> Any:
    from comfy.sd import load_diffusion_model

    return load_diffusion_model(str(WEIGHTS))


@pytest.fixture
def progress(comfy: Any) -> Iterator[list[tuple[int, int]]]:
    """Of the running node: (done, total)."""
    from comfy.utils import set_progress_bar_global_hook

    seen: list[tuple[int, int]] = []
    set_progress_bar_global_hook(lambda done, total, *_, **__: seen.append((done, total)))
    yield seen
    set_progress_bar_global_hook(None)


def plan(**changes: Any) -> Any:
    from snug.nodes.adapter.sampling import Sampling
    from snug.nodes.measure.benchmark import Plan

    return Plan(**{"sampling": Sampling(3, STEPS, 3.0, "euler", "simple"), "runs": 2, "warmup": 1, **changes})


def run(*models: tuple[str, Any], vae: Any = None, **changes: Any) -> tuple[list[Any], dict[str, Any]]:
    from snug.nodes.measure.benchmark import benchmark

    conditioning = ([[prompts([3, 8]), {}]], [[prompts([10]), {}]])
    return benchmark(models, conditioning, LATENTS, plan(**changes), vae)


def failing(patcher: Any, error: BaseException) -> Any:
    from comfy.patcher_extension import WrappersMP

    def fail(*_: Any, **__: Any) -> None:
        raise error

    clone = patcher.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "failing", fail)
    return clone


class FormulaVAE:
    """Decodes as ComfyUI's VAE of the digits does, faster."""

    @staticmethod
    def decode(samples: torch.Tensor) -> torch.Tensor:
        from digits.vae import decode

        return decode(samples).unsqueeze(1)


def test_what_counts(dense: Any, clock: Clock, progress: list[tuple[int, int]]) -> None:
    (row,), _ = run(("a model", clock.slow(dense)))
    assert row.loading == 5 and row.first_step == 10
    # The first step of each run is the sampler's own beginning as well.
    assert row.steps == [1.0] * 2 * (STEPS - 1) and row.step == 1 and row.spread == (1, 1)
    assert row.compiling == 9
    assert row.totals == [5 + STEPS] * 2
    assert row.weights == dense.model_size() and row.peak >= row.memory > 0
    assert (row.caption, row.error, row.psnr, row.problem) == ("a model", None, None, "")
    assert progress == [(done + 1, 3 * STEPS) for done in range(3 * STEPS)]


def test_without_warm_up_and_with_one_step(dense: Any, clock: Clock) -> None:
    from snug.nodes.adapter.sampling import Sampling

    (row,), _ = run(
        ("", clock.slow(dense)), warmup=0, runs=1, sampling=Sampling(3, 1, 3.0, "euler", "simple")
    )
    assert row.steps == [10] and row.spread is None and row.compiling == 0


def test_what_looks_on_does_not_count(dense: Any, clock: Clock) -> None:
    import comfy.utils

    def slow_page(*_: Any, **__: Any) -> None:
        clock.now += 100

    comfy.utils.set_progress_bar_global_hook(slow_page)
    try:
        (row,), _ = run(("", clock.slow(dense)))
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert (row.loading, row.steps, row.totals) == (5, [1.0] * 2 * (STEPS - 1), [5 + STEPS] * 2)


def test_results_are_the_samplers_and_compared_with_the_first(dense: Any) -> None:
    from digits.drawing import draw
    from snug.nodes.adapter.quantizing import QuantizeSettings, quantize_model

    exact = draw(dense, [3, 8], seed=3, steps=STEPS, guidance=3.0)
    packed, _ = quantize_model(dense, QuantizeSettings("GGUF Q4_K"))
    rough = draw(packed, [3, 8], seed=3, steps=STEPS, guidance=3.0)
    rows, latent = run(("", dense), ("", dense.clone()), ("", packed), vae=FormulaVAE, runs=1)
    assert latent["samples"].equal(torch.cat([exact, exact, rough]))
    first, same, other = rows
    assert (first.error, first.ssim) == (None, None)
    assert (same.error, same.psnr, same.ssim) == (0, None, pytest.approx(1))
    assert other.error == pytest.approx(float((rough - exact).norm() / exact.norm()))
    assert 10 < other.psnr < 60 and 0.5 < other.ssim < 1
    assert (first.caption, other.caption) == ("float32", "Q4_K")
    assert other.weights < first.weights


def test_one_model_without_memory_for_it(dense: Any) -> None:
    error = torch.cuda.OutOfMemoryError("no memory")
    rows, latent = run(("a", dense), ("b", failing(dense, error)), ("c", dense), runs=1)
    assert [row.problem for row in rows] == ["", "out of memory", ""]
    assert rows[2].error == 0 and rows[1].step is None
    assert latent["samples"].shape[0] == 4
    rows, latent = run(("b", failing(dense, error)), ("c", dense), runs=1)
    assert rows[1].error is None and rows[1].step is not None
    assert latent is LATENTS


def test_what_is_not_finite_is_not_compared(dense: Any) -> None:
    from comfy.patcher_extension import WrappersMP
    from snug.nodes.measure.benchmark_report import as_json, report_text

    broken = dense.clone()
    broken.add_wrapper_with_key(
        WrappersMP.APPLY_MODEL, "broken", lambda execute, *a, **k: execute(*a, **k) * torch.nan
    )
    for models in ((dense, broken), (broken, dense)):
        rows, _ = run(*((str(number), model) for number, model in enumerate(models)), vae=FormulaVAE, runs=1)
        assert [row.is_finite for row in rows] == [model is dense for model in models]
        assert all(row.error is row.psnr is row.ssim is None for row in rows)
        assert report_text(rows, plan()).count("not finite") == 1
        assert "NaN" not in as_json(rows, plan(), {})


def test_other_errors_end_it_and_leave_nothing(dense: Any) -> None:
    before = {kind: dict(entries) for kind, entries in dense.wrappers.items()}
    with pytest.raises(ValueError, match="broken"):
        run(("a", failing(dense, ValueError("broken"))))
    assert dense.wrappers == before


def test_cancelling(dense: Any) -> None:
    import comfy.model_management as management
    from comfy.patcher_extension import WrappersMP

    calls = 0

    def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        management.interrupt_current_processing(calls == STEPS + 2)  # in the second run
        return executor(*args, **kwargs)

    model = dense.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "cancelled", call)
    try:
        with pytest.raises(management.InterruptProcessingException):
            run(("a", model), ("b", dense))
    finally:
        management.interrupt_current_processing(False)
    assert calls == STEPS + 2


@pytest.fixture
def rows(comfy: Any) -> list[Any]:
    from snug.nodes.measure.benchmark import Row

    full = {"loading": 0.5, "weights": 2**30, "memory": 2**30, "peak": 2**31, "first_step": 30.0}
    return [
        Row("first, dense", ["bfloat16"], "cuda:0", **full, steps=[1.0, 1.1, 1.2], totals=[3.5]),
        Row("a", ["Q8_0"], "cuda:0", **full, steps=[2.0], totals=[5.0], error=0.0, ssim=1.0),
        Row("b", ["Q4_K"], "cuda:0", **full, steps=[0.05], totals=[5.0], error=0.1, psnr=20.0, ssim=0.8),
        Row("c", ["Q2_K"], "cuda:0", problem="out of memory"),
    ]


def test_the_report(rows: list[Any]) -> None:
    from snug.nodes.measure.benchmark_report import report_text

    text = report_text(rows, plan())
    head, first, same, other, failed = text.splitlines()[:5]
    columns = "load, weights, memory, peak, per, step, middle, half, compile, error, PSNR, SSIM"
    assert head.split() == columns.split(", ")
    assert "1.10 s" in first and "1.05 s to 1.15 s" in first and "28.90 s" in first and "2.00 GB" in first
    assert same.split()[-3:] == ["none", "identical", "1.0000"]
    assert "50 ms" in other and other.split()[-5:] == ["10", "%", "20.0", "dB", "0.8000"]
    assert failed.split() == ["c", "out", "of", "memory"]
    assert len({len(line) for line in (head, first, same, other)}) == 1, "columns are not aligned"
    assert "2 runs of 3 steps each after 1 to warm up; euler, simple, cfg 3, seed 3; on cuda:0" in text
    assert "PSNR" not in report_text(rows[:1], plan())


def test_the_files(rows: list[Any]) -> None:
    from snug.nodes.measure.benchmark_report import as_csv, as_json

    lines = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [line["caption"] for line in lines] == ["first, dense", "a", "b", "c"]
    assert float(lines[0]["step"]) == 1.1 and float(lines[0]["compiling"]) == 28.9
    assert lines[2]["psnr"] == "20.0" and lines[3]["problem"] == "out of memory" and lines[3]["step"] == ""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    data = json.loads(as_json(rows, plan(), {"torch": "2"}), parse_constant=refuse)
    assert data["models"][0]["steps"] == [1.0, 1.1, 1.2] and data["models"][0]["spread"] == [1.05, 1.15]
    assert data["plan"]["sampling"]["sampler_name"] == "euler" and data["environment"] == {"torch": "2"}


def test_the_picture(rows: list[Any]) -> None:
    from snug.nodes.adapter.bars import COLOURS, WIDTH
    from snug.nodes.measure.benchmark_report import draw

    picture = draw(rows, plan())
    assert picture.shape[0] == 1 and picture.shape[2:] == (WIDTH, 3)
    pixels = (picture[0] * 255).round().byte()

    def amount(colour: str) -> int:
        return int((pixels == torch.tensor(ImageColor.getrgb(colour), dtype=torch.uint8)).all(dim=-1).sum())

    assert all(amount(colour) > 1000 for colour in COLOURS[:3])
    assert amount(COLOURS[3]) == 0, "the failed model has a bar"
    nothing = draw(rows[3:], plan())
    assert nothing.shape[1] < picture.shape[1]


def test_captions_belong_to_their_inputs(dense: Any) -> None:
    from snug.nodes.benchmark import SnugBenchmark

    output = execute(
        SnugBenchmark.execute, dense, captions="one\n\nthree\nfour", model_3=dense, model_5=dense
    )
    assert [line["caption"] for line in csv.DictReader(io.StringIO(output.args[3]))] == [
        "one",
        "three",
        "float32",
    ]
    assert output.args[4]["samples"].shape == (6, *LATENT)


def test_a_file_is_written(
    dense: Any, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import folder_paths
    from snug.nodes.benchmark import SnugBenchmark

    folder = tmp_path_factory.mktemp("output")
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(folder))
    output = execute(SnugBenchmark.execute, dense, save_as="JSON", filename_prefix="figures/mine")
    assert output.args[0].endswith("Saved as figures/mine_00001.json")
    saved = json.loads((folder / "figures" / "mine_00001.json").read_text(encoding="utf-8"))
    assert saved == json.loads(output.args[2]) and saved["environment"]["torch"] == torch.__version__


def execute(node: Callable[..., Any], model: Any, **inputs: Any) -> Any:
    given = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    shared = {"positive": [[prompts([3, 8]), {}]], "negative": [[prompts([10]), {}]], "latent_image": LATENTS}
    return node(model=model, **shared, **given, runs=1, warmup=0, **inputs)
