"""Which format each layer gets so that a model of a given size has the least error: pure arithmetic.

Errors of layers add up (they are independent and small), and so do bytes. What is left is a knapsack with one choice
per layer. On the lower convex hull of a layer's (bytes, error) points the error falls ever more slowly with each byte;
taking the steepest steps of all layers first, until the bytes are spent, is the best mix of hull points for the bytes
it takes (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988). What remains is
less than one step; it is spent on whatever single change still gains most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import SnugError
from ..memory.plan import size_text


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a layer. format: its name, "" for the layer as it is; nbytes: what it then takes, scales
    included; error: what it adds to the error of the whole, in any unit that adds up.
    """

    format: str
    nbytes: int
    error: float


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """One option of each layer: the least sum of errors found with at most `budget` bytes.

    Raises SnugError when even the smallest options take more.
    """
    hulls = {name: lower_hull(choices) for name, choices in options.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    spent = sum(option.nbytes for option in chosen.values())
    if spent > budget:
        raise SnugError(
            f"The layers take at least {size_text(spent)} in the smallest formats, but only "
            f"{size_text(max(budget, 0))} are left for them; allow a larger size or exclude fewer layers."
        )
    steps = [
        (_slope(hull[index], hull[index + 1]), name, index)
        for name, hull in hulls.items()
        for index in range(len(hull) - 1)
    ]
    # On a hull slopes only fall, so that this order never takes a layer's second step before its first.
    for _, name, index in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        if chosen[name] is not hulls[name][index]:
            continue  # a smaller step did not fit
        larger = hulls[name][index + 1]
        if spent - chosen[name].nbytes + larger.nbytes <= budget:
            spent += larger.nbytes - chosen[name].nbytes
            chosen[name] = larger
    _spend_the_rest(options, chosen, budget - spent)
    return chosen


def lower_hull(choices: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull, by bytes: each has less error than those before it.

    Raises SnugError when there are none.
    """
    if not choices:
        raise SnugError(
            "A layer without a format cannot be given one; this is a mistake in Snug, please report it."
        )
    hull: list[Option] = []
    for option in sorted(choices, key=lambda option: (option.nbytes, option.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(smaller: Option, larger: Option) -> float:
    """Error that a byte more takes away."""
    return (smaller.error - larger.error) / max(1, larger.nbytes - smaller.nbytes)


def _spend_the_rest(options: Mapping[str, Sequence[Option]], chosen: dict[str, Option], left: int) -> None:
    """Single changes that fit into the bytes left, the one that gains most first; `chosen` is changed."""
    while True:
        gains = [
            (chosen[name].error - option.error, name, option)
            for name, choices in options.items()
            for option in choices
            if option.nbytes - chosen[name].nbytes <= left and option.error < chosen[name].error
        ]
        if not gains:
            return
        _, name, option = max(gains, key=lambda gain: (gain[0], gain[1]))
        left -= option.nbytes - chosen[name].nbytes
        chosen[name] = option
