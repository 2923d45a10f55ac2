"""Samples while somebody looks or a monitor node is in the running prompt; nothing runs otherwise."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from . import progress
from .accounting import DeviceParts, Sample
from .buffers import Numbers, RingBuffer
from .counters import CPU, Counters, main_device
from .devices import read_devices
from .events import Event, Events, Failures
from .leases import Leases
from .models import LoadedModels
from .record import Counter, PromptRecord

logger = logging.getLogger("snug")

# Seconds between samples.
RUNNING, IDLE = 0.2, 1.0
SLACK = 0.02  # waiting ends a little early or late
# Seconds between looks for the registry of a prompt that is just being made.
SOON, SOON_TIMES = 0.001, 300
HISTORY = 3000  # samples: ten minutes of running
PROMPTS = 5
# Seconds that a running prompt is recorded on when nobody looks: a page that is loaded anew finds all of it.
GRACE = 60.0
MOST_FAILURES = 5


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """node_id: of the node that ended a prompt so. is_ram: whether it was the RAM that did not suffice."""

    node_id: str
    is_ram: bool


class Telemetry:
    """One per process. Methods may be called from any thread.

    is_running(prompt id): whether ComfyUI is at it. out_of_memory(prompt id): where an ended prompt ran out of memory,
    None when it did not. send(number, sample, events, client ids): passes a sample on with the events
    since the one before.
    """

    def __init__(
        self,
        is_running: Callable[[str], bool],
        out_of_memory: Callable[[str], OutOfMemory | None],
        send: Callable[[int, Sample, list[Event], list[str]], None],
    ) -> None:
        self.leases = Leases()
        numbers = Numbers()
        self.history: RingBuffer[Sample] = RingBuffer(HISTORY, numbers)
        self.events = Events(numbers)
        self.prompts: deque[PromptRecord] = deque(maxlen=PROMPTS)
        self._is_running, self._out_of_memory, self._send = is_running, out_of_memory, send
        self._sent = 0
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
        self._looked_at = float("-inf")
        self._peaks: dict[str, int] | None = None

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
                counters = self._read()
                record.open(node_id, title, time.time(), counters)
            self._note(counters, None)

    def node_stepped(self, node_id: str) -> None:
        record = self._record
        if record is not None:
            record.step(node_id, time.time())

    def node_finished(self, node_id: str) -> None:
        record = self._record
        if record is None:
            return
        with self._reading:
            counters = self._read()
            node = record.close(node_id, time.time(), counters)
        if node is not None:
            self._models.mark(node.title)
            self._note(counters, node.title)

    def prompt_ended(self) -> None:
        """The next prompt begins right after this."""
        self._end()
        self.prompt_queued()

    def prompt_queued(self) -> None:
        """A prompt may begin soon, whose first node is to be seen."""
        self._is_between_prompts = True
        self._wake.set()

    def observe(self) -> Sample:
        """Reads everything now, for a node that looks at its own prompt."""
        if self._record is not None:
            self.read()
        return self.take()

    def read(self) -> dict[str, Counter]:
        """The counters now, which the running record gets as well."""
        with self._reading:
            counters, record = self._read(), self._record
            if record is not None:
                record.observe(time.time(), counters)
            return counters

    @contextmanager
    def peaks(self) -> Iterator[dict[str, int]]:
        """By device, the most bytes in use inside the block; known when it ends. One block at a time.

        Whoever reads the counters sets their peaks back, so that all that is read inside the block counts.
        """
        found: dict[str, int] = {}
        self.read()
        self._peaks = found
        try:
            yield found
        finally:
            self.read()
            self._peaks = None

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
                self.events.forget()
                registry = progress.current()
                if registry is not None and not self._is_running(registry.prompt_id):
                    self._registry = registry  # it ended before anybody looked
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
                self._looked_at = now
                return False
            if self._record is not None and now < self._looked_at + GRACE:
                return False
            self._end()
            self._registry = None  # a prompt that still runs is seen again by who looks later
            self._thread = None
            return True

    def _give_up(self) -> None:
        with self._lock:
            self.leases.clear()
            self._end()
            self._thread = None

    def _sample(self) -> None:
        sample = self.take()
        self._note({parts.name: parts for parts in sample.devices}, sample.running)
        if self._record is not None:
            self.read()
        number = self.history.add(sample)
        receivers = self.leases.receivers(time.monotonic())
        if receivers:
            self._send(number, sample, [event for _, event in self.events.ring.since(self._sent)], receivers)
        self._sent = number

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
            if registry is self._registry:
                return False
            if not self._is_running(registry.prompt_id):
                self._end()
                self._registry = registry  # it was over before it was seen
                self._note_failure(registry.prompt_id, time.time(), None)
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
        for before in [record for record in self.prompts if record.prompt_id == registry.prompt_id]:
            self.prompts.remove(before)
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
                counters, running = self._last_counters(), record.running()
                record.finish(time.time(), counters)
                self._note_end(record, counters, running)
                self.prompts.append(record)

    def running_record(self) -> PromptRecord | None:
        return self._record

    def record_of(self, prompt_id: str) -> PromptRecord | None:
        """Of a prompt that runs or was recorded lately."""
        records = [*self.prompts, self._record]
        return next((record for record in records if record and record.prompt_id == prompt_id), None)

    def events_of(self, record: PromptRecord) -> list[Event]:
        return self.events.between(record.started, record.ended or time.time())

    # ---- events ----------------------------------------------------------------------------------------------------

    def _note(self, failures: Mapping[str, Failures], node: str | None) -> None:
        self.events.note(time.time(), self._models.holdings(), failures, node)

    def _note_end(self, record: PromptRecord, failures: Mapping[str, Failures], node: str | None) -> None:
        """A record ends in any case, so that errors are only logged."""
        try:
            self._note(failures, node)
        except Exception:
            logger.debug("The end of a prompt could not be looked at.", exc_info=True)
        self._note_failure(record.prompt_id, record.started, record)

    def _note_failure(self, prompt_id: str, started: float, record: PromptRecord | None) -> None:
        try:
            found = self._out_of_memory(prompt_id)
            if found is not None:
                device = CPU if found.is_ram else main_device()
                node = record.stopped(found.node_id) if record is not None else None
                self.events.prompt_ran_out(started, time.time(), device, node or f"#{found.node_id}")
        except Exception:
            logger.debug("How a prompt ended could not be found out.", exc_info=True)

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
        counters = self._counted().read()
        if self._peaks is not None:
            for device, counter in counters.items():
                self._peaks[device] = max(counter.peak, self._peaks.get(device, 0))
        return counters


def _device(devices: tuple[DeviceParts, ...], name: str) -> DeviceParts:
    return next(parts for parts in devices if parts.name == name)
