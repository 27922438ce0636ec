"""Runs a hypothesis state machine and counts the steps that were really made: it makes fewer than it is allowed."""

from typing import ClassVar

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, run_state_machine_as_test


class CountedMachine(RuleBasedStateMachine):
    """Counts executed rules over all examples, shrinking aside."""

    steps: ClassVar[int] = 0

    @invariant()
    def count(self) -> None:
        type(self).steps += 1


def run_machine(machine: type[CountedMachine], examples: int, least: int) -> None:
    """``examples`` runs of up to 200 rules; fails if they come to fewer than ``least`` steps."""
    machine.steps = -examples  # the invariant is looked at after the start too
    limits = settings(
        max_examples=examples, stateful_step_count=200, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(machine, settings=limits)
    print(f"{machine.__name__}: {machine.steps} steps")
    assert machine.steps >= least, f"{machine.steps} steps, {least} wanted: more examples are needed"
