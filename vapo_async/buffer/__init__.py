"""The staleness-bounded flow between collector and learner: see :mod:`vapo_async.buffer.buffer`."""

from vapo_async.buffer.batch import Batch, PublicationError, StalenessViolation, TicketError
from vapo_async.buffer.budget import Choice, StalenessBudget, choose_batch
from vapo_async.buffer.buffer import RolloutBuffer
from vapo_async.buffer.counters import FlowCounters
from vapo_async.buffer.dynamic_sampling import ALL_RIGHT, ALL_WRONG, DynamicSampling
from vapo_async.buffer.lengths import DROPPED, GENERATED, REFUSED, TRAINED, LengthAudit, Lengths
from vapo_async.buffer.straggler import StragglerWatch

__all__ = [
    "ALL_RIGHT",
    "ALL_WRONG",
    "DROPPED",
    "GENERATED",
    "REFUSED",
    "TRAINED",
    "Batch",
    "Choice",
    "DynamicSampling",
    "FlowCounters",
    "LengthAudit",
    "Lengths",
    "PublicationError",
    "RolloutBuffer",
    "StalenessBudget",
    "StalenessViolation",
    "StragglerWatch",
    "TicketError",
    "choose_batch",
]
