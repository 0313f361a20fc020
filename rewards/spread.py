"""--reward-scale std: the running spread of each scorer's differences, by which they are divided (docs/method.md 3)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

EPOCHS = 10  # over which the mean runs


@dataclass(frozen=True)
class Spread:
    """The running mean, over epochs, of the squared deviation of each scorer's scores from the mean of their pair."""

    squares: dict[str, float] = field(default_factory=dict)  # by scorer
    epochs: dict[str, int] = field(default_factory=dict)  # that each scorer's mean holds

    def after(self, scores: Mapping[str, Sequence[float]]) -> "Spread":
        """Return the spread with one more epoch: scores [2P] of the whole job in global order, so that all ranks get the same.

        The first epochs count alike; later each counts 1 / EPOCHS. Pairs with a score that is not finite are left out, and a scorer
        without a finite pair stays as it was.
        """
        squares, epochs = dict(self.squares), dict(self.epochs)
        for name, values in scores.items():
            halves = [(one - two) / 2 for one, two in zip(values[::2], values[1::2], strict=True)]
            finite = [half * half for half in halves if math.isfinite(half)]
            if finite:
                epochs[name], before = epochs.get(name, 0) + 1, squares.get(name, 0.0)
                squares[name] = before + (math.fsum(finite) / len(finite) - before) / min(epochs[name], EPOCHS)
        return Spread(squares, epochs)

    def divide(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Return the weights divided by the spreads; a scorer that has told no pair apart yet keeps its weight."""
        return {name: weight / (self.of(name) or 1.0) for name, weight in weights.items()}

    def of(self, name: str) -> float:
        """Return a scorer's spread, in the scorer's own units; 0 if it has none yet."""
        return math.sqrt(self.squares.get(name, 0.0))
