"""Run the real ComfyUI as a child process and talk to it over HTTP, with the standard library only.

    with ComfyServer(python, comfyui, folder, packs=[checkout]) as server:
        outputs = server.run(workflow)                       # a workflow in ComfyUI's API format
        png = server.view(outputs["9"]["images"][0])

Nothing is written into the ComfyUI tree: models, inputs, outputs, custom nodes and the database all lie in the
base directory given.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from console import tail_lines

Workflow = Mapping[str, Mapping[str, Any]]
# Local requests must not go through a proxy that the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(Exception):
    """The server did not start, died or refused a request; the text ends with the tail of its log."""


class WorkflowError(Exception):
    """A workflow was refused or failed; carries the node that did (None when the whole workflow is wrong)."""

    def __init__(self, message: str, node_id: str | None = None, node_type: str | None = None) -> None:
        super().__init__(message)
        self.node_id = node_id
        self.node_type = node_type


class ComfyServer:
    """One ComfyUI process on its own base directory.

    Args:
        python: interpreter of an environment with ComfyUI's requirements.
        comfyui: the ComfyUI checkout.
        base_directory: made when missing; holds ``models/``, ``custom_nodes/``, ``output/`` and the log.
        packs: custom node folders, linked into ``custom_nodes/`` under the name given.
        cpu: compute on the CPU even where there is a GPU.
        arguments: further arguments for ComfyUI's ``main.py``.
    """

    def __init__(
        self,
        python: Path,
        comfyui: Path,
        base_directory: Path,
        packs: Mapping[str, Path],
        cpu: bool = True,
        arguments: Sequence[str] = (),
    ) -> None:
        self.python = python
        self.comfyui = comfyui
        self.base = base_directory
        self.packs = dict(packs)
        self.cpu = cpu
        self.arguments = list(arguments)
        self.log = base_directory / "comfyui.log"
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Of the running process; ServerError when there is none."""
        self._require_running()
        assert self._process is not None
        return self._process.pid

    # -- life cycle ---------------------------------------------------------------------------------------------

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, timeout: float = 120.0) -> None:
        """Start the process and wait until it answers; ServerError when it does not within ``timeout`` seconds."""
        if self._process is not None:
            raise ServerError(f"ComfyUI is already running at {self.url}.")
        for name in ("models", "custom_nodes", "input", "output", "temp", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for name, folder in self.packs.items():
            link_folder(folder, self.base / "custom_nodes" / name)
        self.port = self.port or free_port()  # started again, it is where it was
        command = [str(self.python), "main.py", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--disable-auto-launch", "--disable-api-nodes", "--base-directory", str(self.base)]
        command += ["--database-url", f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}"]
        command += ["--cpu"] if self.cpu else []
        # Spinning OpenMP threads make a loaded machine many times slower.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *self.arguments],
                cwd=self.comfyui,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its own process group, so that stop() reaches its children as well
            )
        try:
            self._wait_until_up(timeout)
        except BaseException:
            self.stop()
            raise

    def _wait_until_up(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                self.system_stats()
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                self._require_running()
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"ComfyUI did not answer within {timeout:.0f} s.\n{self.log_tail()}"
                    ) from None
                time.sleep(0.2)

    def stop(self) -> None:
        """End the process and everything it started; harmless when it is not running."""
        process, self._process = self._process, None
        if process is None:
            return
        for force in (False, True):
            if process.poll() is not None:
                break
            _signal_group(process, force)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                continue
        process.wait()

    def _require_running(self) -> None:
        if self._process is None:
            raise ServerError("ComfyUI is not running: call start() or use the server in a with statement.")
        status = self._process.poll()
        if status is not None:
            raise ServerError(f"ComfyUI ended with exit status {status}.\n{self.log_tail()}")

    def log_tail(self, lines: int = 40) -> str:
        return f"The last lines of {self.log}:\n" + "\n".join(tail_lines(self.log, lines))

    def failed_imports(self) -> list[str]:
        """Folders of custom nodes that ComfyUI could not import."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return re.findall(r"\(IMPORT FAILED\):? *(.+)", text)

    # -- requests -----------------------------------------------------------------------------------------------

    def request(self, path: str, body: Any = None, timeout: float = 30.0) -> bytes:
        """GET ``path``, or POST ``body`` to it as JSON when one is given."""
        data = None if body is None else json.dumps(body).encode()
        headers = {} if data is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        with _OPENER.open(request, timeout=timeout) as response:
            return response.read()

    def json(self, path: str, body: Any = None) -> Any:
        answer = self.request(path, body)
        return json.loads(answer) if answer.strip() else None

    def system_stats(self) -> dict[str, Any]:
        return self.json("/system_stats")

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        return self.json(f"/object_info/{urllib.parse.quote(node)}" if node else "/object_info")

    def free(self) -> None:
        """Ask for all models to be unloaded and all cached results to be dropped (before the next workflow)."""
        self.request("/free", {"unload_models": True, "free_memory": True})

    def interrupt(self) -> None:
        self.request("/interrupt", {})

    def view(self, image: Mapping[str, str]) -> bytes:
        """The bytes of an image that a workflow's outputs name."""
        return self.request("/view?" + urllib.parse.urlencode(dict(image)))

    # -- workflows ----------------------------------------------------------------------------------------------

    def queue(self, workflow: Workflow) -> str:
        """Queue a workflow in API format and return its prompt id; WorkflowError when ComfyUI refuses it."""
        try:
            return self.json("/prompt", {"prompt": workflow, "client_id": "snug"})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise _refusal(json.loads(error.read())) from None

    def wait(self, prompt_id: str, timeout: float = 600.0) -> dict[str, Any]:
        """Wait for a queued workflow and return its history entry; WorkflowError when a node failed."""
        deadline = time.monotonic() + timeout
        while True:
            entry = self.json(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                break
            self._require_running()
            if time.monotonic() > deadline:
                raise ServerError(
                    f"Workflow {prompt_id} did not end within {timeout:.0f} s.\n{self.log_tail()}"
                )
            time.sleep(0.05)
        for kind, details in entry["status"]["messages"]:
            if kind == "execution_error":
                text = f"{details['exception_type']}: {details['exception_message'].strip()}"
                where = f"node {details['node_id']} ({details['node_type']})"
                raise WorkflowError(f"{where}: {text}", details["node_id"], details["node_type"])
            if kind == "execution_interrupted":
                raise WorkflowError("interrupted", details["node_id"], details["node_type"])
        return entry

    def run(self, workflow: Workflow, timeout: float = 600.0) -> dict[str, Any]:
        """Queue a workflow, wait for it and return its outputs by node id."""
        return self.wait(self.queue(workflow), timeout)["outputs"]


def execution_seconds(entry: Mapping[str, Any]) -> float:
    """How long a workflow ran, from the time stamps (milliseconds) in its history entry."""
    stamps = {kind: details["timestamp"] for kind, details in entry["status"]["messages"]}
    return (stamps["execution_success"] - stamps["execution_start"]) / 1000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def link_folder(folder: Path, place: Path) -> None:
    """Link ``folder`` at ``place``; where links are not allowed (Windows) copy it without its version control."""
    if place.is_symlink() or place.exists():
        return
    try:
        place.symlink_to(folder, target_is_directory=True)
    except OSError:
        shutil.copytree(folder, place, ignore=shutil.ignore_patterns(".git", "__pycache__", "demo-output"))


def _signal_group(process: subprocess.Popen[bytes], force: bool) -> None:
    if os.name == "nt":
        process.kill() if force else process.terminate()
    else:
        os.killpg(process.pid, signal.SIGKILL if force else signal.SIGTERM)


def _refusal(answer: Mapping[str, Any]) -> WorkflowError:
    for node_id, problem in (answer.get("node_errors") or {}).items():
        first = problem["errors"][0]
        text = f"node {node_id} ({problem['class_type']}): {first['message']}: {first['details']}"
        return WorkflowError(text, node_id, problem["class_type"])
    error = answer["error"]
    return WorkflowError(
        f"{error['message']}: {error['details']}" if error.get("details") else error["message"]
    )
