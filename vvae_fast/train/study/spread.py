"""A mean over seeds with its spread, and when a difference between models is clear."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

CLEAR = 2.0  # a mean difference is clear above so many standard deviations of the seeds' differences


class Spread(NamedTuple):
    """A mean over the seeds and the sample standard deviation, 0 for one seed."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)

    def text(self, digits: int = 2, sign: bool = False) -> str:
        return f"{self.mean:{'+' * sign}.{digits}f} ± {self.deviation:.{digits}f}"

    @property
    def is_clear(self) -> bool:
        return abs(self.mean) > CLEAR * self.deviation


def in_words(
    name: str, nlls: Sequence[float | None], vanilla: Sequence[float | None], other: str = "the vanilla VAE"
) -> str:
    """What a model gains over `other`, from both models' NLL in nats for the same seeds; None: no score.

    A seed without one of the two is left out. One seed says how large the difference is, and not whether it is clear.
    """
    pairs = [(x, y) for x, y in zip(nlls, vanilla, strict=True) if x is not None and y is not None]
    if not pairs:
        return f"{name}: not compared with {other}, no seed has a score of both"
    change = Spread.of([x - y for x, y in pairs])
    size = change._replace(mean=abs(change.mean)).text()
    of = f"{len(pairs)} seeds"
    if len(pairs) == 1:
        size, of = f"{abs(change.mean):.2f}", "one seed"
    elif not change.is_clear:
        return f"{name}: no clear difference from {other}, NLL {change.text(sign=True)} nats ({of})"
    return f"{name}: {size} nats {'better' if change.mean < 0 else 'worse'} than {other} in NLL ({of})"
