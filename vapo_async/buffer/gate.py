"""The second gate: it must never fire."""

from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torchrl.envs.transforms import PolicyAgeFilter

from vapo_async.buffer.batch import StalenessViolation
from vapo_async.buffer.budget import StalenessBudget
from vapo_async.buffer.queue import Entry
from vapo_async.schema import POLICY_VERSION


class AgeGate:
    """TorchRL's filter over the oldest token of every group, against the live version."""

    def __init__(self, budget: StalenessBudget) -> None:
        self._budget = budget
        self._filter = PolicyAgeFilter(lambda: budget.published, budget.max_staleness, strict=True)

    def check(self, entries: Sequence[Entry]) -> None:
        """Raises ``StalenessViolation`` if one of the groups that are about to be taken is older than the bound."""
        oldest = torch.tensor([entry.oldest for entry in entries])
        if len(self._filter(TensorDict({POLICY_VERSION: oldest}, batch_size=[len(entries)]))) < len(entries):
            now, bound = self._budget.published, self._budget.max_staleness
            old = {e.ticket.ticket_id: now - e.oldest for e in entries if now - e.oldest > bound}
            raise StalenessViolation(f"older than max_staleness={bound} at version {now}: ages by ticket {old}")
