"""The staleness-bounded flow between collector and learner: see :mod:`vapo_async.buffer.buffer`."""

from vapo_async.buffer.batch import Batch, PublicationError, StalenessViolation, TicketError
from vapo_async.buffer.budget import StalenessBudget, choose_batch, plan_batch
from vapo_async.buffer.buffer import RolloutBuffer

__all__ = [
    "Batch",
    "PublicationError",
    "RolloutBuffer",
    "StalenessBudget",
    "StalenessViolation",
    "TicketError",
    "choose_batch",
    "plan_batch",
]
