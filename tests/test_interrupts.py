"""Real signals to this process: the first is polite, the second is not."""

import os
import signal

import pytest

from vapo_async.interrupts import Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    with Interrupts() as interrupts:
        assert not interrupts()
        os.kill(os.getpid(), number)
        assert interrupts()
    assert "stopping at the next safe moment" in capfd.readouterr().err


def test_the_second_signal_leaves_at_once_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
