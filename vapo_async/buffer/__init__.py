"""The staleness-bounded flow between collector and learner: see :mod:`vapo_async.buffer.buffer`."""

from vapo_async.buffer.batch import Batch, PublicationError, StalenessViolation, TicketError
from vapo_async.buffer.budget import Choice, StalenessBudget, choose_batch
from vapo_async.buffer.buffer import RolloutBuffer
from vapo_async.buffer.dynamic_sampling import ALL_RIGHT, ALL_WRONG, DynamicSampling

__all__ = [
    "ALL_RIGHT",
    "ALL_WRONG",
    "Batch",
    "Choice",
    "DynamicSampling",
    "PublicationError",
    "RolloutBuffer",
    "StalenessBudget",
    "StalenessViolation",
    "TicketError",
    "choose_batch",
]
