"""Makes value estimators known by name to TorchRL's losses."""

from collections.abc import Callable

from torchrl.objectives import A2CLoss, PPOLoss, ReinforceLoss
from torchrl.objectives.utils import register_value_estimator
from torchrl.objectives.value import ValueEstimatorBase

Estimator = type[ValueEstimatorBase]


def register_for_losses(name: str, **default_kwargs: float) -> Callable[[Estimator], Estimator]:
    """Class decorator: ``loss.make_value_estimator(name, ...)`` builds the class, in the losses that read an advantage.

    TorchRL's registry is open, but these losses also keep a list of what they accept: the name is added to it.
    """
    for loss in (PPOLoss, A2CLoss, ReinforceLoss):
        if name not in loss.SUPPORTED_VALUE_ESTIMATORS:
            loss.SUPPORTED_VALUE_ESTIMATORS = (*loss.SUPPORTED_VALUE_ESTIMATORS, name)
    register: Callable[[Estimator], Estimator] = register_value_estimator(name, default_kwargs=default_kwargs)
    return register
