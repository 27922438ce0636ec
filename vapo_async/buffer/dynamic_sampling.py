"""DAPO's dynamic sampling (2503.14476, section 3.2, eq. 11): a batch holds only groups with 0 < correct responses < G.

A group that is all right or all wrong says nothing about which response was the better one. It is refunded instead of
committed, and the ticket that takes its place gets another prompt. Groups for value pretraining are not judged; one of
them that is overtaken may still reach the policy.
"""

from typing import Any

from tensordict import TensorDictBase

from vapo_async.config import RunError
from vapo_async.schema import CORRECT

ALL_RIGHT = "all right"
ALL_WRONG = "all wrong"


def rejection_reason(group: TensorDictBase) -> str | None:
    """``ALL_RIGHT`` or ``ALL_WRONG`` where the verifier judged all G responses alike, else None.

    Its word before any shaping: rewards differ by length even among responses that are all right.
    """
    verdicts = {bool(trajectory[CORRECT]) for trajectory in group.unbind(0)}
    if len(verdicts) > 1:
        return None
    return ALL_RIGHT if True in verdicts else ALL_WRONG


class DynamicSampling:
    """Which groups are refused, and when that has gone on for too long.

    Args:
        patience: groups that may be refused in a row.
        exempt: groups that are committed unjudged before the first one is judged: what value pretraining trains on.

    Raises:
        ValueError: unless patience >= 1 and exempt >= 0.
    """

    def __init__(self, patience: int, exempt: int = 0) -> None:
        if patience < 1 or exempt < 0:
            raise ValueError(f"patience >= 1 and exempt >= 0 do not hold: patience={patience}, exempt={exempt}")
        self._patience, self._exempt = patience, exempt
        self._in_a_row = {ALL_RIGHT: 0, ALL_WRONG: 0}

    @property
    def in_a_row(self) -> int:
        """Groups refused since the last one that was not, or since patience was lost; over resumes."""
        return sum(self._in_a_row.values())

    def judge(self, group: TensorDictBase, committed: int) -> str | None:
        """Why the group is refused, or None; changes nothing. ``committed``: groups committed so far, over resumes."""
        return None if committed < self._exempt else rejection_reason(group)

    def count(self, reason: str | None) -> None:
        """Records what became of a group: ``reason`` as :meth:`judge` gave it."""
        if reason is None:
            self._in_a_row = {ALL_RIGHT: 0, ALL_WRONG: 0}
        else:
            self._in_a_row[reason] += 1

    def check_patience(self) -> None:
        """Raises ``RunError`` once ``patience`` groups in a row were refused; the count then starts anew."""
        if self.in_a_row < self._patience:
            return
        right, wrong = self._in_a_row[ALL_RIGHT], self._in_a_row[ALL_WRONG]
        self._in_a_row = {ALL_RIGHT: 0, ALL_WRONG: 0}
        raise RunError(
            f"dynamic sampling refused {right + wrong} groups in a row, {right} all right and {wrong} all wrong: "
            f"train on {'harder' if right > wrong else 'easier'} problems, raise algorithm.group_size or "
            "algorithm.dynamic_sampling_patience, or set algorithm.dynamic_sampling=false"
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON data: the row."""
        return {"in_a_row": dict(self._in_a_row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave; patience and exemption are this run's."""
        self._in_a_row = {ALL_RIGHT: state["in_a_row"][ALL_RIGHT], ALL_WRONG: state["in_a_row"][ALL_WRONG]}
