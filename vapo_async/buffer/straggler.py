"""How long the learner has waited for one ticket: pure, the time is an argument."""

from vapo_async.schema import Ticket


class StragglerWatch:
    """Times the one ticket that is waited for; another one, or none, starts it anew.

    Args:
        timeout_s: seconds after which the ticket is overdue, above 0.

    Raises:
        ValueError: unless timeout_s > 0.
    """

    def __init__(self, timeout_s: float) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s > 0 does not hold: timeout_s={timeout_s}")
        self._timeout_s = timeout_s
        self._ticket_id: int | None = None
        self._due = 0.0  # on the caller's clock

    def overdue(self, ticket: Ticket | None, now: float) -> bool:
        """Whether ``ticket``, which is waited for at ``now`` (seconds of any steady clock), has been for too long."""
        if ticket is None:
            self.reset()
            return False
        if ticket.ticket_id != self._ticket_id:
            self._ticket_id, self._due = ticket.ticket_id, now + self._timeout_s
        return now >= self._due

    def remaining(self, now: float) -> float | None:
        """Seconds until the ticket seen last is overdue, at least 0; None if none is timed."""
        return None if self._ticket_id is None else max(0.0, self._due - now)

    def reset(self) -> None:
        """Times nobody: the learner waits no more, or what it waits for has come a step nearer."""
        self._ticket_id = None
