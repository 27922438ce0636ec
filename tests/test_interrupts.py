"""Real signals to this process: the first is polite, the second is not."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

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


def test_the_second_signal_ends_a_single_long_call_too() -> None:
    """Python's handlers wait for the call to return: minutes here. It lets other threads run, as torch does."""
    script = """
import hashlib, sys
from vapo_async.interrupts import Interrupts
with Interrupts():
    print("up", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**30)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "up\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n" and "stopping at the next safe moment" in process.stderr.readline()
    since = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 130
    assert time.monotonic() - since < 10, "not when the call returns"


def test_two_signals_that_python_takes_for_one_are_two(capfd: pytest.CaptureFixture[str]) -> None:
    """Both come during one call that does not return to the interpreter."""
    with Interrupts(), pytest.raises(KeyboardInterrupt):
        pid, number = os.getpid(), int(signal.SIGINT)
        both = threading.Thread(target=lambda: [(time.sleep(0.1), os.kill(pid, number)) for _ in range(2)])
        both.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 600_000)  # longer than it takes to send both
        both.join()
        time.sleep(5)
    assert capfd.readouterr().err.count("stopping at the next safe moment") == 1
