"""How long the responses are that were generated, trained on, refused and dropped: whether a limit favours short ones.

A mean says little about a heavy tail, so each kind has a histogram: a time limit that cuts long answers shows as
buckets that are full under GENERATED or DROPPED and empty under TRAINED.
"""

from collections.abc import Iterable
from typing import Any

from vapo_async.metrics.flow_sums import Lengths

GENERATED = "generated"  # finished responses, also those that are refused or come too late
TRAINED = "trained"
REFUSED = "refused"  # by dynamic sampling
DROPPED = "dropped"  # of stragglers that were cancelled, with the tokens that they had; finished samples too
KINDS = (GENERATED, TRAINED, REFUSED, DROPPED)


def upper_bound(length: int) -> int:
    """The smallest power of two >= ``length``; 1 for a response that was cut before its first token."""
    return 1 << max(length - 1, 0).bit_length()


class LengthAudit:
    """Counts responses and tokens by kind, over the whole run, resumes included."""

    def __init__(self) -> None:
        self._counts = {kind: Lengths() for kind in KINDS}

    def add(self, kind: str, lengths: Iterable[int]) -> None:
        """Counts responses of ``lengths`` tokens. Raises ``KeyError`` if ``kind`` is not one of ``KINDS``."""
        before = self._counts[kind]
        histogram, responses, tokens = dict(before.histogram), before.responses, before.tokens
        for length in lengths:
            bound = upper_bound(length)
            histogram[bound] = histogram.get(bound, 0) + 1
            responses, tokens = responses + 1, tokens + length
        self._counts[kind] = Lengths(responses, tokens, histogram)

    def counts(self) -> dict[str, Lengths]:
        """By kind; every kind is there, histograms in order of their bounds."""
        return {
            kind: Lengths(found.responses, found.tokens, dict(sorted(found.histogram.items())))
            for kind, found in self._counts.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {kind: found.to_json() for kind, found in self._counts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave."""
        self._counts = {kind: Lengths.from_json(state[kind]) for kind in KINDS}
