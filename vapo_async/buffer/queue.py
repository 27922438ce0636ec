"""The tickets that are not trained on yet, in order of admission, and which of them are next."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from vapo_async.buffer.batch import TicketError
from vapo_async.buffer.budget import Choice, StalenessBudget, choose_batch
from vapo_async.schema import Ticket


@dataclass
class Entry:
    """A ticket in the queue. ``slot`` and ``oldest`` are set when it has its group."""

    ticket: Ticket
    slot: int | None = None  # where the group lies in the storage; None while it is being generated
    oldest: int = -1  # smallest policy_version among the generated tokens


class TicketQueue:
    """Running and ready tickets. No method but the iteration over all of it reads more than a batch needs.

    Args:
        budget: what admission and deadlines go by.
    """

    def __init__(self, budget: StalenessBudget) -> None:
        self._budget = budget
        # By ticket id. A plain dict would walk over the deleted entries at its front.
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._ready = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    @property
    def ready(self) -> int:
        """Tickets that have their group."""
        return self._ready

    def append(self, entry: Entry) -> None:
        """The newest ticket."""
        self._entries[entry.ticket.ticket_id] = entry
        self._ready += entry.slot is not None

    def finish(self, entry: Entry, slot: int, oldest: int) -> None:
        """A running ticket has its group."""
        entry.slot, entry.oldest = slot, oldest
        self._ready += 1

    def remove(self, entry: Entry) -> None:
        """A ticket that was refunded or taken."""
        del self._entries[entry.ticket.ticket_id]
        self._ready -= entry.slot is not None

    def running(self, ticket_id: int) -> Entry:
        """Raises ``TicketError`` if the ticket is not running."""
        entry = self._entries.get(ticket_id)
        if entry is None or entry.slot is not None:
            known = 0 <= ticket_id < self._budget.charged
            raise TicketError(
                f"ticket {ticket_id} has already ended: a ticket is committed or refunded exactly once"
                if known
                else f"ticket {ticket_id} was never given"
            )
        return entry

    def next_batch(self) -> list[Entry] | None:
        """The B oldest that have their group; None while there are fewer or a deadline forbids them."""
        positions = self._choose().positions
        return None if positions is None else self._at(positions)

    def straggler(self) -> Ticket | None:
        """The running ticket whose deadline forbids the batch; while fewer than B are ready, the oldest running one."""
        choice = self._choose()
        if choice.late is not None:
            return self._at([choice.late])[0].ticket
        if choice.positions is not None:
            return None
        return next((entry.ticket for entry in self if entry.slot is None), None)

    def _choose(self) -> Choice:
        """The batch as it stands; deadlines speak only once B groups are finished."""
        budget = self._budget
        if self._ready < budget.groups_per_batch:
            return Choice(None, None)
        states = ((entry.ticket.version, entry.slot is not None) for entry in self)
        return choose_batch(states, budget.groups_per_batch, budget.max_staleness, budget.published)

    def _at(self, positions: Sequence[int]) -> list[Entry]:
        first = list(islice(self, positions[-1] + 1))
        return [first[position] for position in positions]
