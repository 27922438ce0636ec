"""What crosses the buffer's border: the batch, the errors, and the check of an incoming group."""

from dataclasses import dataclass

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase

from vapo_async.schema import (
    GROUP_ID,
    POLICY_VERSION,
    RESPONSE_MASK,
    TICKET_ID,
    Ticket,
    check_trajectories,
    oldest_of,
)


class TicketError(RuntimeError):
    """A ticket was ended twice, or was never given."""


class PublicationError(RuntimeError):
    """``take`` and ``publish`` have to alternate, beginning with ``take``."""


class StalenessViolation(RuntimeError):  # noqa: N818
    """The second gate fired: a group older than the bound was about to be trained on. A bug, never a user's mistake."""


@dataclass(frozen=True)
class Batch:
    """What one ``take`` gives."""

    groups: LazyStackedTensorDict
    """[B * G] trajectories, ragged in L, in order of ticket, then sample."""
    ages: list[int]
    """[B] versions: ``version`` − the smallest ``policy_version`` among the group's generated tokens."""
    version: int
    """Versions published at take."""
    tickets: list[int]
    """[B] ticket ids."""
    group_ids: list[int]
    """[B] which prompts."""


def check_group(ticket: Ticket, group: TensorDictBase, group_size: int) -> int:
    """The group's oldest version. Raises ``ValueError`` if it breaks the schema or is not the ticket's."""
    who, trajectories = f"ticket {ticket.ticket_id}", group.unbind(0)
    if len(trajectories) != group_size:
        raise ValueError(f"{who}: the group holds {len(trajectories)} trajectories, group_size={group_size}")
    columns = check_trajectories(trajectories)
    tickets = {*torch.stack(columns[TICKET_ID]).tolist()}
    if tickets != {ticket.ticket_id}:
        raise ValueError(f"{who}: key '{TICKET_ID}' holds {sorted(tickets)}")
    prompts = {*torch.stack(columns[GROUP_ID]).tolist()}
    if len(prompts) != 1:
        raise ValueError(f"{who}: key '{GROUP_ID}' holds {sorted(prompts)}, expected one prompt")
    oldest = oldest_of(columns[POLICY_VERSION], columns[RESPONSE_MASK])
    if oldest < ticket.version:
        raise ValueError(
            f"{who}: key '{POLICY_VERSION}' goes back to version {oldest}, but it was admitted at version "
            f"{ticket.version}: its engine has to hold those weights before it starts"
        )
    return oldest
