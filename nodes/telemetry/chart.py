"""The picture of a prompt: memory over time, the nodes below it, and where the peak was. No ComfyUI, no torch."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ..adapter.fonts import fitting
from .record import NodeRecord, Point, PromptRecord
from .report import size_text

WIDTH, HEIGHT = 1024, 576
LEFT, RIGHT, TOP = 84, 24, 64
LANES, LANE = 5, 26
BOTTOM = 34
# A card of its own colour is readable on dark and on light pages.
CARD, GRID, TEXT, FAINT = "#1f242b", "#39414c", "#f2f4f7", "#a9b3c0"
PEAK = "#ffd166"
# From the bottom up: part, colour, whether it is hatched (so that colour is not all that tells them apart).
PARTS = (
    ("weights", "#4c9be8", 0),
    ("pages", "#7c83f0", 9),
    ("activations", "#e8894c", 0),
    ("cache", "#8a94a3", 14),
)
NODE_COLOURS = ("#2f6f9f", "#8a5a2b", "#3f7d58", "#7a4a86", "#87663a", "#3c6e78")
STOPPED = "#a83c3c"
TICKS = 5
SMALL = 14  # letters, in pixels
SHORTEST = 4  # letters of a title that is cut


def draw_timeline(record: PromptRecord, now: float) -> Image.Image:
    """RGB, WIDTH by HEIGHT, of what came after the start of the record's window."""
    return _Chart(record, now).draw()


class _Chart:
    def __init__(self, record: PromptRecord, now: float) -> None:
        self.points, self.nodes = record.points(), record.nodes()
        self.device = record.device
        self.peak_node = record.highest()
        self.start = record.window_started
        self.end = max(record.ended or now, self.start + 0.001)
        self.image = Image.new("RGB", (WIDTH, HEIGHT), CARD)
        self.canvas = ImageDraw.Draw(self.image)
        self.font, self.small = ImageFont.load_default(18), ImageFont.load_default(SMALL)
        self.floor = HEIGHT - BOTTOM - LANES * LANE - 10
        peak = self.peak_node.peak.get(self.device, 0) if self.peak_node else 0
        highest = max([peak, *(point.used + point.cache for point in self.points)], default=0)
        self.top_value = max(highest, 1) * 1.12

    def draw(self) -> Image.Image:
        self._grid()
        for offset, (_, colour, hatch) in enumerate(PARTS):
            self._area(offset, colour, hatch)
        self._lanes()
        self._peak()
        self._head()
        return self.image

    def _x(self, time: float) -> float:
        part = (time - self.start) / (self.end - self.start)
        return LEFT + min(max(part, 0.0), 1.0) * (WIDTH - LEFT - RIGHT)

    def _y(self, nbytes: float) -> float:
        return self.floor - nbytes / self.top_value * (self.floor - TOP)

    def _grid(self) -> None:
        for tick in range(TICKS + 1):
            value = self.top_value * tick / TICKS
            self.canvas.line((LEFT, self._y(value), WIDTH - RIGHT, self._y(value)), fill=GRID)
            self.canvas.text((LEFT - 8, self._y(value)), size_text(value), TEXT, self.small, anchor="rm")
            time = self.start + (self.end - self.start) * tick / TICKS
            place = "la" if tick == 0 else "ra" if tick == TICKS else "ma"
            text = f"{time - self.start:.3g} s"
            self.canvas.text((self._x(time), HEIGHT - BOTTOM + 8), text, FAINT, self.small, anchor=place)

    def _area(self, index: int, colour: str, hatch: int) -> None:
        """The part of this index on top of those before it."""
        if not self.points:
            return
        below = [self._sum(point, index) for point in self.points]
        above = [self._sum(point, index + 1) for point in self.points]
        if above == below:
            return
        times = [self._x(point.time) for point in self.points]
        # The first value also stands for the time before it, the last for that after it.
        times = [LEFT, *times, WIDTH - RIGHT]
        upper = [above[0], *above, above[-1]]
        lower = [below[0], *below, below[-1]]
        outline = [(x, self._y(y)) for x, y in zip(times, upper, strict=True)]
        outline += [(x, self._y(y)) for x, y in zip(reversed(times), reversed(lower), strict=True)]
        self.canvas.polygon(outline, fill=colour)
        if hatch:
            mask = Image.new("1", self.image.size)
            ImageDraw.Draw(mask).polygon(outline, fill=1)
            self._hatch(mask, hatch)

    def _hatch(self, mask: Image.Image, distance: int) -> None:
        lines = Image.new("1", self.image.size)
        canvas = ImageDraw.Draw(lines)
        for x in range(-HEIGHT, WIDTH, distance):
            canvas.line((x, HEIGHT, x + HEIGHT, 0), fill=1)
        both = Image.new("1", self.image.size)
        both.paste(lines, mask=mask)
        self.image.paste(CARD, mask=both)

    @staticmethod
    def _sum(point: Point, count: int) -> int:
        return sum(getattr(point, part) for part, _, _ in PARTS[:count])

    def _lanes(self) -> None:
        """A bar for each node, in the first lane that is free then; very short ones are at least visible."""
        free = [float("-inf")] * LANES
        shown: Sequence[NodeRecord] = sorted(self.nodes, key=lambda node: node.started)
        for number, node in enumerate(shown):
            first = self._x(node.started)
            last = max(self._x(node.ended or self.end), first + 2)
            lane = next((at for at in range(LANES) if free[at] <= first), None)
            if lane is None:
                continue
            y = self.floor + 10 + lane * LANE
            colour = STOPPED if node.state == "stopped" else NODE_COLOURS[number % len(NODE_COLOURS)]
            edge = PEAK if node is self.peak_node else None
            self.canvas.rectangle((first, y, last, y + LANE - 5), fill=colour, outline=edge)
            free[lane] = self._label(node, first, last, y)

    def _label(self, node: NodeRecord, first: float, last: float, y: float) -> float:
        """Inside the bar, or beside it where there is room, or cut; returns where the lane is free again."""
        middle = y + (LANE - 5) / 2
        text, font = fitting(node.title, SMALL)
        width, inside = self.canvas.textlength(text, font), last - first - 8
        if width > inside and last + 4 + width <= WIDTH - RIGHT:
            self.canvas.text((last + 4, middle), text, TEXT, font, anchor="lm")
            return last + width + 12
        while text and self.canvas.textlength(text, font) > inside:
            text = text[:-2] + "…" if len(text) > SHORTEST else ""
        self.canvas.text((first + 4, middle), text, TEXT, font, anchor="lm")
        return last + 1

    def _peak(self) -> None:
        node = self.peak_node
        if node is None:
            return
        nbytes = node.peak.get(self.device, 0)
        first, last = self._x(node.started), self._x(node.ended or self.end)
        y = self._y(nbytes)
        self.canvas.line((first, y, max(last, first + 2), y), fill=PEAK, width=3)
        middle = (first + last) / 2
        self.canvas.polygon([(middle, y - 2), (middle - 6, y - 12), (middle + 6, y - 12)], fill=PEAK)
        text, font = fitting(f"peak {size_text(nbytes)}: {node.title}", SMALL)
        half = self.canvas.textlength(text, font) / 2
        x = min(max(middle, LEFT + half), WIDTH - RIGHT - half)
        box = (x - half - 4, y - 32, x + half + 4, y - 13)
        self.canvas.rectangle(box, fill=CARD)
        self.canvas.text((x, y - 22), text, PEAK, font, anchor="mm")

    def _head(self) -> None:
        where = "RAM of ComfyUI" if self.device == "cpu" else f"Memory on {self.device}"
        self.canvas.text((LEFT, 14), where, TEXT, self.font)
        x = float(WIDTH - RIGHT)
        present = [entry for entry in PARTS if any(getattr(point, entry[0]) for point in self.points)]
        names = {"pages": "paged weights", "activations": "rest" if self.device == "cpu" else "activations"}
        for part, colour, hatch in reversed(present):
            name = names.get(part, part)
            x -= self.canvas.textlength(name, self.small)
            self.canvas.text((x, 17), name, TEXT, self.small)
            x -= 22
            box = (int(x), 17, int(x) + 16, 33)
            self.canvas.rectangle(box, fill=colour)
            if hatch:
                mask = Image.new("1", self.image.size)
                ImageDraw.Draw(mask).rectangle(box, fill=1)
                self._hatch(mask, hatch)
            x -= 18
