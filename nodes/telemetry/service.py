"""Samples while somebody looks or a monitor node is in the running prompt; nothing runs otherwise."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from . import progress
from .accounting import DeviceParts, Sample
from .buffers import RingBuffer
from .counters import Counters, main_device
from .devices import read_devices
from .leases import Leases
from .models import LoadedModels
from .record import Counter, PromptRecord

logger = logging.getLogger("snug")

# Seconds between samples.
RUNNING, IDLE = 0.2, 1.0
SLACK = 0.02  # waiting ends a little early or late
# Seconds between looks for the registry of a prompt that is just being made.
SOON, SOON_TIMES = 0.001, 100
HISTORY = 3000  # samples: ten minutes of running
PROMPTS = 5
MOST_FAILURES = 5


class Telemetry:
    """One per process. Methods may be called from any thread.

    is_running(prompt id): whether ComfyUI is at it. send(sample, client ids): passes a sample on.
    """

    def __init__(
        self, is_running: Callable[[str], bool], send: Callable[[int, Sample, list[str]], None]
    ) -> None:
        self.leases = Leases()
        self.history: RingBuffer[Sample] = RingBuffer(HISTORY)
        self.prompts: deque[PromptRecord] = deque(maxlen=PROMPTS)
        self._is_running, self._send = is_running, send
        self._models = LoadedModels()
        self._counters: Counters | None = None
        self._lock = threading.RLock()
        self._reading = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._is_between_prompts = False
        self._record: PromptRecord | None = None
        self._handler: progress.Handler | None = None
        self._registry: progress.Registry | None = None
        self._is_monitored = False

    # ---- who looks -------------------------------------------------------------------------------------------------

    def lease(self, client_id: str, seconds: float, push: bool) -> None:
        """Sampling goes on for so many seconds at least. Raises ValueError when too many look already."""
        self.leases.renew(client_id, seconds, push, time.monotonic())
        self._start()

    def monitor(self) -> PromptRecord:
        """The record of the prompt that this thread runs, made here unless it was there before; sampling goes on until
        the prompt ends."""
        with self._lock:
            registry = progress.of_this_thread()
            if registry is not self._registry or self._record is None or self._record.ended is not None:
                progress.attach(self._begin(registry))
            self._is_monitored = True
            assert self._record is not None
            record = self._record
        self._start()
        return record

    @property
    def is_sampling(self) -> bool:
        thread = self._thread
        return thread is not None and thread.is_alive()

    # ---- what ComfyUI tells ----------------------------------------------------------------------------------------

    def node_started(self, node_id: str, title: str) -> None:
        record = self._record
        if record is not None:
            with self._reading:
                record.open(node_id, title, time.time(), self._read())

    def node_stepped(self, node_id: str) -> None:
        record = self._record
        if record is not None:
            record.step(node_id, time.time())

    def node_finished(self, node_id: str) -> None:
        record = self._record
        if record is None:
            return
        with self._reading:
            node = record.close(node_id, time.time(), self._read())
        if node is not None:
            self._models.mark(node.title)

    def prompt_ended(self) -> None:
        """The next prompt begins right after this."""
        self._end()
        self._is_between_prompts = True
        self._wake.set()

    def observe(self) -> Sample:
        """Reads everything now, for a node that looks at its own prompt."""
        record = self._record
        if record is not None:
            with self._reading:
                record.observe(time.time(), self._read())
        return self.take()

    # ---- samples ---------------------------------------------------------------------------------------------------

    def take(self) -> Sample:
        """A sample of now, which also goes to the record of the prompt."""
        now = time.time()
        models = tuple(self._models.rows())
        devices = tuple(read_devices(models, self._counted().resident()))
        record = self._record
        if record is not None:
            record.sample(now, _device(devices, record.device))
        return Sample(now, devices, models, record.running() if record is not None else None)

    def _start(self) -> None:
        with self._lock:
            if not self.is_sampling:
                self._thread = threading.Thread(target=self._run, name="snug-telemetry", daemon=True)
                self._thread.start()
            self._wake.set()

    def _run(self) -> None:
        failures, last_sample = 0, -IDLE
        while True:
            try:
                now = time.monotonic()
                self._follow()
                if self._is_over(now):
                    return
                pause = IDLE if self._record is None else RUNNING
                if now >= last_sample + pause - SLACK:
                    self._sample()
                    last_sample = now
                failures = 0
            except Exception:
                failures += 1
                logger.debug("Memory could not be sampled.", exc_info=True)
                if failures >= MOST_FAILURES:
                    logger.warning("Memory is not sampled any more: the log at level DEBUG says why.")
                    self._give_up()
                    return
            self._wake.wait(RUNNING)
            self._wake.clear()

    def _is_over(self, now: float) -> bool:
        """Whether nobody looks any more; the thread must end then."""
        with self._lock:
            if self.leases.active(now) or self._is_monitored:
                return False
            self._end()
            self._thread = None
            return True

    def _give_up(self) -> None:
        with self._lock:
            self.leases.clear()
            self._end()
            self._thread = None

    def _sample(self) -> None:
        sample = self.take()
        record = self._record
        if record is not None:
            with self._reading:
                record.observe(sample.time, self._read())
        number = self.history.add(sample)
        receivers = self.leases.receivers(time.monotonic())
        if receivers:
            self._send(number, sample, receivers)

    # ---- which prompt ----------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Begins a record when a prompt runs that has none, and ends the one whose prompt does not run any more."""
        tries = SOON_TIMES if self._is_between_prompts else 1
        self._is_between_prompts = False
        for _ in range(tries):
            registry = progress.current()
            if registry is not None and registry is not self._registry and self._begin_outside(registry):
                return
            if self._record is not None and registry is self._registry:
                break
            if tries > 1:
                time.sleep(SOON)
        record = self._record
        if record is not None and not self._is_running(record.prompt_id):
            self._end()

    def _begin_outside(self, registry: progress.Registry) -> bool:
        with self._lock:
            if registry is self._registry or not self._is_running(registry.prompt_id):
                return False
            before = self._registry
            handler = self._begin(registry)
            if not progress.attach_from_outside(handler, registry):
                self._record, self._registry = None, before
                return False
            for node_id in progress.running(registry):
                self.node_started(node_id, progress.title(registry, node_id))
            return True

    def _begin(self, registry: progress.Registry) -> progress.Handler:
        self._end()
        self._registry = registry
        self._record = PromptRecord(registry.prompt_id, main_device(), time.time())
        self._handler = progress.Handler(self, registry)
        with self._reading:
            self._read()  # sets peaks of before back
        return self._handler

    def _end(self) -> None:
        with self._lock:
            record, self._record = self._record, None
            self._is_monitored = False
            if self._handler is not None:
                self._handler.disable()
            if record is not None:
                record.finish(time.time(), self._last_counters())
                self.prompts.append(record)

    def running_record(self) -> PromptRecord | None:
        return self._record

    # ---- counters --------------------------------------------------------------------------------------------------

    def _counted(self) -> Counters:
        if self._counters is None:
            self._counters = Counters()
        return self._counters

    def _last_counters(self) -> dict[str, Counter]:
        """Nothing where they cannot be read: a record ends in any case."""
        try:
            with self._reading:
                return self._read()
        except Exception:
            logger.debug("Memory could not be read.", exc_info=True)
            return {}

    def _read(self) -> dict[str, Counter]:
        return self._counted().read()


def _device(devices: tuple[DeviceParts, ...], name: str) -> DeviceParts:
    return next(parts for parts in devices if parts.name == name)
