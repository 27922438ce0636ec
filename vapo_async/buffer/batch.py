"""What crosses the buffer's border: the batch, the errors, and the check of an incoming group."""

from dataclasses import dataclass

from tensordict import LazyStackedTensorDict, TensorDictBase

from vapo_async.schema import GROUP_ID, POLICY_VERSION, TICKET_ID, Ticket, check_trajectory, oldest_version


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
    for trajectory in trajectories:
        check_trajectory(trajectory)
    tickets = {int(t[TICKET_ID]) for t in trajectories}
    if tickets != {ticket.ticket_id}:
        raise ValueError(f"{who}: key '{TICKET_ID}' holds {sorted(tickets)}")
    prompts = {int(t[GROUP_ID]) for t in trajectories}
    if len(prompts) != 1:
        raise ValueError(f"{who}: key '{GROUP_ID}' holds {sorted(prompts)}, expected one prompt")
    oldest = oldest_version(group)
    if oldest < ticket.version:
        raise ValueError(
            f"{who}: key '{POLICY_VERSION}' goes back to version {oldest}, but it was admitted at version "
            f"{ticket.version}: its engine has to hold those weights before it starts"
        )
    return oldest
