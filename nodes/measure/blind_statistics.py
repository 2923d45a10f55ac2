"""How sure one can be that somebody tells two things apart: of n votes k were right."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Of the normal distribution, for an interval that holds the true share 95 times of 100.
Z_95 = 1.959963984540054
# A result below it is called one that guessing hardly gives; the usual bound.
UNLIKELY = 0.05


@dataclass(frozen=True, slots=True)
class Result:
    """right, wrong, undecided: votes; the undecided ones count in neither number.

    p_value: how often guessing is right at least so many times. low, high: 95% interval of the share of right votes.
    """

    right: int
    wrong: int
    undecided: int
    p_value: float
    low: float
    high: float

    @property
    def decided(self) -> int:
        return self.right + self.wrong

    def sentence(self, name: str) -> str:
        """Such as "You found Q4_K 14 of 20 times; by guessing this happens in 5.8% of tries."."""
        if not self.decided:
            return f"You could not tell {name} from the reference in any of {self.undecided} pairs."
        times = "time" if self.decided == 1 else "times"
        text = f"You found {name} {self.right} of {self.decided} {times}; "
        text += f"by guessing this happens in {percent(self.p_value)} of tries."
        if self.undecided:
            text += f" In {self.undecided} more you could not tell, which count for neither."
        return f"{text} {self.meaning()}"

    def meaning(self) -> str:
        share = (
            f"The true share of right votes lies between {percent(self.low)} and {percent(self.high)} (95%)."
        )
        if self.p_value < UNLIKELY:
            return f"{share} You can tell them apart."
        return f"{share} That you can tell them apart is not shown; more pairs would make it surer."


def evaluate(right: int, wrong: int, undecided: int) -> Result:
    low, high = wilson_interval(right, right + wrong)
    return Result(right, wrong, undecided, p_value(right, right + wrong), low, high)


def p_value(right: int, count: int) -> float:
    """P(X >= right) for X of a binomial distribution with `count` tries and chance 1/2: the exact one-sided test.

    Sums whole numbers, so nothing is rounded before the end. 1 for no votes.
    """
    return sum(math.comb(count, k) for k in range(right, count + 1)) / 2**count


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The score interval of Wilson (1927) for a share at 95%; (0, 1) for no votes."""
    if not count:
        return 0.0, 1.0
    share, square = right / count, Z_95**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = Z_95 / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def percent(share: float) -> str:
    """Such as "5.8%"; very small ones are not called 0."""
    if 0 < share < 0.0005:
        return "less than 0.1%"
    return f"{100 * share:.1f}%"
