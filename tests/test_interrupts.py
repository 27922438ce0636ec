"""Real signals to this process: the first is polite, the second is not."""

import os
import signal

import pytest

from vapo_async.interrupts import Interrupted, Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_breaks_a_wait_and_only_a_wait(number: int) -> None:
    with Interrupts() as interrupts:
        os.kill(os.getpid(), number)
        assert interrupts.requested
        with pytest.raises(Interrupted), interrupts.raising():
            pass
    with Interrupts() as interrupts, pytest.raises(Interrupted), interrupts.raising():
        os.kill(os.getpid(), number)


def test_the_second_signal_leaves_at_once_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
