"""The objectives: pure functions of tensors, and TorchRL modules around them."""

from vapo_async.objectives.estimators import LengthAdaptiveGAE
from vapo_async.objectives.group_estimator import GroupRelativeAdvantage
from vapo_async.objectives.vapo import VAPOLoss

__all__ = ["GroupRelativeAdvantage", "LengthAdaptiveGAE", "VAPOLoss"]
