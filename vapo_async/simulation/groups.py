"""The smallest groups that the real buffer takes: one response of one token, most tensors shared by all groups."""

import torch
from tensordict import LazyStackedTensorDict, TensorDict

from vapo_async import schema
from vapo_async.schema import FinishReason, Problem, Prompt, Response, Ticket


class GroupMaker:
    """Makes groups that differ in ticket and version only; a group of the simulation has its lengths elsewhere."""

    def __init__(self) -> None:
        prompt = Prompt(0, Problem(0, "", ""), "", ())
        response = Response(0, [0], [0.0], [0], FinishReason.STOP)
        trajectory = schema.make_trajectory(prompt, Ticket(0, 0), response)
        self._shared = {str(key): value for key, value in trajectory.items()}
        self._versions: list[torch.Tensor] = []

    def __call__(self, ticket_id: int, version: int) -> LazyStackedTensorDict:
        """A group of batch size [1] whose oldest token is of ``version``."""
        while len(self._versions) <= version:
            self._versions.append(torch.tensor([len(self._versions)], dtype=torch.int32))
        own = {schema.TICKET_ID: torch.tensor(ticket_id), schema.POLICY_VERSION: self._versions[version]}
        return schema.stack_group([TensorDict({**self._shared, **own})])
