"""What the learner has done: ages of the groups trained on, tokens, steps; checkpoints carry them as JSON."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


class AgeHistogram:
    """How old (in versions) the groups were that the learner took."""

    def __init__(self, counts: dict[int, int] | None = None) -> None:
        self._counts: Counter[int] = Counter(counts or {})

    def add(self, ages: Iterable[int]) -> None:
        """Counts one age per group; a negative age is a bug in the versions and refused."""
        ages = list(ages)
        if any(age < 0 for age in ages):
            raise ValueError(f"an age is the learner's version minus an older one and cannot be negative, found {ages}")
        self._counts.update(ages)

    @property
    def counts(self) -> dict[int, int]:
        """Age → groups, by age."""
        return dict(sorted(self._counts.items()))

    @property
    def total(self) -> int:
        """Groups counted."""
        return self._counts.total()

    @property
    def mean(self) -> float:
        """Mean age; 0 before the first group."""
        return sum(age * n for age, n in self._counts.items()) / self.total if self._counts else 0.0

    @property
    def max(self) -> int:
        """Oldest age; 0 before the first group."""
        return max(self._counts, default=0)

    def state_dict(self) -> dict[str, int]:
        """JSON-able: ages as strings."""
        return {str(age): n for age, n in self.counts.items()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Replaces the counts by saved ones."""
        self._counts = Counter({int(age): n for age, n in state.items()})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AgeHistogram) and self.counts == other.counts

    def __repr__(self) -> str:
        return f"AgeHistogram({self.counts})"


@dataclass
class RunTotals:
    """Sums over the whole run, resumed parts included."""

    trained_tokens: int = 0
    """Response tokens of the batches that the learner took, each counted once."""
    optimizer_steps: int = 0
    """Policy optimizer steps."""
    critic_steps: int = 0
    versions: int = 0
    """Publications."""
    value_pretraining_batches: int = 0
    policy_batches: int = 0
    wall_s: float = 0.0
    """Seconds of the parts of the run that ended; a resumed run adds its own."""
    ages: AgeHistogram = field(default_factory=AgeHistogram)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {name: value.state_dict() if name == "ages" else value for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces every count by the saved one; a missing or unknown name is an error."""
        if state.keys() != vars(self).keys():
            wrong = sorted(state.keys() ^ vars(self).keys())
            raise ValueError(f"saved run totals do not fit: {', '.join(wrong)} missing or unknown")
        for name, value in state.items():
            if name == "ages":
                self.ages.load_state_dict(value)
            else:
                setattr(self, name, value)
