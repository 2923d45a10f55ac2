"""The environment's key, its inputs and the lock; installing itself is what ./test does before this runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import bootstrap
import comfyui_source
import pytest
from console import ScriptError, Steps, locked, run_logged


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files that pass for a ComfyUI checkout."""
    folder = tmp_path / "ComfyUI"
    for name in comfyui_source.NEEDED_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "requirements.txt").write_text(
        "torch\ntorchsde\ntorchvision\nTorchaudio>=1\nnumpy>=1.25.0\n\n# note\n"
    )
    return folder


@pytest.fixture(autouse=True)
def clean_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMFYUI_PATH", "SNUG_PYTHON", "SNUG_TORCH"):
        monkeypatch.delenv(name, raising=False)


def test_only_torch_itself_is_left_out(tree: Path) -> None:
    assert bootstrap.requirements_without_torch(tree) == ["torchsde", "numpy>=1.25.0", "", "# note"]


def test_environment_depends_on_requirements_and_torch_only(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bootstrap.environment_folder(tmp_path, tree)
    (tree / "nodes.py").write_text("changed")
    assert bootstrap.environment_folder(tmp_path, tree) == first
    monkeypatch.setenv("SNUG_TORCH", "torch==1.0")
    other_torch = bootstrap.environment_folder(tmp_path, tree)
    (tree / "requirements.txt").write_text("numpy>=2\n")
    assert len({first, other_torch, bootstrap.environment_folder(tmp_path, tree)}) == 3


def test_finished_environment_is_used_without_work(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNUG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bootstrap, "build", lambda *_: pytest.fail("built although it was there"))
    folder = bootstrap.environment_folder(tmp_path / "cache", tree)
    folder.mkdir(parents=True)
    (folder / "complete.json").touch()
    environment = bootstrap.prepare(str(tree))
    assert environment.comfyui == tree
    assert environment.python == bootstrap.environment_python(folder)


def test_own_python_is_used_as_it_is(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNUG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SNUG_PYTHON", sys.executable)
    assert bootstrap.prepare(str(tree)).python == Path(sys.executable)
    assert not (tmp_path / "cache").exists()


def test_folder_that_is_no_comfyui_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(ScriptError, match=r"COMFYUI_PATH is .*, which is no ComfyUI checkout \(main.py"):
        comfyui_source.given_comfyui(None)


def test_argument_goes_before_the_variable(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", "/nowhere")
    assert comfyui_source.given_comfyui(str(tree)) == tree


def test_full_disk_is_told_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 2**30})
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ScriptError, match=r"1.0 GiB free; 4 GiB are needed .* SNUG_CACHE"):
        bootstrap.check_disk(tmp_path)


def test_failed_command_shows_itself_its_output_and_advice(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
    with pytest.raises(ScriptError, match=r"(?s)exit status 3 .*the reason.*Try this\."):
        run_logged(command, tmp_path / "log", "Try this.")


def test_steps_are_counted_and_timed(capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps(2)
    with steps.step("one"):
        pass
    with pytest.raises(ValueError), steps.step("two"):
        raise ValueError
    assert capsys.readouterr().err == "[1/2] one ... 0 s\n[2/2] two ... failed\n"


def test_lock_makes_a_second_process_wait(root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from console import locked\n"
        "with locked(Path(sys.argv[1])): print('in')"
    )
    environment = {"PYTHONPATH": str(root / "scripts")}
    with locked(tmp_path / "lock"):
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "lock")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert other.stderr is not None
        assert "waiting for it" in other.stderr.readline()
        assert other.poll() is None
    output, _ = other.communicate(timeout=30)
    assert output == "in\n"


def test_packages_of_npm_are_fetched_for_tests_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo runs where npm's registry cannot be reached."""
    fetched: list[list[str]] = []

    def install(command: list[object], *_: object) -> None:
        fetched.append([str(word) for word in command])
        for package in bootstrap.node_packages():
            folder = bootstrap.node_modules(environment.python) / package.rpartition("@")[0]
            folder.mkdir(parents=True)
            (folder / "package.json").touch()

    monkeypatch.setattr(bootstrap, "run_logged", install)
    environment = bootstrap.Environment(tmp_path / "bin" / "python", tmp_path, tmp_path)
    assert bootstrap.missing_node_packages(environment.python) == bootstrap.node_packages()
    for _ in range(2):
        bootstrap.prepare_node_packages(environment)
        assert len(fetched) == 1 and "install" in fetched[0]
        assert set(bootstrap.node_packages()) <= set(fetched[0])


def test_installing_the_environment_asks_npm_for_nothing(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[str] = []
    monkeypatch.setattr(
        bootstrap, "run_logged", lambda command, *_: commands.append(" ".join(map(str, command)))
    )
    monkeypatch.setattr(bootstrap, "torch_is_cpu_build", lambda _: False)
    folder = tmp_path / "environment"
    monkeypatch.setattr(bootstrap.shutil, "rmtree", lambda *_, **__: folder.mkdir())
    bootstrap.build(folder, tree, Steps(6), tmp_path / "log")
    assert commands and not any("npm" in command for command in commands)
    assert bootstrap.is_complete(folder)
